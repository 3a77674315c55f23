//! `/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's spelling.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::chat::Message;

#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    /// This or `messages`.
    pub prompt: Option<String>,
    pub messages: Option<Vec<Message>>,
    pub add_special_tokens: Option<bool>,
    pub return_token_strs: Option<bool>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub chat_template: Option<String>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    #[schemars(with = "Option<Vec<super::tools::ToolSchema>>")]
    pub tools: Option<Vec<Value>>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct TokenizeResponse {
    pub count: usize,
    pub max_model_len: usize,
    pub tokens: Vec<u32>,
    pub token_strs: Option<Vec<String>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct DetokenizeResponse {
    pub prompt: String,
}

/// What transformers keeps in a tokenizer's configuration.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TokenizerInfo {
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub chat_template: Option<String>,
    pub model_max_length: usize,
}
