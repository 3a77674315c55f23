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
/// The others are f32, kept as f16.
const UNROUNDED: Bounds = Bounds { root_mean_square: 0.0005, largest: 0.003 };

fn bounds(name: &str) -> Bounds {
    let rounded = ["glm4", "helium"].contains(&name) || !tiny_models::long_tail().contains_key(name);
    if rounded { BOUNDS } else { UNROUNDED }
}

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
        wrong.extend(tiny_parity::check_nearly(&name, &model, &open, &[1, 7], bounds(&name)).err());
        let error = load(dir.path(), Runner::Native).map(|_| ()).expect_err("rill has none").to_string();
        let architecture = model.config["architectures"][0].as_str().expect("a name");
        assert!(error.contains("is not supported") && error.matches(architecture).count() == 2, "{error}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_sequence_that_does_not_go_on_starts_again() {
    // Refused drafts and other sequences take back what a state cannot.
    for name in ["mamba", "mamba2", "recurrent-gemma", "lfm2", "glm4"] {
        let model = &tiny_models::long_tail()[name];
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let open = || load(dir.path(), Runner::Auto).expect(name);
        let wanted = logits(open(), &model.tokens);
        let mut single = SingleSequence::new(open().model, 16, model.tokens.len()).expect("a small cache fits");
        let width = single.vocab_size();
        let mut check = |others: &[u32], first: usize, end: usize| {
            single.restart();
            single.step(&model.tokens[..first], false).expect("it runs");
            single.step(others, true).expect("it runs");
            single.rewind(first);
            let given = single.step(&model.tokens[first..end], false).expect("it runs");
            let apart = tiny_parity::distance(&given, &wanted[(end - 1) * width..end * width]);
            assert!(apart < 1e-5, "{name}: {apart} after {first} tokens, {others:?} and {end} in place of them");
        };
        // Longer than what is held, so that its length alone would let it go on.
        check(&[1, 2, 3], 36, 40);
        check(&[7], 36, 38);
        // Shorter, and as long.
        check(&[1, 2, 3], 20, 22);
        check(&[1, 2, 3], 20, 23);
    }
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
    let (mut all, mut tail) = (tiny_models::all(), tiny_models::long_tail());
    let mut made = Vec::new();
    for name in ["glm4", "lfm2", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "llama-3"] {
        let model = all.remove(name).or_else(|| tail.remove(name)).expect("in a fixture");
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
            Ok(_) => wrong.extend(tiny_parity::check_nearly(name, &model, &open, &[1, 7], bounds(name)).err()),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn windows_and_states_bound_what_a_sequence_takes() {
    let tail = tiny_models::long_tail();
    for (name, context_len, bytes_per_token) in [
        // Neither keeps anything of a token but the token.
        ("mamba", 1 << 15, 4),
        ("mamba2", 1 << 15, 4),
        // One layer of four attends, with one head of 16; candle does not slide its window.
        ("recurrent-gemma", 48, 2 * 4 * 16 + 4),
        // Two of four, with two heads.
        ("lfm2", 128, 2 * 4 * 2 * 2 * 16 + 4),
        // One head for all queries.
        ("gpt-bigcode", 128, 2 * 4 * 2 * 16 + 4),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        tail[name].write_directory(dir.path(), true);
        let loaded = load(dir.path(), Runner::Auto).expect(name);
        let shape = loaded.model.shape();
        assert_eq!((shape.context_len, shape.kv_bytes_per_token), (context_len, bytes_per_token), "{name}");
    }
}

#[test]
fn configurations_candle_would_pass_over_are_refused() {
    for (name, changes, part) in [
        ("gpt-bigcode", json!({"multi_query": false}), "multi_query"),
        ("gpt-bigcode", json!({"activation_function": "gelu"}), "activation_function"),
        ("gpt-bigcode", json!({"scale_attn_weights": false}), "scale_attn_weights"),
        ("mamba", json!({"layer_norm_epsilon": 1e-6}), "layer_norm_epsilon"),
        ("mamba", json!({"conv_kernel": 3}), "conv_kernel"),
        ("mamba", json!({"hidden_act": "gelu"}), "hidden_act"),
        ("mamba2", json!({"time_step_limit": [0.01, 0.5]}), "time_step_limit"),
        ("mamba2", json!({"layer_norm_epsilon": 1e-6}), "layer_norm_epsilon"),
        ("recurrent-gemma", json!({"embeddings_scale_by_sqrt_dim": false}), "embeddings_scale_by_sqrt_dim"),
        ("recurrent-gemma", json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope scaling"),
        ("granite-hybrid", json!({"position_embedding_type": null}), "position_embedding_type"),
        ("granite-hybrid", json!({"num_local_experts": 4, "num_experts_per_tok": 2}), "num_local_experts"),
        ("granite-hybrid", json!({"layer_types": ["attention", "mamba"]}), "layer_types"),
        ("granite-hybrid", json!({"layer_types": null}), "layer_types"),
        ("lfm2", json!({"hidden_act": "gelu"}), "hidden_act"),
    ] {
        let model = changed(tiny_models::long_tail().remove(name).expect("in the fixture"), &changes);
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let error = load(dir.path(), Runner::Auto).map(|_| ()).expect_err(part).to_string();
        assert!(error.contains(part) && error.contains("not followed"), "{name}: {error}");
    }
    // Tensors that nothing reads.
    for (name, tensor, shape) in [
        ("mamba2", "lm_head.weight", vec![64, 64]),
        ("mamba", "backbone.layers.0.mixer.in_proj.bias", vec![256]),
        ("lfm2", "model.layers.0.conv.conv.bias", vec![64]),
    ] {
        let mut model = tiny_models::long_tail().remove(name).expect("in the fixture");
        if tensor.starts_with("lm_head") {
            model = changed(model, &json!({"tie_word_embeddings": false}));
        }
        model.tensors.insert(tensor.to_owned(), shape);
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let error = load(dir.path(), Runner::Auto).map(|_| ()).expect_err(tensor).to_string();
        assert!(error.contains(tensor), "{name}: {error}");
    }
}

#[test]
fn files_as_other_versions_of_transformers_write_them_are_read() {
    let nested = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "rope_theta": null, "partial_rotary_factor": null, "eos_token_id": [1, 2]});
    let kinds = json!({"layer_types": ["conv", "full_attention", "conv", "full_attention"], "full_attn_idxs": null,
        "tie_embedding": true});
    let attention = json!({"layer_types": ["full_attention", "full_attention"]});
    let default = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": null});
    for (name, changes) in [
        ("recurrent-gemma", nested.clone()),
        ("glm4", nested),
        ("lfm2", kinds),
        ("lfm2", default),
        ("granite-hybrid", attention),
        ("mamba", json!({"intermediate_size": null, "time_step_rank": "auto"})),
        ("mamba2", json!({"time_step_limit": [0.0, "as Python writes it"]})),
    ] {
        let model = changed(tiny_models::long_tail().remove(name).expect("in the fixture"), &changes);
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write_directory(dir.path(), true);
        let text = model.config.to_string().replace("\"as Python writes it\"", "Infinity");
        std::fs::write(dir.path().join("config.json"), text).expect("a folder of our own");
        let given = logits(
            load(dir.path(), Runner::Auto).unwrap_or_else(|error| panic!("{name}: {error}")),
            &model.tokens,
        );
        let apart = tiny_parity::distance(&given, &model.logits());
        assert!(apart < bounds(name).root_mean_square, "{name}: {apart}");
    }
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
}
