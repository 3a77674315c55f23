//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, where the operator allows them: they read files of this machine.

use std::path::Path;
use std::sync::Arc;

use axum::extract::State;

use crate::adapters::AdapterError;
use crate::app::AppState;
use crate::body::{JsonBytes, parse};
use crate::protocol::ApiError;
use crate::protocol::adapters::{LoadAdapterRequest, UnloadAdapterRequest};
use crate::serving::Serving;

pub async fn load(State(state): State<Arc<AppState>>, JsonBytes(body): JsonBytes) -> Result<String, ApiError> {
    let serving = allowed(&state)?;
    let LoadAdapterRequest { lora_name, lora_path, load_inplace } = parse(&body)?;
    let name = lora_name.clone();
    let loading = move || serving.adapters.load(&name, Path::new(&lora_path), load_inplace);
    tokio::task::spawn_blocking(loading).await.map_err(|error| {
        tracing::error!(%error, "loading an adapter failed");
        ApiError::internal("a defect in the server was caught; see its log")
    })??;
    Ok(format!("Success: LoRA adapter '{lora_name}' added successfully."))
}

pub async fn unload(State(state): State<Arc<AppState>>, JsonBytes(body): JsonBytes) -> Result<String, ApiError> {
    let serving = allowed(&state)?;
    let UnloadAdapterRequest { lora_name } = parse(&body)?;
    serving.adapters.unload(&lora_name)?;
    Ok(format!("Success: LoRA adapter '{lora_name}' removed successfully."))
}

fn allowed(state: &AppState) -> Result<Arc<Serving>, ApiError> {
    let serving = state.ready()?;
    if !serving.adapters.limits().at_run_time {
        return Err(ApiError::forbidden(
            "adapters are loaded and unloaded by requests only where the server runs with --enable-runtime-lora",
        ));
    }
    Ok(serving.clone())
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let message = error.to_string();
        match error {
            AdapterError::Unknown(_) => ApiError::not_found("lora_name", message),
            AdapterError::Files(_) => ApiError::invalid("lora_path", message),
            AdapterError::Name
            | AdapterError::Taken(_)
            | AdapterError::Loaded(_)
            | AdapterError::Loading(_)
            | AdapterError::Full { .. }
            | AdapterError::Model => ApiError::invalid("lora_name", message),
        }
    }
}
