//! WordPiece from a GGUF vocabulary (`bert`): words, each cut into the longest pieces from its start.

use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::TokenizerError;
use super::vocab::Vocab;
use crate::ModelError;
use crate::gguf::Metadata;

/// Marks the piece that begins a word.
pub(super) const WORD_START: char = '▁';

pub(super) struct WordPieceModel {
    normalizer: BertNormalizer,
    unknown: u32,
}

impl WordPieceModel {
    pub fn from_gguf(metadata: &Metadata, unknown: Option<u32>) -> Result<WordPieceModel, ModelError> {
        let unknown =
            unknown.ok_or_else(|| metadata.error("metadata key tokenizer.ggml.unknown_token_id is missing"))?;
        let lowercase = metadata.bool("tokenizer.ggml.normalizer.lowercase")?.unwrap_or(true);
        let strip_accents = metadata.bool("tokenizer.ggml.normalizer.strip_accents")?;
        Ok(WordPieceModel { normalizer: BertNormalizer::new(true, true, strip_accents, lowercase), unknown })
    }

    /// Appends the tokens of `text`, which holds no special tokens.
    pub fn encode(&self, vocab: &Vocab, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let failed = |e: tokenizers::Error| TokenizerError(format!("the text cannot be split: {e}"));
        let mut normalized = NormalizedString::from(text);
        self.normalizer.normalize(&mut normalized).map_err(failed)?;
        let mut words = PreTokenizedString::from(normalized);
        BertPreTokenizer.pre_tokenize(&mut words).map_err(failed)?;
        for (word, ..) in words.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            let start = ids.len();
            let spelled = format!("{WORD_START}{word}");
            if !self.pieces(vocab, &spelled, ids) {
                ids.truncate(start);
                ids.push(self.unknown);
            }
        }
        Ok(())
    }

    /// Appends the pieces of a word; false if some of it is in no piece.
    fn pieces(&self, vocab: &Vocab, word: &str, ids: &mut Vec<u32>) -> bool {
        let mut start = 0;
        while start < word.len() {
            let most = word.len().min(start + vocab.spelling_len_max);
            let found = (start + 1..=most)
                .rev()
                .filter(|&end| word.is_char_boundary(end))
                .find_map(|end| Some((end, vocab.text_id(&word[start..end])?)));
            let Some((end, id)) = found else {
                return false;
            };
            ids.push(id);
            start = end;
        }
        true
    }
}
