//! The engine on its real thread: many submitters, streams dropped at random, drains, shutdowns and deaths. No stream
//! may hang, every answer must be the plain model's, and every block must come back.

mod fake_runner;
mod plain_model;
mod workload;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use fake_runner::{FakeRunner, FakeText, Faults};
use rill_engine::{
    Engine, EngineConfig, EngineHandle, Event, EventStream, FailureKind, Health, Outcome, SubmitError, TokenText,
};
use workload::{Prefixes, Random};

const PATIENCE: Duration = Duration::from_secs(60);

fn config() -> EngineConfig {
    EngineConfig {
        block_size: 4,
        num_blocks: 40,
        context_len: 100,
        max_batch_tokens: 32,
        max_running: 8,
        max_waiting: 16,
        ..EngineConfig::default()
    }
}

fn start_with(text: Arc<dyn TokenText>, aside: bool) -> (EngineHandle, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    let config = config();
    let runner = FakeRunner::new(config.num_blocks, config.block_size, Arc::clone(&faults)).aside(aside);
    (Engine::start(Box::new(runner), text, config).expect("a valid config"), faults)
}

fn start() -> (EngineHandle, Arc<Faults>) {
    start_with(Arc::new(FakeText), false)
}

/// A request that is accepted and takes its time.
fn long_request(random: &mut Random) -> rill_engine::GenerateRequest {
    let prefixes = Prefixes::new(random, 20);
    let mut request = workload::request(random, &prefixes, &EngineConfig { context_len: 20, ..config() });
    request.prompt.truncate(10);
    request.stop.max_tokens = 90;
    request.stop.stop_strings.clear();
    request.stop.eos_token_ids.clear();
    request.stop.stop_token_ids.clear();
    request.sampling.logit_bias.clear();
    request
}

/// The stream's last event; panics on a stream that ends without one.
fn last_event(mut stream: EventStream) -> Event {
    let mut last = None;
    while let Some(event) = stream.next_blocking() {
        last = Some(event);
    }
    last.expect("a stream ends with an event")
}

fn failure(stream: EventStream) -> Option<(FailureKind, String)> {
    match last_event(stream) {
        Event::Failed { kind, message } => Some((kind, message)),
        Event::Finished { .. } => None,
        other => panic!("the stream ended with {other:?}"),
    }
}

fn submit_when_there_is_room(handle: &EngineHandle, request: rill_engine::GenerateRequest) -> EventStream {
    let start = Instant::now();
    loop {
        match handle.submit(request.clone()) {
            Ok(stream) => return stream,
            Err(SubmitError::QueueFull { .. } | SubmitError::QueueTokensFull { .. }) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
        assert!(start.elapsed() < PATIENCE, "the queue does not move");
    }
}

#[test]
fn many_submitters_get_what_they_would_get_alone() {
    [false, true].into_iter().for_each(check_many_submitters);
}

fn check_many_submitters(aside: bool) {
    let (handle, _) = start_with(Arc::new(FakeText), aside);
    let submitters: Vec<_> = (0..8)
        .map(|seed| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                let mut random = Random::new(seed);
                let prefixes = Prefixes::new(&mut Random::new(0), 60);
                for _ in 0..150 {
                    let mut request = workload::request(&mut random, &prefixes, &config());
                    request.prompt.truncate(70);
                    let mut stream = submit_when_there_is_room(&handle, request.clone());
                    if random.one_in(4) {
                        for _ in 0..random.below(3) {
                            stream.next_blocking();
                        }
                        continue;
                    }
                    let want = plain_model::run(&request, config().context_len, None);
                    let (mut text, mut tokens, mut ended) = (String::new(), Vec::new(), None);
                    while let Some(event) = stream.next_blocking() {
                        match event {
                            Event::Prompt { logprobs } => assert_eq!(Some(logprobs), want.prompt_logprobs),
                            Event::Embedding { .. } => panic!("nobody asked for an embedding"),
                            Event::Delta { text: more, token_ids, .. } => {
                                text.push_str(&more);
                                tokens.extend(token_ids);
                            }
                            Event::Finished { reason, .. } => ended = Some(reason),
                            Event::Failed { message, .. } => panic!("{message}"),
                        }
                    }
                    assert_eq!((text, tokens, ended), (want.text, want.token_ids, want.reason));
                }
            })
        })
        .collect();
    for submitter in submitters {
        submitter.join().expect("a submitter's checks hold");
    }
    handle.drain();
    assert_eq!(handle.health(), Health::Draining);
    assert!(handle.wait_drained(PATIENCE), "requests are left");
    // The gauges follow within a step of the last cancelled stream.
    let start = Instant::now();
    while handle.stats().blocks_held() > 0 || handle.stats().running() > 0 {
        assert!(start.elapsed() < PATIENCE, "blocks leaked: {}", handle.stats().blocks_held());
        std::thread::yield_now();
    }
    assert_eq!(handle.stats().waiting(), 0);
    handle.shutdown();
    assert!(handle.wait_stopped(PATIENCE));
    assert_eq!(handle.health(), Health::Stopped);
    let ended: u64 = Outcome::ALL.iter().map(|&outcome| handle.stats().requests_finished(outcome)).sum();
    assert_eq!(ended, 8 * 150);
}

