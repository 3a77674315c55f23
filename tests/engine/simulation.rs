//! Seeded simulation of the whole engine but its thread: random workloads on tiny pools, every invariant checked at
//! every step, every output compared with a plain model's.
//!
//! `cargo test -p rill-tests --test simulation -- --seed 17` replays one run; `--runs 20000` does more of them. A run that
//! fails is made as small as it goes, and the command that replays it printed.

mod fake_runner;
mod fake_tier;
mod interleavings;
mod plain_model;
mod scheduling_bounds;
mod shrink;
mod workload;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use fake_runner::{FakeRunner, FakeText, Faults};
use fake_tier::FakeTier;
use plain_model::Expected;
use rill_engine::spill::SpillTier;
use rill_engine::{
    Clock, EngineConfig, EngineCore, EngineHandle, Event, EventStream, Extras, FailureKind, GenerateRequest,
    Outcome, Runner, Step, SubmitError,
};
use shrink::Case;
use workload::{Prefixes, Random};

const RUNS: u64 = 5000;

/// Totals over all runs, to show that the interesting things do happen.
#[derive(Debug, Default)]
struct Seen {
    steps: u64,
    tokens: u64,
    finished: u64,
    cancelled: u64,
    failed: u64,
    overdue: u64,
    refused: u64,
    preemptions: u64,
    cache_hits: u64,
    shared_blocks: u64,
    drafted: u64,
    accepted_drafts: u64,
    forks: u64,
    block_copies: u64,
    blocks_restored: u64,
    blocks_lost: u64,
    blocks_passed: u64,
    planned_ahead: u64,
    runs_ended_by_death: u64,
}

/// A request the engine has accepted, and what its stream has said so far.
struct Live {
    request: GenerateRequest,
    stream: EventStream,
    got: Expected,
    cached_tokens: u32,
    submitted_us: u64,
    failure: Option<(FailureKind, String)>,
}

struct Simulation {
    case: Case,
    random: Random,
    config: EngineConfig,
    prefixes: Prefixes,
    /// Of the model.
    window: Option<usize>,
    core: EngineCore,
    handle: EngineHandle,
    faults: Arc<Faults>,
    now_us: Arc<AtomicU64>,
    live: Vec<Live>,
    /// Salt and tokens of every request that is no longer live: all that the prefix cache can know.
    past: Vec<(Option<String>, Vec<u32>)>,
    accepted: u64,
    seen: Seen,
}

impl Simulation {
    fn new(case: Case) -> Simulation {
        let mut random = Random::new(case.seed);
        let block_size = random.between(1, 8);
        // Often so few blocks that a couple of sequences outgrow them.
        let tight = random.one_in(2);
        let num_blocks = if tight { random.between(3, 12) } else { random.between(3, 40) };
        let max_running = random.between(1, 8);
        let capacity = block_size * num_blocks;
        let config = EngineConfig {
            block_size,
            num_blocks,
            context_len: if tight { capacity.clamp(2, 120) } else { random.between(2, (capacity + 8).min(120)) },
            max_batch_tokens: max_running + random.between(0, 24),
            max_running,
            max_waiting: random.between(1, 16),
            max_waiting_tokens: random.between(20, 400),
            max_queue_wait_ms: random.one_in(4).then_some(30),
            prefix_caching: !random.one_in(5),
            max_drafts: *random.pick(&[0, 1, 4, 9]),
        };
        let config = EngineConfig { max_drafts: if case.has("drafts") { config.max_drafts } else { 0 }, ..config };
        let now_us = Arc::new(AtomicU64::new(0));
        let faults = Arc::new(Faults { now_us: Arc::clone(&now_us), ..Faults::default() });
        let window = random.one_in(3).then(|| random.between(1, 24)).filter(|_| case.has("window"));
        let aside = random.one_in(2) && case.has("aside");
        let mut runner = FakeRunner::new(num_blocks, block_size, Arc::clone(&faults)).aside(aside);
        runner.window = window;
        let clock = Clock::manual(Arc::clone(&now_us));
        let (core, handle) =
            EngineCore::new(Box::new(runner), Arc::new(FakeText), config.clone(), clock).expect("a valid config");
        let tier = random.one_in(2).then(|| FakeTier::new(Random::new(random.next())));
        let draft_faults = Faults::default();
        if random.one_in(3) {
            let fault = if random.one_in(2) { &draft_faults.fail_batch_in } else { &draft_faults.spoil_in };
            fault.store(random.between(1, 100) as u32, Relaxed);
        }
        let draft = random.one_in(3).then(|| FakeRunner::new(num_blocks, block_size, Arc::new(draft_faults)));
        let core = core.with(Extras {
            tier: tier.filter(|_| case.has("tier")).map(|tier| Box::new(tier) as Box<dyn SpillTier>),
            draft: draft.filter(|_| case.has("draft-model")).map(|draft| Box::new(draft) as Box<dyn Runner>),
        });
        let prefixes = Prefixes::new(&mut random, config.context_len);
        let (live, past, seen) = (Vec::new(), Vec::new(), Seen::default());
        Simulation {
            case,
            random,
            config,
            prefixes,
            window,
            core,
            handle,
            faults,
            now_us,
            live,
            past,
            accepted: 0,
            seen,
        }
    }

