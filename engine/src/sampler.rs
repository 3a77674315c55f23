//! A logits row and a request's parameters → the next token; and log-probabilities of tokens.
//!
//! The order of operations is vLLM's: mask, bias, penalties, temperature, min_p, top_k, top_p, draw. Wherever tokens
//! are ranked the larger logit comes first and the lower id wins a tie, so every cut is exact and reproducible.

use std::collections::HashMap;

use rill_models::BestLogits;

use crate::constraint::TokenMask;
use crate::philox;
use crate::request::{SamplingParams, TokenLogprobs};
use crate::softmax::{RowError, exp_nonpositive, log_sum_exp_less, maximum, sum};

/// Below this the temperature counts as 0: the division would overflow before it changed the outcome.
const GREEDY_BELOW: f32 = 1e-5;

/// Weights summed per block, so that a draw over the vocabulary skips most of it.
const DRAW_BLOCK: usize = 256;

/// The tokens penalties look at: those generated with their counts, and those of the prompt.
#[derive(Debug, Default)]
pub struct TokenHistory {
    /// Times generated; 0 for a token that is in the prompt only.
    generated: HashMap<u32, u32>,
    tracked: bool,
}

impl TokenHistory {
    /// Keeps nothing if `params` has no penalty.
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> TokenHistory {
        let mut history = TokenHistory { generated: HashMap::new(), tracked: penalises(params) };
        if params.repetition_penalty != 1.0 {
            history.generated.extend(prompt.iter().map(|&token| (token, 0)));
        }
        history
    }

    pub fn push(&mut self, token: u32) {
        if self.tracked {
            *self.generated.entry(token).or_default() += 1;
        }
    }
}

fn is_greedy(params: &SamplingParams) -> bool {
    params.temperature < GREEDY_BELOW || params.top_k == 1
}

/// A logit's weight in a row whose largest is `max`, which weighs one.
fn weights(max: f32, params: &SamplingParams) -> impl Fn(f32) -> f32 + use<> {
    let per_temperature = 1.0 / params.temperature;
    move |logit| exp_nonpositive((logit - max) * per_temperature)
}

fn penalises(params: &SamplingParams) -> bool {
    params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 || params.repetition_penalty != 1.0
}

/// What of a row of logits decides which token is drawn from it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Deciding {
    /// So many of its largest, at least.
    pub count: usize,
    /// If they hold the nucleus, which shows when they are there.
    pub nucleus: Option<Nucleus>,
}

/// The tokens that make up a share of a row's mass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nucleus {
    pub top_p: f32,
    /// 1 / temperature, at which the mass is needed.
    pub rate: f32,
}

/// How many tokens are looked through for a nucleus.
const NUCLEUS_RANKED: usize = 64;

impl Deciding {
    /// Whether the best of a row do decide. A nucleus must end among them, and where it ends must not hang on how exactly the
    /// mass is known: then the token is the one that the whole row gives.
    pub fn by(&self, best: &BestLogits) -> bool {
        let Some(Nucleus { top_p, rate }) = self.nucleus else { return true };
        let (Some(&(_, max)), Some(&(_, last))) = (best.ranked.first(), best.ranked.last()) else { return true };
        if !best.finite {
            return true;
        }
        let weight = |logit: f32| exp_nonpositive((logit - max) * rate);
        // What is not there weighs no more than that, give or take a rounding.
        let rest = if best.ranked.len() < self.count { 0.0 } else { weight(last) * 1.00001 };
        let mass = f64::from(top_p) * f64::from(best.mass);
        let (least, most) = (mass * (1.0 - BestLogits::MASS_ERROR), mass * (1.0 + BestLogits::MASS_ERROR));
        let mut ranked = Vec::new();
        rank_weights(best, weight, &mut ranked);
        let mut kept = 0f64;
        for weight in ranked.into_iter().map(ranked_value) {
            kept += f64::from(weight);
            if kept >= least {
                return kept >= most && weight > rest;
            }
        }
        false
    }
}

