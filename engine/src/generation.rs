//! What one request's computed rows become: log-probabilities, tokens, text, events, and its times.

use std::sync::Arc;

use rill_models::Adapter;

use crate::adapter::AdapterUse;
use crate::constraint::{Constraint, MaskThread};
use crate::detokenizer::{Detokenizer, TokenText};
use crate::handle::Submission;
use crate::kv::salt;
use crate::request::{Event, FailureKind, FinishReason, GenerateRequest, TokenLogprobs, Usage};
use crate::sampler::{RuledOut, Sampler, TokenHistory};
use crate::scheduler::PlanEntry;
use crate::sequence::{Sequence, SequenceKey};
use crate::stats::{BacklogPlace, Outcome, Stats};
use crate::stop::StopMatcher;

/// A generated token, not yet accounted for.
#[derive(Debug)]
pub(crate) struct Drawn {
    token: u32,
    logprobs: Option<TokenLogprobs>,
}

/// Why one sequence cannot go on.
#[derive(Debug)]
pub(crate) struct SequenceFailure {
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
}

impl SequenceFailure {
    pub(crate) fn internal(message: impl Into<String>) -> SequenceFailure {
        SequenceFailure { kind: FailureKind::Internal, message: message.into() }
    }

    fn grammar(message: String) -> SequenceFailure {
        SequenceFailure { kind: FailureKind::Grammar, message }
    }
}

/// Moments of a request's life, in microseconds of the engine's clock.
#[derive(Debug, Default)]
struct Times {
    submitted: u64,
    admitted: Option<u64>,
    first_token: Option<u64>,
    last_token: u64,
}

/// The output side of a request; the scheduler has its [`Sequence`].
pub(crate) struct Generation {
    /// Without its prompt, which the sequence has.
    request: GenerateRequest,
    prompt_len: usize,
    /// `max_tokens`, or less where the context ends before.
    max_tokens: usize,
    generated: usize,
    history: TokenHistory,
    /// End and stop tokens: ruled out until `min_tokens` are there. Empty if there is no minimum.
    masked: Vec<u32>,
    constraint: Option<Constraint>,
    /// What ends a grammar, ruled out for a request that ignores ends.
    grammar_ends: Vec<u32>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    prompt_done: bool,
    events: flume::Sender<Event>,
    /// Until the first admission.
    place: Option<BacklogPlace>,
    /// The handle sees when the last of these is gone.
    _in_flight: flume::Sender<std::convert::Infallible>,
    times: Times,
    adapter: Option<AdapterUse>,
}

impl Generation {
    /// Splits a submission into what the scheduler needs and the rest.
    pub(crate) fn begin(
        submission: Submission,
        arrival: u64,
        context_len: usize,
        text: &dyn TokenText,
    ) -> (Sequence, Generation) {
        let Submission { mut request, events, place, in_flight, submitted_us } = submission;
        let prompt = std::mem::take(&mut request.prompt);
        let key = SequenceKey { priority: request.priority, arrival };
        let max_tokens = request.max_new_tokens(prompt.len(), context_len);
        let adapter = request.adapter.as_ref().map(|adapter| adapter.id());
        let stop = &request.stop;
        let constraint = request.grammar.as_ref().map(Constraint::new);
        let grammar_ends = match &request.grammar {
            Some(grammar) if stop.eos_token_ids.is_empty() => grammar.end_tokens().to_vec(),
            _ => Vec::new(),
        };
        let mut masked: Vec<u32> = match stop.min_tokens {
            0 => Vec::new(),
            _ => stop.eos_token_ids.iter().chain(&stop.stop_token_ids).chain(&grammar_ends).copied().collect(),
        };
        masked.sort_unstable();
        masked.dedup();
        let generation = Generation {
            prompt_len: prompt.len(),
            max_tokens,
            generated: 0,
            history: TokenHistory::new(&request.sampling, &prompt),
            masked,
            constraint,
            grammar_ends,
            detokenizer: Detokenizer::new(stop.skip_special_tokens, text.strips_leading_space()),
            stops: StopMatcher::new(&stop.stop_strings, stop.include_stop_str),
            prompt_logprobs: Vec::new(),
            prompt_done: false,
            events,
            place: Some(place),
            _in_flight: in_flight,
            times: Times { submitted: submitted_us, ..Times::default() },
            adapter: request.adapter.take().map(AdapterUse::new),
            request,
        };
        let scored = generation.request.prompt_logprobs.is_some();
        let salt = salt(generation.request.cache_salt.as_deref(), adapter);
        (Sequence::new(key, prompt, max_tokens, scored, salt), generation)
    }