    fn run(mut self) -> Seen {
        let busy = self.random.between(1, 6);
        let with_faults = self.random.one_in(3);
        for _ in 0..self.case.steps {
            if self.random.one_in(busy) {
                self.submit();
            }
            if !self.live.is_empty() && self.random.one_in(25) && self.case.has("cancels") {
                let gone = self.random.below(self.live.len());
                let gone = self.live.swap_remove(gone);
                self.past.push(gone.salt_and_tokens());
                self.seen.cancelled += 1;
            }
            if with_faults && self.random.one_in(60) && self.case.has("faults") {
                self.faults.fail_batch_in.store(1, Relaxed);
            }
            self.now_us.fetch_add(self.random.between(0, 4000) as u64, Relaxed);
            self.step();
        }
        if self.random.one_in(10) {
            self.die();
        } else if self.random.one_in(10) {
            self.shut_down();
        } else {
            self.drain();
        }
        self.seen
    }

    /// A request, or some choices of one prompt: they differ in what is drawn and in when they end.
    fn choices(&mut self) -> Vec<GenerateRequest> {
        let random = &mut self.random;
        let first = workload::request(random, &self.prefixes, &self.config);
        let count = if random.one_in(4) && self.case.has("choices") { random.between(2, 5) } else { 1 };
        let mut choices = vec![first; count];
        for other in &mut choices[1..] {
            other.sampling.seed = random.next();
            if random.one_in(3) {
                other.stop.max_tokens = random.between(1, 40) as u32;
            }
        }
        choices
    }

    fn submit(&mut self) {
        let requests = self.choices();
        let (prompt_len, count) = (requests[0].prompt.len(), requests.len());
        let stats = self.handle.stats();
        let backlog = (stats.waiting(), stats.waiting_tokens());
        match self.handle.submit_all(requests.clone()) {
            Ok(streams) => {
                assert_eq!(streams.len(), count);
                self.accepted += count as u64;
                let submitted_us = self.now_us.load(Relaxed);
                for (request, stream) in requests.into_iter().zip(streams) {
                    let got = Expected::default();
                    self.live.push(Live { request, stream, got, cached_tokens: 0, submitted_us, failure: None });
                }
                return;
            }
            Err(SubmitError::Invalid(_)) => {
                let room = self.config.context_len - usize::from(requests[0].stop.max_tokens > 0);
                assert!(prompt_len >= room, "refused for no reason: {requests:?}");
            }
            Err(SubmitError::TooLarge { needed, capacity }) => {
                assert_eq!(capacity, self.config.block_size * self.config.num_blocks);
                assert!(needed > capacity && needed >= prompt_len);
            }
            Err(SubmitError::QueueFull { waiting, limit }) => {
                assert!(waiting == limit && limit == self.config.max_waiting && backlog.0 + count > waiting);
            }
            Err(SubmitError::QueueTokensFull { waiting_tokens, limit }) => {
                assert_eq!(limit, self.config.max_waiting_tokens);
                assert!(waiting_tokens >= backlog.1 && waiting_tokens + prompt_len > limit);
            }
            Err(error @ (SubmitError::Draining | SubmitError::Dead(_))) => panic!("{error}"),
        }
        assert_eq!(self.handle.stats().waiting(), backlog.0, "all are taken or none");
        self.seen.refused += 1;
    }

