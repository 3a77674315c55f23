//! Finding tokens that are matched as they are spelled, before any splitting or merging.

use aho_corasick::{AhoCorasick, MatchKind};

/// A piece of a text: a token spelled out in it, or what lies between two of them.
pub(super) enum Fragment<'a> {
    Text(&'a str),
    Token(u32),
}

/// Finds any of a set of spellings, the longest one where several begin at the same place.
pub(super) struct SpecialTokens {
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl SpecialTokens {
    pub fn new<'a>(tokens: impl Iterator<Item = (&'a str, u32)>) -> Result<SpecialTokens, String> {
        let (spellings, ids): (Vec<&str>, Vec<u32>) = tokens.filter(|(spelling, _)| !spelling.is_empty()).unzip();
        let automaton = if spellings.is_empty() {
            None
        } else {
            let built = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&spellings);
            Some(built.map_err(|e| format!("the special tokens cannot be searched for: {e}"))?)
        };
        Ok(SpecialTokens { automaton, ids })
    }

    /// Calls `each` with the fragments of `text`, in order, none of them empty.
    pub fn fragments<'a>(&self, text: &'a str, each: &mut impl FnMut(Fragment<'a>)) {
        let mut done = 0;
        for found in self.automaton.iter().flat_map(|a| a.find_iter(text)) {
            if found.start() > done {
                each(Fragment::Text(&text[done..found.start()]));
            }
            each(Fragment::Token(self.ids[found.pattern().as_usize()]));
            done = found.end();
        }
        if done < text.len() {
            each(Fragment::Text(&text[done..]));
        }
    }
}
