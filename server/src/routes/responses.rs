//! `POST /v1/responses`, and `GET` and `DELETE /v1/responses/{id}`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use rill_engine::Event;
use serde_json::{Map, Value, json};

use super::{PathId, new_id};
use crate::app::{AppState, unix_seconds};
use crate::auth::Caller;
use crate::body::{JsonBytes, parse};
use crate::chat_request::ChatRequest;
use crate::event_stream::{self, Frames};
use crate::protocol::ApiError;
use crate::protocol::error::shorten;
use crate::protocol::responses::{DeletedResponse, ResponseHead, ResponsesRequest};
use crate::response_output::ResponseWriter;
use crate::responses_request::{NAMES, to_chat};

pub async fn responses(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let (serving, in_flight) = state.enter()?;
    let request: ResponsesRequest = parse(&body)?;
    drop(body);
    let earlier = match &request.previous_response_id {
        Some(id) => {
            let kept = state.responses().get(id, caller.name());
            kept.ok_or_else(|| not_found("previous_response_id", id))?.turns
        }
        None => Vec::new(),
    };
    let (shared, own, turns) = to_chat(&request, earlier)?;
    let chat = ChatRequest::new(&state, &serving, &shared, own).await.map_err(|error| error.renamed(&NAMES))?;
    let mut generation = chat.submit(&serving, &caller)?;
    let store = request.store.unwrap_or(true);
    let head = head(&request, &chat.model)?;
    let mut writer = ResponseWriter::new(
        state.clone(),
        head,
        chat.answers.reader(0),
        store.then(|| (turns, caller.name().cloned())),
        chat.options.stream,
    );
    if chat.options.stream {
        return event_stream::respond(generation, writer, in_flight, state.keep_alive()).await;
    }
    while let Some((index, event)) = generation.next().await {
        match event {
            Event::Failed { kind, message } => return Err(ApiError::failed(kind, message)),
            event => writer.event(index, event),
        };
    }
    Ok(Json(writer.into_response()).into_response())
}

pub async fn one(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    PathId(id): PathId,
) -> Result<Json<Value>, ApiError> {
    let kept = state.responses().get(&id, caller.name());
    kept.map(|kept| Json(kept.response)).ok_or_else(|| not_found("response_id", &id))
}

pub async fn delete(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    PathId(id): PathId,
) -> Result<Json<DeletedResponse>, ApiError> {
    if !state.responses().delete(&id, caller.name()) {
        return Err(not_found("response_id", &id));
    }
    Ok(Json(DeletedResponse { id, object: "response", deleted: true }))
}

fn not_found(param: &str, id: &str) -> ApiError {
    ApiError {
        status: StatusCode::NOT_FOUND,
        ..ApiError::invalid(param, format!("{param}: no response `{}` is kept", shorten(id)))
    }
}

/// All of a response that is known before it is generated.
fn head(request: &ResponsesRequest, model: &str) -> Result<Map<String, Value>, ApiError> {
    let format = request.text.as_ref().and_then(|text| text.format.as_ref());
    let format = match format {
        Some(format) if format.kind == "json_schema" => json!({
            "type": "json_schema", "name": format.schema.name, "schema": format.schema.schema,
            "strict": format.schema.strict,
        }),
        Some(format) => json!({"type": format.kind}),
        None => json!({"type": "text"}),
    };
    let response = ResponseHead {
        id: new_id("resp")?.replacen('-', "_", 1),
        object: "response",
        created_at: unix_seconds(),
        status: "in_progress",
        background: false,
        error: None,
        incomplete_details: None,
        instructions: request.instructions.as_deref(),
        max_output_tokens: request.max_output_tokens,
        model,
        output: Vec::new(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        previous_response_id: request.previous_response_id.as_deref(),
        reasoning: Map::from_iter([("effort".to_owned(), Value::Null), ("summary".to_owned(), Value::Null)]),
        service_tier: "default",
        store: request.store.unwrap_or(true),
        temperature: request.temperature.unwrap_or(1.0),
        text: Map::from_iter([("format".to_owned(), format)]),
        tool_choice: request.tool_choice.clone().unwrap_or_else(|| json!("auto")),
        tools: request.tools.clone().unwrap_or_default(),
        top_p: request.top_p.unwrap_or(1.0),
        truncation: "disabled",
        usage: None,
        user: request.user.as_deref(),
        metadata: request.metadata.clone().unwrap_or_default(),
    };
    match json!(response) {
        Value::Object(fields) => Ok(fields),
        _ => Err(ApiError::internal("a response is an object")),
    }
}
