//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use rill_engine::GenerateRequest;
use serde_json::{Value, json};

use super::{choices_of, grammar_for, new_id, over_text, parse_generation, prompt_error};
use crate::app::{AppState, Serving, Target, unix_seconds};
use crate::body::JsonBytes;
use crate::event_stream;
use crate::generation::{Generation, Outcome, finish_reason};
use crate::logprob_format::{self, CompletionLogprobsBuilder};
use crate::protocol::ApiError;
use crate::protocol::completion::{CompletionChoice, CompletionFields, CompletionResponse};
use crate::protocol::logprobs::CompletionLogprobs;
use crate::protocol::prompt::Prompt;
use crate::protocol::usage::UsageBody;
use crate::sse::{Echo, FrameWriter, StreamHead, StreamKind};
use crate::validate;

/// OpenAI's default on this endpoint.
const MAX_TOKENS_DEFAULT: u32 = 16;

pub async fn completions(
    State(state): State<Arc<AppState>>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let (serving, in_flight) = state.enter()?;
    let (shared, own) = parse_generation::<CompletionFields>(&body)?;
    drop(body);
    let Target { name: model, adapter } = serving.target(shared.model.as_deref())?;
    let options = validate::shared(&shared, &serving.limits())?;
    let logprobs =
        validate::integer("logprobs", own.logprobs, 0, validate::LOGPROBS_MAX)?.map(|count| count as u32);
    let n = options.n;
    if let Some(best_of) = own.best_of.filter(|&best_of| best_of != 1 && best_of != n as i64) {
        return Err(ApiError::invalid("best_of", format!("best_of must be 1 or n, {n}, not {best_of}")));
    }
    let prompts = own.prompt.map(|prompts| prompts.0).unwrap_or_default();
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "prompt must not be empty"));
    }
    validate::choices(prompts.len(), n)?;

    let grammar = grammar_for(&serving, &shared).await?;
    let echo = own.echo.unwrap_or(false);
    let encoded = encode(&serving, prompts, own.add_special_tokens.unwrap_or(true)).await?;
    let prompt_logprobs = if echo { options.prompt_logprobs.max(logprobs) } else { options.prompt_logprobs };
    let mut requests: Vec<GenerateRequest> = Vec::with_capacity(encoded.len() * n);
    let mut echoes = Vec::new();
    for (text, ids) in encoded {
        let default = Some(MAX_TOKENS_DEFAULT);
        let max_tokens = validate::max_tokens_for("prompt", &options, ids.len(), default, &serving.limits())?;
        if echo {
            let skip_special = options.stop.skip_special_tokens;
            let text = text.unwrap_or_else(|| serving.tokenizer().decode(&ids, skip_special));
            echoes.push(Echo { text, ids: ids.clone() });
        }
        let prompt = (ids, adapter.as_ref());
        requests.extend(choices_of(prompt, max_tokens, &options, logprobs, prompt_logprobs, grammar.as_ref()));
    }

    let count = requests.len();
    let id = new_id("cmpl")?;
    let created_s = unix_seconds();
    let generation = Generation::submit(&serving.engine, requests)?;
    let skip_special = options.stop.skip_special_tokens;
    if options.stream {
        let head = StreamHead { id: &id, created_s, model: &model, fingerprint: &serving.fingerprint };
        let kind = StreamKind::Completion { echoes, logprobs: logprobs.is_some(), skip_special };
        let writer = FrameWriter::new(serving.clone(), &head, kind, n, count, options.include_usage);
        return event_stream::respond(generation, writer, in_flight, state.keep_alive()).await;
    }
    let outcomes =
        generation.collect().await.map_err(|failure| ApiError::failed(failure.kind, failure.message))?;
    let mut usage = UsageBody::default();
    let mut choices = Vec::with_capacity(count);
    for (index, outcome) in outcomes.into_iter().enumerate() {
        usage.add(outcome.usage, index.is_multiple_of(n));
        let shape = ChoiceShape {
            echo: echoes.get(index / n),
            logprobs: logprobs.is_some(),
            prompt_logprobs: options.prompt_logprobs.is_some(),
            skip_special,
        };
        choices.push(choice(&serving, index, outcome, &shape));
    }
    let response = CompletionResponse {
        id: &id,
        object: "text_completion",
        created: created_s,
        model: &model,
        system_fingerprint: &serving.fingerprint,
        choices,
        usage,
    };
    Ok(Json(response).into_response())
}

/// What of an outcome is shown.
struct ChoiceShape<'a> {
    echo: Option<&'a Echo>,
    logprobs: bool,
    prompt_logprobs: bool,
    skip_special: bool,
}

fn choice(serving: &Serving, index: usize, outcome: Outcome, shape: &ChoiceShape) -> CompletionChoice {
    let tokenizer = serving.tokenizer();
    let of_prompt = outcome.prompt_logprobs.as_deref().unwrap_or_default();
    let logprobs = shape.logprobs.then(|| {
        let mut shown = CompletionLogprobs::default();
        let mut builder = CompletionLogprobsBuilder::new(tokenizer, shape.skip_special, 0);
        if let Some(echo) = shape.echo {
            builder.push_prompt(&mut shown, &echo.ids, of_prompt);
        }
        builder.push_tokens(&mut shown, &outcome.logprobs);
        shown
    });
    let text = match shape.echo {
        Some(echo) => format!("{}{}", echo.text, outcome.text),
        None => outcome.text,
    };
    CompletionChoice {
        index,
        text,
        logprobs,
        finish_reason: finish_reason(outcome.reason),
        prompt_logprobs: shape.prompt_logprobs.then(|| logprob_format::prompt(tokenizer, of_prompt)),
    }
}

/// Each prompt's text, if it came as text, and its ids.
async fn encode(
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
                        .map_err(|error| prompt_error("prompt", error))?;
                    Ok((Some(text), ids))
                }
                Prompt::Tokens(ids) => {
                    validate::prompt_ids("prompt", &ids, &serving.limits())?;
                    Ok((None, ids))
                }
            })
            .collect()
    })
    .await?
}

/// What `/v1/completions` would give the model for the same body, prompt by prompt.
pub async fn render(
    State(state): State<Arc<AppState>>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<Value>, ApiError> {
    let serving = state.serving()?.clone();
    let (shared, own) = parse_generation::<CompletionFields>(&body)?;
    let model = serving.target(shared.model.as_deref())?.name;
    let prompts = own.prompt.map(|prompts| prompts.0).unwrap_or_default();
    validate::choices(prompts.len(), 1)?;
    let encoded = encode(&serving, prompts, own.add_special_tokens.unwrap_or(true)).await?;
    let rendered: Vec<Value> = encoded
        .into_iter()
        .map(|(text, ids)| {
            let prompt = text.unwrap_or_else(|| serving.tokenizer().decode(&ids, false));
            json!({"prompt": prompt, "count": ids.len(), "token_ids": ids})
        })
        .collect();
    Ok(Json(json!({"model": model, "prompts": rendered})))
}
