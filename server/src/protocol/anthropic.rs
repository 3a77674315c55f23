//! `/v1/messages`, Anthropic's API: requests, and the message that answers them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::messages::MESSAGES_MAX;
use crate::validate;

#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct MessagesRequest {
    pub model: Option<String>,
    /// Needed but for counting tokens.
    #[schemars(range(min = 0, max = u32::MAX))]
    pub max_tokens: Option<i64>,
    #[serde(default)]
    #[schemars(required, length(min = 1, max = MESSAGES_MAX))]
    pub messages: Vec<TurnIn>,
    pub system: Option<Blocks>,
    #[schemars(length(max = validate::STOP_STRINGS_MAX),
               inner(length(min = 1, max = validate::STOP_STRING_BYTES_MAX)))]
    pub stop_sequences: Option<Vec<String>>,
    pub stream: Option<bool>,
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f64>,
    #[schemars(range(min = -1, max = u32::MAX))]
    pub top_k: Option<i64>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub thinking: Option<Value>,
    pub mcp_servers: Option<Value>,
    pub container: Option<Value>,
    pub output_config: Option<OutputConfig>,
}

/// `output_config`: what the answer must match.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct OutputConfig {
    pub format: Option<OutputFormat>,
    pub effort: Option<Value>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct OutputFormat {
    #[serde(rename = "type")]
    #[schemars(extend("enum" = ["text", "json_object", "json_schema"]))]
    pub kind: String,
    pub schema: Option<Value>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct TurnIn {
    #[schemars(extend("enum" = ["user", "assistant", "system"]))]
    pub role: String,
    pub content: Blocks,
}

/// A string, or an array of content blocks.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or an array of content blocks")]
pub enum Blocks {
    Text(String),
    Blocks(Vec<Value>),
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct MessageOut<'a> {
    pub id: &'a str,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub role: &'static str,
    pub model: &'a str,
    pub content: Vec<BlockOut>,
    pub stop_reason: Option<&'static str>,
    pub stop_sequence: Option<String>,
    pub usage: MessagesUsage,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BlockOut {
    Text { text: String },
    ToolUse { id: String, name: String, input: Value },
    Thinking { thinking: String, signature: String },
}

#[derive(Debug, Default, Clone, Copy, Serialize, JsonSchema)]
pub struct MessagesUsage {
    /// Without those from the prefix cache.
    pub input_tokens: u64,
    pub cache_creation_input_tokens: u64,
    pub cache_read_input_tokens: u64,
    pub output_tokens: u64,
}

/// `/v1/messages/count_tokens`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TokenCount {
    pub input_tokens: usize,
}

/// An error in Anthropic's shape.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MessagesErrorBody<'a> {
    #[serde(rename = "type")]
    #[schemars(extend("const" = "error"))]
    pub kind: &'static str,
    pub error: MessagesErrorDetail<'a>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct MessagesErrorDetail<'a> {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub message: &'a str,
}
