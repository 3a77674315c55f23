//! The whole CUDA backend, launches and device memory included, its kernels run on the CPU: every architecture against
//! transformers, and the default model against the CPU backend, through the engine, with everything that may happen to a
//! sequence.

use proptest::prelude::*;
use rill_cuda_shim::{Failing, Shim};
use rill_engine::{
    Engine, EngineConfig, EngineHandle, Event, EventStream, GenerateRequest, Health, LoadedAdapter, ModelRunner,
    StopParams, SubmitError,
};
use rill_kernels::cuda::{CudaBackend, Driver};
use rill_models::{
    Adapter, AdapterSites, Device, ForwardInput, KvDtype, LoadOptions, LoadedModel, ModelFiles, NoProgress,
    SourceOptions,
};
use rill_tests::reference::Reference;
use rill_tests::single_sequence::SingleSequence;
use rill_tests::tiny_adapters::{Scales, TinyAdapter};
use rill_tests::tiny_models::TinyModel;
use rill_tests::tiny_parity::{self, Bounds};
use rill_tests::{default_model, tiny_models};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// What is left between an adapter and merged weights is rounding, of which keys and values see the most: up to 0.0012 was
/// seen.
const ADAPTED: f64 = 0.003;

/// Wider than the CPU's: up to 0.0017 and 0.014 were seen, bf16 products in a different order through random weights.
const BOUNDS: Bounds = Bounds { root_mean_square: 0.002, largest: 0.02 };

fn backend(seed: u64) -> CudaBackend {
    CudaBackend::new(Arc::new(Shim::new(seed)), 2)
}

