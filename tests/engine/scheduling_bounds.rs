//! The bounds the scheduler promises, counted in steps.

use rill_engine::scheduler::{Limits, Scheduler, StepBudget};
use rill_engine::{Sequence, SequenceKey};

const BUDGET: usize = 64;

/// Drives the scheduler alone: whoever has computed everything gets another token.
struct Bench {
    scheduler: Scheduler,
    arrivals: u64,
}

impl Bench {
    fn new(max_running: usize) -> Bench {
        let limits = Limits { max_batch_tokens: BUDGET, max_running };
        Bench { scheduler: Scheduler::new(limits, 4096, 16, true), arrivals: 0 }
    }

    /// Prompts differ from their first token on: nothing is shared.
    fn add(&mut self, prompt_len: usize, priority: i32) -> SequenceKey {
        let key = SequenceKey { priority, arrival: self.arrivals };
        self.arrivals += 1;
        let prompt = std::iter::once(1000 + self.arrivals as u32).chain(0..prompt_len as u32 - 1).collect();
        self.scheduler.add(Sequence::new(key, prompt, 1000, false, None));
        key
    }

    /// Steps once; `streams` are decoding and must get a row each step.
    fn step(&mut self, streams: &[SequenceKey]) {
        self.scheduler.schedule(StepBudget::UNLIMITED);
        self.scheduler.check_plan().expect("a sound plan");
        for stream in streams {
            assert!(self.scheduler.plan().entries.iter().any(|e| e.key == *stream), "a stream was held up");
        }
        let entries = self.scheduler.plan().entries.clone();
        for (place, entry) in entries.iter().enumerate() {
            let through = entry.end() == self.scheduler.running()[entry.index].tokens().len();
            self.scheduler.settle(place, if through { &[7] } else { &[] });
        }
        self.scheduler.check_invariants().expect("an invariant");
    }

    fn is_through(&self, key: SequenceKey) -> bool {
        let found = self.scheduler.running().iter().find(|s| s.key() == key);
        found.is_some_and(|s| s.computed() >= s.prompt_len())
    }

    fn steps_until_through(&mut self, key: SequenceKey, streams: &[SequenceKey]) -> usize {
        for steps in 1..10_000 {
            self.step(streams);
            if self.is_through(key) {
                return steps;
            }
        }
        panic!("{key:?} starves");
    }
}

/// Steps that `tokens` take at half of what eight streams leave of the budget.
fn bound(tokens: usize) -> usize {
    tokens.div_ceil((BUDGET - 8) / 2)
}

fn with_streams() -> (Bench, Vec<SequenceKey>) {
    let mut bench = Bench::new(32);
    let streams: Vec<_> = (0..8).map(|_| bench.add(4, 0)).collect();
    bench.step(&[]);
    (bench, streams)
}

/// A 6,000-token prompt amid eight streams and a few short prompts: nobody waits for it.
fn a_long_prompt_holds_up_nobody() {
    let (mut bench, streams) = with_streams();
    let long = bench.add(6000, 0);
    bench.step(&streams);
    let short: Vec<_> = (0..5).map(|_| bench.add(50, 0)).collect();
    for (place, &key) in short.iter().enumerate() {
        let steps = if bench.is_through(key) { 0 } else { bench.steps_until_through(key, &streams) };
        assert!(steps <= bound(50 * (place + 1)), "short prompt {place} took {steps} steps more");
    }
    let steps = bench.steps_until_through(long, &streams);
    assert!(steps <= bound(6000), "the long prompt took {steps} steps");
}

/// Short prompts arriving at every step do not keep a long one from ending.
fn short_prompts_do_not_starve_a_long_one() {
    let (mut bench, streams) = with_streams();
    let long = bench.add(2000, 0);
    let mut steps = 0;
    while !bench.is_through(long) {
        let short = bench.add(40, 0);
        bench.step(&streams);
        if bench.is_through(short) {
            bench.scheduler.remove(short);
        }
        // Those that are through leave, as if they had wanted a single token.
        let through: Vec<_> = bench
            .scheduler
            .running()
            .iter()
            .map(Sequence::key)
            .filter(|&k| k != long && !streams.contains(&k))
            .collect();
        for key in through {
            if bench.is_through(key) {
                bench.scheduler.remove(key);
            }
        }
        steps += 1;
        assert!(steps <= bound(2000) + 1, "the long prompt starves");
    }
}

/// A better priority has the whole of what streams leave, a worse one waits.
fn priority_comes_first() {
    let (mut bench, streams) = with_streams();
    let patient = bench.add(300, 5);
    let urgent = bench.add(300, -5);
    let steps = bench.steps_until_through(urgent, &streams);
    assert_eq!(steps, 300usize.div_ceil(BUDGET - 8));
    assert!(!bench.is_through(patient));
}

pub fn check() {
    a_long_prompt_holds_up_nobody();
    short_prompts_do_not_starve_a_long_one();
    priority_comes_first();
    println!("scheduling bounds hold");
}