#[test]
fn shutdown_ends_every_stream_and_races_with_nothing() {
    for seed in 0..40 {
        let (handle, _) = start();
        let submitters: Vec<_> = (0..4)
            .map(|number| {
                let handle = handle.clone();
                std::thread::spawn(move || {
                    let mut random = Random::new(seed * 10 + number);
                    loop {
                        match handle.submit(long_request(&mut random)) {
                            Ok(stream) => {
                                if let Some((kind, message)) = failure(stream) {
                                    assert_eq!(kind, FailureKind::ShuttingDown, "{message}");
                                }
                            }
                            Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
                            Err(SubmitError::Draining) => return,
                            Err(error) => panic!("{error}"),
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_micros(seed * 50));
        handle.shutdown();
        for submitter in submitters {
            submitter.join().expect("a submitter's checks hold");
        }
        assert!(handle.wait_stopped(PATIENCE));
        assert_eq!((handle.stats().running(), handle.stats().waiting()), (0, 0));
        assert_eq!(handle.stats().blocks_free(), config().num_blocks);
    }
}

#[test]
fn death_ends_every_stream_and_turns_health_red() {
    for (name, panics) in [("an injected death", false), ("an injected panic", true)] {
        let (handle, faults) = start();
        let mut random = Random::new(5);
        let streams: Vec<_> =
            (0..12).map(|_| submit_when_there_is_room(&handle, long_request(&mut random))).collect();
        (if panics { &faults.panic_in } else { &faults.die_in }).store(3, Relaxed);
        for stream in streams {
            if let Some((kind, message)) = failure(stream) {
                assert!(kind == FailureKind::Internal && message.contains(name), "{message}");
            }
        }
        // If all had ended before, the next one meets the fault.
        while let Ok(stream) = handle.submit(long_request(&mut random)) {
            failure(stream);
        }
        assert!(handle.wait_stopped(PATIENCE));
        assert!(matches!(handle.health(), Health::Dead(reason) if reason.contains(name)));
        let refused = handle.submit(long_request(&mut random)).err();
        assert!(matches!(refused, Some(SubmitError::Dead(reason)) if reason.contains(name)));
    }
}

#[test]
fn submissions_that_race_with_death_are_refused_or_end() {
    for seed in 0..60 {
        let (handle, faults) = start();
        let submitters: Vec<_> = (0..3)
            .map(|number| {
                let handle = handle.clone();
                std::thread::spawn(move || {
                    let request = long_request(&mut Random::new(number));
                    loop {
                        match handle.submit(request.clone()) {
                            Ok(stream) => drop(failure(stream)),
                            Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
                            Err(SubmitError::Dead(_)) => return,
                            Err(error) => panic!("{error}"),
                        }
                    }
                })
            })
            .collect();
        faults.die_in.store(1 + seed, Relaxed);
        for submitter in submitters {
            submitter.join().expect("a submitter's checks hold");
        }
        assert!(handle.wait_stopped(PATIENCE));
    }
}

/// Panics when it is asked for one token's bytes.
struct PoisonedText(u32);

impl TokenText for PoisonedText {
    fn token_bytes(&self, id: u32) -> &[u8] {
        assert_ne!(id, self.0, "the poisoned token");
        FakeText.token_bytes(id)
    }

    fn is_special(&self, id: u32) -> bool {
        FakeText.is_special(id)
    }
}

#[test]
fn a_defect_in_one_sequence_fails_that_sequence_alone() {
    const POISON: u32 = 30;
    let (handle, _) = start_with(Arc::new(PoisonedText(POISON)), false);
    let mut random = Random::new(9);
    let mut requests: Vec<_> = (0..12).map(|_| long_request(&mut random)).collect();
    // Long enough for some to meet it, and not for all.
    requests.iter_mut().for_each(|request| request.stop.max_tokens = 10);
    let streams: Vec<_> =
        requests.iter().map(|request| submit_when_there_is_room(&handle, request.clone())).collect();
    let mut failed = 0;
    for (request, stream) in requests.iter().zip(streams) {
        let meets_poison = plain_model::run(request, config().context_len, None).token_ids.contains(&POISON);
        let failure = failure(stream);
        assert_eq!(failure.is_some(), meets_poison);
        if let Some((kind, message)) = failure {
            failed += 1;
            assert!(kind == FailureKind::Internal && message.contains("the poisoned token"), "{message}");
        }
    }
    assert!(failed > 0 && failed < 12, "{failed} of 12 met the poisoned token");
    assert_eq!(handle.health(), Health::Ready);
}

#[test]
fn a_reader_that_never_reads_holds_up_nobody() {
    let (handle, _) = start();
    let mut random = Random::new(3);
    let idle: Vec<_> = (0..8).map(|_| submit_when_there_is_room(&handle, long_request(&mut random))).collect();
    for _ in 0..20 {
        assert_eq!(failure(submit_when_there_is_room(&handle, long_request(&mut random))), None);
    }
    for stream in idle {
        assert_eq!(failure(stream), None);
    }
}

#[test]
fn the_thread_ends_when_nobody_can_submit_any_more() {
    let (handle, _) = start();
    let stream = submit_when_there_is_room(&handle, long_request(&mut Random::new(4)));
    drop(handle);
    assert_eq!(failure(stream), None, "what was accepted is finished");
}