#[test]
fn every_architecture_agrees_with_transformers() {
    let mut wrong = Vec::new();
    for (seed, (name, model)) in tiny_models::all().into_iter().enumerate() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let source = dir.path().display().to_string();
        let load = || {
            let files = rill_models::resolve(&source, &SourceOptions::from_env(), &mut NoProgress)?;
            rill_models::load_on(&files, backend(seed as u64), "the shim")
        };
        wrong.extend(tiny_parity::check(&name, &model, &load, &[7], BOUNDS).err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Adapter `seed` of a tiny model, read from files as any other.
fn adapter(sites: &AdapterSites, model: &TinyModel, seed: u64, scales: Scales) -> Adapter {
    let dir = tempfile::tempdir().expect("a temporary directory");
    TinyAdapter::new(model, seed, scales).write_directory(dir.path());
    let adapter = sites.load(dir.path(), 8).unwrap_or_else(|error| panic!("{error}"));
    assert!((1..=sites.bytes_max(8)).contains(&adapter.bytes()), "room is left for less");
    adapter
}

/// An adapter is the model with the update in its weights, for every architecture that takes adapters.
#[test]
fn adapters_are_what_merged_weights_are() {
    let mut wrong = Vec::new();
    // Latent attention takes no adapters.
    let models = tiny_models::all().into_iter().filter(|(name, _)| !name.starts_with("deepseek"));
    for (seed, (name, model)) in models.enumerate() {
        let [base, merged] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary directory"));
        model.write_directory(base.path(), true);
        model.write_directory_with(
            merged.path(),
            &TinyAdapter::new(&model, 1, Scales::Patterns).merged(&model),
            true,
        );
        let logits = |dir: &TempDir, adapted: bool| {
            let source = dir.path().display().to_string();
            let files =
                rill_models::resolve(&source, &SourceOptions::from_env(), &mut NoProgress).expect("written");
            let loaded = rill_models::load_on(&files, backend(seed as u64), "the shim").expect("loads");
            let mut single = SingleSequence::new(loaded.model, 16, model.tokens.len()).expect("room");
            if adapted {
                let sites = single.adapter_sites().expect("a GPU takes adapters");
                let adapter = adapter(sites, &model, 1, Scales::Patterns);
                single.set_adapter(Some(Arc::new(adapter)));
            }
            single.logits(&model.tokens, 7).expect("computed")
        };
        let (expected, given, plain) = (logits(&merged, false), logits(&base, true), logits(&base, false));
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let distance = |given: &[f32]| {
            let apart = square(&mut given.iter().zip(&expected).map(|(a, b)| a - b));
            (apart / square(&mut expected.iter().copied())).sqrt()
        };
        println!("{name:20} {:.5}, without the adapter {:.3}", distance(&given), distance(&plain));
        if distance(&given) > ADAPTED || distance(&plain) < 0.1 {
            wrong.push(format!("{name}: {}, without the adapter {}", distance(&given), distance(&plain)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Tokens, and the bits of their log-probabilities.
fn outcome(mut stream: EventStream) -> Vec<(u32, u32)> {
    let mut tokens = Vec::new();
    loop {
        match stream.next_blocking() {
            Some(Event::Delta { logprobs, .. }) => {
                tokens.extend(logprobs.iter().map(|entry| (entry.token, entry.logprob.to_bits())));
            }
            Some(Event::Finished { .. }) => return tokens,
            Some(Event::Prompt { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Sequences with two adapters and with none in one batch: the tokens the CPU backend generates for each alone, the same
/// bits alone, in company, and replayed as graphs while another thread loads and drops adapters.
#[test]
fn adapters_in_one_batch_generate_the_cpu_backends_tokens() {
    let tiny = Tiny::new();
    let model = &tiny_models::all()["llama"];
    let run = |loaded: LoadedModel, together: bool, loading: bool| -> Vec<Vec<(u32, u32)>> {
        let sites = loaded.model.adapter_sites().expect("both take adapters").clone();
        let adapters =
            [1, 2].map(|seed| Arc::new(LoadedAdapter::new(adapter(&sites, model, seed, Scales::Patterns))));
        let who = [None, Some(&adapters[0]), Some(&adapters[1])];
        let engine = start(loaded, roomy());
        let requests = tiny.requests.iter().enumerate().map(|(number, request)| GenerateRequest {
            adapter: who[number % 3].cloned(),
            logprobs: Some(0),
            ..request.clone()
        });
        let submit = |request| engine.submit(request).expect("taken");
        let outcomes = std::thread::scope(|scope| {
            if loading {
                scope.spawn(|| (3..13).for_each(|seed| drop(adapter(&sites, model, seed, Scales::Plain))));
            }
            if together {
                let streams: Vec<EventStream> = requests.map(submit).collect();
                streams.into_iter().map(outcome).collect()
            } else {
                requests.map(|request| outcome(submit(request))).collect()
            }
        });
        stop(&engine);
        outcomes
    };
    let tokens = |outcomes: &[Vec<(u32, u32)>]| -> Vec<Vec<u32>> {
        outcomes.iter().map(|outcome| outcome.iter().map(|&(token, _)| token).collect()).collect()
    };
    let on_cpu = run(rill_models::load(&tiny.files, &default_model::CPU).expect("loads"), false, false);
    let load = |backend| rill_models::load_on(&tiny.files, backend, "the shim").expect("loads");
    let alone = run(load(backend(1)), false, false);
    assert_eq!(tokens(&alone), tokens(&on_cpu));
    assert!(run(load(backend(2)), true, false) == alone, "in company");
    let shim = Arc::new(Shim::new(3));
    let graphs = CudaBackend::new(shim.clone(), 2).with_graphs().with_staged_from(1);
    assert!(run(load(graphs), true, true) == alone, "as graphs");
    assert!(shim.replays() > 10, "only {} graphs were replayed", shim.replays());

    let engine = tiny.start(backend(4), roomy());
    let plain = tiny.one_by_one(&engine);
    stop(&engine);
    for (number, (with, without)) in tokens(&alone).iter().zip(&plain).enumerate() {
        assert_eq!(with == without, number % 3 == 0, "request {number}: an adapter does nothing, or too much");
    }
}

fn start(loaded: LoadedModel, config: EngineConfig) -> EngineHandle {
    let runner = ModelRunner::new(loaded.model, &config).expect("the KV cache fits");
    Engine::start(Box::new(runner), loaded.tokenizer, config).expect("the engine starts")
}

/// Tokens, and how many of the prompt came from the prefix cache.
fn finish(mut stream: EventStream) -> (Vec<u32>, u32) {
    let mut tokens = Vec::new();
    loop {
        match stream.next_blocking() {
            Some(Event::Delta { token_ids, .. }) => tokens.extend(token_ids),
            Some(Event::Finished { usage, .. }) => return (tokens, usage.cached_tokens),
            Some(Event::Prompt { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn stop(engine: &EngineHandle) {
    engine.shutdown();
    assert!(engine.wait_stopped(Duration::from_secs(60)), "the engine thread is left");
}

/// Where less is between the two likeliest tokens, whoever rounds otherwise may choose the other.
const NEAR_TIE: f32 = 0.3;

/// Tokens, the next best of each, and by how much the token is likelier.
fn choices(mut stream: EventStream) -> Vec<(u32, u32, f32)> {
    let mut choices = Vec::new();
    loop {
        match stream.next_blocking() {
            Some(Event::Delta { logprobs, .. }) => {
                choices.extend(logprobs.iter().map(|choice| {
                    let [(_, best), (next, second)] = choice.top[..] else { panic!("two were asked for") };
                    (choice.token, next, best - second)
                }));
            }
            Some(Event::Finished { .. }) => return choices,
            Some(Event::Prompt { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A batch of ragged lengths; a pool so small that one of them is preempted; a prompt that is in the prefix cache.
#[test]
fn the_default_model_generates_the_cpu_backends_tokens() {
    let reference = Reference::read();
    let text = &reference.tokens;
    let requests = || {
        [(&text[..13], 8), (&text[100..105], 10), (&text[40..41], 8)]
            .map(|(prompt, most)| GenerateRequest::greedy(prompt.to_vec(), most))
    };
    let config = EngineConfig { num_blocks: 64, prefix_caching: false, ..EngineConfig::default() };
    let on_cpu = start(default_model::load(), config.clone());
    let expected = requests().map(|request| {
        let request = GenerateRequest { logprobs: Some(2), ..request };
        choices(on_cpu.submit(request).expect("taken"))
    });
    stop(&on_cpu);

    let engine = start(default_model::load_on(backend(1)), config);
    let streams = requests().map(|request| engine.submit(request).expect("taken"));
    let mut same = 0;
    for (tokens, expected) in streams.map(|stream| finish(stream).0).iter().zip(&expected) {
        let first = tokens.iter().zip(expected).position(|(token, choice)| *token != choice.0);
        let near = first.is_none_or(|first| expected[first].1 == tokens[first] && expected[first].2 < NEAR_TIE);
        assert!(tokens.len() == expected.len() && near, "{tokens:?} instead of {expected:?}");
        same += first.unwrap_or(tokens.len());
    }
    assert!(same >= 20, "{same} tokens before the first that differ");
    stop(&engine);
}

/// A tiny model on disk, and what is asked of it: prompts of several lengths.
struct Tiny {
    files: ModelFiles,
    requests: Vec<GenerateRequest>,
    _dir: TempDir,
}

impl Tiny {
    fn new() -> Tiny {
        Tiny::of("llama")
    }

    fn of(name: &str) -> Tiny {
        let model = tiny_models::all().remove(name).expect("in the fixture");
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let source = dir.path().display().to_string();
        let files =
            rill_models::resolve(&source, &SourceOptions::from_env(), &mut NoProgress).expect("just written");
        let prompt = |start: usize, len: usize| -> Vec<u32> {
            (start..start + len).map(|i| model.tokens[i % model.tokens.len()]).collect()
        };
        let requests =
            (0..6).map(|i| GenerateRequest::greedy(prompt(i * 3, 5 + 7 * i), 24 + 4 * i as u32)).collect();
        Tiny { files, requests, _dir: dir }
    }

    /// Each request after the one before it.
    fn one_by_one(&self, engine: &EngineHandle) -> Vec<Vec<u32>> {
        self.requests.iter().map(|request| finish(engine.submit(request.clone()).expect("taken")).0).collect()
    }

    /// All at once: tokens of each, and prompt tokens that came from the cache.
    fn all_at_once(&self, engine: &EngineHandle) -> (Vec<Vec<u32>>, u32) {
        let streams = engine.submit_all(self.requests.clone()).expect("taken");
        let found: Vec<(Vec<u32>, u32)> = streams.into_iter().map(finish).collect();
        (found.iter().map(|f| f.0.clone()).collect(), found.iter().map(|f| f.1).sum())
    }

    fn start(&self, backend: CudaBackend, config: EngineConfig) -> EngineHandle {
        start(rill_models::load_on(&self.files, backend, "the shim").expect("loads"), config)
    }

    /// `expected` in company, preempted, and with an empty and a full prefix cache.
    fn check(&self, expected: &[Vec<u32>], backend: impl Fn(u64) -> CudaBackend) {
        let engine = self.start(backend(1), roomy());
        assert_eq!(self.all_at_once(&engine).0, expected, "in company");
        stop(&engine);

        // Four prompts are computed in the first step, in 6 blocks, and need 12 before the first of them has ended.
        let small = EngineConfig { num_blocks: 10, max_batch_tokens: 64, max_running: 8, ..roomy() };
        let engine = self.start(backend(2), small);
        assert_eq!(self.all_at_once(&engine).0, expected, "in a small pool");
        assert!(engine.stats().preemptions.get() > 0, "nothing was preempted");
        stop(&engine);

        let engine = self.start(backend(3), EngineConfig { prefix_caching: true, ..roomy() });
        assert_eq!(self.all_at_once(&engine).0, expected, "with an empty prefix cache");
        let (again, cached) = self.all_at_once(&engine);
        assert!(cached >= 32, "only {cached} prompt tokens came from the cache");
        assert_eq!(again, expected, "with a full prefix cache");
        stop(&engine);
    }
}

fn roomy() -> EngineConfig {
    EngineConfig { num_blocks: 64, prefix_caching: false, context_len: 64, ..EngineConfig::default() }
}

/// A tiny model, where there is time for more: the same tokens as on the CPU, in company, preempted and cached; with
/// launches one by one and replayed as graphs.
#[test]
fn preemption_and_prefix_hits_change_nothing() {
    let tiny = Tiny::new();
    let engine = start(rill_models::load(&tiny.files, &default_model::CPU).expect("loads"), roomy());
    let expected = tiny.one_by_one(&engine);
    stop(&engine);
    tiny.check(&expected, backend);
    let shim = Arc::new(Shim::new(4));
    tiny.check(&expected, |_| CudaBackend::new(shim.clone(), 2).with_graphs().with_staged_from(1));
    assert!(shim.replays() > 10, "only {} graphs were replayed", shim.replays());
}

/// Every kind of cache keeps the promise, whatever its precision.
#[test]
fn no_kind_of_cache_depends_on_company() {
    let tiny = Tiny::new();
    for dtype in [KvDtype::F16, KvDtype::Fp8, KvDtype::Int8] {
        let backend = |seed| backend(seed).with_kv_dtype(dtype);
        let engine = tiny.start(backend(0), roomy());
        let expected = tiny.one_by_one(&engine);
        stop(&engine);
        tiny.check(&expected, backend);
    }
}

/// Sequences of some lengths, each with blocks of its own: their prompts in one step, then one token each in every further
/// step. Returns all logits, then all blocks of the cache.
fn decode(tiny: &Tiny, backend: CudaBackend, lens: &[usize], steps: usize) -> (Vec<f32>, Vec<Vec<u8>>) {
    const BLOCK: usize = 16;
    let mut model = rill_models::load_on(&tiny.files, backend, "the shim").expect("loads").model;
    let each = 1 + (lens.iter().max().expect("a sequence") + steps) / BLOCK;
    model.allocate_kv_cache(1 + lens.len() * each, BLOCK).expect("room");
    let tokens = &tiny.requests[5].prompt;
    let (mut all, mut logits) = (Vec::new(), Vec::new());
    for step in 0..=steps {
        let mut input =
            ForwardInput { query_starts: vec![0], block_table_starts: vec![0], ..ForwardInput::default() };
        for (s, &len) in lens.iter().enumerate() {
            let positions = if step == 0 { 0..len } else { len + step - 1..len + step };
            let block = |i: usize| (1 + s * each + i) as u32;
            input.context_lens.push(positions.end as u32);
            for position in positions {
                input.token_ids.push(tokens[(s * 5 + position * 7) % tokens.len()]);
                input.positions.push(position as u32);
                input.slot_mapping.push(block(position / BLOCK) * BLOCK as u32 + (position % BLOCK) as u32);
            }
            input.logit_rows.push(input.token_ids.len() as u32 - 1);
            input.query_starts.push(input.token_ids.len() as u32);
            input.block_tables.extend((0..each).map(block));
            input.block_table_starts.push(input.block_tables.len() as u32);
        }
        // Every other step is started before it is waited for.
        assert!(step % 2 == 0 || model.start(&input, None).expect("starts"), "a GPU computes aside");
        model.forward(&input, &mut logits).expect("computed");
        all.extend_from_slice(&logits);
    }
    let mut block = Vec::new();
    let blocks = (0..(1 + lens.len() * each) as u32).map(|number| {
        model.read_block(number, &mut block).expect("read");
        block.clone()
    });
    (all, blocks.collect())
}

/// Decode steps filled up to buckets and replayed as graphs: the same bits of logits, nothing written to the cache by the rows
/// that belong to no sequence, and one graph for a bucket however many of its sizes come.
#[test]
fn buckets_change_no_bit_and_bound_the_graphs() {
    let tiny = Tiny::new();
    let shim = Arc::new(Shim::new(6));
    let mut captures = Vec::new();
    for count in [1, 2, 3, 4, 5, 6, 7, 8, 9, 13] {
        let lens: Vec<usize> = (0..count).map(|s| 3 + s * 7 % 30).collect();
        let expected = decode(&tiny, backend(count as u64), &lens, 4);
        let before = (shim.captures(), shim.replays());
        let given = decode(&tiny, CudaBackend::new(shim.clone(), 2).with_graphs(), &lens, 4);
        assert!(expected.0.iter().all(|x| x.is_finite()) && given.0 == expected.0, "logits of {count} sequences");
        assert!(given.1 == expected.1, "the cache of {count} sequences");
        // The second of the four decode steps captures, the rest replay: bucket, work and memory are the same.
        captures.push((shim.captures() - before.0, shim.replays() - before.1));
    }
    assert!(captures.iter().all(|&counts| counts == (1, 3)), "{captures:?}");

    // Batches of all sizes from nine down, through one engine: buckets of 16, 8, 4, 2 and 1.
    let shim = Arc::new(Shim::new(7));
    let config = EngineConfig { max_drafts: 0, ..roomy() };
    let engine = tiny.start(CudaBackend::new(shim.clone(), 2).with_graphs(), config);
    let streams: Vec<_> = (0..9)
        .map(|i| {
            let request =
                GenerateRequest::greedy(tiny.requests[i % 6].prompt[..3 + i % 3].to_vec(), 8 + 5 * i as u32);
            engine.submit(request).expect("taken")
        })
        .collect();
    streams.into_iter().for_each(|stream| drop(finish(stream)));
    stop(&engine);
    assert_eq!(shim.captures(), 5, "one graph for a bucket");
    assert!(shim.replays() > 30, "only {} replays", shim.replays());
}

/// Tokens drawn from the best of a row, ranked on the device, are those drawn from the whole row, in any company: with and
/// without a cap on the logits, a bias, a scale.
#[test]
fn ranked_rows_give_the_tokens_of_whole_rows() {
    for name in ["llama", "gemma2", "phi", "cohere"] {
        check_ranked_rows(&Tiny::of(name));
    }
}

fn check_ranked_rows(tiny: &Tiny) {
    let drawn = |number: usize| {
        let mut request = tiny.requests[number].clone();
        request.stop.max_tokens = 12;
        if number > 0 {
            let sampling = &mut request.sampling;
            (sampling.temperature, sampling.seed) = (0.8, number as u64);
            (sampling.top_k, sampling.top_p) =
                ([3, 20, 64, 0, 0][number - 1], [0.9, 0.5, 1.0, 0.9, 0.3, 0.95][number]);
        }
        request
    };
    let shim = Arc::new(Shim::new(5));
    let engine = tiny.start(CudaBackend::new(shim, 2), roomy());
    let whole: Vec<Vec<u32>> = (0..6)
        .map(|number| {
            let request = GenerateRequest { logprobs: Some(0), ..drawn(number) };
            finish(engine.submit(request).expect("taken")).0
        })
        .collect();
    for (number, expected) in whole.iter().enumerate() {
        assert_eq!(&finish(engine.submit(drawn(number)).expect("taken")).0, expected, "request {number} alone");
    }
    let streams: Vec<_> = (0..6).map(|number| engine.submit(drawn(number)).expect("taken")).collect();
    let found: Vec<Vec<u32>> = streams.into_iter().map(|stream| finish(stream).0).collect();
    assert_eq!(found, whole, "in company");
    stop(&engine);
}

/// Without a GPU: `auto` runs on the CPU, and whatever a GPU alone has is refused by name. No panic without libcuda.
#[test]
fn what_a_gpu_alone_has_is_refused_on_the_cpu() {
    let tiny = Tiny::new();
    let refused = |options: LoadOptions, words: &str| match rill_models::load(&tiny.files, &options) {
        Ok(_) => panic!("{options:?} was taken"),
        Err(error) => assert!(error.to_string().contains(words), "{error}"),
    };
    for kv_dtype in [KvDtype::F16, KvDtype::Fp8] {
        refused(LoadOptions { kv_dtype, ..default_model::CPU }, "on a GPU only");
    }
    refused(LoadOptions { cuda_graphs: true, ..default_model::CPU }, "CUDA graphs are for a GPU");
    // No machine has so many.
    refused(LoadOptions { device: Device::Cuda(999), ..default_model::CPU }, "CUDA");
    if Driver::count().unwrap_or(0) == 0 {
        let loaded = rill_models::load(&tiny.files, &LoadOptions { device: Device::Auto, ..default_model::CPU });
        let description = loaded.expect("the CPU is there").description;
        assert!(description.contains("CPU"), "{description}");
    }
}

/// A device that fails at any moment, while a model loads or while it runs: every request ends with the reason, the
/// engine is dead and says so, and nothing panics.
#[test]
fn a_lost_device_ends_everything_with_a_reason() {
    let tiny = Tiny::new();
    let run = |after: u64, out_of_memory: bool, graphs: bool| -> u64 {
        let device = Arc::new(Failing::after(after, Shim::new(after), out_of_memory));
        let backend = CudaBackend::new(device.clone(), 1);
        let backend = if graphs { backend.with_graphs() } else { backend };
        let words = if out_of_memory { "out of memory" } else { "CUDA_ERROR_ILLEGAL_ADDRESS" };
        let loaded = match rill_models::load_on(&tiny.files, backend, "the shim") {
            Ok(loaded) => loaded,
            Err(error) => {
                assert!(error.to_string().contains(words), "{error}");
                return device.left();
            }
        };
        let config = EngineConfig { num_blocks: 10, max_batch_tokens: 16, max_running: 8, ..roomy() };
        let runner = match ModelRunner::new(loaded.model, &config) {
            Ok(runner) => runner,
            Err(error) => {
                assert!(error.to_string().contains(words), "{error}");
                return device.left();
            }
        };
        let engine = Engine::start(Box::new(runner), loaded.tokenizer, config).expect("the engine starts");
        let mut failures = 0;
        let mut streams = Vec::new();
        for request in &tiny.requests[..3] {
            match engine.submit(GenerateRequest {
                stop: StopParams { max_tokens: 4, ..request.stop.clone() },
                ..request.clone()
            }) {
                Ok(stream) => streams.push(stream),
                Err(SubmitError::Dead(reason)) => assert!(reason.contains(words), "{reason}"),
                Err(other) => panic!("{other}"),
            }
        }
        for mut stream in streams {
            loop {
                match stream.next_blocking() {
                    Some(Event::Finished { .. }) => break,
                    Some(Event::Failed { message, .. }) => {
                        assert!(message.contains(words) && !message.contains("panicked"), "{message}");
                        failures += 1;
                        break;
                    }
                    Some(_) => {}
                    None => panic!("a stream ended without its last event"),
                }
            }
        }
        if failures > 0 {
            assert!(matches!(engine.health(), Health::Dead(reason) if reason.contains(words)));
        }
        engine.shutdown();
        device.left()
    };
    let plenty = 1 << 40;
    let all = plenty - run(plenty, false, false);
    proptest!(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() }, |(
        share in 0.0..1.0_f64,
        out_of_memory in any::<bool>(),
        graphs in any::<bool>(),
    )| {
        run((all as f64 * share) as u64, out_of_memory, graphs);
    });
}
