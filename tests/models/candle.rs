//! The runner for the long tail: candle-transformers' models behind the engine's own interface, against transformers.

use rill_models::{LoadOptions, LoadedModel, ModelError, NoProgress, Runner, SourceOptions};
use rill_tests::single_sequence::SingleSequence;
use rill_tests::tiny_gguf::GgufFiles;
use rill_tests::tiny_models::TinyModel;
use rill_tests::tiny_parity::{self, Bounds};
use rill_tests::{default_model, tiny_models};
use serde_json::{Value, json};
use std::path::Path;

/// Candle rounds neither queries, keys nor values to bf16, as fixtures do that rill's own forward pass is measured by.
const BOUNDS: Bounds = Bounds { root_mean_square: 0.02, largest: 0.15 };
/// Models candle has the architecture of, and what of their files it does not follow.
const REFUSED: [(&str, &str); 9] = [
    ("deepseek2-grouped", "topk_method"),
    ("gemma2", "query_pre_attn_scalar"),
    ("gemma3", "query_pre_attn_scalar"),
    ("llama-dynamic", "rope scaling"),
    ("llama-linear", "rope scaling"),
    ("llama-odd", "head_dim"),
    ("llama-yarn", "rope scaling"),
    ("phi3-longrope", "rope scaling"),
    ("qwen3-moe", "mlp_only_layers"),
];

/// The same of GGUF files. The last two are as converters wrote them once: experts one by one, queries and keys in one.
const REFUSED_IN_GGUF: [(&str, &str); 4] = [
    ("llama-3", "rope.scaling"),
    ("mistral", "head_dim"),
    ("mixtral", "ffn_gate.0.weight"),
    ("phi", "attn_qkv.weight"),
];

fn load(path: &Path, runner: Runner) -> Result<LoadedModel, ModelError> {
    load_with(path, &LoadOptions { runner, ..default_model::CPU })
}

fn load_with(path: &Path, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)?;
    rill_models::load(&files, options)
}

/// Logits after each of `tokens`, or of as many as a sequence may have.
fn logits(loaded: LoadedModel, tokens: &[u32]) -> Vec<f32> {
    let tokens = &tokens[..tokens.len().min(loaded.model.shape().context_len)];
    let mut single = SingleSequence::new(loaded.model, 16, tokens.len()).expect("a small cache fits");
    single.logits(tokens, 5).expect("the model runs")
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
        let architecture = model.config["architectures"][0].as_str().expect("a name");
        assert!(error.contains("is not supported") && error.matches(architecture).count() == 2, "{error}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn candle_can_be_asked_for_a_second_opinion() {
    let mut wrong = Vec::new();
    for (name, model) in tiny_models::all() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let open = || load(dir.path(), Runner::Candle);
        let refused = REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, part)| *part);
        match (open(), refused) {
            (Err(error), _) if error.to_string().contains("candle does not run the architecture") => {}
            (Err(error), Some(part)) if error.to_string().contains(part) => {}
            (Ok(loaded), None) if loaded.model.shape().context_len >= model.tokens.len() => {
                wrong.extend(tiny_parity::check_nearly(&name, &model, &open, &[1, 7], BOUNDS).err());
            }
            // Up to the window that candle does not slide.
            (Ok(loaded), None) => {
                assert_eq!(Some(loaded.model.shape().context_len), loaded.config.sliding_window, "{name}");
                let given = logits(loaded, &model.tokens);
                let apart = tiny_parity::distance(&given, &model.logits()[..given.len()]);
                println!("{name:20} error {apart:.5} within the window");
                if apart >= BOUNDS.root_mean_square {
                    wrong.push(format!("{name}: error {apart:.5}"));
                }
            }
            (other, _) => wrong.push(format!("{name}: {:?}", other.map(|_| "runs").map_err(|e| e.to_string()))),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The model, its configuration changed.
fn changed(mut model: TinyModel, changes: &Value) -> TinyModel {
    let fields = model.config.as_object_mut().expect("an object");
    fields.extend(changes.as_object().expect("an object").clone());
    fields.retain(|_, value| !value.is_null());
    model
}

/// What transformers was not asked about in this form, against rill's own forward pass.
#[test]
fn what_is_changed_agrees_with_rills_own() {
    let mut models = tiny_models::all();
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707});
    let newer = json!({"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    for (name, changes) in [
        ("gemma2", json!({"query_pre_attn_scalar": 32, "sliding_window": 64})),
        ("gemma3", json!({"query_pre_attn_scalar": 32, "rope_scaling": null})),
        ("deepseek2", json!({"rope_scaling": yarn})),
        ("llama-3", json!({"rope_scaling": null, "rope_theta": null, "rope_parameters": newer})),
        ("qwen3-moe", json!({"mlp_only_layers": []})),
    ] {
        let mut model = changed(models.remove(name).expect("in the fixture"), &changes);
        if name == "qwen3-moe" {
            // Its second layer has experts like the first.
            model.tensors.retain(|name, _| !name.starts_with("model.layers.1.mlp."));
            let experts = model.tensors.iter().filter(|(name, _)| name.contains(".0.mlp."));
            let more: Vec<_> =
                experts.map(|(name, s)| (name.replacen(".0.mlp.", ".1.mlp.", 1), s.clone())).collect();
            model.tensors.extend(more);
        }
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let open = |runner| load(dir.path(), runner).unwrap_or_else(|error| panic!("{name}: {error}"));
        let given = logits(open(Runner::Candle), &model.tokens);
        let wanted = logits(open(Runner::Native), &model.tokens);
        let apart = tiny_parity::distance(&given, &wanted);
        println!("{name:20} apart {apart:.5}");
        assert!(apart < BOUNDS.root_mean_square, "{name}: {apart}");
    }
}

