//! Every architecture against transformers: a tiny model's logits at every position, whole, in chunks, and in a ragged
//! batch. Transformers rounds to bf16 where rill does, so that little but the fixture's own f16 is left to differ.

use rill_models::{LoadOptions, LoadedModel, ModelError, NoProgress, RowDtype, SourceOptions};
use rill_tests::single_sequence::SingleSequence;
use rill_tests::tiny_gguf::GgufFiles;
use rill_tests::tiny_parity::{self, Bounds};
use rill_tests::{default_model, tiny_models};
use serde_json::json;
use std::path::Path;

const BOUNDS: Bounds = Bounds { root_mean_square: 0.0015, largest: 0.01 };
/// Where activations are rounded to bf16, as transformers here does not: eight bits, once a layer input.
const ROUNDED: Bounds = Bounds { root_mean_square: 0.02, largest: 0.15 };

/// Models that are not the same bits from safetensors: the file has a scale of scores that is rounded otherwise, or names
/// no activation. Root mean square of what they are apart, relative to the logits.
const FORMATS_APART: ([&str; 3], f64) = (["gemma2", "gemma3", "gpt-neox-sequential"], 1e-3);

fn load(path: &Path) -> Result<LoadedModel, ModelError> {
    load_with(path, &default_model::CPU)
}

fn load_with(path: &Path, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)?;
    rill_models::load(&files, options)
}

#[test]
fn model_directories_agree_with_transformers() {
    let mut wrong = Vec::new();
    for (name, model) in tiny_models::all() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), name.len() % 2 == 0);
        wrong.extend(tiny_parity::check(&name, &model, &|| load(dir.path()), &[1, 7], BOUNDS).err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn activations_rounded_to_bf16_stay_close() {
    let options = LoadOptions { row_dtype: Some(RowDtype::Bf16), ..default_model::CPU };
    for name in ["llama", "llama-odd", "mixtral", "gemma", "smollm3"] {
        let model = &tiny_models::all()[name];
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), false);
        let check = |bounds| tiny_parity::check(name, model, &|| load_with(dir.path(), &options), &[1, 7], bounds);
        check(ROUNDED).unwrap_or_else(|error| panic!("{error}"));
        assert!(check(BOUNDS).is_err(), "{name} rounds nothing");
    }
}

fn logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let loaded = load(path).unwrap_or_else(|error| panic!("{error}"));
    let mut single = SingleSequence::new(loaded.model, 16, tokens.len()).expect("a small cache fits");
    single.logits(tokens, tokens.len()).expect("rill runs")
}

#[test]
fn gguf_files_agree_with_transformers_and_with_safetensors() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let mut files = GgufFiles::new(scratch.path());
    let models = tiny_models::all();
    let mut made = Vec::new();
    for (name, model) in &models {
        let source = scratch.path().join(name);
        std::fs::create_dir(&source).expect("a new folder");
        model.write_directory(&source, true);
        // Every weight is a bf16, so that nothing is lost.
        let dtype = if name.len() % 2 == 0 { "F32" } else { "BF16" };
        made.push((name, "", files.add(&source, json!({"type": dtype}))));
        match name.as_str() {
            "granite-moe" => made.push((name, "fused", files.add(&source, json!({"fused": true})))),
            "deepseek2" | "deepseek2-grouped" => {
                made.push((name, "merged", files.add(&source, json!({"merged": true}))));
            }
            _ => {}
        }
    }
    if !files.write("GGUF files of every architecture", Path::new(env!("CARGO_TARGET_TMPDIR"))) {
        return;
    }
    let mut wrong = Vec::new();
    for (name, form, path) in made {
        let model = &models[name];
        wrong.extend(tiny_parity::check(&format!("{name} {form}"), model, &|| load(&path), &[1, 7], BOUNDS).err());
        let apart = tiny_parity::distance(
            &logits(&path, &model.tokens),
            &logits(&scratch.path().join(name), &model.tokens),
        );
        println!("{name:20} {form} from safetensors: {apart:.6}");
        let (some, most) = FORMATS_APART;
        if apart > if some.contains(&name.as_str()) { most } else { 0.0 } {
            wrong.push(format!("{name} {form}: {apart} from safetensors"));
        }
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
