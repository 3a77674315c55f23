//! What a caller asks of the engine and what it hears back.

use std::sync::Arc;

use crate::adapter::LoadedAdapter;
use crate::constraint::Grammar;
use crate::sequence::Tenant;

/// One sequence to generate. `n > 1` is several of these, submitted one by one.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Never empty, never longer than the context less one token unless `stop.max_tokens` is 0.
    pub prompt: Vec<u32>,
    pub sampling: SamplingParams,
    pub stop: StopParams,
    /// For each generated token, its log-probability and that many alternatives. `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// The same for each prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// Smaller runs earlier (vLLM's convention); 0 where the caller does not say.
    pub priority: i32,
    /// Requests share cached prefixes only with requests of the same salt.
    pub cache_salt: Option<String>,
    /// On whose behalf it runs: among equal priorities, tenants share the engine fairly.
    pub tenant: Tenant,
    /// What the generated text must match. Where only its end is left it ends, whatever `min_tokens` says.
    pub grammar: Option<Grammar>,
    /// What it runs with beside the model's own weights.
    pub adapter: Option<Arc<LoadedAdapter>>,
}

impl GenerateRequest {
    /// The likeliest token each time, `max_tokens` of them whatever they are, and nothing asked for besides.
    pub fn greedy(prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
        GenerateRequest {
            prompt,
            sampling: SamplingParams {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                seed: 0,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                repetition_penalty: 1.0,
                logit_bias: Vec::new(),
            },
            stop: StopParams {
                max_tokens,
                min_tokens: 0,
                eos_token_ids: Vec::new(),
                stop_token_ids: Vec::new(),
                stop_strings: Vec::new(),
                include_stop_str: false,
                skip_special_tokens: true,
            },
            logprobs: None,
            prompt_logprobs: None,
            priority: 0,
            cache_salt: None,
            tenant: None,
            grammar: None,
            adapter: None,
        }
    }

    /// Tokens that may be generated: `max_tokens`, or less where the context ends before.
    pub(crate) fn max_new_tokens(&self, prompt_len: usize, context_len: usize) -> usize {
        (self.stop.max_tokens as usize).min(context_len.saturating_sub(prompt_len))
    }

    /// Events the request can cause at most: the prompt's, one for each generated token, and the terminal one. A
    /// channel this large never fills up, so the engine never waits for a slow reader.
    pub(crate) fn events_max(&self, context_len: usize) -> usize {
        self.max_new_tokens(self.prompt.len(), context_len) + 2
    }

    /// What the engine could not work with; says which field, its limit and its value.
    pub(crate) fn check(&self, vocab_size: usize, context_len: usize) -> Result<(), String> {
        let SamplingParams { temperature, top_p, min_p, repetition_penalty, .. } = self.sampling;
        let prompt_len = self.prompt.len();
        if prompt_len == 0 {
            return Err("prompt is empty; it must have at least 1 token".into());
        }
        let prompt_max = if self.stop.max_tokens == 0 { context_len } else { context_len - 1 };
        if prompt_len > prompt_max {
            return Err(format!(
                "prompt has {prompt_len} tokens; the context of {context_len} leaves room for {prompt_max}"
            ));
        }
        let prompt = self.prompt.iter().map(|&token| ("prompt", token));
        let biased = self.sampling.logit_bias.iter().map(|&(token, _)| ("logit_bias", token));
        if let Some((field, token)) = prompt.chain(biased).find(|&(_, token)| token as usize >= vocab_size) {
            return Err(format!("{field} has token id {token}; the vocabulary has {vocab_size} ids"));
        }
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(format!("temperature is {temperature}; it must be a number, at least 0"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(format!("top_p is {top_p}; it must be above 0 and at most 1"));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(format!("min_p is {min_p}; it must be between 0 and 1"));
        }
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            return Err(format!("repetition_penalty is {repetition_penalty}; it must be a number above 0"));
        }
        let finite = [
            ("presence_penalty", self.sampling.presence_penalty),
            ("frequency_penalty", self.sampling.frequency_penalty),
        ];
        let biases = self.sampling.logit_bias.iter().map(|&(_, bias)| ("logit_bias", bias));
        for (field, value) in finite.into_iter().chain(biases) {
            if !value.is_finite() {
                return Err(format!("{field} is {value}; it must be a finite number"));
            }
        }
        for (field, top) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(top) = top.filter(|&top| top as usize > vocab_size) {
                return Err(format!("{field} is {top}; the vocabulary has {vocab_size} ids"));
            }
        }
        Ok(())
    }
}

/// How the next token is chosen from its logits.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 (or less than 1e-5) is greedy.
    pub temperature: f32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
    /// Key of the counter-based generator; the counter is the index of the generated token.
    pub seed: u64,
    /// In [-2, 2]: subtracted once from every token generated so far.
    pub presence_penalty: f32,
    /// In [-2, 2]: subtracted once per time a token was generated so far.
    pub frequency_penalty: f32,
    /// Above 0, 1 is off: divides positive and multiplies negative logits of tokens in prompt or output.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
}

/// When generation ends, and what of the end is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct StopParams {
    pub max_tokens: u32,
    /// Until there are this many tokens no stop string counts, and end and stop tokens are ruled out.
    pub min_tokens: u32,
    /// End-of-sequence ids: end the generation and are never shown. Empty with `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    /// Further ids that end the generation, not shown unless `include_stop_str`.
    pub stop_token_ids: Vec<u32>,
    /// Matched on the text, across token boundaries.
    pub stop_strings: Vec<String>,
    /// Show the matched stop string too.
    pub include_stop_str: bool,
    /// Leave control tokens out of the text.
    pub skip_special_tokens: bool,
}

/// What a request's stream carries. Exactly one of `Finished` and `Failed` comes, and it comes last.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt's log-probabilities (entry 0 is `None`: nothing precedes the first token). Sent once, before
    /// the first `Delta`, if asked for.
    Prompt {
        logprobs: Vec<Option<TokenLogprobs>>,
    },
    /// What an [`EmbedRequest`](crate::EmbedRequest) asked for. Sent once, before `Finished`.
    Embedding {
        values: Vec<f32>,
    },
    /// New text and the tokens it came from. Text may lag behind tokens while it could still turn out to be the
    /// start of a stop string or an incomplete UTF-8 sequence; all deltas' text concatenated is the final text.
    Delta {
        text: String,
        token_ids: Vec<u32>,
        logprobs: Vec<TokenLogprobs>,
    },
    Finished {
        reason: FinishReason,
        usage: Usage,
    },
    Failed {
        kind: FailureKind,
        message: String,
    },
}

/// A token, its log-softmax value under the raw logits (before temperature, penalties and masks), and the most
/// likely alternatives, most likely first.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub token: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token.
    Eos,
    /// One of `stop_token_ids`.
    StopToken(u32),
    /// The index of the stop string that matched.
    StopString(usize),
    /// The grammar is complete: nothing may follow.
    Complete,
    /// `max_tokens` or the end of the context.
    Length,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Tokens generated, shown or not.
    pub completion_tokens: u32,
    /// Prompt tokens whose keys and values came from the prefix cache.
    pub cached_tokens: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Waited longer in the queue than the configured limit: try again later.
    Overloaded,
    /// The engine is shutting down and the drain time is over.
    ShuttingDown,
    /// The request's grammar led to a place it cannot be followed from, or grew too complex.
    Grammar,
    /// The forward pass failed, or a defect was caught.
    Internal,
}
