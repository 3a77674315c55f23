//! Text ↔ token ids, with each token's bytes at hand so that detokenising is a table look-up.

mod bpe;
mod byte_level;
mod chars_map;
mod from_gguf;
mod from_json;
mod merge;
mod pre_split;
mod special;
mod spm;
mod unigram;
mod vocab;
mod word_piece;

use from_gguf::GgufVocab;
use from_json::JsonTokenizer;

/// A vocabulary or tokenizer file could not be used, or a text could not be encoded.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TokenizerError(pub String);

/// A vocabulary with the rules that cut text into its tokens, plus a table of every token's bytes.
pub struct Tokenizer {
    backend: Backend,
    /// Bytes each id stands for when it follows another token.
    bytes: Vec<Box<[u8]>>,
    /// Control tokens: left out of text unless asked for.
    special: Vec<bool>,
    special_ids: SpecialIds,
    strips_leading_space: bool,
}

enum Backend {
    Gguf(Box<GgufVocab>),
    Json(Box<JsonTokenizer>),
}

#[derive(Debug, Default, Clone, Copy)]
struct SpecialIds {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
}

/// Positions in a text are 32 bits wide while it is merged; spelling a space can triple it.
const TEXT_LEN_MAX: usize = u32::MAX as usize / 4;

impl Tokenizer {
    /// Token ids of `text`. `add_special` adds what the model's own post-processor adds (BOS and the like);
    /// `parse_special` lets control tokens spelled out in `text` become those tokens.
    ///
    /// # Errors
    /// A text of a gigabyte or more, or one the model's own normaliser fails on.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > TEXT_LEN_MAX {
            return Err(TokenizerError(format!(
                "a text of {} bytes cannot be tokenized at once; at most {TEXT_LEN_MAX} can",
                text.len()
            )));
        }
        match &self.backend {
            Backend::Gguf(vocab) => vocab.encode(text, add_special, parse_special),
            Backend::Json(tokenizer) => tokenizer.encode(text, add_special, parse_special),
        }
    }

    /// The bytes `id` contributes to a text; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |b| b)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Number of ids the vocabulary defines: one more than the highest.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.backend {
            Backend::Gguf(vocab) => vocab.token_id(token),
            Backend::Json(tokenizer) => tokenizer.token_id(token),
        }
    }

    /// A token's exact spelling in the vocabulary; for control tokens that is what chat templates write.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        match &self.backend {
            Backend::Gguf(vocab) => vocab.token_text(id),
            Backend::Json(tokenizer) => tokenizer.token_text(id),
        }
    }

    /// Begins a text.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.special_ids.bos
    }

    /// Ends a text or a turn; [`crate::ModelConfig::eos_token_ids`] has all that do.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.special_ids.eos
    }

    /// Stands for what no token spells.
    pub fn unk_token_id(&self) -> Option<u32> {
        self.special_ids.unknown
    }

    /// Fills up batches in training.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.special_ids.padding
    }

    /// Whether a space at the very start of a decoded text is an artefact of the vocabulary and not text
    /// (SentencePiece and WordPiece spell the first word as if a space came before it).
    pub fn strips_leading_space(&self) -> bool {
        self.strips_leading_space
    }

    /// Text of `ids` in one go; the reference for incremental detokenising. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        let text = match bytes.strip_prefix(b" ") {
            Some(rest) if self.strips_leading_space => rest,
            _ => &bytes,
        };
        String::from_utf8_lossy(text).into_owned()
    }
}
