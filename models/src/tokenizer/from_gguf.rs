//! A tokenizer from the vocabulary inside a GGUF file, with the rules llama.cpp applies to each kind.
//!
//! Byte-level merging is the `tokenizers` crate's. The rest runs here because that cannot express it exactly:
//! SentencePiece merges rank by score with ties from the left, control tokens spelled in plain text must stay text,
//! and patterns must not backtrack on hostile input.

use super::bpe::BpeModel;
use super::merge::Merger;
use super::special::{Fragment, SpecialTokens};
use super::spm::{self, SpmModel};
use super::unigram::UnigramModel;
use super::vocab::{TokenKind, Vocab, spelled_byte};
use super::word_piece::{self, WordPieceModel};
use super::{Backend, SpecialIds, Tokenizer, TokenizerError, byte_level};
use crate::ModelError;
use crate::gguf::{GgufFile, Metadata};

enum Algorithm {
    Bpe(Box<BpeModel>),
    Spm(Box<SpmModel>),
    Unigram(Box<UnigramModel>),
    WordPiece(WordPieceModel),
}

/// A vocabulary, how text becomes its tokens, and what goes around a text.
pub(super) struct GgufVocab {
    vocab: Vocab,
    algorithm: Algorithm,
    /// Everything matched as spelled, where control tokens in a text count as such.
    all_specials: SpecialTokens,
    /// The same, where they do not.
    text_specials: SpecialTokens,
    prefix: Option<u32>,
    suffix: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer a GGUF file describes.
    ///
    /// # Errors
    /// A missing or malformed `tokenizer.ggml.*` key, or a kind of vocabulary or word splitting that is not
    /// supported, each by name.
    pub fn from_gguf(file: &GgufFile) -> Result<Tokenizer, TokenizerError> {
        build(file.metadata()).map_err(|error| match error {
            // The caller knows the path.
            ModelError::Format { reason, .. } => TokenizerError(reason),
            other => TokenizerError(other.to_string()),
        })
    }
}

fn build(metadata: &Metadata) -> Result<Tokenizer, ModelError> {
    let model = metadata.require_str("tokenizer.ggml.model")?;
    let vocab = Vocab::from_gguf(metadata)?;
    // What old files of a kind leave unsaid.
    let (bos, eos, unknown, separator) = match model {
        "llama" => (Some(1), Some(2), Some(0), None),
        "t5" => (None, Some(1), Some(2), None),
        "bert" => (Some(101), None, Some(100), Some(102)),
        _ => (None, None, None, None),
    };
    let id = |key: &str, default: Option<u32>| -> Result<Option<u32>, ModelError> {
        let id = metadata.u32(&format!("tokenizer.ggml.{key}"))?.or(default);
        match id {
            Some(id) if id as usize >= vocab.len() => {
                tracing::warn!("tokenizer.ggml.{key} is {id}, outside the vocabulary of {}; ignored", vocab.len());
                Ok(None)
            }
            id => Ok(id),
        }
    };
    let special = SpecialIds {
        bos: id("bos_token_id", bos)?,
        eos: id("eos_token_id", eos)?,
        unknown: id("unknown_token_id", unknown)?,
        padding: id("padding_token_id", None)?,
    };
    let separator = id("seperator_token_id", separator)?; // the key is spelled so
    let (algorithm, add_bos, end) = match model {
        "gpt2" => {
            let bpe = BpeModel::from_gguf(metadata, &vocab)?;
            let add_bos = bpe.add_bos();
            (Algorithm::Bpe(Box::new(bpe)), add_bos, special.eos)
        }
        "llama" => {
            let spm = SpmModel::from_gguf(metadata, &vocab, special.unknown)?;
            (Algorithm::Spm(Box::new(spm)), true, special.eos)
        }
        "t5" => {
            let unigram = UnigramModel::from_gguf(metadata, &vocab, special.unknown)?;
            (Algorithm::Unigram(Box::new(unigram)), false, special.eos)
        }
        "bert" => {
            let word_piece = WordPieceModel::from_gguf(metadata, special.unknown)?;
            (Algorithm::WordPiece(word_piece), true, separator)
        }
        other => {
            return Err(ModelError::Unsupported(format!(
                "tokenizer.ggml.model is {other:?}, a kind of vocabulary that is not supported; gpt2, llama, t5 and bert are"
            )));
        }
    };
    let flag = |key: &str, default: bool, token: Option<u32>, token_key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        match (metadata.bool(&key)?.unwrap_or(default), token) {
            (false, _) => Ok(None),
            (true, Some(token)) => Ok(Some(token)),
            (true, None) => {
                Err(metadata.error(format!("{key} is true, but tokenizer.ggml.{token_key} is missing")))
            }
        }
    };
    let prefix = flag("add_bos_token", add_bos, special.bos, "bos_token_id")?;
    let suffix = match &algorithm {
        Algorithm::WordPiece(_) => flag("add_sep_token", true, end, "seperator_token_id")?,
        _ => flag("add_eos_token", model == "t5", end, "eos_token_id")?,
    };
    let bytes = (0..vocab.len() as u32).map(|id| token_bytes(&vocab, &algorithm, id)).collect();
    let special_flags =
        vocab.kinds.iter().map(|kind| matches!(kind, TokenKind::Control | TokenKind::Unknown)).collect();
    let specials =
        |kinds: &[TokenKind]| SpecialTokens::new(vocab.of_kinds(kinds)).map_err(|reason| metadata.error(reason));
    let all_specials = specials(&[TokenKind::Control, TokenKind::Unknown, TokenKind::UserDefined])?;
    let text_specials = specials(&[TokenKind::UserDefined])?;
    let strips_leading_space = match &algorithm {
        Algorithm::Bpe(_) => false,
        Algorithm::Spm(model) => model.add_space_prefix,
        Algorithm::Unigram(model) => model.add_space_prefix,
        Algorithm::WordPiece(_) => true,
    };
    Ok(Tokenizer {
        bytes,
        special: special_flags,
        special_ids: special,
        strips_leading_space,
        backend: Backend::Gguf(Box::new(GgufVocab {
            vocab,
            algorithm,
            all_specials,
            text_specials,
            prefix,
            suffix,
        })),
    })
}

