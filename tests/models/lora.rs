//! LoRA adapters: each is the model with the update in its weights, for every architecture and in both formats; a row's bits
//! are its own whatever adapters run beside it; cached prefixes are an adapter's own.

use rill_engine::{Engine, EngineConfig, EngineHandle, Event, GenerateRequest, LoadedAdapter, ModelRunner};
use rill_models::{Adapter, AdapterSites, ForwardInput, LoadedModel, NoProgress, SourceOptions};
use rill_tests::default_model;
use rill_tests::reference::Reference;
use rill_tests::single_sequence::SingleSequence;
use rill_tests::tiny_adapters::{PeftReference, Scales, TinyAdapter};
use rill_tests::tiny_gguf::GgufFiles;
use rill_tests::tiny_models::{self, TinyModel};
use rill_tests::tiny_parity::distance;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const BLOCK_SIZE: usize = 16;
const RANK_MAX: usize = 8;

fn load(path: &Path) -> LoadedModel {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)
        .expect("the files are there");
    rill_models::load(&files, &default_model::CPU).unwrap_or_else(|error| panic!("{error}"))
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn logits(path: &Path, model: &TinyModel, adapter: Option<&Path>) -> Vec<f32> {
    let mut single =
        SingleSequence::new(load(path).model, BLOCK_SIZE, model.tokens.len()).expect("a small cache fits");
    if let Some(adapter) = adapter {
        let sites = single.adapter_sites().expect("the CPU takes adapters");
        let adapter = sites.load(adapter, RANK_MAX).unwrap_or_else(|error| panic!("{error}"));
        single.set_adapter(Some(Arc::new(adapter)));
    }
    let whole = single.logits(&model.tokens, model.tokens.len()).expect("rill runs");
    let chunks = single.logits(&model.tokens, 7).expect("rill runs");
    assert!(whole == chunks, "chunks change something");
    whole
}

/// What is left is rounding, of which keys and values see the most.
const CLOSE: f64 = 0.002;

/// A model beside its GGUF file, and an adapter of each kind of scales.
struct Adapted {
    name: String,
    model: TinyModel,
    base: PathBuf,
    gguf: PathBuf,
    plain: Form,
    patterns: Form,
}

/// An adapter as PEFT saves it, as a GGUF file where one can hold it, and merged into a model.
struct Form {
    peft: PathBuf,
    merged: PathBuf,
    gguf: Option<PathBuf>,
}

/// Below `scratch`, and whether GGUF files are there.
fn adapted_models(scratch: &Path) -> (Vec<Adapted>, bool) {
    let mut files = GgufFiles::new(scratch);
    let mut all = Vec::new();
    // Latent attention takes no adapters.
    for (name, model) in tiny_models::all().into_iter().filter(|(name, _)| !name.starts_with("deepseek")) {
        let new = |kind: &str| {
            let path = scratch.join(format!("{name}-{kind}"));
            std::fs::create_dir(&path).expect("a new folder");
            path
        };
        let base = new("base");
        model.write_directory(&base, true);
        let mut form = |scales: Scales| {
            let adapter = TinyAdapter::new(&model, 1, scales);
            let (peft, merged) = (new(&format!("{scales:?}")), new(&format!("{scales:?}-merged")));
            adapter.write_directory(&peft);
            model.write_directory_with(&merged, &adapter.merged(&model), true);
            // A GGUF file holds one alpha.
            let gguf = (scales == Scales::Plain).then(|| files.add(&base, json!({"adapter": peft})));
            Form { peft, merged, gguf }
        };
        let (plain, patterns) = (form(Scales::Plain), form(Scales::Patterns));
        let gguf = files.add(&base, json!({}));
        all.push(Adapted { name, model, base, gguf, plain, patterns });
    }
    (all, files.write("adapters of GGUF files", Path::new(env!("CARGO_TARGET_TMPDIR"))))
}

