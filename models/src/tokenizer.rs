//! Text ↔ token ids, with each token's bytes at hand so that detokenising is a table look-up.

/// A vocabulary or tokenizer file could not be used, or a text could not be encoded.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TokenizerError(pub String);

/// A `tokenizers` tokenizer plus a table of every token's bytes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes each id stands for when it follows another token.
    bytes: Vec<Box<[u8]>>,
    /// Control tokens: left out of text unless asked for.
    special: Vec<bool>,
}

impl Tokenizer {
    /// Token ids of `text`. `add_special` adds what the model's own post-processor adds (BOS and the like);
    /// `parse_special` lets control tokens spelled out in `text` become those tokens.
    pub fn encode(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let _ = (text, add_special, parse_special);
        unimplemented!()
    }

    /// The bytes `id` contributes to a text; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |b| b)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Number of ids the vocabulary defines.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Text of `ids` in one go; the reference for incremental detokenising.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let _ = (ids, skip_special);
        unimplemented!()
    }
}
