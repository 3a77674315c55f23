//! Wire fields → engine parameters. Every limit is here, and every refusal names the field, the limit and the value.

use std::collections::BTreeMap;

use rill_engine::{SamplingParams, StopParams};
use serde_json::Value;

use crate::protocol::ApiError;
use crate::protocol::error::shorten;
use crate::protocol::sampling::SharedFields;
use crate::sampling_defaults::SamplingDefaults;

/// Choices per prompt.
pub const N_MAX: i64 = 64;
/// Choices of one request over all its prompts.
pub const CHOICES_MAX: usize = 256;
pub const STOP_STRINGS_MAX: usize = 16;
pub const STOP_STRING_BYTES_MAX: usize = 1024;
pub const STOP_TOKEN_IDS_MAX: usize = 256;
pub const LOGIT_BIAS_MAX: usize = 1024;
pub const LOGPROBS_MAX: i64 = 20;
pub const CACHE_SALT_BYTES_MAX: usize = 256;
pub const METADATA_MAX: usize = 16;
pub const METADATA_KEY_MAX: usize = 64;
pub const METADATA_VALUE_MAX: usize = 512;
/// Below this a temperature is 0: dividing logits by it leaves nothing but the most likely token anyway.
const TEMPERATURE_MIN: f64 = 1e-5;

/// What a model allows.
#[derive(Debug, Clone, Copy)]
pub struct ModelLimits<'a> {
    pub vocab_size: usize,
    /// Prompt and completion together, in tokens.
    pub context_len: usize,
    pub eos_token_ids: &'a [u32],
    /// Of fields that are not set.
    pub sampling: &'a SamplingDefaults,
}

/// The shared fields, checked; the prompt's length and `max_tokens`' default are not known yet.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedOptions {
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub max_tokens: Option<u32>,
    /// `max_tokens` in here is not set yet: see `max_tokens_for`.
    pub stop: StopParams,
    pub sampling: SamplingParams,
    pub prompt_logprobs: Option<u32>,
    pub priority: i32,
    pub cache_salt: Option<String>,
}

/// Checks everything completions and chat have in common.
pub fn shared(fields: &SharedFields, limits: &ModelLimits) -> Result<SharedOptions, ApiError> {
    let stream = fields.stream.unwrap_or(false);
    if fields.stream_options.is_some() && !stream {
        return Err(ApiError::invalid("stream_options", "stream_options needs stream to be true"));
    }
    let prompt_logprobs = integer("prompt_logprobs", fields.prompt_logprobs, 0, LOGPROBS_MAX)?;
    if prompt_logprobs.is_some() && stream {
        return Err(ApiError::invalid(
            "prompt_logprobs",
            "prompt_logprobs with stream true is not supported by this server yet",
        ));
    }
    if let Some(salt) = &fields.cache_salt
        && !(1..=CACHE_SALT_BYTES_MAX).contains(&salt.len())
    {
        return Err(ApiError::invalid(
            "cache_salt",
            format!("cache_salt must be 1 to {CACHE_SALT_BYTES_MAX} bytes long, not {}", salt.len()),
        ));
    }
    metadata(fields.metadata.as_ref())?;
    let (name, max_tokens) = match fields.max_completion_tokens {
        Some(value) => ("max_completion_tokens", Some(value)),
        None => ("max_tokens", fields.max_tokens),
    };
    let max_tokens = integer(name, max_tokens, 0, i64::from(u32::MAX))?;
    let n = integer("n", fields.n, 1, N_MAX)?.unwrap_or(1);
    Ok(SharedOptions {
        n: n as usize,
        stream,
        include_usage: fields.stream_options.and_then(|o| o.include_usage).unwrap_or(false),
        max_tokens: max_tokens.map(|value| value as u32),
        stop: stop(fields, limits)?,
        sampling: sampling(fields, limits)?,
        prompt_logprobs: prompt_logprobs.map(|value| value as u32),
        priority: integer("priority", fields.priority, i64::from(i32::MIN), i64::from(i32::MAX))?.unwrap_or(0)
            as i32,
        cache_salt: fields.cache_salt.clone(),
    })
}

/// OpenAI's limits on `metadata`, which is for the client's own use.
fn metadata(entries: Option<&BTreeMap<String, Value>>) -> Result<(), ApiError> {
    let entries = entries.into_iter().flatten();
    let count = entries.clone().count();
    if count > METADATA_MAX {
        let message = format!("metadata may hold at most {METADATA_MAX} entries, not {count}");
        return Err(ApiError::invalid("metadata", message));
    }
    for (key, value) in entries {
        let shown = shorten(key);
        let Some(text) = value.as_str() else {
            return Err(ApiError::invalid(
                "metadata",
                format!("metadata: the value of `{shown}` must be a string"),
            ));
        };
        for (what, text, max) in [("key", key.as_str(), METADATA_KEY_MAX), ("value", text, METADATA_VALUE_MAX)] {
            let chars = text.chars().count();
            if chars > max {
                let message = format!(
                    "metadata: the {what} of `{shown}` must be at most {max} characters long, not {chars}"
                );
                return Err(ApiError::invalid("metadata", message));
            }
        }
    }
    Ok(())
}

