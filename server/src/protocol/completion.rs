//! `/v1/completions`: the request's own fields, and the response.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::logprobs::{CompletionLogprobs, PromptLogprob};
use super::prompt::Prompts;
use super::usage::UsageBody;
use crate::validate;

/// The fields completions do not share with chat; see `SharedFields` for the others.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct CompletionFields {
    #[schemars(required)]
    pub prompt: Option<Prompts>,
    /// Show the prompt before the output.
    pub echo: Option<bool>,
    /// Log-probabilities of each token, with so many alternatives.
    #[schemars(range(min = 0, max = validate::LOGPROBS_MAX))]
    pub logprobs: Option<i64>,
    /// Generate so many for each prompt and answer with the `n` likeliest a token; not with `stream`.
    #[schemars(range(min = 1, max = validate::N_MAX))]
    pub best_of: Option<i64>,
    /// What follows the completion; needs a model with fill-in-the-middle tokens.
    pub suffix: Option<String>,
    /// Begin the prompt as the tokenizer does, with the beginning-of-text token if there is one.
    pub add_special_tokens: Option<bool>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct CompletionResponse<'a> {
    pub id: &'a str,
    #[schemars(extend("const" = "text_completion"))]
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub system_fingerprint: &'a str,
    pub choices: Vec<CompletionChoice>,
    pub usage: UsageBody,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    #[schemars(extend("enum" = ["stop", "length"]))]
    pub finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<BTreeMap<u32, PromptLogprob>>>>,
}
