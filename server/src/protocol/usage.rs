//! The `usage` object.

use schemars::JsonSchema;
use serde::Serialize;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct UsageBody {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct PromptTokensDetails {
    pub cached_tokens: u64,
}

impl UsageBody {
    /// Adds one choice. The prompt counts once however many choices share it: pass `first_of_prompt` for one of
    /// them.
    pub fn add(&mut self, choice: rill_engine::Usage, first_of_prompt: bool) {
        if first_of_prompt {
            self.prompt_tokens += u64::from(choice.prompt_tokens);
            self.prompt_tokens_details.cached_tokens += u64::from(choice.cached_tokens);
        }
        self.completion_tokens += u64::from(choice.completion_tokens);
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}
