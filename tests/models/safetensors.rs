//! Parity of a model directory (config.json, tokenizer.json, safetensors): a tiny random llama against
//! candle-transformers' implementation of the same files, in every float type, tied and not.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use rill_models::{LoadedModel, ModelError, NoProgress, SourceOptions};
use rill_tests::default_model;
use rill_tests::single_sequence::SingleSequence;
use std::collections::HashMap;
use std::path::Path;

const HIDDEN: usize = 128;
const INNER: usize = 160;
const VOCAB: usize = 300;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const BLOCK_SIZE: usize = 16;

/// A small generator, so that every run has the same weights.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    }

    fn tensor(&mut self, shape: &[usize], scale: f32, offset: f32, dtype: DType) -> Tensor {
        let values: Vec<f32> =
            (0..shape.iter().product::<usize>()).map(|_| self.next() * scale + offset).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("a small tensor")
    }
}

fn config_json(tied: bool) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied, "torch_dtype": "float32",
    })
}

/// Writes a model directory with random weights of `dtype`.
fn write_model(dir: &Path, dtype: DType, tied: bool) {
    let mut numbers = Numbers(7);
    let mut tensors = HashMap::new();
    let mut matrix = |name: String, rows: usize, cols: usize| {
        tensors.insert(name, numbers.tensor(&[rows, cols], 0.4, 0.0, dtype));
    };
    matrix("model.embed_tokens.weight".into(), VOCAB, HIDDEN);
    if !tied {
        matrix("lm_head.weight".into(), VOCAB, HIDDEN);
    }
    for layer in 0..LAYERS {
        let mut part = |part: &str, rows, cols| matrix(format!("model.layers.{layer}.{part}.weight"), rows, cols);
        part("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN);
        part("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN);
        part("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN);
        part("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM);
        part("mlp.gate_proj", INNER, HIDDEN);
        part("mlp.up_proj", INNER, HIDDEN);
        part("mlp.down_proj", HIDDEN, INNER);
    }
    let norms = (0..LAYERS)
        .flat_map(|l| {
            ["input_layernorm", "post_attention_layernorm"].map(|n| format!("model.layers.{l}.{n}.weight"))
        })
        .chain(["model.norm.weight".to_owned()]);
    for name in norms {
        tensors.insert(name, numbers.tensor(&[HIDDEN], 0.5, 1.0, dtype));
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).expect("weights are written");
    let write = |name: &str, json: serde_json::Value| {
        std::fs::write(dir.join(name), json.to_string()).expect("a small file is written");
    };
    write("config.json", config_json(tied));
    let vocab: HashMap<String, usize> = (0..VOCAB).map(|id| (format!("t{id}"), id)).collect();
    write(
        "tokenizer.json",
        serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "truncation": null,
            "padding": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true}, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true}, "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }),
    );
}

fn load(dir: &Path) -> Result<LoadedModel, ModelError> {
    let files = rill_models::resolve(&dir.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)?;
    rill_models::load(&files, &default_model::CPU)
}

/// Candle's logits after every token, computed in f32 from the stored weights.
fn candle_logits(dir: &Path, tied: bool, tokens: &[u32]) -> Vec<f32> {
    let config: LlamaConfig = serde_json::from_value(config_json(tied)).expect("candle reads the configuration");
    let config: Config = config.into_config(false);
    let tensors =
        candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).expect("weights load");
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let model = Llama::load(builder, &config).expect("candle loads the model");
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).expect("a small cache");
    (0..tokens.len())
        .flat_map(|i| {
            let token = Tensor::new(&tokens[i..=i], &Device::Cpu).and_then(|t| t.unsqueeze(0)).expect("one id");
            let logits = model.forward(&token, i, &mut cache).expect("candle runs");
            logits.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("logits are f32")
        })
        .collect()
}

#[test]
fn a_model_directory_agrees_with_candle() {
    let tokens: Vec<u32> = (0..300_u32).map(|i| (i * i * 7 + i * 31) % VOCAB as u32).collect();
    for (dtype, tied) in [(DType::F32, false), (DType::F32, true), (DType::F16, false), (DType::BF16, false)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_model(dir.path(), dtype, tied);
        let expected = candle_logits(dir.path(), tied, &tokens);
        let loaded = load(dir.path()).unwrap_or_else(|error| panic!("{dtype:?}: {error}"));
        let mut model = SingleSequence::new(loaded.model, BLOCK_SIZE, 512).expect("a small cache fits");
        let given = model.logits(&tokens, 64).expect("rill runs");
        assert_eq!(given.len(), expected.len());
        let rms = |values: &mut dyn Iterator<Item = f32>| {
            let squares: f64 = values.map(|x| f64::from(x) * f64::from(x)).sum();
            (squares / expected.len() as f64).sqrt()
        };
        let size = rms(&mut expected.iter().copied());
        let error = rms(&mut given.iter().zip(&expected).map(|(a, b)| a - b));
        let first = given[..VOCAB].iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let worst = given.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!(
            "{dtype:?} tied {tied}: rms {size:.3}, error rms {error:.5} worst {worst:.4}, first token {first:.4}"
        );
        // Attention reads bf16 queries, keys, values and weights: 2^-9 of each, through two layers of random weights.
        assert!(error < 0.01 * size, "{dtype:?} tied {tied}: {error} of {size}");
        assert!(f64::from(worst) < 0.1 * size, "{dtype:?} tied {tied}: {worst} of {size}");
    }
}

#[test]
fn a_directory_that_does_not_fit_its_configuration_names_the_tensor() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_model(dir.path(), DType::F32, false);
    let mut config = config_json(false);
    config["intermediate_size"] = 192.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let error = load(dir.path()).map(|_| ()).expect_err("the shapes disagree").to_string();
    assert!(error.contains("gate_proj") && error.contains("160") && error.contains("192"), "{error}");

    let mut config = config_json(false);
    config["architectures"] = serde_json::json!(["NobodyForCausalLM"]);
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let error = load(dir.path()).map(|_| ()).expect_err("nobody knows it").to_string();
    assert!(error.contains("NobodyForCausalLM") && error.contains("llama"), "{error}");

    std::fs::write(dir.path().join("config.json"), config_json(false).to_string()).expect("written");
    let weights = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).expect("the weights are there");
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).expect("written");
    let error = load(dir.path()).map(|_| ()).expect_err("the file is cut").to_string();
    assert!(error.contains("model.safetensors"), "{error}");
}