fn sampling(fields: &SharedFields, limits: &ModelLimits) -> Result<SamplingParams, ApiError> {
    let temperature = number("temperature", fields.temperature, 0.0, 2.0)?.unwrap_or(limits.sampling.temperature);
    let top_p = number("top_p", fields.top_p, 0.0, 1.0)?.unwrap_or(limits.sampling.top_p);
    // vLLM's -1 is off, too.
    let top_k = integer("top_k", fields.top_k, -1, i64::from(u32::MAX))?.unwrap_or(limits.sampling.top_k).max(0);
    let repetition_penalty = number("repetition_penalty", fields.repetition_penalty, 0.0, 10.0)?
        .unwrap_or(limits.sampling.repetition_penalty);
    if (repetition_penalty as f32) < f32::MIN_POSITIVE {
        return Err(ApiError::invalid(
            "repetition_penalty",
            format!("repetition_penalty must be above 0, not {repetition_penalty}"),
        ));
    }
    Ok(SamplingParams {
        temperature: if temperature < TEMPERATURE_MIN { 0.0 } else { temperature as f32 },
        // OpenAI takes 0: the smallest set of tokens there is, the most likely one.
        top_p: (top_p as f32).max(f32::MIN_POSITIVE),
        top_k: top_k as u32,
        min_p: number("min_p", fields.min_p, 0.0, 1.0)?.unwrap_or(limits.sampling.min_p) as f32,
        seed: match fields.seed {
            Some(seed) => seed as u64,
            None => random_seed()?,
        },
        presence_penalty: number("presence_penalty", fields.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0) as f32,
        frequency_penalty: number("frequency_penalty", fields.frequency_penalty, -2.0, 2.0)?.unwrap_or(0.0) as f32,
        repetition_penalty: repetition_penalty as f32,
        logit_bias: logit_bias(fields, limits)?,
    })
}

fn logit_bias(fields: &SharedFields, limits: &ModelLimits) -> Result<Vec<(u32, f32)>, ApiError> {
    let entries = fields.logit_bias.iter().flatten();
    let count = fields.logit_bias.as_ref().map_or(0, |map| map.len());
    if count > LOGIT_BIAS_MAX {
        return Err(ApiError::invalid(
            "logit_bias",
            format!("logit_bias may name at most {LOGIT_BIAS_MAX} tokens, not {count}"),
        ));
    }
    let mut biases = entries
        .map(|(key, &bias)| {
            let id: u32 = key.parse().map_err(|_| {
                ApiError::invalid("logit_bias", format!("logit_bias: `{}` is not a token id", shorten(key)))
            })?;
            token_id("logit_bias", i64::from(id), limits)?;
            if !(-100.0..=100.0).contains(&bias) {
                return Err(ApiError::invalid(
                    "logit_bias",
                    format!("logit_bias of token {id} must be between -100 and 100, not {bias}"),
                ));
            }
            Ok((id, bias as f32))
        })
        .collect::<Result<Vec<_>, ApiError>>()?;
    let asked: Vec<u32> = biases.iter().map(|(id, _)| *id).collect();
    // No logit is large enough to make up for it.
    let suppressed = limits.sampling.suppressed.iter().filter(|id| !asked.contains(id));
    biases.extend(suppressed.map(|&id| (id, f32::MIN)));
    Ok(biases)
}

fn stop(fields: &SharedFields, limits: &ModelLimits) -> Result<StopParams, ApiError> {
    let strings = fields.stop.as_ref().map_or(&[][..], |stop| &stop.0);
    if strings.len() > STOP_STRINGS_MAX {
        return Err(ApiError::invalid(
            "stop",
            format!("stop may hold at most {STOP_STRINGS_MAX} strings, not {}", strings.len()),
        ));
    }
    for (position, string) in strings.iter().enumerate() {
        if !(1..=STOP_STRING_BYTES_MAX).contains(&string.len()) {
            return Err(ApiError::invalid(
                "stop",
                format!("stop[{position}] must be 1 to {STOP_STRING_BYTES_MAX} bytes long, not {}", string.len()),
            ));
        }
    }
    let ids = fields.stop_token_ids.as_deref().unwrap_or_default();
    if ids.len() > STOP_TOKEN_IDS_MAX {
        return Err(ApiError::invalid(
            "stop_token_ids",
            format!("stop_token_ids may hold at most {STOP_TOKEN_IDS_MAX} ids, not {}", ids.len()),
        ));
    }
    let min_tokens = integer("min_tokens", fields.min_tokens, 0, i64::from(u32::MAX))?.unwrap_or(0);
    let ignore_eos = fields.ignore_eos.unwrap_or(false);
    Ok(StopParams {
        max_tokens: 0,
        min_tokens: min_tokens as u32,
        eos_token_ids: if ignore_eos { Vec::new() } else { limits.eos_token_ids.to_vec() },
        stop_token_ids: ids
            .iter()
            .map(|&id| token_id("stop_token_ids", id, limits))
            .collect::<Result<_, ApiError>>()?,
        stop_strings: strings.to_vec(),
        include_stop_str: fields.include_stop_str_in_output.unwrap_or(false),
        skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
    })
}