#[test]
fn adapters_are_what_merged_weights_are() {
    let scratch = folder();
    let (all, have_gguf) = adapted_models(scratch.path());
    let mut wrong = Vec::new();
    for Adapted { name, model, base, gguf, plain, patterns } in &all {
        let bare = logits(base, model, None);
        for Form { peft, merged, gguf: converted } in [plain, patterns] {
            let expected = logits(merged, model, None);
            assert!(distance(&bare, &expected) > 0.1, "{name}: the adapter changes little");
            let mut check = |file: &Path, adapter: &Path| {
                let distance = distance(&logits(file, model, Some(adapter)), &expected);
                let what = format!("{} on {}", adapter.display(), file.display());
                println!("{distance:.5} {what}");
                if distance > CLOSE {
                    wrong.push(format!("{what}: {distance}"));
                }
            };
            check(base, peft);
            if have_gguf {
                check(gguf, peft);
                if let Some(converted) = converted {
                    check(gguf, converted);
                    check(base, converted);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn adapters_are_what_peft_makes_of_them() {
    let models = tiny_models::all();
    for (name, reference) in PeftReference::all() {
        let model = &models[&name];
        let adapter = TinyAdapter::new(model, 1, Scales::Patterns);
        assert_eq!(adapter.tensors().into_keys().collect::<Vec<_>>(), reference.names, "{name}");
        let (base, peft) = (folder(), folder());
        model.write_directory(base.path(), true);
        adapter.write_directory(peft.path());
        std::fs::write(peft.path().join("adapter_config.json"), reference.config.to_string()).expect("written");
        let distance = distance(&logits(base.path(), model, Some(peft.path())), &reference.logits());
        println!("{name:20} {distance:.5}");
        assert!(distance < CLOSE, "{name}: {distance}");
    }
}

/// One step's logits for sequences of these tokens and adapters, from the start, in blocks of their own.
fn step(loaded: &mut LoadedModel, sequences: &[(&[u32], Option<Arc<Adapter>>)]) -> Vec<Vec<f32>> {
    let mut input = ForwardInput { query_starts: vec![0], block_table_starts: vec![0], ..ForwardInput::default() };
    for (number, (tokens, adapter)) in sequences.iter().enumerate() {
        for (position, &token) in tokens.iter().enumerate() {
            input.logit_rows.push(input.token_ids.len() as u32);
            input.token_ids.push(token);
            input.positions.push(position as u32);
            input.slot_mapping.push((number * 64 + position) as u32);
        }
        input.query_starts.push(input.token_ids.len() as u32);
        input.context_lens.push(tokens.len() as u32);
        input.block_tables.extend((0..4).map(|block| (number * 4 + block) as u32));
        input.block_table_starts.push(input.block_tables.len() as u32);
        input.adapters.push(adapter.clone());
    }
    let mut logits = Vec::new();
    loaded.model.forward(&input, &mut logits).expect("a sound batch runs");
    let width = loaded.model.shape().vocab_size;
    let mut rows = logits.chunks_exact(width);
    sequences.iter().map(|(tokens, _)| rows.by_ref().take(tokens.len()).flatten().copied().collect()).collect()
}

#[test]
fn a_row_does_not_see_the_adapters_beside_it() {
    for name in ["llama", "mixtral", "gemma2", "gpt2", "gpt-neox", "phi3", "granite"] {
        let model = &tiny_models::all()[name];
        let dir = folder();
        model.write_directory(dir.path(), false);
        let mut loaded = load(dir.path());
        loaded.model.allocate_kv_cache(24, BLOCK_SIZE).expect("a small cache fits");
        let sites = loaded.model.adapter_sites().expect("the CPU takes adapters").clone();
        let adapter = |seed| {
            let dir = folder();
            TinyAdapter::new(model, seed, Scales::Patterns).write_directory(dir.path());
            Some(Arc::new(sites.load(dir.path(), RANK_MAX).expect("sound")))
        };
        let (one, two) = (adapter(1), adapter(2));
        let tokens = &model.tokens;
        let sequences: Vec<(&[u32], Option<Arc<Adapter>>)> = vec![
            (&tokens[..9], one.clone()),
            (&tokens[..30], None),
            (&tokens[..1], two.clone()),
            (&tokens[..9], two.clone()),
            (&tokens[..21], one.clone()),
            (&tokens[..9], None),
        ];
        let together = step(&mut loaded, &sequences);
        for (sequence, given) in sequences.iter().zip(&together) {
            assert!(step(&mut loaded, std::slice::from_ref(sequence))[0] == *given, "{name}: alone it is another");
        }
        assert!(together[0] != together[3] && together[0] != together[5], "{name}: adapters do nothing");
    }
}

fn refusal(sites: &AdapterSites, path: &Path) -> String {
    sites.load(path, RANK_MAX).map(|_| ()).expect_err("must be refused").to_string()
}

#[test]
fn what_an_adapter_may_not_hold_is_named() {
    let model = &tiny_models::all()["llama"];
    let base = folder();
    model.write_directory(base.path(), true);
    let loaded = load(base.path());
    let sites = loaded.model.adapter_sites().expect("the CPU takes adapters");
    let adapter = TinyAdapter::new(model, 1, Scales::Plain);

    for (field, value, part) in [
        ("use_dora", serde_json::json!(true), "DoRA"),
        ("modules_to_save", serde_json::json!(["lm_head"]), "modules_to_save"),
        ("bias", serde_json::json!("lora_only"), "bias is lora_only"),
        ("layer_replication", serde_json::json!([[0, 2]]), "layer_replication"),
        ("alora_invocation_tokens", serde_json::json!([1]), "aLoRA"),
        ("peft_type", serde_json::json!("IA3"), "peft_type"),
        ("lora_alpha", serde_json::json!("many"), "lora_alpha"),
        ("r", serde_json::json!(5), "rank 3; adapter_config.json says 5"),
        ("rank_pattern", serde_json::json!({"(?=x)": 4}), "rank_pattern"),
    ] {
        let dir = folder();
        adapter.write_directory(dir.path());
        let mut config = adapter.config();
        config[field] = value;
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).expect("written");
        let error = refusal(sites, dir.path());
        assert!(error.contains(part), "{field}: {error}");
    }

    let with = |change: &dyn Fn(&mut TinyAdapter)| {
        let mut adapter = TinyAdapter::new(model, 1, Scales::Plain);
        change(&mut adapter);
        let dir = folder();
        adapter.write_directory(dir.path());
        refusal(sites, dir.path())
    };
    let module = "model.layers.1.mlp.up_proj";
    let error = with(&|adapter| {
        let factors = adapter.modules.remove(module).expect("there");
        adapter.modules.insert("lm_head".to_owned(), factors);
    });
    assert!(error.contains("lm_head"), "{error}");
    let error = with(&|adapter| adapter.modules.get_mut(module).expect("there").b.shape = vec![3, 96]);
    assert!(error.contains(module) && error.contains("(96, 3)"), "{error}");
    let error = with(&|adapter| {
        let factors = adapter.modules.remove(module).expect("there");
        adapter.modules.insert("model.layers.2.mlp.up_proj".to_owned(), factors);
    });
    assert!(error.contains("layers.2"), "{error}");

    let dir = folder();
    adapter.write_directory(dir.path());
    let error = sites.load(dir.path(), 2).map(|_| ()).expect_err("rank 3").to_string();
    assert!(error.contains("rank 3") && error.contains("1 to 2") && error.contains("--max-lora-rank"), "{error}");
    // A file that is cut short, one that is a pickle, and none.
    let path = dir.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).expect("written");
    std::fs::write(&path, &bytes[..bytes.len() - 4]).expect("written");
    assert!(refusal(sites, dir.path()).contains("not a safetensors file"));
    std::fs::rename(&path, dir.path().join("adapter_model.bin")).expect("renamed");
    assert!(refusal(sites, dir.path()).contains("pickle"));
    assert!(refusal(sites, &dir.path().join("nowhere")).contains("adapter_config.json"));
}

#[test]
fn gguf_files_that_are_no_adapters_of_the_model_are_refused() {
    let scratch = folder();
    let models = tiny_models::all();
    let source = |name: &str| {
        let path = scratch.path().join(name);
        std::fs::create_dir(&path).expect("a new folder");
        models[name].write_directory(&path, true);
        path
    };
    let (model, other) = (source("llama"), source("qwen3"));
    TinyAdapter::new(&models["qwen3"], 1, Scales::Plain).write_directory(&other);
    let mut files = GgufFiles::new(scratch.path());
    let (a_model, an_adapter) = (files.add(&model, json!({})), files.add(&other, json!({"adapter": other})));
    if files.write("refused GGUF adapters", Path::new(env!("CARGO_TARGET_TMPDIR"))) {
        let single = SingleSequence::new(load(&model).model, BLOCK_SIZE, 16).expect("a small cache fits");
        let sites = single.adapter_sites().expect("the CPU takes adapters");
        assert!(refusal(sites, &a_model).contains("general.type"));
        assert!(refusal(sites, &an_adapter).contains("qwen3"));
    }
}

/// An adapter of the default model, whose weights are 4-bit.
fn default_adapter(sites: &AdapterSites, seed: u64) -> Adapter {
    default_adapter_of_rank(sites, seed, None)
}

/// The same of some rank, in place of the usual one.
fn default_adapter_of_rank(sites: &AdapterSites, seed: u64, rank: Option<usize>) -> Adapter {
    let shapes = (0..30).flat_map(|layer| {
        [
            ("self_attn.q_proj", (576, 576)),
            ("self_attn.k_proj", (192, 576)),
            ("self_attn.v_proj", (192, 576)),
            ("self_attn.o_proj", (576, 576)),
            ("mlp.gate_proj", (1536, 576)),
            ("mlp.up_proj", (1536, 576)),
            ("mlp.down_proj", (576, 1536)),
        ]
        .map(|(part, shape)| (format!("model.layers.{layer}.{part}"), shape))
    });
    let dir = folder();
    let scales = rank.map_or(Scales::Plain, Scales::OfRank);
    TinyAdapter::of_modules(shapes, seed, scales, 0.02).write_directory(dir.path());
    sites.load(dir.path(), rank.unwrap_or(RANK_MAX)).expect("sound")
}

fn request(prompt: &[u32], seed: u64, adapter: Option<&Arc<LoadedAdapter>>) -> GenerateRequest {
    let mut request = GenerateRequest::greedy(prompt.to_vec(), 60);
    request.sampling.temperature = if seed == 0 { 0.0 } else { 0.9 };
    request.sampling.seed = seed;
    GenerateRequest { logprobs: Some(2), adapter: adapter.cloned(), ..request }
}

/// Tokens and the bits of their log-probabilities, and how many prompt tokens were cached.
fn outcomes(engine: &EngineHandle, requests: &[GenerateRequest]) -> Vec<(Vec<(u32, u32)>, u32)> {
    let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).expect("taken")).collect();
    let finish = |mut stream: rill_engine::EventStream| {
        let mut tokens = Vec::new();
        loop {
            match stream.next_blocking() {
                Some(Event::Delta { logprobs, .. }) => {
                    tokens.extend(logprobs.iter().map(|entry| (entry.token, entry.logprob.to_bits())));
                }
                Some(Event::Finished { usage, .. }) => return (tokens, usage.cached_tokens),
                other => panic!("{other:?}"),
            }
        }
    };
    streams.into_iter().map(finish).collect()
}

#[test]
fn on_the_default_model_adapters_share_batches_but_no_bits() {
    let reference = Reference::read();
    let loaded = default_model::load();
    let sites = loaded.model.adapter_sites().expect("the CPU takes adapters").clone();
    let adapters: Vec<Arc<LoadedAdapter>> =
        (1..=2).map(|seed| Arc::new(LoadedAdapter::new(default_adapter(&sites, seed)))).collect();
    let config = EngineConfig {
        block_size: BLOCK_SIZE,
        // Four prompts of five blocks fit, and each grows by four.
        num_blocks: 21,
        context_len: 256,
        max_batch_tokens: 48,
        max_running: 8,
        ..EngineConfig::default()
    };
    let runner = ModelRunner::new(loaded.model, &config).expect("a small cache fits");
    let engine = Engine::start(Box::new(runner), loaded.tokenizer.clone(), config).expect("a sound configuration");

    let text = &reference.tokens;
    let who = [None, Some(&adapters[0]), Some(&adapters[1])];
    let requests: Vec<GenerateRequest> =
        (0..9).map(|i| request(&text[i / 3 * 40..][..70], i as u64 / 3, who[i % 3])).collect();
    // One after another; no prefix is another adapter's.
    let alone: Vec<_> =
        requests.iter().map(|request| outcomes(&engine, std::slice::from_ref(request)).remove(0)).collect();
    assert!(alone.iter().all(|(_, cached)| *cached == 0), "{:?}", alone.iter().map(|o| o.1).collect::<Vec<_>>());
    assert!(alone[0].0 != alone[1].0 && alone[1].0 != alone[2].0, "adapters do nothing");
    let preemptions = engine.stats().preemptions.get();
    let together = outcomes(&engine, &requests);
    assert!(engine.stats().preemptions.get() > preemptions, "the cache is too large to see a preemption");
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert_eq!(alone.0, together.0, "request {i} is another in company");
    }

    // Its own prefix is found again, also by the same weights loaded a second time.
    outcomes(&engine, &requests[7..8]);
    let again = outcomes(&engine, &requests[7..8]).remove(0);
    assert_eq!((&again.0, again.1), (&alone[7].0, 64));
    let reloaded = Arc::new(LoadedAdapter::new(default_adapter(&sites, 1)));
    let renamed = outcomes(&engine, &[request(&text[80..][..70], 2, Some(&reloaded))]).remove(0);
    assert_eq!((&renamed.0, renamed.1), (&alone[7].0, 64));

    // Nothing holds an adapter when its last request has ended.
    let weights = Arc::downgrade(reloaded.weights());
    drop(reloaded);
    let started = Instant::now();
    while weights.upgrade().is_some() || adapters.iter().any(|adapter| adapter.running() + adapter.waiting() > 0) {
        assert!(started.elapsed() < Duration::from_secs(10), "an idle engine keeps an adapter");
        std::thread::sleep(Duration::from_millis(1));
    }
    engine.shutdown();
}

