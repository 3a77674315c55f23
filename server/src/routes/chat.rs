//! `POST /v1/chat/completions`, and `/render`, which stops short of generating.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::{new_id, parse_generation};
use crate::app::{AppState, unix_seconds};
use crate::auth::Caller;
use crate::body::JsonBytes;
use crate::chat_request::ChatRequest;
use crate::event_stream;
use crate::generation::finish_reason;
use crate::logprob_format;
use crate::protocol::ApiError;
use crate::protocol::chat::{ChatChoice, ChatFields, ChatResponse};
use crate::protocol::render::RenderedChat;
use crate::protocol::usage::UsageBody;
use crate::sse::{FrameWriter, StreamHead, StreamKind};

pub async fn chat_completions(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let (serving, in_flight) = state.enter()?;
    let (shared, own) = parse_generation::<ChatFields>(&body)?;
    drop(body);
    let chat = ChatRequest::new(&state, &serving, &shared, own).await?;
    let n = chat.options.n;
    let id = new_id("chatcmpl")?;
    let created_s = unix_seconds();
    let generation = chat.submit(&serving, &caller)?;
    let ChatRequest { model, options, answers, .. } = chat;
    let top_logprobs = chat.top_logprobs.map(|top| top as usize);
    if options.stream {
        let head = StreamHead { id: &id, created_s, model: &model, fingerprint: &serving.fingerprint };
        let kind = StreamKind::Chat { top_logprobs, answers };
        let writer = FrameWriter::new(serving.clone(), &head, kind, n, n, options.include_usage);
        return event_stream::respond(generation, writer, in_flight, state.keep_alive()).await;
    }
    let outcomes =
        generation.collect().await.map_err(|failure| ApiError::failed(failure.kind, failure.message))?;
    let tokenizer = serving.tokenizer();
    let prompt_logprobs = options
        .prompt_logprobs
        .and_then(|_| outcomes.first()?.prompt_logprobs.as_deref())
        .map(|entries| logprob_format::prompt(tokenizer, entries));
    let mut usage = UsageBody::default();
    let mut choices = Vec::with_capacity(n);
    for (index, outcome) in outcomes.into_iter().enumerate() {
        usage.add(outcome.usage, index == 0);
        let (message, finish_reason) = answers.message(index, &outcome.text, finish_reason(outcome.reason));
        choices.push(ChatChoice {
            index,
            message,
            logprobs: top_logprobs.map(|top| logprob_format::chat(tokenizer, &outcome.logprobs, top)),
            finish_reason,
        });
    }
    let response = ChatResponse {
        id: &id,
        object: "chat.completion",
        created: created_s,
        model: &model,
        system_fingerprint: &serving.fingerprint,
        service_tier: "default",
        choices,
        usage,
        prompt_logprobs,
    };
    Ok(Json(response).into_response())
}

/// What `/v1/chat/completions` would give the model for the same body.
pub async fn render(
    State(state): State<Arc<AppState>>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<RenderedChat>, ApiError> {
    let serving = state.serving()?.clone();
    let (shared, own) = parse_generation::<ChatFields>(&body)?;
    let chat = ChatRequest::new(&state, &serving, &shared, own).await?;
    let prompt = serving.tokenizer().decode(&chat.ids, false);
    let (count, max_tokens) = (chat.ids.len(), chat.max_tokens);
    Ok(Json(RenderedChat { model: chat.model, prompt, token_ids: chat.ids, count, max_tokens }))
}