/// The tokens to generate after a prompt of `prompt_len`, or why prompt and completion do not fit.
///
/// `default` is what an unset `max_tokens` means; it is cut to what the context leaves, unlike an explicit one.
pub fn max_tokens_for(
    param: &str,
    options: &SharedOptions,
    prompt_len: usize,
    default: Option<u32>,
    limits: &ModelLimits,
) -> Result<u32, ApiError> {
    let context_len = limits.context_len;
    if prompt_len == 0 {
        return Err(ApiError::invalid(param, format!("{param} must not be empty")));
    }
    let wanted = options.max_tokens.map_or(1, |value| value.min(1)) as usize;
    if prompt_len + wanted > context_len {
        return Err(ApiError::context_length(
            param,
            context_len,
            &format!(
                "the prompt is {prompt_len} tokens long and at least {wanted} of the completion must fit, too"
            ),
        ));
    }
    let room = u32::try_from(context_len - prompt_len).unwrap_or(u32::MAX);
    let max_tokens = match options.max_tokens {
        Some(asked) if asked > room => {
            return Err(ApiError::context_length(
                "max_tokens",
                context_len,
                &format!("the prompt is {prompt_len} tokens long and max_tokens asks for {asked} more"),
            ));
        }
        Some(asked) => asked,
        None => default.unwrap_or(room).min(room),
    };
    if options.stop.min_tokens > max_tokens {
        return Err(ApiError::invalid(
            "min_tokens",
            format!("min_tokens must be at most max_tokens, {max_tokens}, not {}", options.stop.min_tokens),
        ));
    }
    Ok(max_tokens)
}

/// Whether a text of `len` tokens, which is to be embedded, fits.
pub fn embedded_len(param: &str, len: usize, limits: &ModelLimits) -> Result<(), ApiError> {
    match len {
        0 => Err(ApiError::invalid(param, format!("{param} must not be empty"))),
        len if len > limits.context_len => {
            Err(ApiError::context_length(param, limits.context_len, &format!("a text is {len} tokens long")))
        }
        _ => Ok(()),
    }
}

/// Checks ids that a client sends in place of text.
pub fn prompt_ids(param: &str, ids: &[u32], limits: &ModelLimits) -> Result<(), ApiError> {
    // Before looking at each: a body of megabytes may hold a million.
    if ids.len() > limits.context_len {
        return Err(ApiError::context_length(
            param,
            limits.context_len,
            &format!("the prompt is {} tokens long", ids.len()),
        ));
    }
    ids.iter().try_for_each(|&id| token_id(param, i64::from(id), limits).map(|_| ()))
}

/// A number of prompts and choices that one request may ask for.
pub fn choices(prompts: usize, n: usize) -> Result<(), ApiError> {
    if prompts.saturating_mul(n) > CHOICES_MAX {
        return Err(ApiError::invalid(
            "n",
            format!(
                "a request may ask for at most {CHOICES_MAX} choices; {prompts} prompts times n = {n} is more"
            ),
        ));
    }
    Ok(())
}

/// An integer in `low..=high`.
pub fn integer(field: &str, value: Option<i64>, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
    match value {
        Some(given) if !(low..=high).contains(&given) => {
            Err(ApiError::invalid(field, format!("{field} must be between {low} and {high}, not {given}")))
        }
        _ => Ok(value),
    }
}

/// A finite number in `low..=high`.
fn number(field: &str, value: Option<f64>, low: f64, high: f64) -> Result<Option<f64>, ApiError> {
    match value {
        Some(given) if !(low..=high).contains(&given) => {
            Err(ApiError::invalid(field, format!("{field} must be between {low} and {high}, not {given}")))
        }
        _ => Ok(value),
    }
}

fn token_id(field: &str, id: i64, limits: &ModelLimits) -> Result<u32, ApiError> {
    match u32::try_from(id) {
        Ok(valid) if (valid as usize) < limits.vocab_size => Ok(valid),
        _ => Err(ApiError::invalid(
            field,
            format!("{field}: {id} is not a token id; the vocabulary has ids 0 to {}", limits.vocab_size - 1),
        )),
    }
}

fn random_seed() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|error| ApiError::internal(format!("the system gives no random numbers: {error}")))
}

/// The seed of choice `j` of a prompt: the first choice has the request's own, so that `n` does not change it.
pub fn seed_of_choice(seed: u64, j: usize) -> u64 {
    if j == 0 {
        return seed;
    }
    // SplitMix64: neighbouring seeds and choices get unrelated streams.
    let mut z = seed.wrapping_add((j as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
