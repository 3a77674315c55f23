//! The API over real HTTP: the real router, listener and engine around a runner that needs no model.

mod chat;
mod completions;
mod control_tokens;
mod documents;
mod embeddings;
mod errors;
mod exactness;
mod fuzz;
mod hostile;
mod keys;
mod lifecycle;
mod messages;
mod openapi;
mod overload;
mod parameters;
mod responses;
mod routes;
mod scripted_runner;
mod streams;
mod structured;
mod test_server;
mod tiny_tokenizer;
mod tools;
