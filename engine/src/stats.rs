//! Counters, gauges and histograms the server exports: atomics, so that reading them never waits for a step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::kv::BlockUsage;

/// Only ever grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// For totals counted elsewhere.
    pub(crate) fn set(&self, total: u64) {
        self.0.store(total, Relaxed);
    }
}

/// Observations counted in fixed buckets.
#[derive(Debug)]
pub struct Histogram {
    bounds: Box<[f64]>,
    /// Observations at or below each bound and above the one before; the last entry is what exceeds all.
    counts: Box<[AtomicU64]>,
    /// Bits of an f64. Only the engine's thread adds to it.
    sum: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct HistogramSnapshot {
    /// Upper bound and the observations at or below it, ascending, without the infinite one.
    pub buckets: Vec<(f64, u64)>,
    pub sum: f64,
    pub count: u64,
}

impl Histogram {
    /// `bounds` ascending.
    fn new(bounds: &[f64]) -> Histogram {
        debug_assert!(bounds.is_sorted());
        Histogram {
            bounds: bounds.into(),
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0f64.to_bits()),
        }
    }

    pub(crate) fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        let sum = f64::from_bits(self.sum.load(Relaxed)) + value;
        self.sum.store(sum.to_bits(), Relaxed);
    }

    pub fn snapshot(&self) -> HistogramSnapshot {
        let mut count = 0;
        let mut buckets = Vec::with_capacity(self.bounds.len());
        for (&bound, in_bucket) in self.bounds.iter().zip(&self.counts) {
            count += in_bucket.load(Relaxed);
            buckets.push((bound, count));
        }
        count += self.counts[self.bounds.len()].load(Relaxed);
        HistogramSnapshot { buckets, sum: f64::from_bits(self.sum.load(Relaxed)), count }
    }
}

/// How a request ended, in the words of `vllm:request_success_total`'s label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// Its stream was dropped.
    Abort,
    /// It failed.
    Error,
}

impl Outcome {
    pub const ALL: [Outcome; 4] = [Outcome::Stop, Outcome::Length, Outcome::Abort, Outcome::Error];

    pub fn label(self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Abort => "abort",
            Outcome::Error => "error",
        }
    }
}

/// Requests accepted that have not had their first step, wherever they are: the engine's true backlog. Shared between
/// the handle, which adds, and the engine, which takes away.
#[derive(Debug, Default)]
struct Backlog {
    requests: AtomicUsize,
    tokens: AtomicUsize,
}

/// A bound of the waiting queue was reached.
pub(crate) enum BacklogFull {
    Requests(usize),
    Tokens(usize),
}

impl Backlog {
    /// Called under the handle's gate, so that no two additions race.
    fn enter(&self, tokens: usize, max_requests: usize, max_tokens: usize) -> Result<(), BacklogFull> {
        let waiting = self.requests.load(Relaxed);
        if waiting >= max_requests {
            return Err(BacklogFull::Requests(waiting));
        }
        let waiting_tokens = self.tokens.load(Relaxed);
        if waiting > 0 && waiting_tokens.saturating_add(tokens) > max_tokens {
            return Err(BacklogFull::Tokens(waiting_tokens));
        }
        self.requests.fetch_add(1, Relaxed);
        self.tokens.fetch_add(tokens, Relaxed);
        Ok(())
    }

    fn leave(&self, tokens: usize) {
        self.requests.fetch_sub(1, Relaxed);
        self.tokens.fetch_sub(tokens, Relaxed);
    }
}

/// A request's place in the backlog, given up when this is dropped, wherever the request is then.
pub(crate) struct BacklogPlace {
    stats: Arc<Stats>,
    tokens: usize,
}

impl BacklogPlace {
    /// `limits`: requests and tokens.
    pub(crate) fn enter(
        stats: &Arc<Stats>,
        tokens: usize,
        limits: (usize, usize),
    ) -> Result<BacklogPlace, BacklogFull> {
        stats.backlog.enter(tokens, limits.0, limits.1)?;
        Ok(BacklogPlace { stats: Arc::clone(stats), tokens })
    }
}

