//! Model execution: where weights come from, how they are read, and one readable forward pass an architecture.

mod config;
mod error;
mod forward;
mod gguf;
mod layers;
mod llama;
mod registry;
mod tokenizer;
mod weights;

pub use config::{
    Activation, ChatTemplates, GenerationDefaults, ModelConfig, RopeConfig, RopeScaling, RopeStyle,
};
pub use error::ModelError;
pub use forward::{ForwardInput, Model, ModelShape};
pub use gguf::{GgmlType, GgufFile, MetaArray, MetaValue, Metadata, TensorInfo};
pub use tokenizer::{Tokenizer, TokenizerError};
