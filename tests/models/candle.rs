//! The runner for the long tail: candle-transformers' models behind the engine's own interface, against transformers.

use rill_models::{LoadOptions, LoadedModel, ModelError, NoProgress, Runner, SourceOptions};
use rill_tests::tiny_parity::{self, Bounds};
use rill_tests::{default_model, tiny_models};
use std::path::Path;

/// Candle rounds neither queries, keys nor values to bf16, as the fixture does.
const BOUNDS: Bounds = Bounds { root_mean_square: 0.02, largest: 0.15 };

fn load(path: &Path, runner: Runner) -> Result<LoadedModel, ModelError> {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)?;
    rill_models::load(&files, &LoadOptions { runner, ..default_model::CPU })
}

#[test]
fn architectures_only_candle_has_agree_with_transformers() {
    let mut wrong = Vec::new();
    for (name, model) in tiny_models::long_tail() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let open = || load(dir.path(), Runner::Auto);
        match open() {
            Ok(loaded) => assert!(loaded.description.contains("candle"), "{}", loaded.description),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
        wrong.extend(tiny_parity::check_nearly(&name, &model, &open, &[1, 7], BOUNDS).err());
        let error = load(dir.path(), Runner::Native).map(|_| ()).expect_err("rill has none").to_string();
        assert!(error.contains("is not supported") && error.contains("HeliumForCausalLM"), "{error}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn candle_can_be_asked_for_a_second_opinion() {
    let mut wrong = Vec::new();
    for name in ["llama", "qwen2", "qwen3", "olmo2", "phi", "stablelm"] {
        let model = &tiny_models::all()[name];
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let open = || load(dir.path(), Runner::Candle);
        wrong.extend(tiny_parity::check_nearly(name, model, &open, &[1, 7], BOUNDS).err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_candle_cannot_do_is_said() {
    let models = tiny_models::all();
    let refused = |name: &str, options: &LoadOptions| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        models[name].write_directory(dir.path(), true);
        let spec = dir.path().display().to_string();
        let files = rill_models::resolve(&spec, &SourceOptions::from_env(), &mut NoProgress).expect("files");
        rill_models::load(&files, options).map(|_| ()).expect_err(name).to_string()
    };
    let candle = LoadOptions { runner: Runner::Candle, ..default_model::CPU };
    let error = refused("olmoe", &candle);
    assert!(error.contains("candle does not run the architecture OlmoeForCausalLM"), "{error}");
    let error = refused("llama-linear", &candle);
    assert!(error.contains("rope"), "{error}");
    let bytes = LoadOptions { kv_dtype: rill_models::KvDtype::Int8, ..candle };
    let error = refused("llama", &bytes);
    assert!(error.contains("KV caches of bytes"), "{error}");
}