impl Drop for BacklogPlace {
    fn drop(&mut self) {
        self.stats.backlog.leave(self.tokens);
    }
}

/// Everything the engine counts. Units are in the names; names are those of the exported series.
#[derive(Debug)]
pub struct Stats {
    backlog: Backlog,
    running: AtomicUsize,
    preempted: AtomicUsize,
    blocks_total: usize,
    blocks_free: AtomicUsize,
    blocks_cached: AtomicUsize,
    finished: [Counter; Outcome::ALL.len()],
    /// Prompt tokens of requests whose prompt has been computed.
    pub prompt_tokens: Counter,
    pub generation_tokens: Counter,
    pub preemptions: Counter,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: Counter,
    /// Prompt tokens found there.
    pub prefix_cache_hits: Counter,
    /// Tokens proposed to follow, and checked.
    pub drafted_tokens: Counter,
    /// Those that did follow.
    pub accepted_draft_tokens: Counter,
    /// Choices of one prompt that did not compute it.
    pub forks: Counter,
    /// Blocks copied when one of several holders was to write.
    pub block_copies: Counter,
    /// Evicted blocks handed on to be kept.
    pub blocks_spilled: Counter,
    /// Blocks read back.
    pub blocks_restored: Counter,
    /// Blocks that were to be read back and were missing or damaged.
    pub blocks_lost: Counter,
    /// Forward passes.
    pub steps: Counter,
    /// Microseconds of steps, from the batch to its tokens.
    pub step_us: Counter,
    /// Tokens drawn under a grammar.
    pub grammar_tokens: Counter,
    /// Microseconds of steps in which the engine waited for token masks, or followed grammars itself.
    pub grammar_us: Counter,
    pub time_to_first_token_seconds: Histogram,
    pub inter_token_latency_seconds: Histogram,
    /// Mean gap between a request's tokens.
    pub request_time_per_output_token_seconds: Histogram,
    pub e2e_request_latency_seconds: Histogram,
    /// From submission to the first step that computes any of it.
    pub request_queue_time_seconds: Histogram,
    /// From there to the first token.
    pub request_prefill_time_seconds: Histogram,
    /// From there to the last token.
    pub request_decode_time_seconds: Histogram,
    /// Prefill and decode time together.
    pub request_inference_time_seconds: Histogram,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    /// Tokens a step computed.
    pub iteration_tokens: Histogram,
}

// The bounds are vLLM's, so that its dashboards and autoscaling rules fit.
const FIRST_TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const PER_TOKEN_SECONDS: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

impl Stats {
    pub(crate) fn new(num_blocks: usize, context_len: usize) -> Stats {
        let lengths = one_two_five(context_len);
        Stats {
            backlog: Backlog::default(),
            running: AtomicUsize::new(0),
            preempted: AtomicUsize::new(0),
            blocks_total: num_blocks,
            blocks_free: AtomicUsize::new(num_blocks),
            blocks_cached: AtomicUsize::new(0),
            finished: Default::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            preemptions: Counter::default(),
            prefix_cache_queries: Counter::default(),
            prefix_cache_hits: Counter::default(),
            drafted_tokens: Counter::default(),
            accepted_draft_tokens: Counter::default(),
            forks: Counter::default(),
            block_copies: Counter::default(),
            blocks_spilled: Counter::default(),
            blocks_restored: Counter::default(),
            blocks_lost: Counter::default(),
            steps: Counter::default(),
            step_us: Counter::default(),
            grammar_tokens: Counter::default(),
            grammar_us: Counter::default(),
            time_to_first_token_seconds: Histogram::new(&FIRST_TOKEN_SECONDS),
            inter_token_latency_seconds: Histogram::new(&PER_TOKEN_SECONDS),
            request_time_per_output_token_seconds: Histogram::new(&PER_TOKEN_SECONDS),
            e2e_request_latency_seconds: Histogram::new(&REQUEST_SECONDS),
            request_queue_time_seconds: Histogram::new(&REQUEST_SECONDS),
            request_prefill_time_seconds: Histogram::new(&REQUEST_SECONDS),
            request_decode_time_seconds: Histogram::new(&REQUEST_SECONDS),
            request_inference_time_seconds: Histogram::new(&REQUEST_SECONDS),
            request_prompt_tokens: Histogram::new(&lengths),
            request_generation_tokens: Histogram::new(&lengths),
            iteration_tokens: Histogram::new(&STEP_TOKENS),
        }
    }

