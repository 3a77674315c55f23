//! The two `/render` endpoints' answers: what the model would be given.

use schemars::JsonSchema;
use serde::Serialize;

/// `/v1/completions/render`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RenderedCompletion {
    pub model: String,
    pub prompts: Vec<RenderedPrompt>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct RenderedPrompt {
    pub prompt: String,
    pub count: usize,
    pub token_ids: Vec<u32>,
}

/// `/v1/chat/completions/render`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RenderedChat {
    pub model: String,
    pub prompt: String,
    pub token_ids: Vec<u32>,
    pub count: usize,
    /// Tokens that may be generated after it.
    pub max_tokens: u32,
}
