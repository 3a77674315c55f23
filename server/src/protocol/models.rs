//! The model list.

use schemars::JsonSchema;
use serde::Serialize;

#[derive(Debug, Serialize, JsonSchema)]
pub struct ModelList {
    #[schemars(extend("const" = "list"))]
    pub object: &'static str,
    pub data: Vec<ModelCard>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ModelCard {
    pub id: String,
    #[schemars(extend("const" = "model"))]
    pub object: &'static str,
    /// Unix seconds at which the model was loaded.
    pub created: u64,
    pub owned_by: &'static str,
    /// The name the model was loaded under.
    pub root: String,
    /// Longest sequence, prompt and completion together, in tokens.
    pub max_model_len: usize,
}
