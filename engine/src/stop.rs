//! Stop strings: found across token boundaries, with text held back while it could still be the start of one.
//!
//! Definition on the whole text: of all occurrences of stop strings that end where ending counts (after
//! `min_tokens`), the one ending first wins, of those the longest, of those the first listed. "Ending first" rather
//! than "starting first" is what makes the result independent of how the text was cut into pieces: an occurrence
//! is known as soon as its last byte is.

/// An occurrence of stop string `index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopMatch {
    pub index: usize,
}

/// Scans text as it grows; linear in the text for each stop string.
#[derive(Debug)]
pub struct StopMatcher {
    automata: Vec<Automaton>,
    include_match: bool,
    /// The end of the text, not handed out yet: shorter than the longest stop string between calls.
    held: String,
}

impl StopMatcher {
    /// Empty strings are ignored: they would match everywhere.
    pub fn new(stop_strings: &[String], include_match: bool) -> StopMatcher {
        let automata = stop_strings
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .map(|(index, stop)| Automaton::new(index, stop.as_bytes()))
            .collect();
        StopMatcher { automata, include_match, held: String::new() }
    }

    /// Scans `text` and appends to `out` all text that can not become part of a match any more. `counts`: whether
    /// a match that ends in `text` counts. After a match the text is over: what precedes it (or it, too, if
    /// asked for) is in `out`, and nothing may be pushed any more.
    pub fn push(&mut self, text: &str, counts: bool, out: &mut String) -> Option<StopMatch> {
        if self.automata.is_empty() {
            out.push_str(text);
            return None;
        }
        let scanned = self.held.len();
        self.held.push_str(text);
        for (offset, &byte) in text.as_bytes().iter().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for automaton in &mut self.automata {
                if automaton.step(byte) && longest.is_none_or(|(len, _)| automaton.pattern.len() > len) {
                    longest = Some((automaton.pattern.len(), automaton.index));
                }
            }
            if counts && let Some((len, index)) = longest {
                let end = scanned + offset + 1;
                let shown = if self.include_match { end } else { end - len };
                out.push_str(&self.held[..shown]);
                self.held.clear();
                return Some(StopMatch { index });
            }
        }
        let hold = self.automata.iter().map(|a| a.matched).max().unwrap_or(0);
        let free = self.held.len() - hold;
        out.push_str(&self.held[..free]);
        self.held.drain(..free);
        None
    }

    /// The end of the text: nothing held back can become a match any more.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

/// Knuth-Morris-Pratt: `matched` is the length of the longest proper prefix of the pattern that the text ends with.
/// Patterns and text are whole characters, so such a prefix begins on a character boundary of the text.
#[derive(Debug)]
struct Automaton {
    index: usize,
    pattern: Box<[u8]>,
    /// Entry `n`: the longest proper prefix of the pattern that its first `n + 1` bytes end with.
    fallback: Box<[usize]>,
    matched: usize,
}

impl Automaton {
    fn new(index: usize, pattern: &[u8]) -> Automaton {
        let mut fallback = vec![0; pattern.len()];
        let mut matched = 0;
        for position in 1..pattern.len() {
            while matched > 0 && pattern[position] != pattern[matched] {
                matched = fallback[matched - 1];
            }
            matched += usize::from(pattern[position] == pattern[matched]);
            fallback[position] = matched;
        }
        Automaton { index, pattern: pattern.into(), fallback: fallback.into(), matched: 0 }
    }

    /// Whether the pattern ends with `byte`.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.pattern[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.pattern[self.matched] == byte);
        if self.matched == self.pattern.len() {
            self.matched = self.fallback[self.matched - 1];
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Each piece with whether a match ending in it counts.
    fn run(stops: &[&str], include: bool, pieces: &[(String, bool)]) -> (String, Option<usize>) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut matcher = StopMatcher::new(&stops, include);
        let mut out = String::new();
        for (piece, counts) in pieces {
            if let Some(found) = matcher.push(piece, *counts, &mut out) {
                return (out, Some(found.index));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    /// The definition, over the whole text.
    fn naive(stops: &[&str], include: bool, pieces: &[(String, bool)]) -> (String, Option<usize>) {
        let text: String = pieces.iter().map(|p| p.0.as_str()).collect();
        let mut counts_at = Vec::new();
        for (piece, counts) in pieces {
            counts_at.extend(std::iter::repeat_n(*counts, piece.len()));
        }
        for end in 1..=text.len() {
            if !counts_at[end - 1] || !text.is_char_boundary(end) {
                continue;
            }
            let here = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && text[..end].ends_with(**s));
            if let Some((index, stop)) = here.max_by_key(|(index, s)| (s.len(), usize::MAX - index)) {
                let shown = if include { end } else { end - stop.len() };
                return (text[..shown].to_string(), Some(index));
            }
        }
        (text, None)
    }

    #[test]
    fn holds_back_no_more_than_could_begin_a_stop_string() {
        let mut matcher = StopMatcher::new(&["END".into(), "\n\n".into()], false);
        let mut push = |text: &str| {
            let mut out = String::new();
            let found = matcher.push(text, true, &mut out);
            (out, found.map(|m| m.index))
        };
        assert_eq!(push("one E"), ("one ".into(), None));
        assert_eq!(push("N"), (String::new(), None));
        assert_eq!(push("E"), ("EN".into(), None));
        assert_eq!(push("x\n"), ("Ex".into(), None));
        assert_eq!(push("\nrest"), (String::new(), Some(1)));
    }

    #[test]
    fn the_match_that_ends_first_wins() {
        let piece = |text: &str| vec![(text.to_string(), true)];
        for (stops, text, want) in [
            (&["abcd", "bc"][..], "xabcdy", ("xa", Some(1))),
            (&["bc", "abc"], "xabcdy", ("x", Some(1))),
            (&["a", "a"], "xa", ("x", Some(0))),
            (&["", "b"], "ab", ("a", Some(1))),
            (&["aab"], "aaab", ("a", Some(0))),
            (&["é"], "caf\u{e9}!", ("caf", Some(0))),
            (&["zz"], "az", ("az", None)),
        ] {
            assert_eq!(run(stops, false, &piece(text)), (want.0.to_string(), want.1), "{stops:?} in {text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn agrees_with_the_definition_however_the_text_is_cut(
            stops in prop::collection::vec("[ab\u{e9}]{0,4}", 0..4),
            pieces in prop::collection::vec(("[ab\u{e9}]{0,4}", prop::bool::weighted(0.7)), 0..8),
            include: bool,
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, include, &pieces), naive(&stops, include, &pieces));
        }
    }
}
