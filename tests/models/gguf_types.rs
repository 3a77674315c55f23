//! Every type a GGUF tensor may have against PyPI's `gguf`: any block's values, and models whose matrices are of the type
//! beside the same models in f32 of the values the package makes of them.

use rill_kernels::{DTYPES, Dtype};
use rill_models::{GgufFile, NoProgress, SourceOptions};
use rill_tests::default_model;
use rill_tests::single_sequence::SingleSequence;
use rill_tests::tiny_gguf::GgufFiles;
use rill_tests::tiny_models::{self, TinyModel};
use rill_tests::tiny_parity::distance;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Where activations go as they are, and where they are rounded to 8 bits. Codes read otherwise are another model, which is
/// more than 1 apart.
const FLOATS_APART: f64 = 1e-5;
const CODES_APART: f64 = 0.1;

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn floats(file: &GgufFile, name: &str) -> Vec<f32> {
    let data = file.tensor_data(file.require_tensor(name).expect("the script wrote it"));
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

#[test]
fn any_block_decodes_as_the_package_decodes_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut files = GgufFiles::new(dir.path());
    let path = files.add_samples(&DTYPES.map(Dtype::name));
    if !files.write("decoding of every GGUF type", scratch()) {
        return;
    }
    let file = GgufFile::open(&path).expect("a sound file");
    for dtype in DTYPES {
        let stored = file.require_tensor(&format!("{}.stored", dtype.name())).expect("the script wrote it");
        assert_eq!((stored.dtype.name(), &stored.shape[..]), (dtype.name(), &[64, 256][..]));
        let expected = floats(&file, &format!("{}.decoded", dtype.name()));
        let mut given = vec![f32::NAN; expected.len()];
        rill_kernels::dequantize(dtype, file.tensor_data(stored), &mut given);
        for (i, (a, b)) in given.iter().zip(&expected).enumerate() {
            assert!(a == b, "{dtype:?}, value {i}: {a:e}, not {b:e}");
        }
        let different = expected.iter().filter(|value| **value != expected[0]).count();
        assert!(
            different > expected.len() / 2,
            "{dtype:?}: {different} of {} values say something",
            expected.len()
        );
    }
}

/// A llama whose rows are whole blocks of every type.
fn wide() -> TinyModel {
    let mut config = tiny_models::all()["llama"].config.clone();
    for (key, value) in [("hidden_size", 256), ("intermediate_size", 512), ("num_hidden_layers", 1)] {
        config[key] = value.into();
    }
    let layer = |part: &str| format!("model.layers.0.{part}.weight");
    serde_json::from_value(json!({
        "config": config,
        "tensors": {
            "model.embed_tokens.weight": [64, 256], "model.norm.weight": [256], "lm_head.weight": [64, 256],
            layer("input_layernorm"): [256], layer("post_attention_layernorm"): [256],
            layer("self_attn.q_proj"): [256, 256], layer("self_attn.k_proj"): [128, 256],
            layer("self_attn.v_proj"): [128, 256], layer("self_attn.o_proj"): [256, 256],
            layer("mlp.gate_proj"): [512, 256], layer("mlp.up_proj"): [512, 256], layer("mlp.down_proj"): [256, 512],
        },
        "tokens": (0..40).map(|i| (i * i * 7 + i * 13 + 5) % 64).collect::<Vec<u32>>(),
        "logits_f16": "",
    }))
    .expect("a model")
}

fn logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)
        .expect("the file is there");
    let loaded = rill_models::load(&files, &default_model::CPU).unwrap_or_else(|error| panic!("{error}"));
    let mut single = SingleSequence::new(loaded.model, 16, tokens.len()).expect("a small cache fits");
    single.logits(tokens, 7).expect("rill runs")
}

#[test]
fn models_of_every_type_are_what_their_values_make() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut files = GgufFiles::new(dir.path());
    // Experts lie in one tensor; all are asked for every token, since choices that a rounding turns are no matter of types.
    let mut mixtral = tiny_models::all().remove("mixtral").expect("in the fixture");
    mixtral.config["num_experts_per_tok"] = mixtral.config["num_local_experts"].clone();
    let models = [("wide", wide()), ("mixtral", mixtral)];
    let mut pairs: Vec<(&str, Dtype, &TinyModel, [PathBuf; 2])> = Vec::new();
    for (name, model) in &models {
        let source = dir.path().join(name);
        std::fs::create_dir(&source).expect("a new folder");
        model.write_directory(&source, true);
        // Its rows are whole blocks of 32.
        for dtype in DTYPES.into_iter().filter(|dtype| *name == "wide" || dtype.block_len() <= 32) {
            let mut of = |decoded| files.add(&source, json!({"type": dtype.name(), "decoded": decoded}));
            pairs.push((name, dtype, model, [of(false), of(true)]));
        }
    }
    if !files.write("models of every GGUF type", scratch()) {
        return;
    }
    let mut wrong = Vec::new();
    for (name, dtype, model, [stored, decoded]) in pairs {
        let apart = distance(&logits(&stored, &model.tokens), &logits(&decoded, &model.tokens));
        println!("{name:8} {:7} {apart:.6}", dtype.name());
        let float = matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        if apart > if float { FLOATS_APART } else { CODES_APART } {
            wrong.push(format!("{name} in {}: {apart}", dtype.name()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
