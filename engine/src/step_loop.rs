//! The engine's thread. A step is: receive → propose → schedule → build the batch → forward → take rows → emit.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::batch::Batch;
use crate::config::{ConfigError, EngineConfig};
use crate::constraint::MaskThread;
use crate::detokenizer::TokenText;
use crate::draft_model::DraftModel;
use crate::generation::{ComputedRows, Generation, Output, SequenceFailure};
use crate::handle::{Alive, EngineHandle, Health, Message, Shared};
use crate::inspect::EngineState;
use crate::kv::{BlockUsage, Digest};
use crate::pace::{Pace, Work};
use crate::request::{Event, FailureKind};
use crate::runner::{Runner, RunnerError};
use crate::sampler::{Deciding, Sampler};
use crate::scheduler::{Limits, Scheduler, StepBudget};
use crate::sequence::{Sequence, SequenceKey};
use crate::speculate::Payoff;
use crate::spill::{Spill, SpillTier};
use crate::stats::Outcome;
use crate::step_logits::StepLogits;

/// Starts engines.
pub struct Engine;

/// What an engine can do without.
#[derive(Default)]
pub struct Extras {
    /// Keeps blocks the prefix cache evicts.
    pub tier: Option<Box<dyn SpillTier>>,
    /// A smaller model of the same vocabulary, with as many blocks of the same size, that proposes drafts.
    pub draft: Option<Box<dyn Runner>>,
}

/// The engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the engine's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

impl Engine {
    /// Runs an engine on a thread of its own, "rill-engine". The thread ends after
    /// [`EngineHandle::shutdown`], or when all handles are gone and no request is left.
    pub fn start(
        runner: Box<dyn Runner>,
        text: Arc<dyn TokenText>,
        config: EngineConfig,
    ) -> Result<EngineHandle, StartError> {
        Engine::start_with(runner, text, config, Extras::default())
    }

    /// The same with what an engine can do without.
    pub fn start_with(
        runner: Box<dyn Runner>,
        text: Arc<dyn TokenText>,
        config: EngineConfig,
        extras: Extras,
    ) -> Result<EngineHandle, StartError> {
        let (core, handle) = EngineCore::new(runner, text, config, Clock::monotonic())?;
        let core = core.with(extras);
        std::thread::Builder::new().name("rill-engine".into()).spawn(move || core.run())?;
        Ok(handle)
    }
}

/// Microseconds since the engine was made. The only clock in the engine.
#[derive(Debug, Clone)]
pub struct Clock(Source);

#[derive(Debug, Clone)]
enum Source {
    Monotonic(Instant),
    Manual(Arc<AtomicU64>),
}

impl Clock {
    pub fn monotonic() -> Clock {
        Clock(Source::Monotonic(Instant::now()))
    }

    /// Stands still, but for what is stored in `now_us`: for simulation.
    pub fn manual(now_us: Arc<AtomicU64>) -> Clock {
        Clock(Source::Manual(now_us))
    }

