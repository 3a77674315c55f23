//! A tokenizer from tokenizer.json, run by the `tokenizers` crate; each token's bytes follow from its decoder.

use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedVocabulary, Encoding, Model, OffsetType, PreTokenizer, Token};

use super::vocab::spelled_byte;
use super::{Backend, SpecialIds, Tokenizer, TokenizerError, byte_level};

/// Stands for the text when asking the post-processor what it puts around one; no vocabulary is so large.
const MARKER: u32 = u32::MAX;

pub(super) struct JsonTokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens, set so that control tokens spelled in a text stay text.
    text_only: AddedVocabulary,
    spellings: Vec<Option<Box<str>>>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl Tokenizer {
    /// Reads a tokenizer.json; the names of its special tokens come from a tokenizer_config.json beside it, if any.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, or a decoder whose tokens have no bytes of their own, by name.
    pub fn from_json_file(path: &Path) -> Result<Tokenizer, TokenizerError> {
        let failed = TokenizerError;
        let json = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(|e| failed(e.to_string()))?;
        drop(json);
        // Both are for training-time batches; a prompt is neither cut nor padded.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| failed(e.to_string()))?;
        let decoding = Decoding::of(&inner).map_err(failed)?;
        let vocab = inner.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        // Ids may have gaps, but a corrupt file must not make the tables huge.
        if size > 2 * vocab.len() + 65_536 {
            return Err(failed(format!("the highest id is {}, with only {} tokens", size - 1, vocab.len())));
        }
        let added = inner.get_added_vocabulary();
        let mut spellings = vec![None; size];
        let mut bytes = vec![Box::default(); size];
        let mut special = vec![false; size];
        for (spelling, id) in vocab {
            let id = id as usize;
            special[id] = added.is_special_token(&spelling);
            bytes[id] = if special[id] { spelling.as_bytes().into() } else { decoding.bytes(&spelling) };
            spellings[id] = Some(spelling.into_boxed_str());
        }
        let mut text_only = added.clone();
        text_only.set_encode_special_tokens(true);
        let (prefix, suffix) = surroundings(&inner).map_err(failed)?;
        let special_ids = special_ids(&inner, &path.with_file_name("tokenizer_config.json"))?;
        Ok(Tokenizer {
            bytes,
            special,
            special_ids,
            strips_leading_space: decoding.strips_leading_space,
            backend: Backend::Json(Box::new(JsonTokenizer { inner, text_only, spellings, prefix, suffix })),
        })
    }
}

impl JsonTokenizer {
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let failed = |e: tokenizers::Error| TokenizerError(format!("the text cannot be tokenized: {e}"));
        let added = if parse_special { self.inner.get_added_vocabulary() } else { &self.text_only };
        let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = self.inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(failed)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        let text_ids = encoding.get_ids();
        let (prefix, suffix): (&[u32], &[u32]) =
            if add_special { (&self.prefix, &self.suffix) } else { (&[], &[]) };
        Ok([prefix, text_ids, suffix].concat())
    }

    pub fn token_id(&self, spelling: &str) -> Option<u32> {
        self.inner.token_to_id(spelling)
    }

    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.spellings.get(id as usize)?.as_deref()
    }
}

/// The ids the post-processor puts before and after a single text.
fn surroundings(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let text = Encoding::from_tokens(vec![Token::new(MARKER, String::new(), (0, 0))], 0);
    let processed = inner.post_process(text, None, true).map_err(|e| format!("the post-processor: {e}"))?;
    let ids = processed.get_ids();
    let middle = ids.iter().position(|&id| id == MARKER).ok_or("the post-processor drops the text")?;
    Ok((ids[..middle].to_vec(), ids[middle + 1..].to_vec()))
}

