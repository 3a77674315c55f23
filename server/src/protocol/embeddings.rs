//! `/v1/embeddings`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::prompt::Prompts;

#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct EmbeddingsRequest {
    pub model: Option<String>,
    /// A text, several, token ids, or several lists of token ids.
    #[schemars(required)]
    pub input: Option<Prompts>,
    /// `base64` is of little-endian f32 values.
    #[schemars(extend("enum" = ["float", "base64", null]))]
    pub encoding_format: Option<String>,
    /// Keep so many leading values.
    #[schemars(range(min = 1))]
    pub dimensions: Option<i64>,
    /// Begin and end each text as the tokenizer does; true if unset.
    pub add_special_tokens: Option<bool>,
    #[schemars(range(min = i32::MIN, max = i32::MAX))]
    pub priority: Option<i64>,
    /// Accepted and not used.
    pub user: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct EmbeddingsResponse<'a> {
    #[schemars(extend("const" = "list"))]
    pub object: &'static str,
    pub data: Vec<EmbeddingOut>,
    pub model: &'a str,
    pub usage: EmbeddingsUsage,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct EmbeddingOut {
    #[schemars(extend("const" = "embedding"))]
    pub object: &'static str,
    pub index: usize,
    pub embedding: EmbeddingValues,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum EmbeddingValues {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct EmbeddingsUsage {
    pub prompt_tokens: u64,
    pub total_tokens: u64,
}
