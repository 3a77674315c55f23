//! Determinism on the real model, through the engine: a request's tokens, text and log-probabilities are the same bits
//! alone, in company, in any prefill chunks, after preemption, after a prefix-cache hit, from blocks read back from disk,
//! with drafts or without, and as one of several choices.

use rill_engine::spill::{DiskTier, SpillTier};
use rill_engine::{
    Engine, EngineConfig, EngineHandle, Event, EventStream, Extras, FinishReason, GenerateRequest, ModelRunner,
    Runner, SamplingParams, TokenLogprobs, Usage,
};
use rill_tests::default_model;
use rill_tests::reference::{Reference, english};
use std::path::Path;
use std::time::Duration;

/// Everything a caller can see of a request, with floats as bits.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    tokens: Vec<u32>,
    text: String,
    logprobs: Vec<TokenBits>,
    prompt_logprobs: Vec<Option<TokenBits>>,
    reason: FinishReason,
}

#[derive(Debug, PartialEq, Eq)]
struct TokenBits {
    token: u32,
    logprob: u32,
    top: Vec<(u32, u32)>,
}

impl From<TokenLogprobs> for TokenBits {
    fn from(from: TokenLogprobs) -> TokenBits {
        TokenBits {
            token: from.token,
            logprob: from.logprob.to_bits(),
            top: from.top.into_iter().map(|(token, logprob)| (token, logprob.to_bits())).collect(),
        }
    }
}