/// Tokens that may not be chosen.
#[derive(Debug, Default, Clone, Copy)]
pub struct RuledOut<'a> {
    /// These, and
    pub tokens: &'a [u32],
    /// those it does not allow.
    pub mask: Option<&'a TokenMask>,
}

impl RuledOut<'_> {
    fn is_nothing(&self) -> bool {
        self.tokens.is_empty() && self.mask.is_none()
    }
}

/// Working memory for sampling, reused from token to token and sequence to sequence; carries no state over.
#[derive(Debug, Default)]
pub struct Sampler {
    adjusted: Vec<f32>,
    weights: Vec<f32>,
    block_sums: Vec<f64>,
    /// Ranked tokens: the value's order in the high half, the complement of the id in the low half.
    ranked: Vec<u64>,
}

impl Sampler {
    /// Chooses generated token number `index` among those `ruled` leaves.
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        history: &TokenHistory,
        ruled: RuledOut,
        index: u64,
    ) -> Result<u32, RowError> {
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let row = if ruled.is_nothing() && params.logit_bias.is_empty() && !penalises(params) {
            logits
        } else {
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            adjust(&mut adjusted, params, history, ruled);
            &adjusted
        };
        let token = self.choose(row, params, index);
        self.adjusted = adjusted;
        token
    }

    /// How many of the best tokens of a row of `vocab_size` decide what [`Sampler::sample`] chooses if nothing is ruled out;
    /// `None`: all of them.
    pub fn deciding(params: &SamplingParams, vocab_size: usize) -> Option<Deciding> {
        if penalises(params) || !params.logit_bias.is_empty() {
            return None;
        }
        let top_k = params.top_k as usize;
        if is_greedy(params) {
            Some(Deciding { count: 1, nucleus: None })
        } else if top_k > 0 && top_k < vocab_size {
            Some(Deciding { count: top_k, nucleus: None })
        } else if params.top_p < 1.0 && params.min_p == 0.0 {
            let nucleus = Nucleus { top_p: params.top_p, rate: 1.0 / params.temperature };
            Some(Deciding { count: NUCLEUS_RANKED.min(vocab_size), nucleus: Some(nucleus) })
        } else {
            None
        }
    }

    /// What [`Sampler::sample`] chooses, nothing being ruled out, from the best of a row, if [`Deciding::by`] says that they
    /// decide: at least as many as [`Sampler::deciding`] asks for, as far as there are so many.
    pub fn sample_best(
        &mut self,
        best: &BestLogits,
        params: &SamplingParams,
        index: u64,
    ) -> Result<u32, RowError> {
        if !best.finite {
            return Err(RowError::NotFinite);
        }
        let &(token, max) = best.ranked.first().ok_or(RowError::AllMasked)?;
        if is_greedy(params) {
            return Ok(token);
        }
        self.ranked.clear();
        let draw = philox::uniform(params.seed, index);
        // Asked for with a nucleus alone.
        if best.mass > 0.0 {
            rank_weights(best, weights(max, params), &mut self.ranked);
            self.weights.clear();
            self.weights.extend(self.ranked.iter().map(|&entry| ranked_value(entry)));
            return Ok(self.draw_ranked(params.top_p, Some(f64::from(best.mass)), draw));
        }
        self.ranked.extend(best.ranked.iter().take(params.top_k as usize).map(|&(id, value)| rank(value, id)));
        Ok(self.draw_top(max, params, draw))
    }

    /// Log-softmax of the raw `logits` at `token`, and the `top` most likely tokens, most likely first (fewer if the
    /// model rules out the rest).
    pub fn logprobs(&mut self, logits: &[f32], token: u32, top: usize) -> Result<TokenLogprobs, RowError> {
        let (max, _) = maximum(logits)?;
        let log_sum = log_sum_exp_less(logits, max);
        let logprob = |id: u32| {
            let logit = logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
            (f64::from(logit) - f64::from(max) - log_sum) as f32
        };
        self.rank_top(logits, top);
        let top = self.ranked.iter().map(|&entry| (ranked_id(entry), logprob(ranked_id(entry)))).collect();
        Ok(TokenLogprobs { token, logprob: logprob(token), top })
    }

    fn choose(&mut self, row: &[f32], params: &SamplingParams, index: u64) -> Result<u32, RowError> {
        let (max, best) = maximum(row)?;
        if is_greedy(params) {
            return Ok(best);
        }
        let weight = weights(max, params);
        let draw = philox::uniform(params.seed, index);
        if params.top_k > 0 && (params.top_k as usize) < row.len() {
            self.rank_top(row, params.top_k as usize);
            return Ok(self.draw_top(max, params, draw));
        }
        self.weights.clear();
        self.weights.extend(row.iter().map(|&logit| weight(logit)));
        if params.min_p > 0.0 {
            for weight in &mut self.weights {
                *weight = if *weight >= params.min_p { *weight } else { 0.0 };
            }
        }
        self.sum_blocks();
        let total: f64 = self.block_sums.iter().sum();
        if params.top_p < 1.0 {
            self.rank_nucleus(f64::from(params.top_p) * total);
            return Ok(self.draw_ranked(params.top_p, Some(total), draw));
        }
        Ok(self.draw_any(total, draw).unwrap_or(best))
    }

    /// Draws among the ranked tokens, the best of a row whose largest logit is `max`.
    fn draw_top(&mut self, max: f32, params: &SamplingParams, draw: f64) -> u32 {
        let weight = weights(max, params);
        self.weights.clear();
        self.weights.extend(self.ranked.iter().map(|&entry| weight(ranked_value(entry))));
        // min_p and top_p both cut the tail of the ranking; the best token always stays.
        let likely = self.weights.iter().take_while(|&&w| w >= params.min_p).count().max(1);
        self.weights.truncate(likely);
        self.draw_ranked(params.top_p, None, draw)
    }

    /// Leaves the `count` largest values of `row` in `ranked`, best first, leaving out minus infinity.
    fn rank_top(&mut self, row: &[f32], count: usize) {
        let ranked = &mut self.ranked;
        ranked.clear();
        if count == 0 {
            return;
        }
        // Collect what beats the threshold; whenever the buffer is full, cut it to the best and raise the threshold.
        let full = count.saturating_mul(4).clamp(256, row.len().max(256));
        let mut threshold = f32::NEG_INFINITY;
        for (id, &value) in row.iter().enumerate() {
            if value > threshold {
                ranked.push(rank(value, id as u32));
                if ranked.len() >= full && ranked.len() > count {
                    let (_, &mut last, _) = ranked.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
                    ranked.truncate(count);
                    threshold = row[ranked_id(last) as usize];
                }
            }
        }
        if ranked.len() > count {
            ranked.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
            ranked.truncate(count);
        }
        ranked.sort_unstable_by(|a, b| b.cmp(a));
    }

    /// Leaves the heaviest tokens in `ranked`, best first, and their weights in `weights`: at least as many as it
    /// takes to weigh `mass`.
    fn rank_nucleus(&mut self, mass: f64) {
        let mut threshold = 1.0f32 / 8.0;
        loop {
            self.ranked.clear();
            let mut gathered = 0f64;
            for (id, &weight) in self.weights.iter().enumerate() {
                if weight >= threshold && weight > 0.0 {
                    self.ranked.push(rank(weight, id as u32));
                    gathered += f64::from(weight);
                }
            }
            if gathered >= mass || threshold == 0.0 {
                break;
            }
            threshold = if threshold > 1e-9 { threshold / 16.0 } else { 0.0 };
        }
        self.ranked.sort_unstable_by(|a, b| b.cmp(a));
        // Ranked weights overwrite the table from its start; the ranking holds each value in full.
        self.weights.clear();
        self.weights.extend(self.ranked.iter().map(|&entry| ranked_value(entry)));
    }

    /// Draws among the ranked tokens, of which the fewest that reach `top_p` of `total` (by default, of their own
    /// sum) count.
    fn draw_ranked(&mut self, top_p: f32, total: Option<f64>, draw: f64) -> u32 {
        let total = total.unwrap_or_else(|| self.weights.iter().map(|&w| f64::from(w)).sum());
        let mass = f64::from(top_p) * total;
        let mut kept = 0f64;
        let mut count = 0;
        for &weight in &self.weights {
            kept += f64::from(weight);
            count += 1;
            if top_p < 1.0 && kept >= mass {
                break;
            }
        }
        let target = draw * kept;
        let mut reached = 0f64;
        let place = self.weights[..count].iter().position(|&weight| {
            reached += f64::from(weight);
            reached > target
        });
        ranked_id(self.ranked[place.unwrap_or(0)])
    }

    fn sum_blocks(&mut self) {
        self.block_sums.clear();
        self.block_sums.extend(self.weights.chunks(DRAW_BLOCK).map(sum));
    }

    /// Draws among all tokens by their weights, in order of id.
    fn draw_any(&self, total: f64, draw: f64) -> Option<u32> {
        let mut target = draw * total;
        let mut last = None;
        for (block, &weight) in self.block_sums.iter().enumerate() {
            if weight <= 0.0 {
                continue;
            }
            if target >= weight {
                target -= weight;
                last = Some(block);
                continue;
            }
            last = Some(block);
            break;
        }
        // Rounding can leave the target a hair beyond the end; the last token with any weight is meant then.
        let first = last? * DRAW_BLOCK;
        let mut heavy = None;
        for (offset, &weight) in self.weights[first..].iter().take(DRAW_BLOCK).enumerate() {
            if weight > 0.0 {
                heavy = Some((first + offset) as u32);
                target -= f64::from(weight);
                if target < 0.0 {
                    break;
                }
            }
        }
        heavy
    }
}

