//! One file an endpoint family.

pub mod adapters;
pub mod chat;
pub mod completions;
pub mod debug;
pub mod docs;
pub mod embeddings;
pub mod health;
pub mod messages;
pub mod metrics;
pub mod models;
pub mod responses;
pub mod tokenize;
pub mod ui;

use std::sync::Arc;

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use rill_engine::{GenerateRequest, Grammar, LoadedAdapter};
use serde::de::DeserializeOwned;

use crate::body::parse;
use crate::prompt::PromptError;
use crate::protocol::ApiError;
use crate::protocol::prompt::Prompt;
use crate::protocol::sampling::SharedFields;
use crate::protocol::unsupported::UnsupportedField;
use crate::serving::Serving;
use crate::structured;
use crate::validate::{self, SharedOptions};

/// The id at the end of a path.
pub struct PathId(pub String);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(PathId(id)),
            Err(error) => Err(ApiError::bad_path(&error.body_text())),
        }
    }
}

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

/// Each prompt's text, if it came as text, and its ids.
async fn encode_prompts(
    param: &'static str,
    serving: &Arc<Serving>,
    prompts: Vec<Prompt>,
    add_special: bool,
) -> Result<Vec<(Option<String>, Vec<u32>)>, ApiError> {
    let bytes = prompts
        .iter()
        .map(|prompt| match prompt {
            Prompt::Text(text) => text.len(),
            Prompt::Tokens(_) => 0,
        })
        .sum();
    let serving = serving.clone();
    over_text(bytes, move || {
        prompts
            .into_iter()
            .map(|prompt| match prompt {
                Prompt::Text(text) => {
                    let ids = serving
                        .prompts
                        .encode_text(&text, add_special)
                        .map_err(|error| prompt_error(param, error))?;
                    Ok((Some(text), ids))
                }
                Prompt::Tokens(ids) => {
                    validate::prompt_ids(param, &ids, &serving.limits())?;
                    Ok((None, ids))
                }
            })
            .collect()
    })
    .await?
}

/// A new object id, such as `cmpl-9f86d081884c7d65`.
fn new_id(prefix: &str) -> Result<String, ApiError> {
    let random = getrandom::u64()
        .map_err(|error| ApiError::internal(format!("the system gives no random numbers: {error}")))?;
    // Anthropic's ids are `msg_…`.
    let separator = if prefix == "msg" { '_' } else { '-' };
    Ok(format!("{prefix}{separator}{random:016x}"))
}

pub(crate) fn prompt_error(param: &str, error: PromptError) -> ApiError {
    match error {
        PromptError::TooLong { context_len, .. } => {
            ApiError::context_length(param, context_len, &error.to_string())
        }
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

/// The engine's requests for the `n` choices of one prompt, with an adapter or without.
pub(crate) fn choices_of<'a>(
    (prompt, adapter): (Vec<u32>, Option<&'a Arc<LoadedAdapter>>),
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
            // Whoever submits it says.
            tenant: None,
            grammar: grammar.cloned(),
            adapter: adapter.cloned(),
        }
    })
}
