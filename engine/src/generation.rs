//! What one request's computed rows become: log-probabilities, tokens, text, events, and its times.

use std::sync::Arc;

use rill_models::Adapter;

use crate::adapter::AdapterUse;
use crate::config::EngineConfig;
use crate::constraint::{Constraint, MaskThread};
use crate::detokenizer::{Detokenizer, TokenText};
use crate::handle::Submission;
use crate::kv::salt;
use crate::pooling::Pool;
use crate::request::{Event, FailureKind, FinishReason, GenerateRequest, TokenLogprobs, Usage};
use crate::sampler::{Deciding, RuledOut, Sampler, TokenHistory};
use crate::scheduler::PlanEntry;
use crate::sequence::{Sequence, SequenceKey};
use crate::softmax::RowError;
use crate::speculate::{Drafter, Payoff};
use crate::stats::{BacklogPlace, Outcome, Stats};
use crate::step_logits::{Row, StepLogits};
use crate::step_loop::Clock;
use crate::stop::StopMatcher;

/// What the step computed of one sequence.
#[derive(Clone, Copy)]
pub(crate) struct ComputedRows<'a> {
    pub(crate) sequence: &'a Sequence,
    pub(crate) entry: PlanEntry,
    pub(crate) logits: &'a StepLogits,
    /// Its rows: one for each position the sequence wants.
    pub(crate) rows: (usize, usize),
}

/// What it takes to make tokens and events of logits.
pub(crate) struct Output<'a> {
    pub(crate) sampler: &'a mut Sampler,
    pub(crate) clock: &'a Clock,
    pub(crate) stats: &'a Stats,
    pub(crate) text: &'a dyn TokenText,
    pub(crate) events: &'a mut Vec<(SequenceKey, Event)>,
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

fn bad_row(error: RowError) -> SequenceFailure {
    SequenceFailure::internal(error.to_string())
}

