//! rill as a library: what the binary and the tests share.

pub mod answer;
pub mod app;
pub mod auth;
pub mod body;
pub mod chat_template;
pub mod cli;
pub mod config;
pub mod drain;
pub mod fetch_progress;
pub mod gbnf;
pub mod generation;
pub mod grammars;
pub mod listen;
pub mod logprob_format;
pub mod messages;
pub mod prompt;
pub mod protocol;
pub mod reasoning;
pub mod routes;
pub mod sse;
pub mod start;
pub mod structured;
pub mod tools;
pub mod validate;