    fn step(&mut self) -> Step {
        let step = self.core.step().expect("no fatal error was injected");
        self.core.check_invariants().expect("an invariant");
        self.seen.steps += 1;
        if let Step::Worked { tokens } = step {
            self.seen.tokens += tokens as u64;
        }
        let pool = self.core.scheduler().pool();
        let shared = (0..pool.num_blocks() as u32).filter(|&block| pool.holders(block) > 1).count();
        self.seen.shared_blocks += shared as u64;
        self.check_windows();
        self.read_streams();
        let scheduler = self.core.scheduler();
        let sequences = scheduler.running().len() + scheduler.waiting().count();
        assert_eq!(sequences, self.live.len(), "one sequence for each stream that is held and has not ended");
        let stats = self.handle.stats();
        assert_eq!((stats.running(), stats.waiting()), (scheduler.running().len(), scheduler.waiting().count()));
        let usage = scheduler.pool().usage();
        assert_eq!(
            (stats.blocks_free(), stats.blocks_cached(), stats.blocks_held()),
            (usage.free, usage.evictable, usage.held)
        );
        step
    }

    /// Blocks that no token to come reads are given back, and no others.
    fn check_windows(&mut self) {
        let size = self.config.block_size;
        for sequence in self.core.scheduler().running() {
            // Blocks for what is planned ahead come after these.
            let passed = sequence.table().passed();
            let held = sequence.computed().div_ceil(size) - passed;
            match self.core.scheduler().window() {
                Some(window) => assert!(held <= window.div_ceil(size) + 1, "{held} blocks for {window} tokens"),
                None => assert_eq!(passed, 0),
            }
            self.seen.blocks_passed += passed as u64;
        }
    }

    /// Takes in all events; a stream that has ended is compared with what it had to be and forgotten.
    fn read_streams(&mut self) {
        let now = self.now_us.load(Relaxed);
        let mut place = 0;
        while place < self.live.len() {
            if !self.live[place].read() {
                place += 1;
                continue;
            }
            let live = self.live.swap_remove(place);
            match &live.failure {
                None => {
                    live.compare(&self.config, self.window);
                    self.check_cache_hit(&live);
                    self.seen.finished += 1;
                }
                Some((FailureKind::Overloaded, _)) => {
                    let limit = self.config.max_queue_wait_ms.expect("a limit, since it was reached");
                    assert!(now - live.submitted_us > limit * 1000);
                    self.seen.overdue += 1;
                }
                Some((kind, message)) => {
                    assert_eq!(*kind, FailureKind::Internal, "{message}");
                    assert!(message.contains("an injected failure"), "{message}");
                    self.seen.failed += 1;
                }
            }
            self.past.push(live.salt_and_tokens());
        }
    }

    /// Tokens said to come from the prefix cache were another request's, of the same salt.
    fn check_cache_hit(&self, live: &Live) {
        let cached = &live.request.prompt[..live.cached_tokens as usize];
        let mut others = self.live.iter().map(Live::salt_and_tokens).chain(self.past.iter().cloned());
        let known = |(salt, tokens): (Option<String>, Vec<u32>)| {
            salt == live.request.cache_salt && tokens.starts_with(cached)
        };
        assert!(cached.is_empty() || others.any(known), "{cached:?} can not be in the cache of that salt");
    }

