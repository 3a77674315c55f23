//! The shapes of tools, choices and calls, for the API's description: `tools::choice` and `messages` read them as they
//! came, since templates show them so.

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// A tool: a function the model may call.
#[derive(JsonSchema)]
#[schemars(rename = "Tool")]
pub struct ToolSchema {
    #[schemars(rename = "type", extend("const" = "function"))]
    pub kind: String,
    pub function: FunctionSchema,
}

#[derive(JsonSchema)]
#[schemars(rename = "Function")]
pub struct FunctionSchema {
    #[schemars(regex(pattern = "^[A-Za-z0-9_.:/-]{1,128}$"))]
    pub name: String,
    pub description: Option<String>,
    /// JSON schema of the arguments.
    pub parameters: Option<Map<String, Value>>,
    pub strict: Option<bool>,
}

/// `tool_choice`.
#[derive(JsonSchema)]
#[schemars(rename = "ToolChoice", untagged)]
pub enum ToolChoiceSchema {
    Word(#[schemars(extend("enum" = ["none", "auto", "required"]))] String),
    Named(NamedSchema),
}

/// The one function that must be called.
#[derive(JsonSchema)]
#[schemars(rename = "NamedToolChoice")]
pub struct NamedSchema {
    #[schemars(rename = "type", extend("const" = "function"))]
    pub kind: String,
    pub function: NamedFunctionSchema,
}

#[derive(JsonSchema)]
#[schemars(rename = "FunctionName")]
pub struct NamedFunctionSchema {
    #[schemars(length(min = 1))]
    pub name: String,
}

/// A call of an earlier answer.
#[derive(JsonSchema)]
#[schemars(rename = "Call")]
pub struct CallSchema {
    pub id: Option<String>,
    pub function: CalledSchema,
}

#[derive(JsonSchema)]
#[schemars(rename = "CalledFunction")]
pub struct CalledSchema {
    #[schemars(length(min = 1))]
    pub name: String,
    /// JSON text, or the object it holds.
    pub arguments: Option<ArgumentsSchema>,
}

#[derive(JsonSchema)]
#[schemars(rename = "Arguments", untagged)]
pub enum ArgumentsSchema {
    Text(String),
    Object(Map<String, Value>),
}
