//! Log-probability objects of the three kinds: completions' parallel arrays, chat's list, vLLM's prompt list.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Serialize, Serializer};

/// Completions: parallel arrays, one entry a token.
#[derive(Debug, Default, Clone, PartialEq, Serialize, JsonSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt, which nothing precedes.
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<TopLogprobs>>,
    /// Characters of text before each token.
    pub text_offset: Vec<usize>,
}

/// Alternatives by text, most likely first. Not a `serde_json` map: that would print the very same number with more
/// digits than `token_logprobs` does.
#[derive(Debug, Default, Clone, PartialEq, JsonSchema)]
#[schemars(with = "BTreeMap<String, f32>")]
pub struct TopLogprobs(pub Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

/// Chat: one object a token.
#[derive(Debug, Default, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatToken>,
    pub refusal: Option<()>,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ChatToken {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<ChatTopToken>,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ChatTopToken {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// vLLM's `prompt_logprobs`: for each prompt token but the first, a map from token id to this.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct PromptLogprob {
    pub logprob: f32,
    /// 1 is the most likely; null where the token is not among the alternatives asked for.
    pub rank: Option<usize>,
    pub decoded_token: String,
}
