//! Which tokens may come next: drafts from the sequence's own past, and how many of them are worth checking.
//!
//! A draft costs rows in the step that checks it and saves steps where it was right. It never changes what is generated:
//! each row's token is drawn as it would be without drafts, and the rows after one that was not drafted are thrown away
//! (Leviathan et al. 2023, arXiv:2211.17192, with the draw fixed by the counter-based generator, so that acceptance is equality).
//!
//! Drafts are looked up (Saxena 2023, "Prompt Lookup Decoding"): where the sequence's last tokens occurred before, what
//! followed then may follow again. Of several such places the one whose past agrees longest is taken.

use std::collections::HashMap;

/// Tokens that must agree for a place to be looked at.
const MATCH_MIN: usize = 3;
/// Agreement beyond this counts no more.
const MATCH_MAX: usize = 32;
/// Places looked at, the latest first.
const PLACES_MAX: usize = 16;

/// Weight of the past in the acceptance estimate, a draft.
const MEMORY: f32 = 0.9;
/// With each token generated without a draft the estimate forgets a little, so that drafting is tried again some time.
const FORGETTING: f32 = 0.99;
/// What is assumed before anything is known: as if this many drafts had been checked,
const PRIOR_DRAFTS: f32 = 1.0;
/// and this share of them had been right.
const PRIOR_ACCEPTANCE: f32 = 0.6;

/// What drafting brings and costs in the coming step, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Payoff {
    /// Drafts there may be at most.
    pub(crate) most: usize,
    /// What one more token in this step is worth: the step's time divided among the tokens it yields anyway.
    pub(crate) token_worth: f32,
    /// What one more row costs.
    pub(crate) row_cost: f32,
}

/// Proposes drafts for one sequence and learns from what became of them.
#[derive(Debug, Default)]
pub(crate) struct Drafter {
    lookup: Lookup,
    acceptance: Acceptance,
}

impl Drafter {
    /// Appends to `draft` what may follow `tokens`.
    pub(crate) fn propose(&mut self, tokens: &[u32], payoff: Payoff, draft: &mut Vec<u32>) {
        self.lookup.extend(tokens);
        let most = self.acceptance.drafts_worth(payoff);
        self.lookup.propose(tokens, most, draft);
        if draft.is_empty() {
            self.acceptance.fade();
        }
    }

    /// Of `checked` drafts the first `accepted` were right.
    pub(crate) fn learn(&mut self, checked: usize, accepted: usize) {
        self.acceptance.learn(checked, accepted);
    }
}

/// How likely the next draft is to be right, given that those before it were.
#[derive(Debug, Default)]
struct Acceptance {
    checked: f32,
    accepted: f32,
}

impl Acceptance {
    fn probability(&self) -> f32 {
        (self.accepted + PRIOR_DRAFTS * PRIOR_ACCEPTANCE) / (self.checked + PRIOR_DRAFTS)
    }

    /// Drafts after the first wrong one say nothing.
    fn learn(&mut self, checked: usize, accepted: usize) {
        let tried = accepted + usize::from(accepted < checked);
        for draft in 0..tried {
            self.checked = self.checked * MEMORY + 1.0;
            self.accepted = self.accepted * MEMORY + f32::from(u8::from(draft < accepted));
        }
    }

    fn fade(&mut self) {
        self.checked *= FORGETTING;
        self.accepted *= FORGETTING;
    }

    /// The number of drafts `k` for which the tokens expected from them, p + p² + … + pᵏ, are worth most beyond the rows
    /// they cost. Each draft is worth less than the one before it, so it is the first that does not pay that ends it.
    fn drafts_worth(&self, payoff: Payoff) -> usize {
        let probability = self.probability();
        let mut expected = probability;
        (0..payoff.most)
            .take_while(|_| {
                let pays = expected * payoff.token_worth > payoff.row_cost;
                expected *= probability;
                pays
            })
            .count()
    }
}

/// Where each run of `MATCH_MIN` tokens occurs in a growing sequence: chains from the latest place back, as in
/// LZ77 match finders.
#[derive(Debug, Default)]
struct Lookup {
    /// The position after the latest occurrence.
    latest: HashMap<[u32; MATCH_MIN], u32>,
    /// For each position, the one that the same tokens led to before; 0 is none.
    before: Vec<u32>,
}

impl Lookup {
    /// Takes in tokens that are new since the last call, but for the last run: it is what is looked for.
    fn extend(&mut self, tokens: &[u32]) {
        self.before.reserve(tokens.len().saturating_sub(self.before.len()));
        while self.before.len() < tokens.len() {
            let position = self.before.len();
            let run = position.checked_sub(MATCH_MIN).and_then(|start| tokens[start..position].try_into().ok());
            let before = run.and_then(|run: [u32; MATCH_MIN]| self.latest.insert(run, position as u32));
            self.before.push(before.unwrap_or(0));
        }
    }

