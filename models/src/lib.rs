//! Model execution: where weights come from, how they are read, and one readable forward pass an architecture.

mod adapter;
mod candle;
mod cohere;
mod config;
mod error;
mod fill_in_the_middle;
mod forward;
mod gemma;
mod gguf;
mod gpt2;
mod gpt_neox;
mod layers;
mod llama;
mod load;
mod needs;
mod olmo2;
mod perplexity;
mod registry;
mod source;
mod tokenizer;
mod traffic;
mod weights;

pub use adapter::{Adapter, AdapterSites};
pub use config::{
    Activation, ChatTemplates, ExpertsConfig, GenerationDefaults, LatentConfig, ModelConfig, Pooling, RopeConfig,
    RopeScaling, RopeStyle, Routing,
};
pub use error::ModelError;
pub use fill_in_the_middle::FillInTheMiddle;
pub use forward::{ForwardInput, Model, ModelShape};
pub use gguf::{GgmlType, GgufFile, MetaArray, MetaValue, Metadata, TensorInfo};
pub use load::{Device, LoadOptions, LoadedModel, OpenDevice, Runner, load, load_on};
pub use needs::MemoryNeeds;
pub use perplexity::{Score, Windows, perplexity};
pub use rill_kernels::{BestLogits, Isa, KvDtype, Ranking, RowDtype};
pub use source::{
    CachedModel, DEFAULT_MODEL, ModelFiles, ModelKind, NoProgress, Progress, SourceOptions, cached_models,
    remove_cached, resolve,
};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use traffic::{Cost, WeightTraffic};
pub use weights::Quantize;
