//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::PathId;
use crate::adapters::NamedAdapter;
use crate::app::AppState;
use crate::protocol::ApiError;
use crate::protocol::models::{ModelCard, ModelList};
use crate::serving::Serving;

pub async fn list(State(state): State<Arc<AppState>>) -> Result<Json<ModelList>, ApiError> {
    let serving = state.ready()?;
    let models = serving.names.iter().map(|name| card(serving, name));
    let adapters = serving.adapters.list().into_iter().map(|adapter| adapter_card(serving, adapter));
    let data = models.chain(adapters).collect();
    Ok(Json(ModelList { object: "list", data }))
}

pub async fn one(State(state): State<Arc<AppState>>, PathId(id): PathId) -> Result<Json<ModelCard>, ApiError> {
    let serving = state.ready()?;
    if let Some(adapter) = serving.adapters.list().into_iter().find(|adapter| adapter.name == id) {
        return Ok(Json(adapter_card(serving, adapter)));
    }
    Ok(Json(card(serving, &serving.target(Some(&id))?.name)))
}

fn adapter_card(serving: &Serving, adapter: NamedAdapter) -> ModelCard {
    ModelCard {
        created: adapter.loaded_s,
        root: adapter.path.display().to_string(),
        parent: Some(serving.names[0].clone()),
        ..card(serving, &adapter.name)
    }
}

fn card(serving: &Serving, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: serving.created_s,
        owned_by: "rill",
        root: serving.names[0].clone(),
        parent: None,
        max_model_len: serving.context_len(),
    }
}
