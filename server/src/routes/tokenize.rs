//! `POST /tokenize` and `/detokenize`, and `GET /tokenizer_info`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::{over_text, prompt_error};
use crate::app::AppState;
use crate::body::{JsonBytes, parse};
use crate::chat_request::{ChatPrompt, ChatPromptFields};
use crate::protocol::ApiError;
use crate::protocol::tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse, TokenizerInfo,
};
use crate::validate;

pub async fn tokenize(
    State(state): State<Arc<AppState>>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let serving = state.serving()?.clone();
    let request: TokenizeRequest = parse(&body)?;
    serving.model_name(request.model.as_deref())?;
    let tokens = match (request.prompt, request.messages) {
        (Some(prompt), None) => {
            let add_special = request.add_special_tokens.unwrap_or(true);
            let serving = serving.clone();
            over_text(prompt.len(), move || serving.prompts.encode_text(&prompt, add_special))
                .await?
                .map_err(|error| prompt_error("prompt", error))?
        }
        (None, Some(messages)) => {
            let fields = ChatPromptFields {
                describe_tools: request.tools.is_some(),
                tools: request.tools,
                documents: None,
                add_generation_prompt: request.add_generation_prompt,
                continue_final_message: request.continue_final_message,
                chat_template: request.chat_template,
                variables: request.chat_template_kwargs,
            };
            let chat = ChatPrompt::new(&messages, fields, state.trusts_request_chat_template())?;
            chat.encode(&serving, request.add_special_tokens.unwrap_or(false)).await?
        }
        _ => return Err(ApiError::invalid("prompt", "exactly one of prompt and messages is needed")),
    };
    let token_strs = request.return_token_strs.unwrap_or(false).then(|| {
        let text = |&id: &u32| String::from_utf8_lossy(serving.tokenizer().token_bytes(id)).into_owned();
        tokens.iter().map(text).collect()
    });
    Ok(Json(TokenizeResponse { count: tokens.len(), max_model_len: serving.context_len(), tokens, token_strs }))
}

/// With it clients such as lm-eval need no tokenizer of their own.
pub async fn info(State(state): State<Arc<AppState>>) -> Result<Json<TokenizerInfo>, ApiError> {
    let serving = state.serving()?;
    let tokenizer = serving.tokenizer();
    let spelling = |id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
    Ok(Json(TokenizerInfo {
        bos_token: tokenizer.bos_token_id().map(spelling),
        eos_token: tokenizer.eos_token_id().or(serving.eos_token_ids.first().copied()).map(spelling),
        chat_template: serving.template.as_ref().map(|template| template.source().to_owned()),
        model_max_length: serving.context_len(),
    }))
}

pub async fn detokenize(
    State(state): State<Arc<AppState>>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let serving = state.serving()?;
    let request: DetokenizeRequest = parse(&body)?;
    serving.model_name(request.model.as_deref())?;
    validate::prompt_ids("tokens", &request.tokens, &serving.limits())?;
    Ok(Json(DetokenizeResponse { prompt: serving.tokenizer().decode(&request.tokens, false) }))
}
