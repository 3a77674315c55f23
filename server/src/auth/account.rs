//! What one name has used: its limits, what is left of them, and its counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::bucket::{Bucket, Reading};
use super::key_file::KeyLimits;

/// Kept over reloads of the file as long as the name is in it.
#[derive(Debug)]
pub struct Account {
    name: Arc<str>,
    usage: Mutex<Usage>,
    pub counters: Counters,
}

#[derive(Debug)]
struct Usage {
    limits: KeyLimits,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    in_flight: u64,
}

/// For `/metrics`.
#[derive(Debug, Default)]
pub struct Counters {
    pub requests: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub generation_tokens: AtomicU64,
    limited: [AtomicU64; Limit::ALL.len()],
}

/// Which limit a request ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Requests,
    Tokens,
    Concurrency,
}

impl Limit {
    pub const ALL: [Limit; 3] = [Limit::Requests, Limit::Tokens, Limit::Concurrency];

    pub fn label(self) -> &'static str {
        match self {
            Limit::Requests => "requests",
            Limit::Tokens => "tokens",
            Limit::Concurrency => "concurrency",
        }
    }
}

/// Why a request is not taken now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limited {
    pub limit: Limit,
    /// The limit's value.
    pub value: u64,
    /// What the request asked of it.
    pub asked: u64,
    /// When it may be taken; `None` is never.
    pub wait: Option<Duration>,
}

impl Account {
    pub fn new(name: &str, limits: KeyLimits, now: Instant) -> Account {
        let usage = Usage {
            limits,
            requests: limits.requests_per_minute.map(|limit| Bucket::new(limit, now)),
            tokens: limits.tokens_per_minute.map(|limit| Bucket::new(limit, now)),
            in_flight: 0,
        };
        Account { name: name.into(), usage: Mutex::new(usage), counters: Counters::default() }
    }

    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Other limits from now on.
    pub fn set_limits(&self, limits: KeyLimits, now: Instant) {
        let mut usage = self.usage();
        set_bucket(&mut usage.requests, limits.requests_per_minute, now);
        set_bucket(&mut usage.tokens, limits.tokens_per_minute, now);
        usage.limits = limits;
    }

    pub fn priority(&self) -> Option<i32> {
        self.usage().limits.priority
    }

    pub fn in_flight(&self) -> u64 {
        self.usage().in_flight
    }

    /// Takes a request, which is under way until the place is dropped.
    pub fn enter(self: &Arc<Self>, now: Instant) -> Result<Place, Limited> {
        let mut usage = self.usage();
        if let Some(value) = usage.limits.concurrency.filter(|&limit| usage.in_flight >= limit) {
            // Nobody knows when a request ends.
            let wait = Some(Duration::from_secs(1));
            return Err(self.limited(Limited { limit: Limit::Concurrency, value, asked: 1, wait }));
        }
        if let Some(bucket) = &mut usage.requests
            && let Err(wait) = bucket.take(1, now)
        {
            let value = bucket.per_minute();
            return Err(self.limited(Limited { limit: Limit::Requests, value, asked: 1, wait: Some(wait) }));
        }
        usage.in_flight += 1;
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        Ok(Place(self.clone()))
    }

    /// Sets tokens aside: those of the prompt, and as many of those it may generate as the limit has at all. Returns
    /// how many these are.
    pub fn take_tokens(&self, prompt: u64, generated_max: u64, now: Instant) -> Result<u64, Limited> {
        let mut usage = self.usage();
        let Some(bucket) = &mut usage.tokens else { return Ok(0) };
        let value = bucket.per_minute();
        let refused = |asked, wait| self.limited(Limited { limit: Limit::Tokens, value, asked, wait });
        if prompt > value {
            return Err(refused(prompt, None));
        }
        let amount = prompt.saturating_add(generated_max).min(value);
        bucket.take(amount, now).map_err(|wait| refused(amount, Some(wait)))?;
        Ok(amount)
    }

    /// A request ended that had `taken` tokens set aside.
    pub fn settle(&self, taken: u64, prompt: u64, generated: u64, now: Instant) {
        self.counters.prompt_tokens.fetch_add(prompt, Ordering::Relaxed);
        self.counters.generation_tokens.fetch_add(generated, Ordering::Relaxed);
        if let Some(bucket) = &mut self.usage().tokens {
            bucket.settle(taken, prompt + generated, now);
        }
    }

