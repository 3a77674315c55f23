//! The control tokens that let a model fill in what is between two texts, where its vocabulary has them.

use crate::ModelError;
use crate::Tokenizer;
use crate::gguf::Metadata;

/// A prompt is `prefix` text `suffix` text `middle`; what follows is what belongs in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillInTheMiddle {
    pub prefix: u32,
    pub suffix: u32,
    pub middle: u32,
}

/// Prefix, suffix and middle as vocabularies spell them: StarCoder, SantaCoder, Qwen and CodeGemma, CodeLlama,
/// DeepSeek.
const SPELLINGS: [[&str; 3]; 6] = [
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["▁<PRE>", "▁<SUF>", "▁<MID>"],
    ["<PRE>", "<SUF>", "<MID>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
];

/// Tokens after which a middle is over, though a text may go on after them.
const ENDS: [&str; 9] = [
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<fim_pad>",
    "<file_sep>",
    "<fim-pad>",
    "▁<EOT>",
    "<EOT>",
];

impl FillInTheMiddle {
    /// What a GGUF file says, in either of the spellings its keys have had.
    pub(crate) fn from_gguf(metadata: &Metadata) -> Result<Option<FillInTheMiddle>, ModelError> {
        let id = |new: &str, old: &str| -> Result<Option<u32>, ModelError> {
            match metadata.u32(&format!("tokenizer.ggml.{new}_token_id"))? {
                None => metadata.u32(&format!("tokenizer.ggml.{old}_token_id")),
                id => Ok(id),
            }
        };
        Ok(match (id("fim_pre", "prefix")?, id("fim_suf", "suffix")?, id("fim_mid", "middle")?) {
            (Some(prefix), Some(suffix), Some(middle)) => Some(FillInTheMiddle { prefix, suffix, middle }),
            _ => None,
        })
    }

    /// The well-known tokens, where `tokenizer` has all three as control tokens.
    pub fn of_vocabulary(tokenizer: &Tokenizer) -> Option<FillInTheMiddle> {
        let id = |token: &str| tokenizer.token_id(token).filter(|&id| tokenizer.is_special(id));
        SPELLINGS.iter().find_map(|[prefix, suffix, middle]| {
            Some(FillInTheMiddle { prefix: id(prefix)?, suffix: id(suffix)?, middle: id(middle)? })
        })
    }

    /// Further tokens that end a middle.
    pub fn ends(tokenizer: &Tokenizer) -> Vec<u32> {
        let id = |token: &&str| tokenizer.token_id(token).filter(|&id| tokenizer.is_special(id));
        ENDS.iter().filter_map(id).collect()
    }
}
