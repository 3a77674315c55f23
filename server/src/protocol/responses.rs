//! `/v1/responses`: the request. Responses are assembled item by item in `response_output`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::structured::NamedSchema;

#[derive(Debug, Default, Clone, Deserialize)]
pub struct ResponsesRequest {
    pub model: Option<String>,
    pub input: Option<Input>,
    pub instructions: Option<String>,
    pub max_output_tokens: Option<i64>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub stream: Option<bool>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub previous_response_id: Option<String>,
    pub store: Option<bool>,
    pub metadata: Option<BTreeMap<String, Value>>,
    pub text: Option<TextOptions>,
    pub user: Option<String>,
    pub truncation: Option<String>,
    pub background: Option<bool>,
    pub conversation: Option<Value>,
    pub context_management: Option<Value>,
    pub moderation: Option<Value>,
    pub include: Option<Vec<String>>,
    pub prompt: Option<Value>,
    pub max_tool_calls: Option<i64>,
    pub top_logprobs: Option<i64>,
    pub reasoning: Option<BTreeMap<String, Value>>,
}

/// A string, or an array of items.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Input {
    Text(String),
    Items(Vec<Value>),
}

#[derive(Debug, Clone, Deserialize)]
pub struct TextOptions {
    pub format: Option<TextFormat>,
    pub verbosity: Option<Value>,
}

/// `text.format`: chat's `response_format`, less nested.
#[derive(Debug, Clone, Deserialize)]
pub struct TextFormat {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(flatten)]
    pub schema: NamedSchema,
}
