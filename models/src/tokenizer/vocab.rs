//! The token table of a GGUF file: spelling, kind and id of every token.

use std::collections::HashMap;

use crate::ModelError;
use crate::gguf::Metadata;

/// What a token is for (`tokenizer.ggml.token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// All tokens by id, and ids by spelling.
pub(super) struct Vocab {
    pub spellings: Vec<Box<str>>,
    pub kinds: Vec<TokenKind>,
    ids: HashMap<Box<str>, u32>,
    /// Bytes of the longest spelling.
    pub spelling_len_max: usize,
}

impl Vocab {
    pub fn from_gguf(metadata: &Metadata) -> Result<Vocab, ModelError> {
        let tokens = metadata.require_strings("tokenizer.ggml.tokens")?;
        if tokens.is_empty() {
            return Err(metadata.error("tokenizer.ggml.tokens is empty"));
        }
        let kinds = match metadata.ints("tokenizer.ggml.token_type")? {
            None => vec![TokenKind::Normal; tokens.len()],
            Some(kinds) if kinds.len() == tokens.len() => kinds.into_iter().map(kind).collect(),
            Some(kinds) => {
                return Err(metadata.error(format!(
                    "tokenizer.ggml.token_type has {} entries, tokenizer.ggml.tokens has {}",
                    kinds.len(),
                    tokens.len()
                )));
            }
        };
        let spellings: Vec<Box<str>> = tokens.iter().map(|t| t.as_str().into()).collect();
        let mut ids = HashMap::with_capacity(spellings.len());
        for (id, spelling) in spellings.iter().enumerate() {
            // Of two tokens spelled alike only the first can come out of a text.
            ids.entry(spelling.clone()).or_insert(id as u32);
        }
        let spelling_len_max = spellings.iter().map(|s| s.len()).max().unwrap_or(0);
        Ok(Vocab { spellings, kinds, ids, spelling_len_max })
    }

    pub fn len(&self) -> usize {
        self.spellings.len()
    }

    pub fn id(&self, spelling: &str) -> Option<u32> {
        self.ids.get(spelling).copied()
    }

    pub fn kind(&self, id: u32) -> TokenKind {
        self.kinds[id as usize]
    }

    /// The id of a token that text may turn into: never a control token, however it is spelled.
    pub fn text_id(&self, spelling: &str) -> Option<u32> {
        self.id(spelling)
            .filter(|&id| matches!(self.kind(id), TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused))
    }

    /// `scores` as `tokenizer.ggml.scores` must be: there, and one a token.
    pub fn scored(&self, metadata: &Metadata, scores: Option<Vec<f32>>) -> Result<Vec<f32>, ModelError> {
        let scores = scores.ok_or_else(|| metadata.error("metadata key tokenizer.ggml.scores is missing"))?;
        if scores.len() != self.len() {
            return Err(metadata.error(format!(
                "tokenizer.ggml.scores has {} entries, tokenizer.ggml.tokens has {}",
                scores.len(),
                self.len()
            )));
        }
        Ok(scores)
    }

    /// The token of a single byte, spelled `<0x0A>`.
    pub fn byte_id(&self, byte: u8) -> Option<u32> {
        self.id(&format!("<0x{byte:02X}>"))
    }

    /// Spellings and ids of the tokens of some kinds.
    pub fn of_kinds(&self, kinds: &[TokenKind]) -> impl Iterator<Item = (&str, u32)> {
        let tokens = self.spellings.iter().zip(&self.kinds).zip(0u32..);
        tokens.filter(|((_, kind), _)| kinds.contains(kind)).map(|((spelling, _), id)| (&**spelling, id))
    }
}

fn kind(code: i64) -> TokenKind {
    match code {
        2 => TokenKind::Unknown,
        3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        5 => TokenKind::Unused,
        6 => TokenKind::Byte,
        _ => TokenKind::Normal,
    }
}

/// The byte a token spelled `<0x0A>` stands for.
pub(super) fn spelled_byte(spelling: &str) -> Option<u8> {
    let hex = spelling.strip_prefix("<0x")?.strip_suffix('>')?;
    // from_str_radix takes a sign, which is no hexadecimal digit.
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}