fn whole(row: Row<'_>) -> Result<&[f32], SequenceFailure> {
    match row {
        Row::Whole(row) => Ok(row),
        Row::Best(_) => Err(SequenceFailure::internal("of a row that is wanted whole the best came alone")),
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
    /// Proposes what may follow; `None`: nothing ever is.
    drafter: Option<Drafter>,
    /// Of a prompt that is to be embedded.
    pool: Option<Pool>,
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
        config: &EngineConfig,
        text: &dyn TokenText,
    ) -> (Sequence, Generation) {
        let Submission { mut request, pooling, events, place, in_flight, submitted_us } = submission;
        let prompt = std::mem::take(&mut request.prompt);
        let key = SequenceKey { priority: request.priority, arrival };
        let adapter = request.adapter.as_ref().map(|adapter| *adapter.weights().digest());
        let max_tokens = request.max_new_tokens(prompt.len(), config.context_len);
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
            drafter: (config.max_drafts > 0).then(Drafter::default),
            pool: pooling.map(|pooling| Pool::new(pooling, prompt.len())),
            events,
            place: Some(place),
            _in_flight: in_flight,
            times: Times { submitted: submitted_us, ..Times::default() },
            adapter: request.adapter.take().map(AdapterUse::new),
            request,
        };
        let scored = generation.request.prompt_logprobs.is_some();
        let salt = salt(generation.request.cache_salt.as_deref(), adapter.as_ref());
        let tenant = generation.request.tenant.clone();
        let mut sequence = Sequence::new(key, prompt, max_tokens, scored, salt).of_tenant(tenant);
        sequence.reads_no_cache = pooling.is_some_and(Pool::needs_all);
        (sequence, generation)
    }

    /// Whether several of its kind can share one computation of their prompt: they sample, and nobody asked for the
    /// prompt's own log-probabilities.
    pub(crate) fn can_follow(&self) -> bool {
        self.request.prompt_logprobs.is_none() && self.max_tokens > 0
    }

    /// Nobody listens any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_disconnected()
    }

    /// Microseconds it has been waiting for its first admission; `None` once admitted.
    pub(crate) fn queued_us(&self, now: u64) -> Option<u64> {
        self.place.as_ref().map(|_| now.saturating_sub(self.times.submitted))
    }

    /// Microseconds since it was submitted.
    pub(crate) fn age_us(&self, now: u64) -> u64 {
        now.saturating_sub(self.times.submitted)
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

    /// What gathers hidden states, for a prompt that is to be embedded.
    pub(crate) fn pool(&mut self) -> Option<&mut Pool> {
        self.pool.as_mut()
    }

    pub(crate) fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// Adds to `draft` what may follow the decoding `sequence`, as far as checking it pays.
    pub(crate) fn propose(&mut self, sequence: &Sequence, payoff: Payoff, draft: &mut Vec<u32>) {
        // Of what is left to generate, the last token is drawn and never drafted.
        let most = (self.max_tokens - self.generated).saturating_sub(1);
        if let Some(drafter) = &mut self.drafter {
            drafter.propose(sequence.tokens(), Payoff { most: payoff.most.min(most), ..payoff }, draft);
        }
    }

    /// How many drafts of a draft model are worth checking.
    pub(crate) fn drafts_worth(&mut self, payoff: Payoff) -> usize {
        let most = (self.max_tokens - self.generated).saturating_sub(1);
        let payoff = Payoff { most: payoff.most.min(most), ..payoff };
        self.drafter.as_mut().map_or(0, |drafter| drafter.worth(payoff))
    }

    /// The draft of that number, from the draft model's logits: drawn as the token itself will be, so that the two agree
    /// where the models do. What rules tokens out is left to the check.
    pub(crate) fn draw_draft(&self, row: &[f32], number: usize, sampler: &mut Sampler) -> Option<u32> {
        let index = (self.generated + number) as u64;
        sampler.sample(row, &self.request.sampling, &self.history, RuledOut::default(), index).ok()
    }

    /// Makes of a step's rows what they mean: the prompt's log-probabilities, and new tokens with their events. Leaves the
    /// tokens in `new`: one from the last row that is sure, and one more for each drafted token that was the one drawn. Returns
    /// whether the generation has ended.
    pub(crate) fn take_rows(
        &mut self,
        computed: ComputedRows<'_>,
        output: &mut Output<'_>,
        new: &mut Vec<u32>,
    ) -> Result<bool, SequenceFailure> {
        let ComputedRows { sequence, entry, logits, rows } = computed;
        let mut rows = (rows.0..rows.1).map(|row| logits.row(row));
        for position in entry.start..entry.start + entry.count {
            if !sequence.wants_logits(position) {
                continue;
            }
            let row = rows
                .next()
                .ok_or_else(|| SequenceFailure::internal("the runner returned too few rows of logits"))?;
            if let Some(&next) = sequence.tokens().get(position + 1) {
                if self.prompt_logprobs.is_empty() {
                    self.prompt_logprobs.push(None);
                }
                let top = self.request.prompt_logprobs.unwrap_or(0);
                let row = whole(row)?;
                let logprobs = output.sampler.logprobs(row, next, top as usize).map_err(bad_row)?;
                self.prompt_logprobs.push(Some(logprobs));
                continue;
            }
            self.end_prompt(sequence, entry.end(), output);
            let (token, last) = self.take_row(sequence, row, output)?;
            new.push(token);
            if last {
                return Ok(true);
            }
            if sequence.draft().get(new.len() - 1) != Some(&token) {
                break;
            }
        }
        if entry.drafts > 0
            && let Some(drafter) = &mut self.drafter
        {
            drafter.learn(entry.drafts, new.len() - 1);
        }
        self.end_prompt(sequence, entry.end(), output);
        if self.prompt_done && self.max_tokens == 0 {
            self.finish(sequence, FinishReason::Length, output);
            return Ok(true);
        }
        Ok(false)
    }

    /// Draws the next token from its row, and queues the events that causes. Returns it, and whether it is the last.
    fn take_row(
        &mut self,
        sequence: &Sequence,
        row: Row<'_>,
        output: &mut Output<'_>,
    ) -> Result<(u32, bool), SequenceFailure> {
        let (token, logprobs) = self.draw(row, output)?;
        let (delta, end) = self.accept(token, output)?;
        let logprobs = logprobs.into_iter().collect();
        output.events.push((sequence.key(), Event::Delta { text: delta, token_ids: vec![token], logprobs }));
        if let Some(reason) = end {
            self.finish(sequence, reason, output);
        }
        Ok((token, end.is_some()))
    }

    /// The first token of a choice whose prompt another one computed, from that one's last row.
    pub(crate) fn take_first_row(
        &mut self,
        sequence: &Sequence,
        row: Row<'_>,
        output: &mut Output<'_>,
    ) -> Result<(u32, bool), SequenceFailure> {
        self.prompt_done = true;
        self.take_row(sequence, row, output)
    }

    /// How much of a row of logits decides what is drawn from it; `None`: all of it.
    pub(crate) fn deciding(&self, vocab_size: usize) -> Option<Deciding> {
        let request = &self.request;
        let whole = request.logprobs.is_some() || request.prompt_logprobs.is_some();
        let ruled = self.constraint.is_some() || !self.masked.is_empty() || !self.grammar_ends.is_empty();
        if whole || ruled { None } else { Sampler::deciding(&request.sampling, vocab_size) }
    }

    fn draw(
        &mut self,
        row: Row<'_>,
        output: &mut Output<'_>,
    ) -> Result<(u32, Option<TokenLogprobs>), SequenceFailure> {
        let sampler = &mut *output.sampler;
        let row = match row {
            Row::Whole(row) => row,
            Row::Best(best) => {
                let token = sampler.sample_best(best, &self.request.sampling, self.generated as u64);
                return Ok((token.map_err(bad_row)?, None));
            }
        };
        let minimum_reached = self.generated >= self.request.stop.min_tokens as usize;
        let mut tokens = if minimum_reached { &self.grammar_ends[..] } else { &self.masked };
        let mask = match &mut self.constraint {
            Some(constraint) => {
                let asked = output.clock.now_us();
                let mask = constraint.mask().map_err(SequenceFailure::grammar)?;
                output.stats.grammar_us.add(output.clock.now_us().saturating_sub(asked));
                output.stats.grammar_tokens.add(1);
                Some(mask)
            }
            None => None,
        };
        // A grammar that can only end now does.
        if mask.is_some_and(|mask| !mask.allows_more_than(tokens)) {
            tokens = &[];
        }
        let ruled = RuledOut { tokens, mask };
        let index = self.generated as u64;
        let token = sampler.sample(row, &self.request.sampling, &self.history, ruled, index).map_err(bad_row)?;
        let logprobs = match self.request.logprobs {
            Some(top) => Some(sampler.logprobs(row, token, top as usize).map_err(bad_row)?),
            None => None,
        };
        Ok((token, logprobs))
    }

    /// Notes that the prompt is computed, once it is, and tells what was asked about it.
    fn end_prompt(&mut self, sequence: &Sequence, computed: usize, output: &mut Output<'_>) {
        if self.prompt_done || computed < self.prompt_len {
            return;
        }
        self.prompt_done = true;
        if self.request.prompt_logprobs.is_some() {
            let mut logprobs = std::mem::take(&mut self.prompt_logprobs);
            logprobs.resize(self.prompt_len, None);
            output.events.push((sequence.key(), Event::Prompt { logprobs }));
        }
        if let Some(pool) = &self.pool {
            output.events.push((sequence.key(), Event::Embedding { values: pool.finish() }));
        }
    }

    fn finish(&self, sequence: &Sequence, reason: FinishReason, output: &mut Output<'_>) {
        let usage = Usage {
            prompt_tokens: self.prompt_len as u32,
            completion_tokens: self.generated as u32,
            cached_tokens: sequence.cached_prompt_tokens as u32,
        };
        output.events.push((sequence.key(), Event::Finished { reason, usage }));
    }

    /// The text that `token` lets out, and why the generation ends, if it does.
    fn accept(
        &mut self,
        token: u32,
        output: &Output<'_>,
    ) -> Result<(String, Option<FinishReason>), SequenceFailure> {
        let text = output.text;
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
        if let (Some(constraint), None) = (&mut self.constraint, reason) {
            let given = output.clock.now_us();
            if constraint.accept(token).map_err(SequenceFailure::grammar)? {
                reason = Some(FinishReason::Complete);
            }
            output.stats.grammar_us.add(output.clock.now_us().saturating_sub(given));
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
            Event::Prompt { .. } | Event::Embedding { .. } => {}
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
