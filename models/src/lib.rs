//! Model execution: where weights come from, how they are read, and one readable forward pass an architecture.

mod error;
mod forward;
mod tokenizer;

pub use error::ModelError;
pub use forward::{ForwardInput, Model, ModelShape};
pub use tokenizer::{Tokenizer, TokenizerError};