    pub(crate) fn now_us(&self) -> u64 {
        match &self.0 {
            Source::Monotonic(start) => start.elapsed().as_micros() as u64,
            Source::Manual(now_us) => now_us.load(Ordering::Relaxed),
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Computed so many tokens, or failed to.
    Worked { tokens: usize },
    /// There is nothing to do until a request comes.
    Idle,
    /// The handle asked to stop.
    Stop,
}

/// The engine without its thread. [`Engine::start`] runs one; simulations step one themselves.
pub struct EngineCore {
    shared: Arc<Shared>,
    inbox: flume::Receiver<Message>,
    clock: Clock,
    runner: Box<dyn Runner>,
    vocab_size: usize,
    text: Arc<dyn TokenText>,
    scheduler: Scheduler,
    generations: HashMap<SequenceKey, Generation>,
    arrivals: u64,
    batch: Batch,
    logits: StepLogits,
    /// For each row of logits, how much of it decides what is sampled from it.
    deciding: Vec<Option<Deciding>>,
    /// Hidden states, for embeddings.
    hidden: Vec<f32>,
    sampler: Sampler,
    pace: Pace,
    spill: Option<Spill>,
    draft_model: Option<DraftModel>,
    spill_changes: Vec<(Digest, bool)>,
    /// Which of the plan's restores could be had.
    restored: Vec<bool>,
    /// Tokens that may follow the sequence being looked at.
    draft: Vec<u32>,
    /// Tokens that did.
    new_tokens: Vec<u32>,
    /// Places in the plan of sequences whose prompt others have been waiting for.
    leaders: Vec<usize>,
    /// Started with the first request that has a grammar.
    masks: Option<MaskThread>,
    /// Sequences to take out of the scheduler.
    ended: Vec<SequenceKey>,
    /// Events in the order they are sent.
    outbox: Vec<(SequenceKey, Event)>,
    _alive: Alive,
}

impl EngineCore {
    pub fn new(
        runner: Box<dyn Runner>,
        text: Arc<dyn TokenText>,
        config: EngineConfig,
        clock: Clock,
    ) -> Result<(EngineCore, EngineHandle), ConfigError> {
        config.validate()?;
        let limits = Limits { max_batch_tokens: config.max_batch_tokens, max_running: config.max_running };
        let mut scheduler = Scheduler::new(limits, config.num_blocks, config.block_size, config.prefix_caching);
        scheduler.set_window(runner.window_tokens());
        let vocab_size = runner.vocab_size();
        let widths = (vocab_size, runner.hidden_size());
        let (handle, inbox, alive) = EngineHandle::new(config, widths, clock.clone());
        let core = EngineCore {
            shared: Arc::clone(handle.shared()),
            inbox,
            clock,
            runner,
            vocab_size,
            text,
            scheduler,
            generations: HashMap::new(),
            arrivals: 0,
            batch: Batch::default(),
            logits: StepLogits::default(),
            deciding: Vec::new(),
            hidden: Vec::new(),
            sampler: Sampler::default(),
            pace: Pace::default(),
            spill: None,
            draft_model: None,
            spill_changes: Vec::new(),
            restored: Vec::new(),
            draft: Vec::new(),
            new_tokens: Vec::new(),
            leaders: Vec::new(),
            masks: None,
            ended: Vec::new(),
            outbox: Vec::new(),
            _alive: alive,
        };
        Ok((core, handle))
    }

    /// The same engine with more to it.
    ///
    /// # Panics
    /// If the draft model's vocabulary is of another size.
    pub fn with(mut self, extras: Extras) -> EngineCore {
        if let Some(draft) = &extras.draft {
            assert_eq!(draft.vocab_size(), self.vocab_size, "the draft model's vocabulary is another one");
            // It may come to a sequence late, and then reads and writes all of its blocks.
            self.scheduler.set_window(None);
        }
        self.spill = extras.tier.map(Spill::new);
        self.draft_model = extras.draft.map(DraftModel::new);
        self
    }

    /// Steps until told to stop, or until nobody can submit any more and nothing is left. However it ends, every
    /// stream gets its terminal event.
    pub fn run(mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| {
            while self.wait_for_work() {
                if self.step()? == Step::Stop {
                    break;
                }
            }
            Ok(())
        }));
        match ended {
            Ok(Ok(())) => self.stop(),
            Ok(Err(RunnerError::Fatal(reason) | RunnerError::Batch(reason))) => self.die(reason),
            Err(panic) => self.die(format!("the engine's thread panicked: {}", panic_message(&*panic))),
        }
    }

    /// One step. An error is the end of the engine: the runner may not be used again.
    pub fn step(&mut self) -> Result<Step, RunnerError> {
        self.receive();
        self.tell_inspectors();
        if self.shared.stop.load(Ordering::Acquire) {
            return Ok(Step::Stop);
        }
        self.drop_cancelled_and_overdue();
        self.propose();
        self.schedule();
        self.move_blocks()?;
        self.draft();
        let started = self.clock.now_us();
        let tokens = self.scheduler.plan().tokens;
        if tokens > 0 {
            self.batch.build(&self.scheduler);
            self.add_adapters();
            self.prepare_masks();
            match self.forward() {
                Ok(()) => {
                    self.pool()?;
                    self.take_rows();
                    self.fork();
                    self.remove_ended();
                    self.learn_pace(started);
                }
                Err(RunnerError::Batch(reason)) => self.fail_batch(&reason),
                Err(fatal) => return Err(fatal),
            }
        }
        self.emit();
        Ok(if self.generations.is_empty() && tokens == 0 { Step::Idle } else { Step::Worked { tokens } })
    }