/// How a spelling becomes bytes.
#[derive(Default)]
struct Decoding {
    byte_level: bool,
    byte_fallback: bool,
    /// A spelling of space.
    space: Option<String>,
    /// Pieces with this before them continue a word; others begin one.
    continuation: Option<String>,
    /// Ends a word, and is a space.
    word_end: Option<String>,
    strips_leading_space: bool,
}

impl Decoding {
    fn of(inner: &tokenizers::Tokenizer) -> Result<Decoding, String> {
        let json = |part: serde_json::Result<Value>| part.map_err(|e| e.to_string());
        let mut decoding = Decoding::default();
        match inner.get_decoder() {
            Some(decoder) => decoding.add(&json(serde_json::to_value(decoder))?)?,
            None => {
                let pre_tokenizer = json(serde_json::to_value(inner.get_pre_tokenizer()))?;
                if !mentions(&pre_tokenizer, "ByteLevel") {
                    return Err("has no decoder, so its tokens cannot be turned into text".to_owned());
                }
                decoding.byte_level = true;
            }
        }
        Ok(decoding)
    }

    fn add(&mut self, decoder: &Value) -> Result<(), String> {
        let text = |key: &str| decoder[key].as_str().map(str::to_owned);
        match decoder["type"].as_str().unwrap_or_default() {
            "Sequence" => {
                for part in decoder["decoders"].as_array().into_iter().flatten() {
                    self.add(part)?;
                }
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" if decoder["content"] == " " && decoder["pattern"]["String"].is_string() => {
                self.space = decoder["pattern"]["String"].as_str().map(str::to_owned);
            }
            "Metaspace" => {
                self.space = text("replacement");
                self.strips_leading_space = decoder["prepend_scheme"] != "never";
            }
            "Strip" if decoder["content"] == " " && decoder["stop"] == 0 => {
                self.strips_leading_space = decoder["start"].as_u64() > Some(0);
            }
            "WordPiece" => {
                self.continuation = text("prefix");
                self.strips_leading_space = true;
            }
            "BPEDecoder" => self.word_end = text("suffix"),
            _ => return Err(format!("its decoder is not supported: {decoder}")),
        }
        Ok(())
    }

    fn bytes(&self, spelling: &str) -> Box<[u8]> {
        if self.byte_level {
            let bytes = byte_level::bytes_of(spelling);
            return bytes.map_or_else(|| spelling.as_bytes().into(), Into::into);
        }
        if self.byte_fallback
            && let Some(byte) = spelled_byte(spelling)
        {
            return Box::new([byte]);
        }
        let text = if let Some(prefix) = &self.continuation {
            match spelling.strip_prefix(prefix.as_str()) {
                Some(rest) => rest.to_owned(),
                None => format!(" {spelling}"),
            }
        } else if let Some(space) = self.space.as_ref().or(self.word_end.as_ref()) {
            spelling.replace(space.as_str(), " ")
        } else {
            spelling.to_owned()
        };
        text.into_bytes().into()
    }
}

/// Whether a part of a tokenizer.json is, or holds, one of this type.
fn mentions(part: &Value, kind: &str) -> bool {
    match part {
        Value::Object(fields) => part["type"] == kind || fields.values().any(|value| mentions(value, kind)),
        Value::Array(parts) => parts.iter().any(|value| mentions(value, kind)),
        _ => false,
    }
}

/// The special tokens a tokenizer_config.json names; none if there is no such file.
fn special_ids(inner: &tokenizers::Tokenizer, path: &Path) -> Result<SpecialIds, TokenizerError> {
    if !path.is_file() {
        return Ok(SpecialIds::default());
    }
    let failed = |reason: String| TokenizerError(format!("{}: {reason}", path.display()));
    let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
    let config: Value = serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))?;
    let id = |key: &str| {
        let token = config[key].as_str().or(config[key]["content"].as_str())?;
        inner.token_to_id(token)
    };
    Ok(SpecialIds {
        bos: id("bos_token"),
        eos: id("eos_token"),
        unknown: id("unk_token"),
        padding: id("pad_token"),
    })
}
