//! The engine: requests in, token events out. Continuous batching over a paged KV cache on a thread of its own.
//!
//! [`Engine::start`] gives an [`EngineHandle`]; [`EngineHandle::submit`] takes a [`GenerateRequest`] and gives an
//! [`EventStream`]. The modules are public for those who test or drive the parts: [`step_loop`] shows how they meet.

mod adapter;
mod batch;
mod config;
mod constraint;
mod detokenizer;
mod draft_model;
pub mod fair_share;
mod generation;
mod handle;
mod inspect;
pub mod kv;
mod least_squares;
mod pace;
mod philox;
mod pooling;
mod request;
mod runner;
pub mod sampler;
pub mod scheduler;
mod sequence;
mod softmax;
mod speculate;
pub mod spill;
mod stats;
mod step_logits;
pub mod step_loop;
mod stop;

pub use adapter::LoadedAdapter;
pub use config::{ConfigError, EngineConfig};
pub use constraint::{Constraint, Grammar, GrammarCompiler, GrammarError, TokenMask, regex_in_grammar};
pub use detokenizer::{Detokenizer, TokenText};
pub use handle::{EngineHandle, EventStream, Health, SubmitError};
pub use inspect::{EngineState, SequenceState};
pub use pooling::EmbedRequest;
pub use request::{
    Event, FailureKind, FinishReason, GenerateRequest, SamplingParams, StopParams, TokenLogprobs, Usage,
};
pub use runner::{ModelRunner, Runner, RunnerError};
pub use sequence::{Sequence, SequenceKey, Tenant};
pub use softmax::RowError;
pub use stats::{Counter, Histogram, HistogramSnapshot, Outcome, Stats};
pub use step_loop::{Clock, Engine, EngineCore, Extras, StartError, Step};
pub use stop::{StopMatch, StopMatcher};
