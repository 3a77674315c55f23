//! `/v1/messages`, Anthropic's API: requests, and the message that answers them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Default, Deserialize)]
pub struct MessagesRequest {
    pub model: Option<String>,
    pub max_tokens: Option<i64>,
    #[serde(default)]
    pub messages: Vec<TurnIn>,
    pub system: Option<Blocks>,
    pub stop_sequences: Option<Vec<String>>,
    pub stream: Option<bool>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub thinking: Option<Value>,
    pub mcp_servers: Option<Value>,
    pub container: Option<Value>,
    pub output_config: Option<OutputConfig>,
}

/// `output_config`: what the answer must match.
#[derive(Debug, Clone, Deserialize)]
pub struct OutputConfig {
    pub format: Option<OutputFormat>,
    pub effort: Option<Value>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct OutputFormat {
    #[serde(rename = "type")]
    pub kind: String,
    pub schema: Option<Value>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct TurnIn {
    pub role: String,
    pub content: Blocks,
}

/// A string, or an array of content blocks.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Blocks {
    Text(String),
    Blocks(Vec<Value>),
}

#[derive(Debug, Serialize)]
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

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BlockOut {
    Text { text: String },
    ToolUse { id: String, name: String, input: Value },
    Thinking { thinking: String, signature: String },
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
pub struct MessagesUsage {
    /// Without those from the prefix cache.
    pub input_tokens: u64,
    pub cache_creation_input_tokens: u64,
    pub cache_read_input_tokens: u64,
    pub output_tokens: u64,
}
