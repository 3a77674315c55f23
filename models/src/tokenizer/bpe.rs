//! Byte-level byte-pair encoding from a GGUF vocabulary: its tokens and merges as a `tokenizers` model.

use std::collections::HashSet;

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as Spellings};

use super::TokenizerError;
use super::byte_level;
use super::pre_split::PreSplit;
use super::vocab::Vocab;
use crate::ModelError;
use crate::gguf::Metadata;

pub(super) struct BpeModel {
    /// Ours, and not the crate's `Split`: its patterns backtrack, and stop without a word where that takes too long.
    split: PreSplit,
    merges: BPE,
}

impl BpeModel {
    pub fn from_gguf(metadata: &Metadata, vocab: &Vocab) -> Result<BpeModel, ModelError> {
        let name = metadata.str("tokenizer.ggml.pre")?.unwrap_or_else(|| {
            tracing::warn!("the model does not say how its tokenizer splits words (tokenizer.ggml.pre); using \"default\", which may be wrong");
            "default"
        });
        let split = PreSplit::named(name).map_err(ModelError::Unsupported)?;
        let lines = metadata.require_strings("tokenizer.ggml.merges")?;
        let mut seen = HashSet::with_capacity(lines.len());
        let mut merges = Vec::with_capacity(lines.len());
        for (rank, line) in lines.iter().enumerate() {
            // A token may begin with a space, so the separator is the first one after that.
            let middle = line.char_indices().skip(1).find_map(|(at, c)| (c == ' ').then_some(at));
            let Some(middle) = middle else {
                return Err(
                    metadata.error(format!("entry {rank} of tokenizer.ggml.merges, {line:?}, is not two tokens"))
                );
            };
            let (left, right) = (&line[..middle], &line[middle + 1..]);
            // A merge of what is no token can never be used; of two merges of one pair the first counts.
            let whole = [left, right].concat();
            if let (Some(a), Some(b), Some(_)) = (vocab.text_id(left), vocab.text_id(right), vocab.text_id(&whole))
                && seen.insert((a, b))
            {
                merges.push((left.to_owned(), right.to_owned()));
            }
        }
        // Control tokens are matched before words are cut; text never turns into one.
        let spellings: Spellings = vocab
            .spellings
            .iter()
            .filter_map(|spelling| Some((spelling.to_string(), vocab.text_id(spelling)?)))
            .collect();
        let merges = BPE::builder()
            .vocab_and_merges(spellings, merges)
            .ignore_merges(split.ignore_merges)
            .build()
            .map_err(|error| {
                metadata.error(format!("the vocabulary and its merges do not fit together: {error}"))
            })?;
        Ok(BpeModel { split, merges })
    }

    /// Whether texts begin with BOS where the file does not say.
    pub fn add_bos(&self) -> bool {
        self.split.add_bos
    }

    /// Appends the tokens of `text`, which holds no special tokens.
    ///
    /// A byte without a token is left out, as by every other implementation.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut spelled = String::new();
        let mut outcome = Ok(());
        self.split.words(text, &mut |word| {
            spelled.clear();
            spelled.extend(word.bytes().map(byte_level::char_of));
            match self.merges.tokenize(&spelled) {
                Ok(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                Err(error) => outcome = Err(TokenizerError(format!("the text cannot be tokenized: {error}"))),
            }
        });
        outcome
    }
}