#[test]
fn gguf_files_agree_with_transformers() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let mut files = GgufFiles::new(scratch.path());
    let mut all = tiny_models::all();
    let mut made = Vec::new();
    for name in ["llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "llama-3"] {
        let model = all.remove(name).expect("in a fixture");
        let source = scratch.path().join(name);
        std::fs::create_dir(&source).expect("a new folder");
        model.write_directory(&source, true);
        made.push((name, model, files.add(&source, json!({}))));
    }
    if !files.write("GGUF files through candle", Path::new(env!("CARGO_TARGET_TMPDIR"))) {
        return;
    }
    let mut wrong = Vec::new();
    for (name, model, path) in made {
        let open = || load(&path, Runner::Candle);
        match open() {
            Err(error)
                if REFUSED_IN_GGUF.iter().any(|(n, part)| *n == name && error.to_string().contains(part)) => {}
            Ok(_) if REFUSED_IN_GGUF.iter().any(|(refused, _)| *refused == name) => {
                wrong.push(format!("{name} runs"))
            }
            Ok(loaded) if loaded.model.shape().context_len < model.tokens.len() => {
                let given = logits(loaded, &model.tokens);
                let apart = tiny_parity::distance(&given, &model.logits()[..given.len()]);
                println!("{name:20} error {apart:.5} within the window");
                if apart >= BOUNDS.root_mean_square {
                    wrong.push(format!("{name}: error {apart:.5}"));
                }
            }
            Ok(_) => wrong.extend(tiny_parity::check_nearly(name, &model, &open, &[1, 7], BOUNDS).err()),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_candle_cannot_do_is_said() {
    let models = tiny_models::all();
    let refused = |name: &str, options: &LoadOptions| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        models[name].write_directory(dir.path(), true);
        load_with(dir.path(), options).map(|_| ()).expect_err(name).to_string()
    };
    let candle = LoadOptions { runner: Runner::Candle, ..default_model::CPU };
    let error = refused("olmoe", &candle);
    assert!(error.contains("candle does not run the architecture OlmoeForCausalLM"), "{error}");
    let bytes = LoadOptions { kv_dtype: rill_models::KvDtype::Int8, ..candle };
    let error = refused("llama", &bytes);
    assert!(error.contains("KV caches of bytes"), "{error}");
    // A tensor that nothing reads.
    let mut model = tiny_models::all().remove("llama").expect("in the fixture");
    model.tensors.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), vec![64]);
    let dir = tempfile::tempdir().expect("a temporary directory");
    model.write_directory(dir.path(), true);
    let error = load_with(dir.path(), &candle).map(|_| ()).expect_err("a bias").to_string();
    assert!(error.contains("leave out the tensor model.layers.0.self_attn.q_proj.bias"), "{error}");
}