    /// Appends at most `most` tokens that followed the best place.
    fn propose(&self, tokens: &[u32], most: usize, out: &mut Vec<u32>) {
        let len = tokens.len();
        let Some(start) = len.checked_sub(MATCH_MIN).filter(|_| most > 0) else { return };
        let Ok(run) = <[u32; MATCH_MIN]>::try_from(&tokens[start..]) else { return };
        let mut place = self.latest.get(&run).map_or(0, |&place| place as usize);
        let mut best = (0, 0);
        for _ in 0..PLACES_MAX {
            if place == 0 {
                break;
            }
            let past = tokens[..place].iter().rev().zip(tokens.iter().rev()).take(MATCH_MAX);
            let agreeing = past.take_while(|(a, b)| a == b).count();
            if agreeing > best.0 {
                best = (agreeing, place);
            }
            if agreeing == MATCH_MAX {
                break;
            }
            place = self.before[place] as usize;
        }
        if best.0 > 0 {
            out.extend_from_slice(&tokens[best.1..len.min(best.1 + most)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FREE: Payoff = Payoff { most: 4, token_worth: 1.0, row_cost: 0.0 };

    fn proposed(tokens: &[u32], most: usize) -> Vec<u32> {
        let (mut lookup, mut out) = (Lookup::default(), Vec::new());
        lookup.extend(tokens);
        lookup.propose(tokens, most, &mut out);
        out
    }

    #[test]
    fn what_followed_before() {
        for (tokens, want) in [
            (&[1, 2, 3, 4, 5, 6, 1, 2, 3][..], &[4, 5, 6, 1][..]),
            (&[1, 2, 3, 4], &[]),
            (&[1, 2], &[]),
            // The latest place, where no other agrees longer,
            (&[1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], &[8, 1, 2, 3]),
            // and the one that agrees longest.
            (&[9, 1, 2, 3, 7, 5, 1, 2, 3, 8, 9, 1, 2, 3], &[7, 5, 1, 2]),
            // A run of equals goes on.
            (&[4, 4, 4, 4], &[4]),
            (&[4, 4, 4, 4, 4, 4], &[4]),
        ] {
            assert_eq!(proposed(tokens, 4), want, "{tokens:?}");
        }
    }

    #[test]
    fn drafting_stops_where_it_does_not_pay_and_is_tried_again() {
        let mut acceptance = Acceptance::default();
        assert_eq!(acceptance.drafts_worth(FREE), 4);
        let payoff = Payoff { most: 8, token_worth: 1.0, row_cost: 0.2 };
        assert_eq!(acceptance.drafts_worth(payoff), 3, "0.6, 0.36, 0.216 are above 0.2");
        for _ in 0..20 {
            acceptance.learn(4, 4);
        }
        assert_eq!(acceptance.drafts_worth(payoff), 8);
        for _ in 0..40 {
            acceptance.learn(4, 0);
        }
        assert_eq!(acceptance.drafts_worth(payoff), 0);
        let tokens_until_tried = (0..).take_while(|_| {
            acceptance.fade();
            acceptance.drafts_worth(payoff) == 0
        });
        assert!((50..400).contains(&tokens_until_tried.count()));
    }

    proptest! {
        /// The place found is one where the last tokens occurred before, and no latest ones agree longer.
        #[test]
        fn proposals_follow_an_earlier_occurrence(tokens in prop::collection::vec(0u32..3, 0..60), most in 1usize..6) {
            let found = proposed(&tokens, most);
            let len = tokens.len();
            let agreeing = |place: usize| {
                tokens[..place].iter().rev().zip(tokens.iter().rev()).take_while(|(a, b)| a == b).count()
            };
            let places: Vec<usize> = (1..len).filter(|&place| agreeing(place) >= MATCH_MIN).collect();
            let looked_at = places.iter().rev().take(PLACES_MAX);
            match looked_at.map(|&place| (agreeing(place).min(MATCH_MAX), place)).max() {
                None => prop_assert!(found.is_empty()),
                Some((longest, _)) => {
                    let follows = |&place: &usize| tokens[place..].starts_with(&found);
                    prop_assert!(!found.is_empty());
                    prop_assert!(places.iter().filter(|&&p| agreeing(p).min(MATCH_MAX) == longest).any(follows));
                }
            }
        }

        /// Growing token by token finds what building at once does.
        #[test]
        fn it_grows_as_it_is_built(tokens in prop::collection::vec(0u32..3, 0..40)) {
            let mut growing = Lookup::default();
            for len in 0..=tokens.len() {
                growing.extend(&tokens[..len]);
            }
            let mut out = Vec::new();
            growing.propose(&tokens, 5, &mut out);
            prop_assert_eq!(out, proposed(&tokens, 5));
        }
    }
}
