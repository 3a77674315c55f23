//! Whoever sent a request: the key it bears, what it may use, and what it has used once it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use super::account::{Account, Limit, Limited, Place};
use super::bucket::Reading;
use crate::protocol::ApiError;

/// The sender of a request, for handlers.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// `None`: this server asks for no keys.
    account: Option<Arc<Account>>,
}

impl Caller {
    pub fn new(account: Arc<Account>) -> Caller {
        Caller { account: Some(account) }
    }

    /// The key's name.
    pub fn name(&self) -> Option<&Arc<str>> {
        self.account.as_ref().map(|account| account.name())
    }

    /// Counts one more request, under way until the place is dropped.
    pub fn enter(&self) -> Result<Option<Place>, ApiError> {
        let Some(account) = &self.account else { return Ok(None) };
        account.enter(Instant::now()).map(Some).map_err(|limited| refusal(account, limited))
    }

    /// The priority of a request that asks for `asked`.
    pub fn priority(&self, asked: i32) -> i32 {
        match self.account.as_ref().and_then(|account| account.priority()) {
            Some(priority) => priority.saturating_add(asked.max(0)),
            None => asked,
        }
    }

    /// Sets aside the tokens of a prompt and those it may generate.
    pub fn charge(&self, prompt: u64, generated_max: u64) -> Result<Charge, ApiError> {
        let taken = match &self.account {
            Some(account) => account
                .take_tokens(prompt, generated_max, Instant::now())
                .map_err(|limited| refusal(account, limited))?,
            None => 0,
        };
        Ok(Charge { account: self.account.clone(), taken, prompt, generated: 0 })
    }

    /// Tells what is left of the limits, in OpenAI's headers.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        let Some(account) = &self.account else { return };
        for (limit, reading) in account.readings(Instant::now()) {
            let names = match limit {
                Limit::Requests => &REQUEST_HEADERS,
                Limit::Tokens => &TOKEN_HEADERS,
                Limit::Concurrency => continue,
            };
            if let Some(Reading { limit, remaining, reset }) = reading {
                headers.insert(&names[0], HeaderValue::from(limit));
                headers.insert(&names[1], HeaderValue::from(remaining));
                if let Ok(value) = HeaderValue::from_str(&go_duration(reset)) {
                    headers.insert(&names[2], value);
                }
            }
        }
    }
}

static REQUEST_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
static TOKEN_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// The headers that pages of other origins may read.
pub fn rate_limit_headers() -> impl Iterator<Item = HeaderName> {
    REQUEST_HEADERS.iter().chain(&TOKEN_HEADERS).cloned()
}

fn refusal(account: &Account, limited: Limited) -> ApiError {
    let Limited { limit, value, asked, wait } = limited;
    let name = account.name();
    let message = match (limit, wait) {
        (Limit::Requests, _) => format!("the key {name} may send {value} requests a minute"),
        (Limit::Concurrency, _) => format!("the key {name} may have {value} requests under way at once"),
        (Limit::Tokens, Some(_)) => {
            format!(
                "the key {name} may use {value} tokens a minute, of which {asked} are not left for this request"
            )
        }
        (Limit::Tokens, None) => {
            format!("the key {name} may use {value} tokens a minute, fewer than the {asked} of this prompt")
        }
    };
    ApiError::rate_limited(limit.label(), message, wait.map(seconds_up))
}

/// Whole seconds, for Retry-After.
fn seconds_up(wait: Duration) -> u32 {
    let seconds = wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0));
    u32::try_from(seconds.max(1)).unwrap_or(u32::MAX)
}

/// As OpenAI writes durations: `120ms`, `7.5s`, `1m12s`.
fn go_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    match (minutes, rest) {
        (0, 0) => "0s".to_owned(),
        (0, rest) if rest < 1000 => format!("{rest}ms"),
        (0, rest) => format!("{}s", rest as f64 / 1000.0),
        (minutes, rest) => format!("{minutes}m{}s", rest as f64 / 1000.0),
    }
}

/// Tokens set aside for a request; settled when dropped.
#[derive(Debug, Default)]
pub struct Charge {
    account: Option<Arc<Account>>,
    taken: u64,
    prompt: u64,
    generated: u64,
}

impl Charge {
    /// Tokens that came of it.
    pub fn generated(&mut self, tokens: u64) {
        self.generated += tokens;
    }

    /// It came to nothing and costs nothing.
    pub fn waive(&mut self) {
        (self.prompt, self.generated) = (0, 0);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.settle(self.taken, self.prompt, self.generated, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (millis, expected) in
            [(0, "0s"), (17, "17ms"), (1000, "1s"), (7660, "7.66s"), (60_000, "1m0s"), (3_672_500, "61m12.5s")]
        {
            assert_eq!(go_duration(Duration::from_millis(millis)), expected);
        }
        assert_eq!(seconds_up(Duration::from_millis(1001)), 2);
        assert_eq!(seconds_up(Duration::from_nanos(1)), 1);
        assert_eq!(seconds_up(Duration::MAX), u32::MAX);
    }
}
