//! One file an endpoint family.

pub mod chat;
pub mod completions;
pub mod health;
pub mod messages;
pub mod metrics;
pub mod models;
pub mod responses;
pub mod tokenize;
pub mod ui;

use rill_engine::{GenerateRequest, Grammar};
use serde::de::DeserializeOwned;

use crate::app::Serving;
use crate::body::parse;
use crate::prompt::PromptError;
use crate::protocol::ApiError;
use crate::protocol::sampling::SharedFields;
use crate::protocol::unsupported::UnsupportedField;
use crate::structured;
use crate::validate::{self, SharedOptions};

/// Text up to this long is tokenised where the request is handled: handing it to another thread costs as much.
const INLINE_BYTES_MAX: usize = 2048;

/// A generation request's body: the fields all share, and the endpoint's own.
fn parse_generation<T: DeserializeOwned>(body: &[u8]) -> Result<(SharedFields, T), ApiError> {
    let unsupported: UnsupportedField = parse(body)?;
    let fields = (parse(body)?, parse(body)?);
    match unsupported.0 {
        Some(field) => Err(ApiError::unsupported(field)),
        None => Ok(fields),
    }
}

/// Runs `work` over `bytes` of text, away from the network's threads if that is much.
pub(crate) async fn over_text<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        tracing::error!(%error, "encoding a prompt failed");
        ApiError::internal("a defect in the server was caught; see its log")
    })
}

/// A new object id, such as `cmpl-9f86d081884c7d65`.
fn new_id(prefix: &str) -> Result<String, ApiError> {
    let random = getrandom::u64()
        .map_err(|error| ApiError::internal(format!("the system gives no random numbers: {error}")))?;
    Ok(format!("{prefix}-{random:016x}"))
}

pub(crate) fn prompt_error(param: &str, error: PromptError) -> ApiError {
    match error {
        PromptError::TooLong { .. } => ApiError::context_length(param, error.to_string()),
        PromptError::Template(_) | PromptError::Tokenizer(_) => ApiError::invalid(param, error.to_string()),
    }
}

/// The compiled grammar of what the request's output must match, if it must.
async fn grammar_for(serving: &Serving, fields: &SharedFields) -> Result<Option<Grammar>, ApiError> {
    match structured::grammar_of(fields)? {
        Some(grammar) => serving.grammars.compile(&grammar).await.map(Some),
        None => Ok(None),
    }
}

/// The engine's requests for the `n` choices of one prompt.
pub(crate) fn choices_of<'a>(
    prompt: Vec<u32>,
    max_tokens: u32,
    options: &'a SharedOptions,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    grammar: Option<&'a Grammar>,
) -> impl Iterator<Item = GenerateRequest> + 'a {
    (0..options.n).map(move |j| {
        let mut sampling = options.sampling.clone();
        sampling.seed = validate::seed_of_choice(sampling.seed, j);
        let mut stop = options.stop.clone();
        stop.max_tokens = max_tokens;
        GenerateRequest {
            prompt: prompt.clone(),
            sampling,
            stop,
            logprobs,
            prompt_logprobs,
            priority: options.priority,
            cache_salt: options.cache_salt.clone(),
            tenant: None,
            grammar: grammar.cloned(),
        }
    })
}
