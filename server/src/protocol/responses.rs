//! `/v1/responses`: the request. Responses are assembled item by item in `response_output`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::structured::NamedSchema;

#[derive(Debug, Default, Clone, Deserialize, JsonSchema)]
pub struct ResponsesRequest {
    pub model: Option<String>,
    #[schemars(required)]
    pub input: Option<Input>,
    pub instructions: Option<String>,
    #[schemars(range(min = 0, max = u32::MAX))]
    pub max_output_tokens: Option<i64>,
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f64>,
    pub stream: Option<bool>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub previous_response_id: Option<String>,
    pub store: Option<bool>,
    #[schemars(with = "Option<super::sampling::Metadata>")]
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
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or an array of items")]
pub enum Input {
    Text(String),
    Items(Vec<Value>),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct TextOptions {
    pub format: Option<TextFormat>,
    pub verbosity: Option<Value>,
}

/// `text.format`: chat's `response_format`, less nested.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct TextFormat {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(flatten)]
    pub schema: NamedSchema,
}

/// A response. Kept and written as JSON: what is known at its end is put into `output`, `usage` and the like then.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Response")]
pub struct ResponseHead<'a> {
    pub id: String,
    #[schemars(extend("const" = "response"))]
    pub object: &'static str,
    pub created_at: u64,
    #[schemars(extend("enum" = ["in_progress", "completed", "incomplete", "failed"]))]
    pub status: &'static str,
    pub background: bool,
    pub error: Option<Map<String, Value>>,
    pub incomplete_details: Option<Map<String, Value>>,
    pub instructions: Option<&'a str>,
    pub max_output_tokens: Option<i64>,
    pub model: &'a str,
    #[schemars(with = "Vec<OutputItem>")]
    pub output: Vec<Value>,
    pub parallel_tool_calls: bool,
    pub previous_response_id: Option<&'a str>,
    pub reasoning: Map<String, Value>,
    pub service_tier: &'static str,
    pub store: bool,
    pub temperature: f64,
    pub text: Map<String, Value>,
    pub tool_choice: Value,
    pub tools: Vec<Value>,
    pub top_p: f64,
    pub truncation: &'static str,
    #[schemars(with = "Option<ResponseUsage>")]
    pub usage: Option<()>,
    pub user: Option<&'a str>,
    pub metadata: BTreeMap<String, Value>,
}

/// The shape of what `response_output` writes, piece by piece.
#[derive(Debug, JsonSchema)]
#[schemars(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    Message { id: String, status: String, role: String, content: Vec<Map<String, Value>> },
    FunctionCall { id: String, status: String, call_id: String, name: String, arguments: String },
    Reasoning { id: String, status: String, summary: Vec<Value>, content: Vec<Map<String, Value>> },
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ResponseUsage {
    pub input_tokens: u32,
    pub input_tokens_details: InputDetails,
    pub output_tokens: u32,
    pub output_tokens_details: OutputDetails,
    pub total_tokens: u32,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct InputDetails {
    pub cached_tokens: u32,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct OutputDetails {
    pub reasoning_tokens: u32,
}

/// `DELETE /v1/responses/{id}`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DeletedResponse {
    pub id: String,
    #[schemars(extend("const" = "response"))]
    pub object: &'static str,
    pub deleted: bool,
}
