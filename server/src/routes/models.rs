//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::PathId;
use crate::app::{AppState, Serving};
use crate::protocol::ApiError;
use crate::protocol::models::{ModelCard, ModelList};

pub async fn list(State(state): State<Arc<AppState>>) -> Result<Json<ModelList>, ApiError> {
    let serving = state.ready()?;
    let data = serving.names.iter().map(|name| card(serving, name)).collect();
    Ok(Json(ModelList { object: "list", data }))
}

pub async fn one(State(state): State<Arc<AppState>>, PathId(id): PathId) -> Result<Json<ModelCard>, ApiError> {
    let serving = state.ready()?;
    let name = serving.model_name(Some(&id))?;
    Ok(Json(card(serving, name)))
}

fn card(serving: &Serving, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: serving.created_s,
        owned_by: "rill",
        root: serving.names[0].clone(),
        max_model_len: serving.context_len(),
    }
}
