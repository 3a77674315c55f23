//! Model files as they come: GGUF, configurations, tokenizers.

mod config;
mod default_model;
mod gguf;
mod gguf_writer;
mod references;
mod tokenizer;
mod vocabularies;
