//! The engine: requests in, token events out. Continuous batching over a paged KV cache on a thread of its own.

mod handle;
mod request;

pub use handle::{EngineHandle, EventStream, SubmitError};
pub use request::{
    Event, FailureKind, FinishReason, GenerateRequest, SamplingParams, StopParams, TokenLogprobs, Usage,
};