    /// Scheduler, blocks and generations agree. `Err` says what does not.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.scheduler.check_invariants()?;
        let sequences = self.scheduler.running().len() + self.scheduler.waiting().count();
        if sequences != self.generations.len() {
            return Err(format!("{sequences} sequences and {} generations", self.generations.len()));
        }
        let all = self.scheduler.running().iter().chain(self.scheduler.waiting());
        match all.map(|s| s.key()).find(|key| !self.generations.contains_key(key)) {
            Some(key) => Err(format!("{key:?} has no generation")),
            None => Ok(()),
        }
    }

    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Blocks while there is nothing to do. False when there never will be.
    fn wait_for_work(&mut self) -> bool {
        if self.generations.is_empty() {
            match self.inbox.recv() {
                Ok(message) => self.take(message),
                Err(flume::RecvError::Disconnected) => return false,
            }
        }
        true
    }

    fn receive(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            self.take(message);
        }
    }

    fn tell_inspectors(&self) {
        while let Ok(inspector) = self.shared.inspectors.try_recv() {
            let generation = |key| self.generations.get(&key);
            // Whoever asked may be gone.
            let _ = inspector.try_send(EngineState::of(&self.scheduler, generation, self.clock.now_us()));
        }
    }

    fn take(&mut self, message: Message) {
        let Message::Submit(submissions) = message else { return };
        let mut leader: Option<Sequence> = None;
        let mut followers = Vec::new();
        for submission in submissions {
            let (sequence, generation) =
                Generation::begin(submission, self.arrivals, &self.shared.config, &*self.text);
            self.arrivals += 1;
            let follows =
                leader.as_ref().is_some_and(|leader| generation.can_follow() && sequence.is_choice_of(leader));
            self.generations.insert(sequence.key(), generation);
            if follows {
                followers.push(sequence);
            } else if let Some(leader) = leader.replace(sequence) {
                self.add(leader, &mut followers);
            }
        }
        if let Some(leader) = leader {
            self.add(leader, &mut followers);
        }
    }

    fn add(&mut self, leader: Sequence, followers: &mut Vec<Sequence>) {
        let key = leader.key();
        self.scheduler.add(leader);
        for follower in followers.drain(..) {
            self.scheduler.add_follower(key, follower);
        }
    }

    fn drop_cancelled_and_overdue(&mut self) {
        let now = self.clock.now_us();
        let wait_us_max = self.shared.config.max_queue_wait_ms.map_or(u64::MAX, |ms| ms.saturating_mul(1000));
        for (&key, generation) in &self.generations {
            if generation.is_cancelled() {
                self.shared.stats.finish(Outcome::Abort);
                self.ended.push(key);
            } else if let Some(waited) = generation.queued_us(now).filter(|&waited| waited > wait_us_max) {
                let message =
                    format!("waited {} ms for a place; the limit is {} ms", waited / 1000, wait_us_max / 1000);
                self.outbox.push((key, Event::Failed { kind: FailureKind::Overloaded, message }));
                self.ended.push(key);
            }
        }
        for key in self.ended.drain(..) {
            self.scheduler.remove(key);
            if self.generations.get(&key).is_some_and(Generation::is_cancelled) {
                self.generations.remove(&key);
            }
        }
    }

    /// What may follow the sequences that decode, as far as checking it is faster than generating it.
    fn propose(&mut self) {
        let streams = self.streams();
        if self.shared.config.max_drafts == 0 || streams.rows == 0 {
            return;
        }
        // All that draft do so in one round.
        let round_cost = self.draft_model.as_ref().map_or(0.0, DraftModel::round_seconds) / streams.rows as f64;
        let payoff = Payoff {
            most: self.shared.config.max_drafts,
            token_worth: (self.pace.predict(streams) / streams.rows as f64) as f32,
            row_cost: (self.pace.row_cost(streams.attended / streams.rows) + round_cost) as f32,
        };
        for index in 0..self.scheduler.running().len() {
            if !self.scheduler.may_draft(index) {
                continue;
            }
            let sequence = &self.scheduler.running()[index];
            let Some(generation) = self.generations.get_mut(&sequence.key()) else { continue };
            self.draft.clear();
            match self.draft_model {
                // Places that it fills once the blocks are there.
                Some(_) => self.draft.resize(generation.drafts_worth(payoff), 0),
                None => generation.propose(sequence, payoff, &mut self.draft),
            }
            self.scheduler.propose(index, &self.draft);
        }
    }

    /// Has the draft model fill the places that the plan has room for. It is done without if it fails.
    fn draft(&mut self) {
        let Some(model) = &mut self.draft_model else { return };
        let copied = model.copy_blocks(&self.scheduler.plan().copies);
        let (generations, sampler, clock) = (&self.generations, &mut self.sampler, &self.clock);
        let drafted = copied.and_then(|()| {
            model.draft(
                &mut self.scheduler,
                || clock.now_us(),
                |key, number, row| generations.get(&key)?.draw_draft(row, number, sampler),
            )
        });
        if let Err(error) = drafted {
            tracing::warn!(%error, "the draft model failed and is done without");
            self.draft_model = None;
            for place in 0..self.scheduler.plan().entries.len() {
                self.scheduler.cut_drafts(place, 0);
            }
        }
    }

    /// The next tokens of all sequences that decode.
    fn streams(&self) -> Work {
        let mut work = Work::default();
        for sequence in self.scheduler.running().iter().filter(|sequence| sequence.pending() == 1) {
            work.add_tokens(sequence.tokens().len(), 1);
        }
        work
    }

    /// The plan made while the last step ran, or one made now.
    fn schedule(&mut self) {
        if !self.scheduler.take_ahead() {
            let budget = self.step_budget();
            self.scheduler.schedule(budget);
            let admitted = &self.scheduler.plan().admitted;
            admit(&mut self.generations, admitted, self.clock.now_us());
        }
        debug_assert_eq!(self.scheduler.check_plan(), Ok(()));
    }

    /// The step after this one, while the runner computes: its tokens are put in place when they are there.
    fn plan_ahead(&mut self) {
        self.receive();
        let budget = self.step_budget();
        if let Some(admitted) = self.scheduler.schedule_ahead(budget) {
            admit(&mut self.generations, admitted, self.clock.now_us());
        }
    }

    fn step_budget(&mut self) -> StepBudget {
        let streams = self.streams();
        let running = self.scheduler.running();
        let depth = running.iter().filter(|s| s.pending() > 1).map(Sequence::computed).max().unwrap_or(0);
        let here = (running.len() + self.scheduler.waiting().count()).min(self.shared.config.max_running);
        let others = here.saturating_sub(1);
        let prefill_rows = self.pace.prompt_rows(streams, others, depth);
        let block_size = self.shared.config.block_size;
        let block_seconds = self.pace.prompt_row_cost(depth) * block_size as f64;
        let restores = self.spill.as_mut().map_or(0, |spill| {
            spill.changes(&mut self.spill_changes);
            spill.restores(block_seconds, self.pace.patience(streams, others))
        });
        for (digest, there) in self.spill_changes.drain(..) {
            self.scheduler.set_spilled(digest, there);
        }
        StepBudget { prefill_rows, restores }
    }

    /// Tells the batch which sequences run with adapters.
    fn add_adapters(&mut self) {
        let entries = &self.scheduler.plan().entries;
        let adapters = entries.iter().map(|entry| self.generations.get(&entry.key)?.adapter().cloned());
        if adapters.clone().any(|adapter| adapter.is_some()) {
            self.batch.input.adapters.extend(adapters);
        }
    }

    /// What is evicted is kept, then what is about to be written by one of several holders is copied, then what can be read
    /// back is: in this order, since the blocks may be the same.
    fn move_blocks(&mut self) -> Result<(), RunnerError> {
        let plan = self.scheduler.plan();
        if let Some(spill) = &mut self.spill {
            for &(block, digest) in plan.spills.iter().filter(|(_, digest)| !self.scheduler.is_spilled(digest)) {
                spill.keep(&mut *self.runner, block, digest)?;
                self.shared.stats.blocks_spilled.add(1);
            }
        }
        if !plan.copies.is_empty() {
            self.runner.copy_blocks(&plan.copies)?;
        }
        let Some(spill) = self.spill.as_mut().filter(|_| !plan.restores.is_empty()) else { return Ok(()) };
        self.restored.clear();
        for restore in &plan.restores {
            let started = self.clock.now_us();
            let restored = spill.restore(&mut *self.runner, restore)?;
            spill.learn(self.clock.now_us().saturating_sub(started) as f64 * 1e-6);
            let stats = &self.shared.stats;
            if restored {
                stats.blocks_restored.add(1)
            } else {
                stats.blocks_lost.add(1)
            }
            self.restored.push(restored);
        }
        self.scheduler.settle_restores(&self.restored);
        Ok(())
    }

    /// Sets the mask thread to work on what the step's samples will need, while the model runs.
    fn prepare_masks(&mut self) {
        for (place, entry) in self.scheduler.plan().entries.iter().enumerate() {
            // The last row is a sample's if the sequence is computed to its end.
            let sequence = &self.scheduler.running()[entry.index];
            let samples = entry.end() == sequence.tokens().len()
                && self.batch.logit_starts[place] < self.batch.logit_starts[place + 1];
            let Some(generation) = self.generations.get_mut(&entry.key) else { continue };
            if !samples || !generation.is_constrained() {
                continue;
            }
            if self.masks.is_none() {
                match MaskThread::start(self.shared.config.max_running) {
                    Ok(thread) => self.masks = Some(thread),
                    // The samples compute their masks themselves, later.
                    Err(error) => tracing::warn!(%error, "no thread for masks"),
                }
            }
            if let Some(thread) = &self.masks {
                generation.prepare_mask(thread);
            }
        }
    }

    fn forward(&mut self) -> Result<(), RunnerError> {
        let stats = &self.shared.stats;
        stats.steps.add(1);
        stats.iteration_tokens.observe(self.scheduler.plan().tokens as f64);
        self.deciding.clear();
        for (entry, rows) in self.scheduler.plan().entries.iter().zip(self.batch.logit_starts.windows(2)) {
            let generation = self.generations.get(&entry.key);
            // Others sample from its last row in their own way.
            let alone = generation.filter(|_| !self.scheduler.has_followers(entry.key));
            let deciding = alone.and_then(|generation| generation.deciding(self.vocab_size));
            self.deciding.extend(std::iter::repeat_n(deciding, rows[1] - rows[0]));
        }
        let started = self.logits.start(&mut *self.runner, &self.batch.input, &self.deciding);
        if let Ok(true) = started {
            self.plan_ahead();
        }
        let computed =
            started.and_then(|_| self.logits.compute(&mut *self.runner, &self.batch.input, &self.deciding));
        // An idle engine keeps no adapter alive.
        self.batch.input.adapters.clear();
        computed
    }

    /// Gathers the hidden states that prompts to be embedded want of this step.
    fn pool(&mut self) -> Result<(), RunnerError> {
        for (place, entry) in self.scheduler.plan().entries.iter().enumerate() {
            let Some(pool) = self.generations.get_mut(&entry.key).and_then(Generation::pool) else { continue };
            let positions = entry.start..entry.start + entry.count;
            let wanted: Vec<usize> = positions.filter(|&position| pool.wants(position)).collect();
            if wanted.is_empty() {
                continue;
            }
            let first_row = self.batch.input.query_starts[place] as usize;
            let rows: Vec<u32> =
                wanted.iter().map(|position| (first_row + position - entry.start) as u32).collect();
            self.hidden.clear();
            self.runner.hidden_states(&rows, &mut self.hidden)?;
            let width = self.runner.hidden_size();
            if self.hidden.len() != rows.len() * width {
                let got = self.hidden.len();
                let message = format!("{got} values came back for {} hidden states of {width}", rows.len());
                return Err(RunnerError::Fatal(message));
            }
            for (position, state) in wanted.into_iter().zip(self.hidden.chunks_exact(width)) {
                pool.add(position, state);
            }
        }
        Ok(())
    }

    /// Makes tokens and events of the logits, and settles what has been computed.
    fn take_rows(&mut self) {
        for place in 0..self.scheduler.plan().entries.len() {
            let entry = self.scheduler.plan().entries[place];
            let sequence = &self.scheduler.running()[entry.index];
            self.new_tokens.clear();
            let stats = &self.shared.stats;
            let Some(generation) = self.generations.get_mut(&entry.key) else { continue };
            let rows = (self.batch.logit_starts[place], self.batch.logit_starts[place + 1]);
            let computed = ComputedRows { sequence, entry, logits: &self.logits, rows };
            let events_before = self.outbox.len();
            let was_prefilling = !generation.prompt_done();
            let (new, mut output) = (
                &mut self.new_tokens,
                Output {
                    sampler: &mut self.sampler,
                    clock: &self.clock,
                    stats,
                    text: &*self.text,
                    events: &mut self.outbox,
                },
            );
            let taken = contained(|| generation.take_rows(computed, &mut output, new));
            if was_prefilling && generation.prompt_done() {
                stats.prompt_tokens.add(generation.prompt_len() as u64);
            }
            match taken {
                Ok(last) => {
                    stats.drafted_tokens.add(entry.drafts as u64);
                    stats.accepted_draft_tokens.add(self.new_tokens.len().saturating_sub(1) as u64);
                    self.scheduler.prompt_rows_seen(entry.index, entry.end());
                    self.scheduler.settle(place, &self.new_tokens);
                    if !self.new_tokens.is_empty() && self.scheduler.has_followers(entry.key) {
                        self.leaders.push(place);
                    }
                    if last {
                        self.ended.push(entry.key);
                    }
                }
                Err(failure) => self.fail(entry.key, failure, events_before),
            }
        }
    }

    /// Half of what a failing step had to say is worth nothing.
    fn fail(&mut self, key: SequenceKey, failure: SequenceFailure, events_before: usize) {
        let SequenceFailure { kind, message } = failure;
        self.outbox.truncate(events_before);
        self.outbox.push((key, Event::Failed { kind, message }));
        self.ended.push(key);
    }

    /// Choices whose prompt has just been computed by another one start from its blocks, and from its last row of logits.
    fn fork(&mut self) {
        let now = self.clock.now_us();
        for place in std::mem::take(&mut self.leaders) {
            let leader = self.scheduler.plan().entries[place].key;
            let row = self.batch.logit_starts[place + 1] - 1;
            for key in self.scheduler.fork(leader) {
                let Some(generation) = self.generations.get_mut(&key) else { continue };
                let Some(sequence) = self.scheduler.running_sequence(key) else { continue };
                generation.admit(now);
                let events_before = self.outbox.len();
                let mut output = Output {
                    sampler: &mut self.sampler,
                    clock: &self.clock,
                    stats: &self.shared.stats,
                    text: &*self.text,
                    events: &mut self.outbox,
                };
                match contained(|| generation.take_first_row(sequence, self.logits.row(row), &mut output)) {
                    Ok((token, last)) => {
                        self.scheduler.append(key, token);
                        if last {
                            self.ended.push(key);
                        }
                    }
                    Err(failure) => self.fail(key, failure, events_before),
                }
            }
        }
    }

    fn learn_pace(&mut self, started_us: u64) {
        let (mut streams, mut prompts) = (Work::default(), Work::default());
        for entry in &self.scheduler.plan().entries {
            let work = if entry.end() - entry.start > 1 { &mut prompts } else { &mut streams };
            work.add_tokens(entry.start + entry.count, entry.count);
        }
        let step_us = self.clock.now_us().saturating_sub(started_us);
        self.shared.stats.step_us.add(step_us);
        self.pace.observe(streams, prompts, step_us as f64 * 1e-6);
    }

    /// The step's sequences end; what it was to copy or compute is lost with them.
    fn fail_batch(&mut self, reason: &str) {
        for entry in &self.scheduler.plan().entries {
            let message = format!("the forward pass failed: {reason}");
            self.outbox.push((entry.key, Event::Failed { kind: FailureKind::Internal, message }));
            self.ended.push(entry.key);
        }
        self.remove_ended();
    }

    fn remove_ended(&mut self) {
        for key in self.ended.drain(..) {
            self.scheduler.remove(key);
        }
    }

    /// Gauges first: whoever has seen a request end finds its blocks free.
    fn emit(&mut self) {
        self.write_gauges();
        let now = self.clock.now_us();
        for (key, event) in self.outbox.drain(..) {
            let Some(generation) = self.generations.get_mut(&key) else { continue };
            generation.observe(&event, now, &self.shared.stats);
            let last = matches!(event, Event::Finished { .. } | Event::Failed { .. });
            generation.send(event);
            if last {
                self.generations.remove(&key);
            }
        }
    }

    fn write_gauges(&self) {
        let stats = &self.shared.stats;
        let preempted = self.scheduler.waiting().filter(|s| s.preempted).count();
        stats.set_sequences(self.scheduler.running().len(), preempted);
        stats.set_blocks(self.scheduler.pool().usage());
        let totals = self.scheduler.totals();
        stats.preemptions.set(totals.preemptions);
        stats.prefix_cache_queries.set(totals.cache_queries);
        stats.prefix_cache_hits.set(totals.cache_hits);
        stats.forks.set(totals.forks);
        stats.block_copies.set(totals.copies);
    }

    /// The end that was asked for.
    fn stop(mut self) {
        self.end_streams(Health::Stopped, FailureKind::ShuttingDown, "the server is shutting down");
    }

    /// The end that was not.
    fn die(mut self, reason: String) {
        tracing::error!(%reason, "the engine has died");
        self.end_streams(Health::Dead(reason.clone()), FailureKind::Internal, &reason);
    }

    /// Closes the gate, so that nothing more can come in, and then ends what is in.
    fn end_streams(&mut self, health: Health, kind: FailureKind, message: &str) {
        self.shared.close(health);
        self.receive();
        // Nobody is told any more: their channels close.
        while self.shared.inspectors.try_recv().is_ok() {}
        // The scheduler may have been left half way through something; its blocks are nobody's now.
        let stats = &self.shared.stats;
        stats.set_sequences(0, 0);
        stats.set_blocks(BlockUsage { free: self.shared.config.num_blocks, ..BlockUsage::default() });
        for (_, generation) in self.generations.drain() {
            stats.finish(if generation.is_cancelled() { Outcome::Abort } else { Outcome::Error });
            generation.fail(kind, message.to_string());
        }
    }
}

impl Drop for EngineCore {
    fn drop(&mut self) {
        // Finds nothing left to end if `run` has ended it.
        self.end_streams(Health::Stopped, FailureKind::ShuttingDown, "the server is shutting down");
    }
}

fn admit(generations: &mut HashMap<SequenceKey, Generation>, admitted: &[SequenceKey], now: u64) {
    for key in admitted {
        if let Some(generation) = generations.get_mut(key) {
            generation.admit(now);
        }
    }
}

/// Runs what concerns one sequence, so that a defect there is that sequence's alone.
fn contained<T>(work: impl FnOnce() -> Result<T, SequenceFailure>) -> Result<T, SequenceFailure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(SequenceFailure::internal(format!("a defect was caught: {}", panic_message(&*panic))))
    })
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown panic")
}
