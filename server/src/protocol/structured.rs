//! What the output must match: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

/// `response_format`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ResponseFormat {
    #[serde(rename = "type")]
    #[schemars(extend("enum" = ["text", "json_object", "json_schema"]))]
    pub kind: String,
    pub json_schema: Option<NamedSchema>,
    /// The schema itself, as Anyscale and llama.cpp take it beside `json_object`.
    pub schema: Option<Value>,
}

/// `response_format.json_schema`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct NamedSchema {
    #[schemars(regex(pattern = "^[A-Za-z0-9_-]{1,64}$"))]
    pub name: Option<String>,
    pub schema: Option<Value>,
    pub strict: Option<bool>,
}

/// `structured_outputs`: exactly one of the kinds, and how JSON may be spaced.
#[derive(Debug, Default, Clone, Deserialize, JsonSchema)]
pub struct StructuredOutputs {
    pub json: Option<Value>,
    #[schemars(length(min = 1))]
    pub regex: Option<String>,
    #[schemars(length(min = 1, max = crate::structured::CHOICES_MAX), inner(length(min = 1)))]
    pub choice: Option<Vec<String>>,
    pub grammar: Option<String>,
    pub json_object: Option<bool>,
    /// Not supported, but for null.
    pub structural_tag: Option<Value>,
    pub disable_any_whitespace: Option<bool>,
    pub disable_additional_properties: Option<bool>,
    pub whitespace_pattern: Option<String>,
}
