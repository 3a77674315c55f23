//! Model execution: where weights come from, how they are read, and one readable forward pass an architecture.

mod config;
mod error;
mod forward;
mod gguf;
mod layers;
mod llama;
mod load;
mod registry;
mod source;
mod tokenizer;
mod weights;

pub use config::{Activation, ChatTemplates, GenerationDefaults, ModelConfig, RopeConfig, RopeScaling, RopeStyle};
pub use error::ModelError;
pub use forward::{ForwardInput, Model, ModelShape};
pub use gguf::{GgmlType, GgufFile, MetaArray, MetaValue, Metadata, TensorInfo};
pub use load::{Device, LoadOptions, LoadedModel, load};
pub use source::{DEFAULT_MODEL, ModelFiles, ModelKind, NoProgress, Progress, SourceOptions, resolve};
pub use tokenizer::{Tokenizer, TokenizerError};
