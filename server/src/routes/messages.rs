//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use rill_engine::{FinishReason, Usage};
use serde_json::json;

use super::new_id;
use crate::anthropic_request::{NAMES, to_chat};
use crate::anthropic_stream::MessageFrames;
use crate::app::AppState;
use crate::auth::Caller;
use crate::body::{JsonBytes, parse};
use crate::chat_request::ChatRequest;
use crate::event_stream;
use crate::generation::finish_reason;
use crate::protocol::ApiError;
use crate::protocol::anthropic::{
    BlockOut, MessageOut, MessagesErrorBody, MessagesErrorDetail, MessagesRequest, MessagesUsage, TokenCount,
};

pub async fn messages(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    body: Result<JsonBytes, ApiError>,
) -> Result<Response, MessagesError> {
    let (serving, in_flight) = state.enter()?;
    let request: MessagesRequest = parse(&body?.0)?;
    let stop = Arc::new(StopWords(request.stop_sequences.clone().unwrap_or_default()));
    let (shared, own) = to_chat(request, false)?;
    let chat = ChatRequest::new(&state, &serving, &shared, own).await.map_err(|error| error.renamed(&NAMES))?;
    let id = new_id("msg")?;
    let generation = chat.submit(&serving, &caller)?;
    if chat.options.stream {
        let frames = MessageFrames::new(&id, &chat.model, chat.ids.len(), chat.answers.reader(0), stop);
        return Ok(event_stream::respond(generation, frames, in_flight, state.keep_alive()).await?);
    }
    let outcome = generation
        .collect()
        .await
        .map_err(|failure| ApiError::failed(failure.kind, failure.message))?
        .pop()
        .ok_or_else(|| ApiError::internal("the engine gave nothing"))?;
    let (message, _) = chat.answers.message(0, &outcome.text, finish_reason(outcome.reason));
    let mut content = Vec::new();
    if let Some(thinking) = message.reasoning_content {
        content.push(BlockOut::Thinking { thinking, signature: String::new() });
    }
    let calls = message.tool_calls.unwrap_or_default();
    let has_calls = !calls.is_empty();
    match message.content {
        Some(text) if !text.is_empty() || (content.is_empty() && !has_calls) => {
            content.push(BlockOut::Text { text })
        }
        _ => {}
    }
    for call in calls {
        // What is not JSON, having been cut short, has no better place.
        let input = serde_json::from_str(&call.function.arguments).unwrap_or_else(|_| json!({}));
        content.push(BlockOut::ToolUse { id: call.id, name: call.function.name, input });
    }
    let (stop_reason, stop_sequence) = stop.of(outcome.reason, has_calls);
    let answer = MessageOut {
        id: &id,
        kind: "message",
        role: "assistant",
        model: &chat.model,
        content,
        stop_reason: Some(stop_reason),
        stop_sequence,
        usage: usage_of(outcome.usage),
    };
    Ok(Json(answer).into_response())
}

pub async fn count_tokens(
    State(state): State<Arc<AppState>>,
    body: Result<JsonBytes, ApiError>,
) -> Result<Json<TokenCount>, MessagesError> {
    let serving = state.serving()?.clone();
    let request: MessagesRequest = parse(&body?.0)?;
    let (shared, own) = to_chat(request, true)?;
    let chat = ChatRequest::new(&state, &serving, &shared, own).await.map_err(|error| error.renamed(&NAMES))?;
    Ok(Json(TokenCount { input_tokens: chat.ids.len() }))
}

/// `usage` in Anthropic's terms, which count what came from the cache apart.
pub fn usage_of(usage: Usage) -> MessagesUsage {
    MessagesUsage {
        input_tokens: u64::from(usage.prompt_tokens.saturating_sub(usage.cached_tokens)),
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: u64::from(usage.cached_tokens),
        output_tokens: u64::from(usage.completion_tokens),
    }
}

/// A request's `stop_sequences`.
pub struct StopWords(Vec<String>);

impl StopWords {
    /// `stop_reason` and `stop_sequence`.
    pub fn of(&self, reason: FinishReason, has_calls: bool) -> (&'static str, Option<String>) {
        match reason {
            FinishReason::Length => ("max_tokens", None),
            FinishReason::StopString(index) => ("stop_sequence", self.0.get(index).cloned()),
            _ if has_calls => ("tool_use", None),
            FinishReason::Eos | FinishReason::StopToken(_) | FinishReason::Complete => ("end_turn", None),
        }
    }
}

/// An error in Anthropic's shape.
pub struct MessagesError(pub ApiError);

impl MessagesError {
    pub fn body(&self) -> MessagesErrorBody<'_> {
        let kind = match self.0.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "api_error",
        };
        MessagesErrorBody { kind: "error", error: MessagesErrorDetail { kind, message: &self.0.message } }
    }
}

impl From<ApiError> for MessagesError {
    fn from(error: ApiError) -> Self {
        MessagesError(error)
    }
}

impl IntoResponse for MessagesError {
    fn into_response(self) -> Response {
        let body = Json(self.body()).into_response().into_body();
        // Status, Retry-After and the like are those of OpenAI's shape.
        let (mut parts, _) = self.0.into_response().into_parts();
        parts.headers.remove(header::CONTENT_LENGTH);
        (parts, body).into_response()
    }
}