    /// Nobody listens any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_disconnected()
    }

    /// Microseconds it has been waiting for its first admission; `None` once admitted.
    pub(crate) fn queued_us(&self, now: u64) -> Option<u64> {
        self.place.as_ref().map(|_| now.saturating_sub(self.times.submitted))
    }

    pub(crate) fn admit(&mut self, now: u64) {
        self.place = None;
        self.times.admitted = Some(now);
        if let Some(adapter) = &mut self.adapter {
            adapter.admit();
        }
    }

    /// What its sequence runs with beside the model's own weights.
    pub(crate) fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref().map(AdapterUse::weights)
    }

    /// Has the tokens its grammar allows next worked out on `thread`.
    pub(crate) fn prepare_mask(&mut self, thread: &MaskThread) {
        if let Some(constraint) = &mut self.constraint {
            constraint.prepare(thread);
        }
    }

    pub(crate) fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// Reads the logits of a planned run of tokens, one row for each the sequence wants: the prompt's are kept, the
    /// last token's gives the next token.
    pub(crate) fn sample<'a>(
        &mut self,
        sequence: &Sequence,
        entry: &PlanEntry,
        mut rows: impl Iterator<Item = &'a [f32]>,
        sampler: &mut Sampler,
    ) -> Result<Option<Drawn>, SequenceFailure> {
        let mut drawn = None;
        for position in entry.start..entry.start + entry.count {
            if !sequence.wants_logits(position) {
                continue;
            }
            let row = rows
                .next()
                .ok_or_else(|| SequenceFailure::internal("the runner returned too few rows of logits"))?;
            let failed = |error| SequenceFailure::internal(format!("{error} (at position {position})"));
            if let Some(&next) = sequence.tokens().get(position + 1) {
                if self.prompt_logprobs.is_empty() {
                    self.prompt_logprobs.push(None);
                }
                let top = self.request.prompt_logprobs.unwrap_or(0);
                let logprobs = sampler.logprobs(row, next, top as usize).map_err(failed)?;
                self.prompt_logprobs.push(Some(logprobs));
                continue;
            }
            let minimum_reached = self.generated >= self.request.stop.min_tokens as usize;
            let mut tokens = if minimum_reached { &self.grammar_ends[..] } else { &self.masked };
            let mask = match &mut self.constraint {
                Some(constraint) => Some(constraint.mask().map_err(SequenceFailure::grammar)?),
                None => None,
            };
            // A grammar that can only end now does.
            if mask.is_some_and(|mask| !mask.allows_more_than(tokens)) {
                tokens = &[];
            }
            let ruled = RuledOut { tokens, mask };
            let index = self.generated as u64;
            let token =
                sampler.sample(row, &self.request.sampling, &self.history, ruled, index).map_err(failed)?;
            let logprobs = match self.request.logprobs {
                Some(top) => Some(sampler.logprobs(row, token, top as usize).map_err(failed)?),
                None => None,
            };
            drawn = Some(Drawn { token, logprobs });
        }
        Ok(drawn)
    }

    /// Takes in a step's result and queues the events it causes. Returns the new token, and whether it was the last.
    pub(crate) fn advance(
        &mut self,
        sequence: &Sequence,
        drawn: Option<Drawn>,
        text: &dyn TokenText,
        out: &mut Vec<(SequenceKey, Event)>,
    ) -> Result<(Option<u32>, bool), SequenceFailure> {
        let key = sequence.key();
        if !self.prompt_done && sequence.computed() >= self.prompt_len {
            self.prompt_done = true;
            if self.request.prompt_logprobs.is_some() {
                let mut logprobs = std::mem::take(&mut self.prompt_logprobs);
                logprobs.resize(self.prompt_len, None);
                out.push((key, Event::Prompt { logprobs }));
            }
        }
        let mut reason = (self.prompt_done && self.max_tokens == 0).then_some(FinishReason::Length);
        let token = drawn.as_ref().map(|drawn| drawn.token);
        if let Some(Drawn { token, logprobs }) = drawn {
            let (delta, end) = self.accept(token, text)?;
            reason = end;
            let logprobs = logprobs.into_iter().collect();
            out.push((key, Event::Delta { text: delta, token_ids: vec![token], logprobs }));
        }
        if let Some(reason) = reason {
            let usage = Usage {
                prompt_tokens: self.prompt_len as u32,
                completion_tokens: self.generated as u32,
                cached_tokens: sequence.cached_prompt_tokens as u32,
            };
            out.push((key, Event::Finished { reason, usage }));
        }
        Ok((token, reason.is_some()))
    }

    /// The text that `token` lets out, and why the generation ends, if it does.
    fn accept(
        &mut self,
        token: u32,
        text: &dyn TokenText,
    ) -> Result<(String, Option<FinishReason>), SequenceFailure> {
        self.generated += 1;
        self.history.push(token);
        let stop = &self.request.stop;
        // Before min_tokens these were ruled out, unless nobody asked for a minimum.
        let mut reason = if stop.eos_token_ids.contains(&token) {
            Some(FinishReason::Eos)
        } else if stop.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else {
            None
        };
        let mut piece = String::new();
        let shown = match reason {
            None => !self.grammar_ends.contains(&token),
            Some(FinishReason::StopToken(_)) => stop.include_stop_str,
            Some(_) => false,
        };
        if let (Some(constraint), None) = (&mut self.constraint, reason)
            && constraint.accept(token).map_err(SequenceFailure::grammar)?
        {
            reason = Some(FinishReason::Complete);
        }
        if shown {
            self.detokenizer.push(token, text, &mut piece);
        }
        if reason.is_none() && self.generated >= self.max_tokens {
            reason = Some(FinishReason::Length);
        }
        if reason.is_some() {
            self.detokenizer.finish(&mut piece);
        }
        let mut delta = String::new();
        let counts = self.generated >= stop.min_tokens as usize;
        match self.stops.push(&piece, counts, &mut delta) {
            Some(found) => reason = Some(FinishReason::StopString(found.index)),
            None if reason.is_some() => self.stops.finish(&mut delta),
            None => {}
        }
        Ok((delta, reason))
    }

    /// Hands an event to the stream. Never blocks and never finds the channel full: its capacity covers every event
    /// a request can cause (see [`GenerateRequest::events_max`]). A stream that is gone is found by the next step.
    pub(crate) fn send(&self, event: Event) {
        let sent = self.events.try_send(event);
        debug_assert!(!matches!(sent, Err(flume::TrySendError::Full(_))), "more events than a request can cause");
    }

    pub(crate) fn fail(&self, kind: FailureKind, message: String) {
        self.send(Event::Failed { kind, message });
    }

    /// Notes a sent event in the statistics.
    pub(crate) fn observe(&mut self, event: &Event, now: u64, stats: &Stats) {
        let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 * 1e-6;
        match event {
            Event::Prompt { .. } => {}
            Event::Delta { token_ids, .. } => {
                stats.generation_tokens.add(token_ids.len() as u64);
                match self.times.first_token {
                    None => {
                        self.times.first_token = Some(now);
                        stats.time_to_first_token_seconds.observe(seconds(self.times.submitted, now));
                    }
                    Some(_) => stats.inter_token_latency_seconds.observe(seconds(self.times.last_token, now)),
                }
                self.times.last_token = now;
            }
            Event::Failed { .. } => stats.finish(Outcome::Error),
            Event::Finished { reason, usage } => {
                stats.finish(match reason {
                    FinishReason::Length => Outcome::Length,
                    FinishReason::Eos
                    | FinishReason::StopToken(_)
                    | FinishReason::StopString(_)
                    | FinishReason::Complete => Outcome::Stop,
                });
                let Times { submitted, admitted, first_token, last_token } = self.times;
                let admitted = admitted.unwrap_or(submitted);
                // A request for no tokens is all prefill.
                let (first, last) = first_token.map_or((now, now), |first| (first, last_token));
                stats.e2e_request_latency_seconds.observe(seconds(submitted, now));
                stats.request_queue_time_seconds.observe(seconds(submitted, admitted));
                stats.request_prefill_time_seconds.observe(seconds(admitted, first));
                stats.request_decode_time_seconds.observe(seconds(first, last));
                stats.request_inference_time_seconds.observe(seconds(admitted, last));
                stats.request_prompt_tokens.observe(f64::from(usage.prompt_tokens));
                stats.request_generation_tokens.observe(f64::from(usage.completion_tokens));
                if usage.completion_tokens > 1 {
                    let gaps = f64::from(usage.completion_tokens - 1);
                    stats.request_time_per_output_token_seconds.observe(seconds(first, last) / gaps);
                }
            }
        }
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    pub(crate) fn prompt_done(&self) -> bool {
        self.prompt_done
    }
}
