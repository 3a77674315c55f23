//! Log-probability objects of the three kinds: completions' parallel arrays, chat's list, vLLM's prompt list.

use serde::Serialize;
use serde_json::{Map, Value};

/// Completions: parallel arrays, one entry a token.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt, which nothing precedes.
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters of text before each token.
    pub text_offset: Vec<usize>,
}

/// Chat: one object a token.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatToken>,
    pub refusal: Option<()>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatToken {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<ChatTopToken>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatTopToken {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// vLLM's `prompt_logprobs`: for each prompt token but the first, a map from token id to this.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PromptLogprob {
    pub logprob: f32,
    /// 1 is the most likely; null where the token is not among the alternatives asked for.
    pub rank: Option<usize>,
    pub decoded_token: String,
}
