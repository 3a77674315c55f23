//! Byte-level byte-pair encoding from a GGUF vocabulary.

use std::collections::HashMap;

use super::byte_level;
use super::merge::{Merger, Merges, NONE, Symbol};
use super::pre_split::PreSplit;
use super::vocab::Vocab;
use crate::ModelError;
use crate::gguf::Metadata;

pub(super) struct BpeModel {
    split: PreSplit,
    /// The token of each byte on its own, or [`NONE`]: vocabularies leave out bytes that UTF-8 never uses.
    byte_ids: [u32; 256],
    /// Two tokens → the rank of their merge and the token it makes.
    merges: HashMap<(u32, u32), (u32, u32)>,
}

impl Merges for BpeModel {
    fn join(&self, left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        self.merges.get(&(left.id, right.id)).copied()
    }
}

impl BpeModel {
    pub fn from_gguf(metadata: &Metadata, vocab: &Vocab) -> Result<BpeModel, ModelError> {
        let name = metadata.str("tokenizer.ggml.pre")?.unwrap_or_else(|| {
            tracing::warn!("the model does not say how its tokenizer splits words (tokenizer.ggml.pre); using \"default\", which may be wrong");
            "default"
        });
        let split = PreSplit::named(name).map_err(ModelError::Unsupported)?;
        let lines = metadata.require_strings("tokenizer.ggml.merges")?;
        let mut merges = HashMap::with_capacity(lines.len());
        let mut joined = String::new();
        for (rank, line) in lines.iter().enumerate() {
            // A token may begin with a space, so the separator is the first one after that.
            let middle = line.char_indices().skip(1).find_map(|(at, c)| (c == ' ').then_some(at));
            let Some(middle) = middle else {
                return Err(
                    metadata.error(format!("entry {rank} of tokenizer.ggml.merges, {line:?}, is not two tokens"))
                );
            };
            let (left, right) = (&line[..middle], &line[middle + 1..]);
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            // A merge of what is no token can never be used.
            if let (Some(left), Some(right), Some(id)) = (vocab.id(left), vocab.id(right), vocab.id(&joined)) {
                merges.entry((left, right)).or_insert((rank as u32, id));
            }
        }
        let mut byte_ids = [NONE; 256];
        for (byte, slot) in (0..=255u8).zip(&mut byte_ids) {
            let spelling = byte_level::char_of(byte).to_string();
            *slot = vocab.text_id(&spelling).unwrap_or(NONE);
        }
        Ok(BpeModel { split, byte_ids, merges })
    }

    /// Whether texts begin with BOS where the file does not say.
    pub fn add_bos(&self) -> bool {
        self.split.add_bos
    }

    /// Appends the tokens of `text`, which holds no special tokens.
    pub fn encode(&self, vocab: &Vocab, text: &str, merger: &mut Merger, ids: &mut Vec<u32>) {
        let mut spelled = String::new();
        self.split.words(text, &mut |word| {
            if self.split.ignore_merges {
                spelled.clear();
                spelled.extend(word.bytes().map(byte_level::char_of));
                if let Some(id) = vocab.text_id(&spelled) {
                    ids.push(id);
                    return;
                }
            }
            merger.clear();
            for (at, byte) in word.bytes().enumerate() {
                merger.push(at as u32, 1, self.byte_ids[usize::from(byte)]);
            }
            // A byte without a token is left out, as by every other implementation.
            let symbols = merger.run(self).map(|symbol| symbol.id);
            ids.extend(symbols.filter(|&id| id != NONE));
        });
    }
}