    /// The limits on requests and tokens as they are now.
    pub fn readings(&self, now: Instant) -> [(Limit, Option<Reading>); 2] {
        let mut usage = self.usage();
        let requests = usage.requests.as_mut().map(|bucket| bucket.read(now));
        let tokens = usage.tokens.as_mut().map(|bucket| bucket.read(now));
        [(Limit::Requests, requests), (Limit::Tokens, tokens)]
    }

    fn limited(&self, limited: Limited) -> Limited {
        self.counters.limited[limited.limit as usize].fetch_add(1, Ordering::Relaxed);
        limited
    }

    fn usage(&self) -> MutexGuard<'_, Usage> {
        // Whoever holds it only adds and subtracts.
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counters {
    pub fn limited(&self, limit: Limit) -> u64 {
        self.limited[limit as usize].load(Ordering::Relaxed)
    }
}

fn set_bucket(bucket: &mut Option<Bucket>, per_minute: Option<u64>, now: Instant) {
    match (bucket.as_mut(), per_minute) {
        (Some(bucket), Some(per_minute)) => bucket.set_per_minute(per_minute, now),
        (_, per_minute) => *bucket = per_minute.map(|per_minute| Bucket::new(per_minute, now)),
    }
}

/// A request under way, until dropped.
#[derive(Debug)]
pub struct Place(Arc<Account>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.usage().in_flight -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(limits: KeyLimits, now: Instant) -> Arc<Account> {
        Arc::new(Account::new("anna", limits, now))
    }

    #[test]
    fn a_place_is_held_until_dropped_and_a_refusal_costs_nothing() {
        let now = Instant::now();
        let limits = KeyLimits { concurrency: Some(1), requests_per_minute: Some(2), ..KeyLimits::default() };
        let account = account(limits, now);
        let place = account.enter(now).unwrap();
        for _ in 0..5 {
            let limited = account.enter(now).unwrap_err();
            assert_eq!((limited.limit, limited.value), (Limit::Concurrency, 1));
        }
        drop(place);
        drop(account.enter(now).unwrap());
        let limited = account.enter(now).unwrap_err();
        assert_eq!((limited.limit, limited.wait), (Limit::Requests, Some(Duration::from_secs(30))));
        assert_eq!(account.in_flight(), 0);
        assert_eq!(account.counters.requests.load(Ordering::Relaxed), 2);
        assert_eq!(Limit::ALL.map(|limit| account.counters.limited(limit)), [1, 0, 5]);
    }

    #[test]
    fn tokens_are_set_aside_and_settled() {
        let now = Instant::now();
        let account = account(KeyLimits { tokens_per_minute: Some(100), ..KeyLimits::default() }, now);
        assert_eq!(account.take_tokens(10, 50, now), Ok(60));
        let limited = account.take_tokens(10, 50, now).unwrap_err();
        assert_eq!((limited.asked, limited.wait), (60, Some(Duration::from_secs(12))));
        account.settle(60, 10, 5, now);
        assert_eq!(account.take_tokens(10, 50, now), Ok(60));
        account.settle(60, 10, 5, now);
        // More than there can ever be is set aside as far as it goes, once all of it is there.
        assert!(account.take_tokens(10, 1000, now).unwrap_err().wait.is_some());
        let later = now + Duration::from_secs(60);
        assert_eq!(account.take_tokens(10, 1000, later), Ok(100));
        account.settle(100, 10, 190, later);
        assert_eq!(account.take_tokens(0, 1, later).unwrap_err().wait.unwrap().as_secs(), 60);
        // A prompt that can never fit need not come back.
        assert_eq!(account.take_tokens(101, 0, later).unwrap_err().wait, None);
    }

    #[test]
    fn limits_may_change_while_requests_are_under_way() {
        let now = Instant::now();
        let account = account(KeyLimits::default(), now);
        let place = account.enter(now).unwrap();
        assert_eq!(account.take_tokens(10, 50, now), Ok(0));
        account.set_limits(
            KeyLimits { tokens_per_minute: Some(100), concurrency: Some(1), ..KeyLimits::default() },
            now,
        );
        assert!(account.enter(now).is_err());
        account.settle(0, 10, 50, now);
        assert_eq!(account.readings(now)[1].1.unwrap().remaining, 40);
        drop(place);
        account.set_limits(KeyLimits::default(), now);
        assert_eq!(account.readings(now).map(|(_, reading)| reading), [None, None]);
    }
}
