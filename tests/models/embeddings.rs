//! Hidden states of every architecture against transformers, and embeddings made of them through the engine.

use rill_engine::{EmbedRequest, Engine, EngineConfig, EngineHandle, Event, ModelRunner};
use rill_models::{ForwardInput, LoadedModel, NoProgress, Pooling, SourceOptions};
use rill_tests::default_model;
use rill_tests::tiny_models::{self, TinyModel, TinyTensor};
use std::path::Path;

const BLOCK_SIZE: usize = 16;

fn load(dir: &Path) -> LoadedModel {
    let path = dir.display().to_string();
    let files = rill_models::resolve(&path, &SourceOptions::from_env(), &mut NoProgress).expect("a directory");
    rill_models::load(&files, &default_model::CPU).expect("a model")
}

fn written(model: &TinyModel) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    model.write_directory(dir.path(), true);
    dir
}

/// The hidden state of every token, all computed at once.
fn hidden_states(loaded: &mut LoadedModel, tokens: &[u32]) -> Vec<f32> {
    let count = tokens.len() as u32;
    let blocks = count.div_ceil(BLOCK_SIZE as u32);
    loaded.model.allocate_kv_cache(blocks as usize, BLOCK_SIZE).expect("a small cache fits");
    let input = ForwardInput {
        token_ids: tokens.to_vec(),
        positions: (0..count).collect(),
        slot_mapping: (0..count).collect(),
        query_starts: vec![0, count],
        context_lens: vec![count],
        block_tables: (0..blocks).collect(),
        block_table_starts: vec![0, blocks],
        logit_rows: Vec::new(),
        adapters: Vec::new(),
    };
    loaded.model.forward(&input, &mut Vec::new()).expect("a sound batch runs");
    let mut states = Vec::new();
    loaded.model.hidden_states(&(0..count).collect::<Vec<_>>(), &mut states).expect("rows of the batch");
    states
}

/// Logits by plain arithmetic: the output matrix, then what the configuration does to the result.
fn project(model: &TinyModel, states: &[f32]) -> Vec<f32> {
    let weights = model.weights();
    let names = ["lm_head.weight", "embed_out.weight", "model.embed_tokens.weight", "transformer.wte.weight"];
    let TinyTensor { shape, values } = names.iter().find_map(|name| weights.get(*name)).expect("a head");
    let width = shape[1];
    let of = |key: &str| model.config[key].as_f64();
    let bias = weights.get("lm_head.bias").map(|tensor| &tensor.values);
    let mut logits = Vec::new();
    for state in states.chunks_exact(width) {
        for (token, row) in values.chunks_exact(width).enumerate() {
            let dot: f64 = row.iter().zip(state).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
            let dot = dot + bias.map_or(0.0, |bias| f64::from(bias[token]));
            let scaled = dot * of("logit_scale").unwrap_or(1.0) / of("logits_scaling").unwrap_or(1.0);
            logits.push(match of("final_logit_softcapping") {
                Some(cap) => cap * (scaled / cap).tanh(),
                None => scaled,
            } as f32);
        }
    }
    logits
}

/// Heads are square here, so that equal logits mean equal states.
#[test]
fn hidden_states_agree_with_transformers() {
    let mut wrong = Vec::new();
    for (name, model) in tiny_models::all() {
        let dir = written(&model);
        let states = hidden_states(&mut load(dir.path()), &model.tokens);
        let (got, expected) = (project(&model, &states), model.logits());
        assert_eq!(got.len(), expected.len(), "{name}");
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let size = squares(&mut expected.iter().copied()).sqrt();
        let error = squares(&mut got.iter().zip(&expected).map(|(a, b)| a - b)).sqrt() / size;
        println!("{name:20} error {error:.5}");
        if error >= 0.0015 {
            wrong.push(format!("{name}: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn engine(dir: &Path, config: EngineConfig) -> EngineHandle {
    let LoadedModel { model, tokenizer, .. } = load(dir);
    let runner = ModelRunner::new(model, &config).expect("a small cache fits");
    Engine::start(Box::new(runner), tokenizer, config).expect("a sound configuration")
}

fn embed(engine: &EngineHandle, prompts: &[&[u32]], pooling: Pooling) -> Vec<Vec<f32>> {
    let submit = |prompt: &&[u32]| {
        let request = EmbedRequest {
            prompt: prompt.to_vec(),
            pooling,
            priority: 0,
            cache_salt: None,
            tenant: None,
            adapter: None,
        };
        engine.embed(request).expect("taken")
    };
    let streams: Vec<_> = prompts.iter().map(submit).collect();
    let of = |mut stream: rill_engine::EventStream| {
        let Some(Event::Embedding { values }) = stream.next_blocking() else { panic!("no embedding") };
        let Some(Event::Finished { usage, .. }) = stream.next_blocking() else { panic!("no end") };
        assert_eq!(usage.completion_tokens, 0);
        assert!(stream.next_blocking().is_none());
        values
    };
    streams.into_iter().map(of).collect()
}

/// The same bits whole and in chunks, alone and side by side, from the cache and not, after preemptions.
#[test]
fn embeddings_are_the_hidden_states_however_they_are_computed() {
    let model = &tiny_models::all()["llama"];
    let dir = written(model);
    let tokens = &model.tokens;
    let states = hidden_states(&mut load(dir.path()), tokens);
    let width = states.len() / tokens.len();
    let last = |len: usize| states[(len - 1) * width..len * width].to_vec();
    let mean = |len: usize| -> Vec<f32> {
        let sum = |column: usize| (0..len).map(|row| f64::from(states[row * width + column])).sum::<f64>();
        (0..width).map(|column| (sum(column) / len as f64) as f32).collect()
    };
    let lens = [tokens.len(), 1, 17, 33, tokens.len(), 16, 40];
    let prompts: Vec<&[u32]> = lens.iter().map(|&len| &tokens[..len]).collect();
    let config = EngineConfig {
        block_size: BLOCK_SIZE,
        num_blocks: 64,
        context_len: 64,
        max_batch_tokens: 256,
        max_running: 8,
        ..EngineConfig::default()
    };
    for (what, config) in [
        ("whole", config.clone()),
        ("in chunks", EngineConfig { max_batch_tokens: 8, ..config.clone() }),
        ("without a cache", EngineConfig { prefix_caching: false, ..config.clone() }),
        ("preempted", EngineConfig { num_blocks: 5, max_batch_tokens: 24, prefix_caching: false, ..config }),
    ] {
        let engine = engine(dir.path(), config);
        for round in 0..2 {
            for (pooling, expected) in [
                (Pooling::Last, &last as &dyn Fn(usize) -> Vec<f32>),
                (Pooling::Mean, &mean),
                (Pooling::Cls, &|_| last(1)),
            ] {
                for (got, len) in embed(&engine, &prompts, pooling).into_iter().zip(lens) {
                    assert_eq!(got, expected(len), "{what}, round {round}, {pooling:?} of {len}");
                }
            }
        }
        engine.shutdown();
    }
}
