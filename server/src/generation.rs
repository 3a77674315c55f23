//! One API request as several engine requests: submitted together, heard together, cancelled together.

use std::future::Future;
use std::pin::Pin;

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use rill_engine::{
    EngineHandle, Event, EventStream, FailureKind, FinishReason, GenerateRequest, TokenLogprobs, Usage,
};

use crate::auth::{Caller, Charge};
use crate::protocol::ApiError;

type Pull = Pin<Box<dyn Future<Output = (usize, Option<Event>, EventStream)> + Send>>;

/// The choices of one API request, still running. Dropping it cancels them all.
pub struct Generation {
    pulls: FuturesUnordered<Pull>,
    /// Tokens of each choice so far.
    generated: Vec<u32>,
    charge: Charge,
}

/// A choice, ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    pub reason: FinishReason,
    pub usage: Usage,
}

/// A choice failed, and with it the whole request.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

impl Generation {
    /// Submits all of `requests`, whose positions are the choices' indices and of which each `n` share a prompt, or
    /// none. The caller's limits are asked first.
    pub fn submit(
        engine: &EngineHandle,
        mut requests: Vec<GenerateRequest>,
        n: usize,
        caller: &Caller,
    ) -> Result<Self, ApiError> {
        let prompts = requests.iter().step_by(n).map(|request| request.prompt.len() as u64).sum();
        let generated_max = requests.iter().map(|request| u64::from(request.stop.max_tokens)).sum();
        let mut charge = caller.charge(prompts, generated_max)?;
        for request in &mut requests {
            request.priority = caller.priority(request.priority);
            request.tenant = caller.name().cloned();
        }
        let streams = engine.submit_all(requests).inspect_err(|_| charge.waive())?;
        Ok(Generation {
            generated: vec![0; streams.len()],
            pulls: streams.into_iter().enumerate().map(pull).collect(),
            charge,
        })
    }

    /// The next event of any choice and the choice's index; `None` once all have ended.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        let (index, event, stream) = self.pulls.next().await?;
        Some((index, self.heard(index, event, stream)))
    }

    /// The same if one is there already.
    pub fn try_next(&mut self) -> Option<(usize, Event)> {
        self.next().now_or_never().flatten()
    }

    /// All choices have ended.
    pub fn is_done(&self) -> bool {
        self.pulls.is_empty()
    }

    fn heard(&mut self, index: usize, event: Option<Event>, stream: EventStream) -> Event {
        match event {
            Some(Event::Finished { reason, usage }) => {
                self.generated[index] = usage.completion_tokens;
                Event::Finished { reason, usage }
            }
            Some(event @ Event::Failed { .. }) => {
                if self.generated.iter().all(|&tokens| tokens == 0) {
                    self.charge.waive();
                }
                event
            }
            Some(event) => {
                if let Event::Delta { token_ids, .. } = &event {
                    self.generated[index] += token_ids.len() as u32;
                }
                self.pulls.push(pull((index, stream)));
                event
            }
            // The engine promises a terminal event; without one it is gone.
            None => Event::Failed {
                kind: FailureKind::Internal,
                message: "the engine ended without finishing this request".to_owned(),
            },
        }
    }

    /// Waits for all choices and returns them in order.
    pub async fn collect(mut self) -> Result<Vec<Outcome>, Failure> {
        let mut outcomes: Vec<Outcome> = (0..self.pulls.len())
            .map(|_| Outcome {
                text: String::new(),
                token_ids: Vec::new(),
                logprobs: Vec::new(),
                prompt_logprobs: None,
                reason: FinishReason::Length,
                usage: Usage::default(),
            })
            .collect();
        while let Some((index, event)) = self.next().await {
            let outcome = &mut outcomes[index];
            match event {
                Event::Prompt { logprobs } => outcome.prompt_logprobs = Some(logprobs),
                Event::Embedding { .. } => {}
                Event::Delta { text, token_ids, logprobs } => {
                    outcome.text.push_str(&text);
                    outcome.token_ids.extend(token_ids);
                    outcome.logprobs.extend(logprobs);
                }
                Event::Finished { reason, usage } => {
                    outcome.reason = reason;
                    outcome.usage = usage;
                }
                Event::Failed { kind, message } => return Err(Failure { kind, message }),
            }
        }
        Ok(outcomes)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.charge.generated(self.generated.iter().map(|&tokens| u64::from(tokens)).sum());
    }
}

fn pull((index, mut stream): (usize, EventStream)) -> Pull {
    Box::pin(async move {
        let event = stream.next().await;
        (index, event, stream)
    })
}

/// OpenAI's word for why a choice ended.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Eos | FinishReason::StopToken(_) | FinishReason::StopString(_) | FinishReason::Complete => {
            "stop"
        }
        FinishReason::Length => "length",
    }
}