    /// No new work: everything must end within as many steps as there are tokens to compute, many times over.
    fn drain(&mut self) {
        self.handle.drain();
        let request = workload::request(&mut Random::new(1), &self.prefixes, &self.config);
        assert!(!matches!(self.handle.submit(request), Ok(_) | Err(SubmitError::Dead(_))));
        let mut steps = 0;
        while self.step() != Step::Idle {
            steps += 1;
            assert!(steps < 20_000, "{} requests do not end", self.live.len());
        }
        assert!(self.live.is_empty());
        assert!(self.handle.wait_drained(std::time::Duration::ZERO));
        self.seen.planned_ahead += self.core.scheduler().totals().planned_ahead;
        let stats = self.handle.stats();
        assert_eq!((stats.blocks_held(), stats.waiting_tokens()), (0, 0));
        assert_eq!(stats.blocks_free() + stats.blocks_cached(), self.config.num_blocks);
        self.seen.preemptions += stats.preemptions.get();
        self.seen.cache_hits += stats.prefix_cache_hits.get();
        self.seen.drafted += stats.drafted_tokens.get();
        self.seen.accepted_drafts += stats.accepted_draft_tokens.get();
        self.seen.forks += stats.forks.get();
        self.seen.block_copies += stats.block_copies.get();
        self.seen.blocks_restored += stats.blocks_restored.get();
        self.seen.blocks_lost += stats.blocks_lost.get();
        let ended: u64 = Outcome::ALL.iter().map(|&outcome| stats.requests_finished(outcome)).sum();
        assert_eq!(ended, self.accepted);
        assert_eq!(stats.requests_finished(Outcome::Abort), self.seen.cancelled);
        assert_eq!(stats.requests_finished(Outcome::Error), self.seen.failed + self.seen.overdue);
    }

    fn shut_down(&mut self) {
        self.handle.shutdown();
        assert_eq!(self.core.step(), Ok(Step::Stop));
        self.end(FailureKind::ShuttingDown, "shutting down");
    }

    fn die(&mut self) {
        self.submit();
        self.faults.fail_batch_in.store(0, Relaxed);
        self.faults.die_in.store(1, Relaxed);
        self.seen.runs_ended_by_death += 1;
        self.end(FailureKind::Internal, "an injected death");
    }

    /// Runs the core to its end; each stream must end at once, and with the reason.
    fn end(&mut self, kind: FailureKind, reason: &str) {
        let runner = FakeRunner::new(1, 1, Arc::default());
        let config = EngineConfig { num_blocks: 1, block_size: 1, ..self.config.clone() };
        let other = EngineCore::new(Box::new(runner), Arc::new(FakeText), config, Clock::monotonic());
        let (core, handle) = other.expect("a valid config");
        // With its handle gone the core does not wait for more.
        self.handle = handle;
        std::mem::replace(&mut self.core, core).run();
        for mut live in self.live.drain(..) {
            assert!(live.read(), "a stream hangs");
            if let Some((got, message)) = live.failure {
                assert!(got == FailureKind::Overloaded || (got == kind && message.contains(reason)), "{message}");
            }
        }
    }
}

impl Live {
    /// Takes in what has come; true once the terminal event has.
    fn read(&mut self) -> bool {
        let mut ended = false;
        while let Some(event) = self.stream.try_next() {
            assert!(!ended, "{event:?} after the terminal event");
            match event {
                Event::Prompt { logprobs } => {
                    assert!(self.got.token_ids.is_empty() && self.got.prompt_logprobs.is_none());
                    self.got.prompt_logprobs = Some(logprobs);
                }
                Event::Embedding { .. } => panic!("nobody asked for an embedding"),
                Event::Delta { text, token_ids, logprobs } => {
                    self.got.text.push_str(&text);
                    self.got.token_ids.extend(token_ids);
                    self.got.logprobs.extend(logprobs);
                }
                Event::Finished { reason, usage } => {
                    ended = true;
                    self.got.reason = Some(reason);
                    self.cached_tokens = usage.cached_tokens;
                    assert_eq!(usage.prompt_tokens as usize, self.request.prompt.len());
                    assert_eq!(usage.completion_tokens as usize, self.got.token_ids.len());
                }
                Event::Failed { kind, message } => {
                    ended = true;
                    self.failure = Some((kind, message));
                }
            }
        }
        ended
    }

