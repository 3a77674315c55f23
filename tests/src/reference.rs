//! The fixture that tests/models/make_reference.py makes with llama.cpp, and the text it speaks of.

use serde::Deserialize;
use std::path::{Path, PathBuf};

/// What llama.cpp says of the default model's file.
#[derive(Debug, Deserialize)]
pub struct Reference {
    pub model_sha256: String,
    pub continuations: Vec<Continuation>,
    /// Token ids of `english.txt`.
    pub tokens: Vec<u32>,
    /// Entry `i`: what may follow `tokens[..=i]`.
    pub positions: Vec<Position>,
    pub perplexity: f64,
}

/// A greedy continuation.
#[derive(Debug, Deserialize)]
pub struct Continuation {
    /// The prompt as text; for a chat, after the model's own template.
    pub text: String,
    /// The chat's messages as they were given to the template; none for a plain prompt.
    pub messages: Option<serde_json::Value>,
    pub prompt: Vec<u32>,
    pub tokens: Vec<u32>,
    /// Log-probability of the best candidate less that of the second, for each of `tokens`.
    pub gaps: Vec<f32>,
}

/// The ten most likely next tokens at one position.
#[derive(Debug, Deserialize)]
pub struct Position {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    /// Log-probability of the token that really follows.
    pub next: f32,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures")
}

impl Reference {
    pub fn read() -> Reference {
        let path = fixtures().join("smollm2_reference.json");
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

/// The English text of the fixture.
pub fn english() -> String {
    let path = fixtures().join("english.txt");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
