//! `GET /health` and `/ready`, for probes, which are never asked for a key; and `/version`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use rill_engine::Health;

use crate::app::AppState;
use crate::protocol::ApiError;
use crate::protocol::probes::{StatusBody, VersionBody};

/// Alive: 200 while loading and draining, too; 503 once the engine has died.
pub async fn health(State(state): State<Arc<AppState>>) -> Result<Json<StatusBody>, ApiError> {
    let Ok(serving) = state.serving() else { return Ok(Json(StatusBody { status: "loading" })) };
    match serving.engine.health() {
        Health::Dead(reason) => Err(ApiError::unavailable(&format!("the engine has stopped: {reason}"), 5)),
        Health::Ready | Health::Draining | Health::Stopped => Ok(Json(StatusBody { status: "ok" })),
    }
}

/// Takes work: 503 until loaded and while draining.
pub async fn ready(State(state): State<Arc<AppState>>) -> Result<Json<StatusBody>, ApiError> {
    state.ready()?;
    Ok(Json(StatusBody { status: "ready" }))
}

pub async fn version() -> Json<VersionBody> {
    Json(VersionBody { version: env!("CARGO_PKG_VERSION") })
}