/// Fills `out` with the best of a row, heaviest first, ties by id.
fn rank_weights(best: &BestLogits, weight: impl Fn(f32) -> f32, out: &mut Vec<u64>) {
    out.clear();
    out.extend(best.ranked.iter().map(|&(id, value)| rank(weight(value), id)));
    out.sort_unstable_by(|a, b| b.cmp(a));
}

fn adjust(row: &mut [f32], params: &SamplingParams, history: &TokenHistory, ruled: RuledOut) {
    if let Some(mask) = ruled.mask {
        mask.apply(row);
    }
    for &token in ruled.tokens {
        if let Some(logit) = row.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = row.get_mut(token as usize) {
            *logit += bias;
        }
    }
    // Each token is touched once, so the map's order does not show.
    for (&token, &count) in &history.generated {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        if *logit > 0.0 {
            *logit /= params.repetition_penalty;
        } else {
            *logit *= params.repetition_penalty;
        }
        if count > 0 {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
}

/// An integer that orders as (value descending, id ascending) when sorted descending. `value` is not NaN.
fn rank(value: f32, id: u32) -> u64 {
    // Adding zero makes the two zeros one.
    let bits = (value + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!id)
}

fn ranked_id(rank: u64) -> u32 {
    !(rank as u32)
}

fn ranked_value(rank: u64) -> f32 {
    let ordered = (rank >> 32) as u32;
    f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn params() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 7,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
        }
    }

    fn none() -> TokenHistory {
        TokenHistory::default()
    }

    /// The tokens that may be drawn with their probabilities, by the textbook: sort everything, cut, renormalise.
    fn textbook(row: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
        let mut ranked: Vec<(u32, f64)> =
            row.iter().enumerate().map(|(id, &v)| (id as u32, f64::from(v / params.temperature))).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let max = ranked[0].1;
        ranked.iter_mut().for_each(|r| r.1 = (r.1 - max).exp());
        ranked.retain(|r| r.1 >= f64::from(params.min_p));
        if params.top_k > 0 {
            ranked.truncate(params.top_k as usize);
        }
        let total: f64 = ranked.iter().map(|r| r.1).sum();
        let mut kept = 0.0;
        let mut count = 0;
        for r in &ranked {
            kept += r.1;
            count += 1;
            if params.top_p < 1.0 && kept >= f64::from(params.top_p) * total {
                break;
            }
        }
        ranked.truncate(count);
        ranked.iter_mut().for_each(|r| r.1 /= kept);
        ranked
    }

    fn row(seed: u64, len: usize) -> Vec<f32> {
        (0..len).map(|i| (philox::uniform(seed, i as u64) * 12.0 - 6.0) as f32).collect()
    }

    #[test]
    fn frequencies_follow_the_textbook_distribution() {
        let row = row(3, 600);
        let base = params();
        for params in [
            base.clone(),
            SamplingParams { temperature: 0.6, top_p: 0.8, ..base.clone() },
            SamplingParams { top_k: 20, ..base.clone() },
            SamplingParams { top_k: 50, top_p: 0.5, ..base.clone() },
            SamplingParams { min_p: 0.2, ..base.clone() },
            SamplingParams { min_p: 0.1, top_k: 300, top_p: 0.9, temperature: 1.7, ..base.clone() },
        ] {
            let want = textbook(&row, &params);
            let draws = 40_000;
            let mut counts: HashMap<u32, u32> = HashMap::new();
            let mut sampler = Sampler::default();
            for index in 0..draws {
                *counts
                    .entry(sampler.sample(&row, &params, &none(), RuledOut::default(), index).unwrap())
                    .or_default() += 1;
            }
            for token in counts.keys() {
                assert!(want.iter().any(|w| w.0 == *token), "{token} should have been cut: {params:?}");
            }
            for (token, p) in want {
                let got = f64::from(*counts.get(&token).unwrap_or(&0)) / draws as f64;
                let sigma = (p * (1.0 - p) / draws as f64).sqrt();
                assert!((got - p).abs() < 5.0 * sigma + 1e-4, "{token}: {got} for {p}, {params:?}");
            }
        }
    }

    #[test]
    fn masks_bias_and_penalties() {
        let check = |change: &dyn Fn(&mut SamplingParams), masked: &[u32], generated: &[u32], want: u32| {
            let mut params = SamplingParams { temperature: 0.0, ..params() };
            change(&mut params);
            let mut history = TokenHistory::new(&params, &[3]);
            generated.iter().for_each(|&token| history.push(token));
            let logits = [1.0, 2.0, 3.0, 4.0, -1.0];
            let got = Sampler::default()
                .sample(&logits, &params, &history, RuledOut { tokens: masked, mask: None }, 0)
                .unwrap();
            assert_eq!(got, want, "{params:?}");
        };
        check(&|_| (), &[], &[], 3);
        check(&|_| (), &[3, 99], &[], 2);
        check(&|p| p.logit_bias = vec![(0, 5.0), (1 << 30, 1.0)], &[], &[], 0);
        check(&|p| p.logit_bias = vec![(3, -100.0)], &[], &[], 2);
        check(&|p| p.presence_penalty = 1.5, &[], &[3, 3], 2);
        check(&|p| p.presence_penalty = 0.9, &[], &[3, 3], 3);
        check(&|p| p.frequency_penalty = 0.6, &[], &[3, 3], 2);
        check(&|p| p.repetition_penalty = 2.0, &[], &[], 2);
        check(&|p| p.presence_penalty = 2.0, &[], &[], 3);
    }

    #[test]
    fn a_row_without_numbers_is_an_error() {
        let mut sampler = Sampler::default();
        assert_eq!(
            sampler.sample(&[0.0, f32::NAN], &params(), &none(), RuledOut::default(), 0),
            Err(RowError::NotFinite)
        );
        assert_eq!(
            sampler.sample(&[0.0, 1.0], &params(), &none(), RuledOut { tokens: &[0, 1], mask: None }, 0),
            Err(RowError::AllMasked)
        );
        assert_eq!(sampler.logprobs(&[f32::NAN], 0, 1), Err(RowError::NotFinite));
    }

    #[test]
    fn logprobs_are_of_the_raw_logits_and_rank_ties_by_id() {
        let logits = [1.0, 3.0, 3.0, f32::NEG_INFINITY, 2.0];
        let got = Sampler::default().logprobs(&logits, 4, 4).unwrap();
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 4, 0]);
        assert_eq!(got.logprob, got.top[2].1, "the same number wherever it appears");
        let sum: f64 = logits.iter().map(|&v| f64::from(v).exp()).sum();
        assert!((f64::from(got.logprob) - (2.0 - sum.ln())).abs() < 1e-6);
        assert_eq!(Sampler::default().logprobs(&logits, 3, 9).unwrap().top.len(), 4);
    }

    proptest! {
        #[test]
        fn ranks_like_a_full_sort(values in prop::collection::vec(-4i8..4, 1..900), count in 0usize..400) {
            let row: Vec<f32> = values.iter().map(|&v| if v == -4 { f32::NEG_INFINITY } else { f32::from(v) * 0.5 }).collect();
            let mut want: Vec<u32> = (0..row.len() as u32).filter(|&i| row[i as usize] > f32::NEG_INFINITY).collect();
            want.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
            want.truncate(count);
            let mut sampler = Sampler::default();
            sampler.rank_top(&row, count);
            prop_assert_eq!(sampler.ranked.iter().map(|&r| ranked_id(r)).collect::<Vec<_>>(), want);
        }

        #[test]
        fn the_best_of_a_row_decide_what_the_row_does(
            values in prop::collection::vec(-6i8..6, 1..900), top_k in prop_oneof![Just(0u32), 0u32..70],
            more in 0usize..20, greedy: bool,
            temperature in 0.1f32..3.0, top_p in 0.05f32..=1.0, min_p in prop_oneof![Just(0.0f32), 0.0f32..0.5],
            error in -1.0f32..1.0, spoilt in 0u8..8, seed: u64,
        ) {
            let mut row: Vec<f32> = values
                .iter()
                .map(|&v| match v {
                    -6 => f32::NEG_INFINITY,
                    5 => -0.0,
                    v => f32::from(v) * 0.5,
                })
                .collect();
            match spoilt {
                0 => row[0] = f32::NAN,
                1 => row[0] = f32::INFINITY,
                2 => row.fill(f32::NEG_INFINITY),
                _ => {}
            }
            let temperature = if greedy { 0.0 } else { temperature };
            let params = SamplingParams { top_k, top_p, min_p, temperature, seed, ..params() };
            let Some(deciding) = Sampler::deciding(&params, row.len()) else { return Ok(()) };
            let mut sampler = Sampler::default();
            let likely: Vec<f32> = row.iter().map(|v| if v.is_finite() { *v } else { f32::NEG_INFINITY }).collect();
            sampler.rank_top(&likely, deciding.count + more);
            let ranked = sampler.ranked.iter().map(|&r| (ranked_id(r), ranked_value(r))).collect();
            let finite = row.iter().all(|v| !v.is_nan() && *v != f32::INFINITY);
            let max = likely.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mass: f64 = likely.iter().map(|&v| f64::from((v - max) / temperature).exp()).sum();
            let off = 1.0 + f64::from(error) * BestLogits::MASS_ERROR * 0.9;
            let mass = if deciding.nucleus.is_some() { (mass * off) as f32 } else { 0.0 };
            let best = BestLogits { ranked, finite, mass };
            if !deciding.by(&best) {
                return Ok(());
            }
            let given = sampler.sample_best(&best, &params, 3);
            prop_assert_eq!(given, sampler.sample(&row, &params, &none(), RuledOut::default(), 3));
        }

        #[test]
        fn a_rank_keeps_its_value_and_id(value in -1e30f32..1e30, id: u32) {
            prop_assert_eq!((ranked_value(rank(value, id)), ranked_id(rank(value, id))), (value + 0.0, id));
        }

        #[test]
        fn only_tokens_the_textbook_keeps_are_drawn(
            seed: u64, len in 1usize..700, top_k in 0u32..40, top_p in 0.05f32..1.0, temperature in 0.1f32..3.0,
        ) {
            let params = SamplingParams { top_k, top_p, temperature, seed, ..params() };
            let row = row(seed, len);
            let kept = textbook(&row, &params);
            let token = Sampler::default().sample(&row, &params, &none(), RuledOut::default(), 0).unwrap();
            // A hair of rounding may move the nucleus' edge by one token.
            let near = textbook(&row, &SamplingParams { top_p: (top_p + 1e-5).min(1.0), ..params });
            prop_assert!(kept.iter().chain(&near).any(|k| k.0 == token));
        }
    }
}