fn token_bytes(vocab: &Vocab, algorithm: &Algorithm, id: u32) -> Box<[u8]> {
    let spelling = &*vocab.spellings[id as usize];
    let literal = || spelling.as_bytes().into();
    match (vocab.kind(id), algorithm) {
        (TokenKind::Byte, _) => match spelled_byte(spelling) {
            Some(byte) => Box::new([byte]),
            None => literal(),
        },
        (TokenKind::Normal, Algorithm::Bpe(_)) => match byte_level::bytes_of(spelling) {
            Some(bytes) => bytes.into(),
            None => literal(),
        },
        (TokenKind::Normal, Algorithm::Spm(_) | Algorithm::Unigram(_)) => {
            spelling.replace(spm::SPACE, " ").into_bytes().into()
        }
        (TokenKind::Normal, Algorithm::WordPiece(_)) => {
            spelling.replace(word_piece::WORD_START, " ").into_bytes().into()
        }
        _ => literal(),
    }
}

impl GgufVocab {
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let specials = if parse_special { &self.all_specials } else { &self.text_specials };
        let mut ids = Vec::with_capacity(text.len() / 4 + 2);
        let mut merger = Merger::default();
        let mut first = true;
        let mut outcome = Ok(());
        if add_special {
            ids.extend(self.prefix);
        }
        specials.fragments(text, &mut |fragment| match fragment {
            Fragment::Token(id) => {
                ids.push(id);
                first = true;
            }
            Fragment::Text(text) => {
                let encoded = match &self.algorithm {
                    Algorithm::Bpe(bpe) => bpe.encode(text, &mut ids),
                    Algorithm::Spm(spm) => {
                        spm.encode(&self.vocab, text, first, &mut merger, &mut ids);
                        Ok(())
                    }
                    Algorithm::Unigram(unigram) => {
                        unigram.encode(&self.vocab, text, &mut ids);
                        Ok(())
                    }
                    Algorithm::WordPiece(model) => model.encode(&self.vocab, text, &mut ids),
                };
                outcome = std::mem::replace(&mut outcome, Ok(())).and(encoded);
                first = false;
            }
        });
        if add_special {
            ids.extend(self.suffix);
        }
        outcome.map(|()| ids)
    }

    pub fn token_id(&self, spelling: &str) -> Option<u32> {
        self.vocab.id(spelling)
    }

    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.vocab.spellings.get(id as usize).map(|s| &**s)
    }
}
