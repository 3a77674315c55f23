//! SentencePiece's byte-pair variant from a GGUF vocabulary: any two neighbours that spell a token may merge, best
//! score first.

use super::merge::{Merger, Merges, NONE, Symbol};
use super::vocab::Vocab;
use crate::ModelError;
use crate::gguf::Metadata;

/// SentencePiece's spelling of a space.
pub(super) const SPACE: char = '▁';

pub(super) struct SpmModel {
    /// A space goes before a text, and before what follows a special token.
    pub add_space_prefix: bool,
    /// Each token's place when sorted by falling score; equal scores share one.
    ranks: Vec<u32>,
    /// The token of each byte on its own, or that for the unknown, or [`NONE`].
    byte_ids: [u32; 256],
}

struct InText<'a> {
    model: &'a SpmModel,
    vocab: &'a Vocab,
    text: &'a str,
}

impl Merges for InText<'_> {
    fn join(&self, left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        let (start, len) = (left.start as usize, (left.len + right.len) as usize);
        // Also what keeps long texts linear: no look-up hashes more than the longest token.
        if len > self.vocab.spelling_len_max {
            return None;
        }
        let id = self.vocab.text_id(&self.text[start..start + len])?;
        Some((self.model.ranks[id as usize], id))
    }
}

impl SpmModel {
    pub fn from_gguf(metadata: &Metadata, vocab: &Vocab, unknown: Option<u32>) -> Result<SpmModel, ModelError> {
        let scores = match metadata.get("tokenizer.ggml.scores").and_then(|v| v.as_ints()) {
            Some(scores) => Some(scores.into_iter().map(|score| score as f32).collect()),
            None => metadata.floats("tokenizer.ggml.scores")?,
        };
        let scores = vocab.scored(metadata, scores)?;
        let mut order: Vec<u32> = (0..vocab.len() as u32).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
        let mut ranks = vec![0; vocab.len()];
        let mut rank = 0;
        for (place, &id) in order.iter().enumerate() {
            if place > 0 && scores[order[place - 1] as usize] != scores[id as usize] {
                rank += 1;
            }
            ranks[id as usize] = rank;
        }
        let mut byte_ids = [NONE; 256];
        for (byte, slot) in (0..=255u8).zip(&mut byte_ids) {
            *slot = vocab.byte_id(byte).or(unknown).unwrap_or(NONE);
        }
        Ok(SpmModel {
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
            ranks,
            byte_ids,
        })
    }

    /// Appends the tokens of `text`, which holds no special tokens and begins the text or follows a special token
    /// if `first`.
    pub fn encode(&self, vocab: &Vocab, text: &str, first: bool, merger: &mut Merger, ids: &mut Vec<u32>) {
        let mut spelled = String::with_capacity(text.len() + 3);
        if first && self.add_space_prefix {
            spelled.push(SPACE);
        }
        spelled.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        let mut single = [0; 4];
        merger.clear();
        for (at, c) in spelled.char_indices() {
            let id = vocab.text_id(c.encode_utf8(&mut single));
            merger.push(at as u32, c.len_utf8() as u32, id.unwrap_or(NONE));
        }
        let merges = InText { model: self, vocab, text: &spelled };
        for symbol in merger.run(&merges) {
            if symbol.id != NONE {
                ids.push(symbol.id);
                continue;
            }
            let start = symbol.start as usize;
            let bytes = spelled[start..start + symbol.len as usize].bytes();
            let fallback = bytes.map(|byte| self.byte_ids[usize::from(byte)]);
            ids.extend(fallback.filter(|&id| id != NONE));
        }
    }
}
