//! SentencePiece's unigram vocabularies from a GGUF file (`t5`): of all ways to spell a text in tokens, the likeliest one
//! (Kudo 2018, arXiv:1804.10959), found from the beginning to the end.

use super::chars_map::CharsMap;
use super::spm::SPACE;
use super::vocab::{TokenKind, Vocab};
use crate::ModelError;
use crate::gguf::Metadata;

/// How much less likely than the least likely token a character is that no token spells.
const UNKNOWN_PENALTY: f64 = 10.0;

pub(super) struct UnigramModel {
    /// A space goes before a text, and before what follows a special token.
    pub add_space_prefix: bool,
    /// Runs of spaces count as one, and those at the ends as none.
    merges_spaces: bool,
    chars: Option<CharsMap>,
    /// Log-probabilities of tokens.
    scores: Vec<f64>,
    unknown: u32,
    unknown_score: f64,
    /// The token of each byte, where the vocabulary has all of them: for characters that no token spells.
    byte_ids: Option<Vec<u32>>,
}

/// The likeliest way to a place in the text.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    /// Its last token, and where that begins.
    id: u32,
    start: usize,
}

impl UnigramModel {
    pub fn from_gguf(
        metadata: &Metadata,
        vocab: &Vocab,
        unknown: Option<u32>,
    ) -> Result<UnigramModel, ModelError> {
        let scores = vocab.scored(metadata, metadata.floats("tokenizer.ggml.scores")?)?;
        let unknown =
            unknown.ok_or_else(|| metadata.error("metadata key tokenizer.ggml.unknown_token_id is missing"))?;
        let normal = scores.iter().zip(&vocab.kinds).filter(|(_, kind)| **kind == TokenKind::Normal);
        let least = normal.map(|(score, _)| f64::from(*score)).fold(f64::INFINITY, f64::min);
        let score = |(score, kind): (&f32, &TokenKind)| match kind {
            TokenKind::UserDefined => 0.0,
            _ => f64::from(*score),
        };
        let key = "tokenizer.ggml.precompiled_charsmap";
        let chars = match metadata.ints(key)? {
            Some(bytes) if !bytes.is_empty() => {
                let bytes: Vec<u8> = bytes.into_iter().map(|byte| byte as u8).collect();
                let chars = CharsMap::new(&bytes);
                Some(chars.ok_or_else(|| metadata.error(format!("metadata key {key} is no map of characters")))?)
            }
            _ => None,
        };
        Ok(UnigramModel {
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
            merges_spaces: metadata.bool("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false),
            chars,
            scores: scores.iter().zip(&vocab.kinds).map(score).collect(),
            unknown,
            unknown_score: least - UNKNOWN_PENALTY,
            byte_ids: (0..=255).map(|byte| vocab.byte_id(byte)).collect(),
        })
    }

    /// Appends the tokens of `text`, which holds no special tokens.
    pub fn encode(&self, vocab: &Vocab, text: &str, ids: &mut Vec<u32>) {
        let spelled = self.spell(text);
        let mut best = vec![Best { score: f64::NEG_INFINITY, id: self.unknown, start: 0 }; spelled.len() + 1];
        best[0].score = 0.0;
        for (start, first) in spelled.char_indices() {
            let so_far = best[start].score;
            let mut reach = |end: usize, id, score| {
                if so_far + score > best[end].score {
                    best[end] = Best { score: so_far + score, id, start };
                }
            };
            let after = start + first.len_utf8();
            let mut spelled_alone = false;
            let most = spelled.len().min(start + vocab.spelling_len_max);
            for end in (after..=most).filter(|&end| spelled.is_char_boundary(end)) {
                if let Some(id) = vocab.text_id(&spelled[start..end]) {
                    spelled_alone |= end == after;
                    reach(end, id, self.scores[id as usize]);
                }
            }
            if !spelled_alone {
                reach(after, self.unknown, self.unknown_score);
            }
        }
        let first_id = ids.len();
        let mut end = spelled.len();
        while end > 0 {
            let Best { id, start, .. } = best[end];
            match &self.byte_ids {
                Some(of_byte) if id == self.unknown => {
                    ids.extend(spelled[start..end].bytes().rev().map(|byte| of_byte[usize::from(byte)]));
                }
                // A run of what no token spells is one token.
                None if id == self.unknown && ids[first_id..].last() == Some(&id) => {}
                _ => ids.push(id),
            }
            end = start;
        }
        ids[first_id..].reverse();
    }

    /// The text with characters replaced as the vocabulary has it, and spaces as it spells them.
    fn spell(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len() + 3);
        if self.add_space_prefix && !self.merges_spaces && !text.is_empty() {
            out.push(SPACE);
        }
        let mut owed = self.add_space_prefix && self.merges_spaces;
        let mut take = |c: char| match c {
            ' ' if self.merges_spaces => owed |= !out.is_empty(),
            ' ' => out.push(SPACE),
            c => {
                if std::mem::take(&mut owed) {
                    out.push(SPACE);
                }
                out.push(c);
            }
        };
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            match self.chars.as_ref().and_then(|chars| chars.longest(rest)) {
                Some((len, replacement)) => {
                    replacement.chars().for_each(&mut take);
                    rest = &rest[len..];
                }
                None => {
                    take(c);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
        out
    }
}
