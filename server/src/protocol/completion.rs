//! `/v1/completions`: the request's own fields, and the response.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::logprobs::{CompletionLogprobs, PromptLogprob};
use super::prompt::Prompts;
use super::usage::UsageBody;

/// The fields completions do not share with chat; see `SharedFields` for the others.
#[derive(Debug, Default, Deserialize)]
pub struct CompletionFields {
    pub prompt: Option<Prompts>,
    pub echo: Option<bool>,
    pub logprobs: Option<i64>,
    pub best_of: Option<i64>,
    pub add_special_tokens: Option<bool>,
}

#[derive(Debug, Serialize)]
pub struct CompletionResponse<'a> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub system_fingerprint: &'a str,
    pub choices: Vec<CompletionChoice>,
    pub usage: UsageBody,
}

#[derive(Debug, Serialize)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<BTreeMap<u32, PromptLogprob>>>>,
}
