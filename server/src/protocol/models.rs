//! The model list.

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelCard>,
}

#[derive(Debug, Serialize)]
pub struct ModelCard {
    pub id: String,
    pub object: &'static str,
    /// Unix seconds at which the model was loaded.
    pub created: u64,
    pub owned_by: &'static str,
    /// The name the model was loaded under; an adapter's path.
    pub root: String,
    /// The model an adapter is for.
    pub parent: Option<String>,
    /// Longest sequence, prompt and completion together, in tokens.
    pub max_model_len: usize,
}