/// Seconds of a step that decodes one token of each of 16 sequences, which run with these adapters in turn: the median.
fn step_seconds(loaded: &mut LoadedModel, adapters: &[Option<Arc<Adapter>>]) -> f64 {
    const SEQUENCES: u32 = 16;
    let context: u32 = 90;
    let blocks = context.div_ceil(BLOCK_SIZE as u32);
    loaded.model.allocate_kv_cache((SEQUENCES * blocks) as usize, BLOCK_SIZE).expect("a small cache fits");
    let mut times = Vec::new();
    let mut logits = Vec::new();
    for position in 0..context {
        let sequences = 0..SEQUENCES;
        let input = ForwardInput {
            token_ids: sequences.clone().map(|sequence| 1000 + 37 * position + 101 * sequence).collect(),
            positions: vec![position; SEQUENCES as usize],
            slot_mapping: sequences
                .clone()
                .map(|sequence| sequence * blocks * BLOCK_SIZE as u32 + position)
                .collect(),
            query_starts: (0..=SEQUENCES).collect(),
            context_lens: vec![position + 1; SEQUENCES as usize],
            block_tables: (0..SEQUENCES * blocks).collect(),
            block_table_starts: (0..=SEQUENCES).map(|sequence| sequence * blocks).collect(),
            logit_rows: sequences.clone().collect(),
            adapters: sequences
                .map(|sequence| adapters.get(sequence as usize % adapters.len().max(1))?.clone())
                .collect(),
        };
        let started = Instant::now();
        loaded.model.forward(&input, &mut logits).expect("runs");
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// `cargo test --release -p rill-tests --test lora -- --ignored --nocapture cost`
#[test]
#[ignore = "measures; needs a quiet machine"]
fn what_adapters_cost() {
    let mut loaded = default_model::load();
    let sites = loaded.model.adapter_sites().expect("the CPU takes adapters").clone();
    let alone = step_seconds(&mut loaded, &[]);
    println!(
        "| 16 streams, all seven linear layers | ms a step | of none |\n| none | {:.2} | 1.00 |",
        alone * 1e3
    );
    for rank in [8, 16, 64] {
        for count in [1, 4, 16] {
            let adapter = |seed| Some(Arc::new(default_adapter_of_rank(&sites, seed, Some(rank))));
            let adapters: Vec<_> = (0..count).map(adapter).collect();
            let seconds = step_seconds(&mut loaded, &adapters);
            println!("| {count} of rank {rank} | {:.2} | {:.2} |", seconds * 1e3, seconds / alone);
        }
    }
}