    /// Sequences in the running set.
    pub fn running(&self) -> usize {
        self.running.load(Relaxed)
    }

    /// Accepted requests that are not running: not started yet, or preempted.
    pub fn waiting(&self) -> usize {
        self.backlog.requests.load(Relaxed) + self.preempted.load(Relaxed)
    }

    /// Prompt tokens of the requests not started yet.
    pub fn waiting_tokens(&self) -> usize {
        self.backlog.tokens.load(Relaxed)
    }

    pub fn blocks_total(&self) -> usize {
        self.blocks_total
    }

    /// Blocks that hold nothing.
    pub fn blocks_free(&self) -> usize {
        self.blocks_free.load(Relaxed)
    }

    /// Blocks nobody holds that are kept for later prompts; available like the free ones.
    pub fn blocks_cached(&self) -> usize {
        self.blocks_cached.load(Relaxed)
    }

    /// Blocks of running sequences.
    pub fn blocks_held(&self) -> usize {
        self.blocks_total.saturating_sub(self.blocks_free() + self.blocks_cached())
    }

    /// Share of the blocks that is held, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        self.blocks_held() as f64 / self.blocks_total as f64
    }

    /// Requests that ended so.
    pub fn requests_finished(&self, outcome: Outcome) -> u64 {
        self.finished[outcome as usize].get()
    }

    pub(crate) fn finish(&self, outcome: Outcome) {
        self.finished[outcome as usize].add(1);
    }

    /// `preempted`: sequences that wait after having run.
    pub(crate) fn set_sequences(&self, running: usize, preempted: usize) {
        self.running.store(running, Relaxed);
        self.preempted.store(preempted, Relaxed);
    }

    pub(crate) fn set_blocks(&self, usage: BlockUsage) {
        self.blocks_free.store(usage.free, Relaxed);
        self.blocks_cached.store(usage.evictable, Relaxed);
    }
}

/// 1, 2, 5, 10, 20, 50, … up to `max`.
fn one_two_five(max: usize) -> Vec<f64> {
    let mut bounds = Vec::new();
    let mut decade = 1usize;
    loop {
        for step in [1, 2, 5] {
            let bound = decade.saturating_mul(step);
            if bound > max {
                return bounds;
            }
            bounds.push(bound as f64);
        }
        decade = decade.saturating_mul(10);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_own_bucket() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 2.0, 9.0] {
            histogram.observe(value);
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot, HistogramSnapshot { buckets: vec![(1.0, 2), (2.0, 4)], sum: 14.0, count: 5 });
    }

    #[test]
    fn length_bounds() {
        assert_eq!(one_two_five(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
    }

    #[test]
    fn the_backlog_is_bounded_by_requests_and_by_tokens() {
        let backlog = Backlog::default();
        assert!(backlog.enter(100, 2, 50).is_ok(), "a single request may exceed the token bound");
        assert!(matches!(backlog.enter(1, 2, 50), Err(BacklogFull::Tokens(100))));
        backlog.leave(100);
        assert!(backlog.enter(10, 2, 50).is_ok());
        assert!(backlog.enter(10, 2, 50).is_ok());
        assert!(matches!(backlog.enter(10, 2, 50), Err(BacklogFull::Requests(2))));
    }
}