    fn salt_and_tokens(&self) -> (Option<String>, Vec<u32>) {
        (self.request.cache_salt.clone(), [&self.request.prompt[..], &self.got.token_ids].concat())
    }

    fn compare(&self, config: &EngineConfig, window: Option<usize>) {
        let want = plain_model::run(&self.request, config.context_len, window);
        assert_eq!(self.got, want, "{:?}", self.request);
        let cached = self.cached_tokens as usize;
        assert!(cached < self.request.prompt.len() && cached.is_multiple_of(config.block_size));
        assert!(cached == 0 || (config.prefix_caching && self.request.prompt_logprobs.is_none()));
    }
}

/// A run's totals, or the panic that its smallest failing part ends in.
fn simulate(case: Case) -> Seen {
    let run = |case: &Case| Simulation::new(case.clone()).run();
    if let Ok(seen) = catch_unwind(AssertUnwindSafe(|| run(&case))) {
        return seen;
    }
    let smallest = shrink::shrink(case, |case| {
        run(case);
    });
    eprintln!("\nreplay with: {}\n", smallest.command());
    run(&smallest)
}

fn add(total: &mut Seen, seen: &Seen) {
    total.steps += seen.steps;
    total.tokens += seen.tokens;
    total.finished += seen.finished;
    total.cancelled += seen.cancelled;
    total.failed += seen.failed;
    total.overdue += seen.overdue;
    total.refused += seen.refused;
    total.preemptions += seen.preemptions;
    total.cache_hits += seen.cache_hits;
    total.shared_blocks += seen.shared_blocks;
    total.drafted += seen.drafted;
    total.accepted_drafts += seen.accepted_drafts;
    total.forks += seen.forks;
    total.block_copies += seen.block_copies;
    total.blocks_restored += seen.blocks_restored;
    total.blocks_lost += seen.blocks_lost;
    total.blocks_passed += seen.blocks_passed;
    total.planned_ahead += seen.planned_ahead;
    total.runs_ended_by_death += seen.runs_ended_by_death;
}

/// What comes after `name` among the arguments.
fn argument<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let place = arguments.iter().position(|argument| argument == name)?;
    arguments.get(place + 1).map(String::as_str)
}

fn number(arguments: &[String], name: &str) -> Option<u64> {
    argument(arguments, name).map(|text| text.parse().unwrap_or_else(|_| panic!("{name} {text} is no number")))
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let start = Instant::now();
    let mut total = Seen::default();
    let seeds = match number(&arguments, "--seed") {
        Some(seed) => seed..seed + 1,
        None => 0..number(&arguments, "--runs").unwrap_or(RUNS),
    };
    let steps = number(&arguments, "--steps").unwrap_or(shrink::STEPS);
    let without: Vec<String> = argument(&arguments, "--without")
        .map(|text| text.split(',').map(str::to_owned).collect())
        .unwrap_or_default();
    let all = seeds.clone();
    for seed in seeds {
        add(&mut total, &simulate(Case { seed, steps, without: without.clone() }));
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("seeds {all:?}: {total:?} in {seconds:.1} s, {:.0} steps/s", total.steps as f64 / seconds);
    if all.end - all.start >= RUNS {
        let happened = [
            total.finished,
            total.cancelled,
            total.failed,
            total.overdue,
            total.refused,
            total.preemptions,
            total.cache_hits,
            total.shared_blocks,
            total.drafted,
            total.accepted_drafts,
            total.forks,
            total.block_copies,
            total.blocks_restored,
            total.blocks_lost,
            total.blocks_passed,
            total.planned_ahead,
            total.runs_ended_by_death,
        ];
        assert!(happened.iter().all(|&count| count > 100), "something hardly ever happened: {total:?}");
    }
    scheduling_bounds::check();
    shrink::check();
    interleavings::check();
}
