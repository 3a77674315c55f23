//! Every architecture against transformers: a tiny model's logits at every position, whole, in chunks, and in a ragged
//! batch. Transformers rounds to bf16 where rill does, so that little but the fixture's own f16 is left to differ.

use rill_models::{ForwardInput, LoadOptions, LoadedModel, ModelError, NoProgress, SourceOptions};
use rill_tests::single_sequence::SingleSequence;
use rill_tests::tiny_models::{self, TinyModel};
use std::path::Path;

const BLOCK_SIZE: usize = 16;
/// Of the differences, relative to the logits' own size: root mean square, and the largest.
const ERROR_MAX: f64 = 0.0015;
const WORST_MAX: f64 = 0.01;

fn load(path: &Path) -> Result<LoadedModel, ModelError> {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)?;
    rill_models::load(&files, &LoadOptions { threads: 2, device: rill_models::Device::Cpu, isa: None })
}

fn rms(values: impl Iterator<Item = f32>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, n), x| (sum + f64::from(x) * f64::from(x), n + 1));
    (sum / f64::from(count)).sqrt()
}

/// Logits after every token of two sequences that take turns of 1 to 5 tokens in the same steps: `tokens`, and a copy
/// that starts three steps later.
fn ragged(mut loaded: LoadedModel, tokens: &[u32]) -> [Vec<f32>; 2] {
    let blocks = tokens.len().div_ceil(BLOCK_SIZE) as u32;
    loaded.model.allocate_kv_cache(2 * blocks as usize, BLOCK_SIZE).expect("a small cache fits");
    let (mut done, mut outputs, mut step) = ([0, 0], [Vec::new(), Vec::new()], 0);
    while done[1] < tokens.len() {
        let mut input =
            ForwardInput { query_starts: vec![0], block_table_starts: vec![0], ..ForwardInput::default() };
        let mut whose = Vec::new();
        for sequence in [1, 0] {
            let wanted = if sequence == 1 && step < 3 { 0 } else { 1 + (step * 3 + sequence * 2) % 5 };
            let end = tokens.len().min(done[sequence] + wanted);
            if end == done[sequence] {
                continue;
            }
            // Blocks of the two alternate, the last ones first.
            let block = |position: usize| 2 * (blocks - 1 - (position / BLOCK_SIZE) as u32) + sequence as u32;
            for (position, &token) in tokens.iter().enumerate().take(end).skip(done[sequence]) {
                input.logit_rows.push(input.token_ids.len() as u32);
                input.token_ids.push(token);
                input.positions.push(position as u32);
                input.slot_mapping.push(block(position) * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
                whose.push(sequence);
            }
            input.query_starts.push(input.token_ids.len() as u32);
            input.context_lens.push(end as u32);
            input.block_tables.extend((0..end.div_ceil(BLOCK_SIZE)).map(|i| block(i * BLOCK_SIZE)));
            input.block_table_starts.push(input.block_tables.len() as u32);
            done[sequence] = end;
        }
        let mut logits = Vec::new();
        loaded.model.forward(&input, &mut logits).expect("a sound batch runs");
        let width = logits.len() / whose.len();
        for (row, sequence) in logits.chunks_exact(width).zip(whose) {
            outputs[sequence].extend_from_slice(row);
        }
        step += 1;
    }
    outputs
}

/// Loads what lies at `path` and compares every way of running it with transformers.
fn check(name: &str, model: &TinyModel, path: &Path) -> Result<(), String> {
    let load = || load(path).map_err(|error| format!("{name}: {error}"));
    let expected = model.logits();
    let mut single =
        SingleSequence::new(load()?.model, BLOCK_SIZE, model.tokens.len()).expect("a small cache fits");
    let given = single.logits(&model.tokens, model.tokens.len()).expect("rill runs");
    for chunk in [1, 7] {
        assert!(
            single.logits(&model.tokens, chunk).expect("rill runs") == given,
            "{name}: chunks of {chunk} differ"
        );
    }
    for (number, output) in ragged(load()?, &model.tokens).iter().enumerate() {
        assert!(*output == given, "{name}: sequence {number} of a ragged batch differs");
    }
    let size = rms(expected.iter().copied());
    let error = rms(given.iter().zip(&expected).map(|(a, b)| a - b)) / size;
    let worst = given.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / size;
    println!("{name:20} error {error:.5}, worst {worst:.4}");
    if error < ERROR_MAX && worst < WORST_MAX {
        return Ok(());
    }
    Err(format!("{name}: error {error:.5}, worst {worst:.4}"))
}

#[test]
fn model_directories_agree_with_transformers() {
    let mut wrong = Vec::new();
    for (name, model) in tiny_models::all() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), name.len() % 2 == 0);
        wrong.extend(check(&name, &model, dir.path()).err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Models a GGUF file cannot say everything of: dynamic scaling, windows from some layer on, a second base in a list.
const NOT_IN_GGUF: [&str; 3] = ["llama-dynamic", "qwen2-sliding", "gemma3-wide"];

#[test]
fn gguf_files_agree_with_transformers() {
    let mut wrong = Vec::new();
    for (name, model) in tiny_models::all() {
        if NOT_IN_GGUF.contains(&name.as_str()) {
            continue;
        }
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("model.gguf");
        model.write_gguf(&path);
        wrong.extend(check(&name, &model, &path).err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_tensor_that_is_missing_or_too_many_is_named() {
    let mut models = tiny_models::all();
    for (name, add, remove, part) in [
        ("qwen3", None, Some("model.layers.1.self_attn.q_norm.weight"), "layers.1.self_attn.q_norm"),
        ("qwen2", None, Some("model.layers.0.self_attn.k_proj.bias"), "layers.0.self_attn.k_proj.bias"),
        ("llama", Some("model.layers.1.self_attn.q_norm.weight"), None, "layers.1.self_attn.q_norm"),
        ("llama", None, Some("model.embed_tokens.weight"), "model.embed_tokens.weight"),
        ("mixtral", None, Some("model.layers.0.block_sparse_moe.experts.3.w2.weight"), "experts.3.w2"),
    ] {
        let model = models.get_mut(name).expect("in the fixture");
        let kept = model.tensors.clone();
        model.tensors.extend(add.map(|name| (name.to_owned(), vec![16])));
        model.tensors.retain(|name, _| Some(name.as_str()) != remove);
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        model.tensors = kept;
        let error = load(dir.path()).map(|_| ()).expect_err(name).to_string();
        assert!(error.contains(part), "{name}: {error}");
    }
}
