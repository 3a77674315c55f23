//! The wire: what clients send and what they get back, in OpenAI's and vLLM's spellings. Types only, no policy.

pub mod anthropic;
pub mod chat;
pub mod completion;
pub mod debug;
pub mod embeddings;
pub mod error;
pub mod logprobs;
pub mod models;
pub mod probes;
pub mod prompt;
pub mod render;
pub mod responses;
pub mod sampling;
pub mod structured;
pub mod tokenize;
pub mod tools;
pub mod unsupported;
pub mod usage;

pub use error::ApiError;
