//! What the cross-crate tests share: the default model's files, what an independent engine says of them, a real
//! server process, and a small HTTP client that can also misbehave.

pub mod default_model;
pub mod environment;
pub mod http;
pub mod node;
pub mod python;
pub mod reference;
pub mod server_process;
pub mod single_sequence;
pub mod tiny_adapters;
pub mod tiny_gguf;
pub mod tiny_models;
pub mod tiny_parity;
