//! `POST /v1/embeddings`: texts as vectors of length 1, from the hidden states of the model.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use rill_engine::{EmbedRequest, Event};
use rill_models::Pooling;

use super::{encode_prompts, parse_generation};
use crate::app::AppState;
use crate::auth::Caller;
use crate::body::JsonBytes;
use crate::protocol::ApiError;
use crate::protocol::embeddings::{
    EmbeddingOut, EmbeddingValues, EmbeddingsRequest, EmbeddingsResponse, EmbeddingsUsage,
};
use crate::protocol::error::shorten;
use crate::serving::{Serving, Target};
use crate::validate;

/// OpenAI's bound.
pub const INPUTS_MAX: usize = 2048;

pub async fn embeddings(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let (serving, _in_flight) = state.enter()?;
    let (_, request) = parse_generation::<EmbeddingsRequest>(&body)?;
    drop(body);
    let Target { name: model, adapter } = serving.target(request.model.as_deref())?;
    let width = serving.engine.hidden_size();
    if width == 0 || serving.pooling == Pooling::Other {
        return Err(ApiError::invalid(
            "model",
            "this model's files ask for embeddings of a kind that is not implemented, if for any: see --pooling",
        ));
    }
    let as_base64 = match request.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let message = format!("encoding_format must be float or base64, not `{}`", shorten(other));
            return Err(ApiError::invalid("encoding_format", message));
        }
    };
    let dimensions = validate::integer("dimensions", request.dimensions, 1, width as i64)?;
    let dimensions = dimensions.map_or(width, |dimensions| dimensions as usize);
    let priority = validate::integer("priority", request.priority, i32::MIN.into(), i32::MAX.into())?;
    let inputs = request.input.map(|prompts| prompts.0).unwrap_or_default();
    if !(1..=INPUTS_MAX).contains(&inputs.len()) {
        let message = format!("input must hold 1 to {INPUTS_MAX} texts, not {}", inputs.len());
        return Err(ApiError::invalid("input", message));
    }
    let encoded = encode_prompts("input", &serving, inputs, request.add_special_tokens.unwrap_or(true)).await?;
    for (_, ids) in &encoded {
        validate::embedded_len("input", ids.len(), &serving.limits())?;
    }
    let tokens = encoded.iter().map(|(_, ids)| ids.len() as u64).sum();
    let mut charge = caller.charge(tokens, 0)?;
    let priority = caller.priority(priority.unwrap_or(0) as i32);
    // A window of them at a time: a long list is no reason to fill the queue.
    let engine = serving.engine.config();
    let window = engine.max_running.min(engine.max_waiting).max(1);
    let answered: Vec<(Vec<f32>, u64)> = stream::iter(encoded)
        .map(|(_, prompt)| {
            let request = EmbedRequest {
                prompt,
                pooling: serving.pooling,
                priority,
                cache_salt: None,
                tenant: caller.name().cloned(),
                adapter: adapter.clone(),
            };
            embed(&serving, request)
        })
        .buffered(window)
        .try_collect()
        .await
        .inspect_err(|_| charge.waive())?;
    let prompt_tokens = answered.iter().map(|(_, tokens)| tokens).sum();
    let data = answered
        .into_iter()
        .enumerate()
        .map(|(index, (values, _))| {
            let values = normalised(values, dimensions);
            let embedding = match as_base64 {
                false => EmbeddingValues::Float(values),
                true => {
                    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    EmbeddingValues::Base64(STANDARD.encode(bytes))
                }
            };
            EmbeddingOut { object: "embedding", index, embedding }
        })
        .collect();
    let usage = EmbeddingsUsage { prompt_tokens, total_tokens: prompt_tokens };
    Ok(Json(EmbeddingsResponse { object: "list", data, model: &model, usage }).into_response())
}

/// One prompt's pooled hidden state, and its tokens.
async fn embed(serving: &Serving, request: EmbedRequest) -> Result<(Vec<f32>, u64), ApiError> {
    let tokens = request.prompt.len() as u64;
    let mut stream = serving.engine.embed(request)?;
    let mut embedding = None;
    while let Some(event) = stream.next().await {
        match event {
            Event::Embedding { values } => embedding = Some(values),
            Event::Failed { kind, message } => return Err(ApiError::failed(kind, message)),
            Event::Finished { .. } | Event::Prompt { .. } | Event::Delta { .. } => {}
        }
    }
    let values = embedding.ok_or_else(|| ApiError::internal("the engine gave nothing"))?;
    Ok((values, tokens))
}

/// The leading `dimensions` values, scaled to length 1.
fn normalised(mut values: Vec<f32>, dimensions: usize) -> Vec<f32> {
    values.truncate(dimensions);
    let length = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_and_scaled() {
        assert_eq!(normalised(vec![3.0, 4.0], 2), [0.6, 0.8]);
        assert_eq!(normalised(vec![3.0, 4.0, 5.0], 1), [1.0]);
        assert_eq!(normalised(vec![0.0, 0.0], 2), [0.0, 0.0]);
    }
}
