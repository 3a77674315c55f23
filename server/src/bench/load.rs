//! One measurement: a closed loop of streams over one server, and what came of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::client::{Client, EngineCounts, RequestError, Sample};
use super::prompts::prompt;

/// What is asked of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Requests under way at once.
    pub streams: usize,
    /// Requests in all.
    pub requests: usize,
    pub prompt_words: usize,
    pub max_tokens: usize,
    /// Counted in prompt tokens a second; otherwise in those generated.
    pub is_prefill: bool,
    /// The answers must be JSON documents.
    pub structured: bool,
}

impl Work {
    pub fn name(&self) -> String {
        let name = match (self.is_prefill, self.streams) {
            (true, _) => "prefill".to_owned(),
            (false, 1) => "1 stream".to_owned(),
            (false, streams) => format!("{streams} streams"),
        };
        if self.structured { name + " of JSON" } else { name }
    }
}

/// A server and what it calls its model.
#[derive(Debug, Clone)]
pub struct Target {
    pub name: String,
    pub client: Client,
    pub model: String,
}

/// What one closed loop measured.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub samples: Vec<Sample>,
    pub errors: Vec<RequestError>,
    pub time: Duration,
    /// What the engine counted meanwhile, where the server tells.
    pub engine: Option<EngineCounts>,
}

impl Outcome {
    pub fn prompt_tokens(&self) -> u64 {
        self.samples.iter().map(|sample| sample.prompt_tokens).sum()
    }

    pub fn completion_tokens(&self) -> u64 {
        self.samples.iter().map(|sample| sample.completion_tokens).sum()
    }

    /// Tokens a second of the kind the work is counted in.
    pub fn rate(&self, work: &Work) -> f64 {
        let tokens = if work.is_prefill { self.prompt_tokens() } else { self.completion_tokens() };
        tokens as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// Runs `work` on `target`; prompts are drawn by `seed`, which must differ from run to run if no cache is to help.
pub async fn run(work: &Work, target: &Target, seed: u64) -> Outcome {
    let before = target.client.counts().await;
    let next = Arc::new(AtomicUsize::new(0));
    let start = Instant::now();
    let mut streams = JoinSet::new();
    for _ in 0..work.streams {
        let (work, target, next) = (work.clone(), target.clone(), next.clone());
        streams.spawn(async move {
            let mut results = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= work.requests {
                    return results;
                }
                let prompt = prompt(seed.wrapping_mul(1_000_003).wrapping_add(index as u64), work.prompt_words);
                let answer = target.client.complete(&target.model, &prompt, work.max_tokens, work.structured);
                results.push(answer.await);
            }
        });
    }
    let mut outcome = Outcome::default();
    while let Some(results) = streams.join_next().await {
        // A stream's task neither panics nor is it aborted while this loop waits.
        for result in results.unwrap_or_default() {
            match result {
                Ok(sample) => outcome.samples.push(sample),
                Err(error) => outcome.errors.push(error),
            }
        }
    }
    outcome.time = start.elapsed();
    outcome.engine = before.zip(target.client.counts().await).map(|(before, after)| after - before);
    outcome
}
