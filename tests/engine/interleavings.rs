//! Every order of a few things that handles, streams and the engine can do, on the real objects: submissions, streams
//! dropped, steps, failures, drain, shutdown and death. Each of these happens under the gate's lock or on the engine's thread alone, so their
//! orders are all the interleavings there are.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rill_engine::{
    Clock, EngineConfig, EngineCore, EngineHandle, Event, EventStream, GenerateRequest, Step, SubmitError,
};

use crate::fake_runner::{FakeRunner, FakeText, Faults};

const DEPTH: u32 = 5;

const ACTIONS: [Action; 8] = [
    Action::Submit(1),
    Action::Submit(2),
    Action::DropOldest,
    Action::Step,
    Action::FailStep,
    Action::Drain,
    Action::Shutdown,
    Action::Die,
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    /// So many choices of one prompt.
    Submit(usize),
    DropOldest,
    Step,
    /// The next forward pass fails its batch.
    FailStep,
    Drain,
    Shutdown,
    /// The next forward pass is the engine's end.
    Die,
}

struct World {
    handle: EngineHandle,
    /// `None`: it has ended.
    core: Option<EngineCore>,
    faults: Arc<Faults>,
    streams: Vec<EventStream>,
    closed: bool,
}

fn request() -> GenerateRequest {
    GenerateRequest::greedy(vec![3, 4, 5], 2)
}

impl World {
    fn new(aside: bool) -> World {
        let config = EngineConfig {
            block_size: 2,
            num_blocks: 6,
            context_len: 8,
            max_batch_tokens: 4,
            max_running: 2,
            max_waiting: 3,
            ..EngineConfig::default()
        };
        let faults = Arc::new(Faults::default());
        let runner = FakeRunner::new(config.num_blocks, config.block_size, Arc::clone(&faults)).aside(aside);
        let (core, handle) =
            EngineCore::new(Box::new(runner), Arc::new(FakeText), config, Clock::monotonic()).expect("valid");
        World { handle, core: Some(core), faults, streams: Vec::new(), closed: false }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Submit(count) => match self.handle.submit_all(vec![request(); count]) {
                Ok(streams) => {
                    assert!(!self.closed && self.core.is_some(), "taken though nobody will answer");
                    self.streams.extend(streams);
                }
                Err(SubmitError::QueueFull { .. }) => {}
                Err(SubmitError::Draining | SubmitError::Dead(_)) => {
                    assert!(self.closed || self.core.is_none(), "refused for no reason");
                }
                Err(error) => panic!("{error}"),
            },
            Action::DropOldest => {
                if !self.streams.is_empty() {
                    self.streams.remove(0);
                }
            }
            Action::Step => self.step(),
            Action::FailStep => {
                self.faults.fail_batch_in.store(1, Relaxed);
                self.step();
            }
            Action::Drain => {
                self.handle.drain();
                self.closed = true;
            }
            Action::Shutdown => {
                self.handle.shutdown();
                self.closed = true;
            }
            Action::Die => self.faults.die_in.store(1, Relaxed),
        }
    }

    fn step(&mut self) {
        let Some(core) = &mut self.core else { return };
        match core.step() {
            Ok(Step::Stop) | Err(_) => self.core = None,
            Ok(_) => core.check_invariants().expect("an invariant"),
        }
    }

    /// Nobody submits any more; whatever is left ends.
    fn end(self) {
        let World { handle, core, streams, .. } = self;
        let held = match core {
            Some(mut core) => {
                let mut steps = 0;
                while matches!(core.step(), Ok(Step::Worked { .. })) {
                    steps += 1;
                    assert!(steps < 100, "it does not end");
                }
                drop(core);
                handle.stats().blocks_held()
            }
            None => handle.stats().blocks_held(),
        };
        assert_eq!((held, handle.stats().waiting()), (0, 0), "blocks or places are held by nobody");
        assert!(handle.wait_drained(std::time::Duration::ZERO), "a request is left");
        for mut stream in streams {
            let mut ends = 0;
            while let Some(event) = stream.try_next() {
                assert_eq!(ends, 0, "{event:?} after the terminal event");
                ends += usize::from(matches!(event, Event::Finished { .. } | Event::Failed { .. }));
            }
            assert_eq!(ends, 1, "a stream without its end");
        }
    }
}

pub fn check() {
    let orders = (ACTIONS.len() as u64).pow(DEPTH);
    for (order, aside) in (0..orders).flat_map(|order| [(order, false), (order, true)]) {
        let mut world = World::new(aside);
        let actions: Vec<Action> = (0..DEPTH)
            .map(|i| ACTIONS[(order / (ACTIONS.len() as u64).pow(i)) as usize % ACTIONS.len()])
            .collect();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            actions.iter().for_each(|&action| world.act(action));
            world.end();
        }));
        if let Err(panic) = result {
            eprintln!("\nin this order: {actions:?}, computing aside: {aside}\n");
            std::panic::resume_unwind(panic);
        }
    }
    println!("{orders} orders of {DEPTH} actions: every stream ends once, every block and place comes back");
}