fn finish(name: &str, mut stream: EventStream) -> (Outcome, Usage) {
    let mut outcome = Outcome {
        tokens: Vec::new(),
        text: String::new(),
        logprobs: Vec::new(),
        prompt_logprobs: Vec::new(),
        reason: FinishReason::Length,
    };
    loop {
        match stream.next_blocking() {
            Some(Event::Prompt { logprobs }) => {
                outcome.prompt_logprobs = logprobs.into_iter().map(|entry| entry.map(TokenBits::from)).collect();
            }
            Some(Event::Delta { text, token_ids, logprobs }) => {
                outcome.text.push_str(&text);
                outcome.tokens.extend(token_ids);
                outcome.logprobs.extend(logprobs.into_iter().map(TokenBits::from));
            }
            Some(Event::Finished { reason, usage }) => {
                outcome.reason = reason;
                return (outcome, usage);
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

fn greedy(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    let mut request =
        GenerateRequest { logprobs: Some(5), ..GenerateRequest::greedy(prompt.to_vec(), max_tokens) };
    request.stop.eos_token_ids = vec![2];
    request
}

fn request(prompt: &[u32], max_tokens: u32, sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest { sampling, ..greedy(prompt, max_tokens) }
}

/// The requests whose every bit is watched: short and long prompts, greedy and seeded, with and without penalties.
fn subjects(reference: &Reference) -> Vec<(&'static str, GenerateRequest)> {
    let text = &reference.tokens;
    let chat = &reference.continuations[12].prompt;
    let seeded = |seed, temperature| SamplingParams { seed, temperature, top_p: 0.95, ..greedy(chat, 0).sampling };
    let penalised = SamplingParams {
        top_k: 50,
        min_p: 0.02,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        repetition_penalty: 1.1,
        logit_bias: vec![(text[5], -1.5), (text[9], 0.5)],
        ..seeded(77, 1.1)
    };
    let mut long = request(&text[..400], 24, seeded(5, 0.8));
    long.prompt_logprobs = Some(3);
    let mut stopped = request(chat, 48, seeded(11, 0.9));
    stopped.stop.stop_strings = vec!["zebra".to_owned(), ". ".to_owned()];
    vec![
        ("short greedy", greedy(&reference.continuations[0].prompt, 48)),
        ("chat greedy", greedy(chat, 48)),
        ("150-token greedy", greedy(&text[20..170], 32)),
        ("one-token prompt, seeded", request(&text[..1], 32, seeded(3, 1.0))),
        ("90-token prompt, seeded, penalties and bias", request(&text[300..390], 40, penalised)),
        ("400-token prompt, seeded, prompt log-probabilities", long),
        ("chat, seeded, stop strings", stopped),
        ("a text that repeats itself", greedy(&text[..50].repeat(3), 60)),
        ("a text that repeats itself, seeded", request(&text[..50].repeat(3), 60, seeded(4, 0.6))),
    ]
}

/// 32 others of mixed lengths and parameters, the same at every call.
fn others(reference: &Reference) -> Vec<GenerateRequest> {
    let text = &reference.tokens;
    (0..32u64)
        .map(|i| {
            let start = (i as usize * 53) % 500;
            let length = 1 + (i as usize * 37) % 140;
            let mut other = greedy(&text[start..start + length], 4 + (i as u32 * 7) % 36);
            let temperature = [0.0, 0.7, 1.3][i as usize % 3];
            other.sampling = SamplingParams { seed: i, temperature, top_k: 40, ..other.sampling };
            other.logprobs = (i % 4 == 0).then_some(2);
            other.stop.eos_token_ids.clear();
            other
        })
        .collect()
}

/// Ten requests that begin small, so that they are admitted together, and grow to more than a small pool holds.
fn growing(reference: &Reference) -> impl Iterator<Item = GenerateRequest> {
    (0..10).map(|i| {
        let start = 60 * i as usize;
        let mut other = greedy(&reference.tokens[start..start + 8], 160);
        other.sampling = SamplingParams { seed: i, temperature: 1.0, top_k: 40, ..other.sampling };
        other.stop.eos_token_ids.clear();
        other
    })
}

/// Room for everything; no prefix cache, so that what is tested is one thing at a time.
fn roomy() -> EngineConfig {
    EngineConfig { num_blocks: 1024, prefix_caching: false, ..EngineConfig::default() }
}

fn start(config: EngineConfig) -> EngineHandle {
    start_spilling(config, None)
}

/// The same with evicted blocks kept in a directory.
fn start_spilling(config: EngineConfig, dir: Option<&Path>) -> EngineHandle {
    let loaded = default_model::load();
    let runner = ModelRunner::new(loaded.model, &config).expect("the KV cache fits");
    let tier = dir.map(|dir| {
        let tier = DiskTier::open(dir, 1 << 30, [1; 32], runner.block_bytes()).expect("a fresh directory");
        Box::new(tier) as Box<dyn SpillTier>
    });
    let extras = Extras { tier, ..Extras::default() };
    Engine::start_with(Box::new(runner), loaded.tokenizer, config, extras).expect("the engine starts")
}

fn stop(engine: &EngineHandle) {
    engine.drain();
    assert!(engine.wait_drained(Duration::from_secs(60)), "requests are left");
    let stats = engine.stats();
    assert_eq!(stats.blocks_held(), 0, "blocks are held by nobody");
    assert_eq!(stats.blocks_free() + stats.blocks_cached(), stats.blocks_total());
    engine.shutdown();
    assert!(engine.wait_stopped(Duration::from_secs(60)), "the engine thread is left");
}

/// Each subject alone in the engine, one after another.
fn alone(reference: &Reference) -> Vec<Outcome> {
    let engine = start(EngineConfig { max_drafts: 0, ..roomy() });
    let outcomes = subjects(reference)
        .into_iter()
        .map(|(name, request)| finish(name, engine.submit(request).expect("taken")).0)
        .collect();
    stop(&engine);
    outcomes
}

/// Submits the subjects scattered among the others, drops some of the others half-way, and returns what came of
/// the subjects.
fn in_company(engine: &EngineHandle, reference: &Reference) -> Vec<(Outcome, Usage)> {
    let mut others = others(reference).into_iter();
    let mut company = Vec::new();
    let mut watched = Vec::new();
    for (name, request) in subjects(reference) {
        for other in others.by_ref().take(4) {
            company.push(engine.submit(other).expect("taken"));
        }
        watched.push((name, engine.submit(request).expect("taken")));
    }
    for other in others {
        company.push(engine.submit(other).expect("taken"));
    }
    // Every fourth of the others goes away after its first words.
    let mut index = 0;
    company.retain_mut(|stream| {
        index += 1;
        if index % 4 == 0 {
            stream.next_blocking();
        }
        index % 4 != 0
    });
    let outcomes = watched.into_iter().map(|(name, stream)| finish(name, stream)).collect();
    for stream in company {
        finish("another request", stream);
    }
    outcomes
}

fn assert_same(what: &str, reference: &Reference, expected: &[Outcome], found: &[(Outcome, Usage)]) {
    assert_eq!(expected.len(), found.len());
    for (((name, _), expected), (found, _)) in subjects(reference).iter().zip(expected).zip(found) {
        assert_eq!(found, expected, "{name}, {what}");
    }
}

#[test]
fn the_same_bits_whatever_happens_around_a_request() {
    let reference = Reference::read();
    assert_eq!(english().len(), 3768, "the fixture's tokens speak of another text");
    let expected = alone(&reference);
    for ((name, request), outcome) in subjects(&reference).iter().zip(&expected) {
        assert_eq!(outcome.logprobs.len(), outcome.tokens.len(), "{name}: a log-probability a token");
        assert!(!outcome.tokens.is_empty(), "{name}: no tokens");
        let entries = if request.prompt_logprobs.is_some() { request.prompt.len() } else { 0 };
        assert_eq!(outcome.prompt_logprobs.len(), entries, "{name}: prompt log-probabilities");
    }

    // Another run of the same.
    assert_eq!(alone(&reference), expected, "alone, again");

    // Among others, in prefill chunks of many sizes.
    for max_batch_tokens in [16, 64, 256, 1024] {
        let config = EngineConfig { max_batch_tokens, max_running: max_batch_tokens.min(64), ..roomy() };
        let engine = start(config);
        let found = in_company(&engine, &reference);
        assert_same(&format!("among 32 others, {max_batch_tokens} tokens a step"), &reference, &expected, &found);
        assert_eq!(engine.stats().preemptions.get(), 0, "the pool was to be large enough");
        println!("{max_batch_tokens} tokens a step: same bits over {} steps", engine.stats().steps.get());
        stop(&engine);
    }

    // Other block sizes.
    for block_size in [32, 64] {
        let engine = start(EngineConfig { block_size, num_blocks: 16384 / block_size, ..roomy() });
        let found = in_company(&engine, &reference);
        assert_same(&format!("among 32 others, blocks of {block_size}"), &reference, &expected, &found);
        stop(&engine);
    }

    // A pool so small that the subjects, which rank last, lose their blocks to others and are computed again.
    for prefix_caching in [false, true] {
        let engine = start(EngineConfig { num_blocks: 40, context_len: 640, prefix_caching, ..roomy() });
        let growing: Vec<_> = growing(&reference).map(|other| engine.submit(other).expect("taken")).collect();
        let watched: Vec<_> = subjects(&reference)
            .into_iter()
            .map(|(name, request)| {
                (name, engine.submit(GenerateRequest { priority: 1, ..request }).expect("taken"))
            })
            .collect();
        let found: Vec<_> = watched.into_iter().map(|(name, stream)| finish(name, stream)).collect();
        for stream in growing {
            finish("a growing request", stream);
        }
        let preemptions = engine.stats().preemptions.get();
        assert!(preemptions > 0, "nothing was preempted");
        assert_same(&format!("after {preemptions} preemptions"), &reference, &expected, &found);
        println!("{preemptions} preemptions, prefix cache {prefix_caching}: same bits");
        stop(&engine);
    }

    // With a prefix cache: cold, then warm, then warm in company.
    let engine = start(EngineConfig { prefix_caching: true, ..roomy() });
    let mut cached = 0;
    for round in ["cold", "warm"] {
        let found: Vec<_> = subjects(&reference)
            .into_iter()
            .map(|(name, request)| finish(name, engine.submit(request).expect("taken")))
            .collect();
        assert_same(&format!("{round} prefix cache"), &reference, &expected, &found);
        cached = found.iter().map(|(_, usage)| usage.cached_tokens).sum::<u32>();
    }
    assert!(cached > 200, "only {cached} prompt tokens came from the cache");
    println!("{cached} prompt tokens from the prefix cache: same bits");
    let found = in_company(&engine, &reference);
    assert_same("warm prefix cache, among 32 others", &reference, &expected, &found);
    stop(&engine);

    // With drafts, more of them than pay.
    let engine = start(EngineConfig { max_drafts: 24, ..roomy() });
    let found: Vec<_> = subjects(&reference)
        .into_iter()
        .map(|(name, request)| finish(name, engine.submit(request).expect("taken")))
        .collect();
    assert_same("with drafts", &reference, &expected, &found);
    let (drafted, accepted) = (engine.stats().drafted_tokens.get(), engine.stats().accepted_draft_tokens.get());
    assert!(accepted > 20 && accepted < drafted, "{accepted} of {drafted} drafts accepted");
    println!("{accepted} of {drafted} drafted tokens accepted: same bits");
    stop(&engine);

    // As the first of three choices, which start from its blocks.
    let engine = start(roomy());
    let found: Vec<_> = subjects(&reference)
        .into_iter()
        .map(|(name, request)| {
            let choices = (0..3).map(|choice| {
                let mut request = request.clone();
                request.sampling.seed += 1000 * choice;
                request
            });
            let mut streams = engine.submit_all(choices.collect()).expect("taken");
            let others = streams.split_off(1);
            let outcome = finish(name, streams.remove(0));
            for other in others {
                finish(name, other);
            }
            outcome
        })
        .collect();
    assert_same("as one of three choices", &reference, &expected, &found);
    let (forks, copies) = (engine.stats().forks.get(), engine.stats().block_copies.get());
    assert!(forks >= 12 && copies > 0, "{forks} forks, {copies} copies");
    println!("{forks} forks, {copies} blocks copied: same bits");
    stop(&engine);

    // From blocks that were evicted to disk.
    let dir = tempfile::tempdir().expect("a directory");
    let small = EngineConfig { num_blocks: 40, context_len: 640, prefix_caching: true, ..roomy() };
    let engine = start_spilling(small, Some(dir.path()));
    for round in ["cold", "warm"] {
        let found: Vec<_> = subjects(&reference)
            .into_iter()
            .map(|(name, request)| finish(name, engine.submit(request).expect("taken")))
            .collect();
        assert_same(&format!("{round}, with blocks on disk"), &reference, &expected, &found);
    }
    let (spilled, restored) = (engine.stats().blocks_spilled.get(), engine.stats().blocks_restored.get());
    assert!(restored > 5, "{restored} blocks read back of {spilled}");
    println!("{restored} blocks read back of {spilled} on disk: same bits");
    stop(&engine);
}
