//! Quantised checkpoints against transformers on the weights they stand for: tiny models in every way GPTQ, AWQ,
//! compressed-tensors and FP8 files keep them. See make_quantized.py.

use half::{bf16, f16};
use rill_models::{LoadedModel, ModelError, NoProgress, SourceOptions};
use rill_tests::default_model;
use rill_tests::tiny_models::{self, TinyModel};
use rill_tests::tiny_parity::{self, Bounds};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// Activations meet integer weights as 8-bit integers, which transformers does not do: up to 0.044 in all and 0.44 at one
/// place with the weights as stored, and 0.053 where FP8 and small groups are rounded to 8 bits besides. Zero points off by
/// one are worth twenty times as much. That each weight is what its codes stand for is held against the formats' definitions,
/// to half a step, beside the decoder (models/src/weights/coded.rs).
const BOUNDS: Bounds = Bounds { root_mean_square: 0.055, largest: 0.55 };
/// Columns of different groups, and so of different scales and zero points, share the 8-bit grids: 0.073 and 0.91 are seen.
const ACT_ORDER: Bounds = Bounds { root_mean_square: 0.08, largest: 1.0 };
/// Columns that fill no blocks are floats and meet floats: nothing but the weights' own rounding to bf16, 0.009.
const FLOATS: Bounds = Bounds { root_mean_square: 0.012, largest: 0.07 };

/// A tensor of codes, scales or zero points.
#[derive(Debug, Clone, Deserialize)]
struct Codes {
    dtype: String,
    shape: Vec<usize>,
    /// Of scales: half their mean.
    base: Option<f32>,
    values: Option<Vec<i64>>,
    word: Option<u32>,
}

#[derive(Deserialize)]
struct Quantized {
    #[serde(flatten)]
    model: TinyModel,
    codes: BTreeMap<String, Codes>,
}

impl Codes {
    /// `raw` of make_quantized.py.
    fn bytes(&self, name: &str) -> Vec<u8> {
        let count = self.shape.iter().product::<usize>();
        if let Some(values) = &self.values {
            return match self.dtype.as_str() {
                "I64" => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                _ => values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
            };
        }
        if let Some(word) = self.word {
            return word.to_le_bytes().repeat(count);
        }
        let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
        let bits = (0..count as u64).map(|index| tiny_models::mixed(seed, index));
        let scale =
            |bits: u64| ((bits >> 40) as f32 / (1 << 24) as f32 + 0.5) * self.base.expect("scales have one");
        match self.dtype.as_str() {
            "I32" => bits.flat_map(|b| ((b >> 32) as u32).to_le_bytes()).collect(),
            "I8" => bits.map(|b| (b >> 56) as u8).collect(),
            "F8_E4M3" => bits.map(|b| (b >> 56) as u8).map(|b| if b % 128 == 127 { b - 1 } else { b }).collect(),
            "F16" => bits.flat_map(|b| f16::from_f32(scale(b)).to_le_bytes()).collect(),
            "BF16" => bits.flat_map(|b| bf16::from_f32(scale(b)).to_le_bytes()).collect(),
            "F32" => bits.flat_map(|b| scale(b).to_le_bytes()).collect(),
            other => panic!("{other}"),
        }
    }
}

impl Quantized {
    /// Writes the model with its codes in a second shard.
    fn write(&self, dir: &Path) {
        self.model.write_directory(dir, false);
        let tensors = self
            .codes
            .iter()
            .map(|(name, codes)| (name.as_str(), codes.dtype.as_str(), codes.shape.as_slice(), codes.bytes(name)));
        std::fs::write(dir.join("codes.safetensors"), tiny_models::safetensors(tensors)).expect("written");
        let in_codes = self.codes.keys().map(|name| (name, "codes.safetensors"));
        let map: BTreeMap<_, _> =
            self.model.tensors.keys().map(|name| (name, "model.safetensors")).chain(in_codes).collect();
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        std::fs::write(dir.join("model.safetensors.index.json"), index).expect("written");
    }
}

fn all() -> BTreeMap<String, Quantized> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/quantized.json");
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn load(path: &Path) -> Result<LoadedModel, ModelError> {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)?;
    rill_models::load(&files, &default_model::CPU)
}

#[test]
fn quantised_checkpoints_agree_with_transformers() {
    let mut wrong = Vec::new();
    for (name, quantized) in all() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        quantized.write(dir.path());
        let bounds = match name.as_str() {
            "gptq-act-order" => ACT_ORDER,
            "gptq-odd" => FLOATS,
            _ => BOUNDS,
        };
        wrong.extend(tiny_parity::check(&name, &quantized.model, &|| load(dir.path()), &[7], bounds).err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_became_of_the_weights_is_said() {
    let models = all();
    for (name, words) in [
        ("gptq", "GPTQ 4-bit weights (14 matrices in 4 bits as stored)"),
        ("gptq-act-order", "GPTQ 4-bit weights (14 matrices rounded to 8 bits)"),
        ("gptq-odd", "GPTQ 4-bit weights (14 matrices rounded to bf16)"),
        ("gptq-8", "GPTQ 8-bit weights (14 matrices in 8 bits as stored)"),
        ("awq", "AWQ 4-bit weights (14 matrices in 4 bits as stored)"),
        ("packed-4-zeros-channel", "compressed-tensors int4 weights (14 matrices in 4 bits as stored)"),
        ("int8", "compressed-tensors int8 weights (14 matrices in 8 bits as stored)"),
        ("fp8-blocks", "FP8 weights (14 matrices rounded to 8 bits)"),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        models[name].write(dir.path());
        let description = load(dir.path()).unwrap_or_else(|error| panic!("{name}: {error}")).description;
        assert!(description.contains(words), "{name}: {description}");
    }
}

#[test]
fn conventions_that_differ_are_told_apart() {
    // The first version's zero points read as the second's.
    let mut models = all();
    let gptq = models.get_mut("gptq").expect("in the fixture");
    gptq.model.config["quantization_config"]["checkpoint_format"] = json!("gptq_v2");
    let dir = tempfile::tempdir().expect("a temporary directory");
    gptq.write(dir.path());
    let error = tiny_parity::check("gptq", &gptq.model, &|| load(dir.path()), &[], BOUNDS);
    assert!(error.is_err(), "zero points off by one go unnoticed");
}

#[test]
fn broken_quantised_tensors_are_named() {
    let stem = "model.layers.1.mlp.down_proj";
    let mut models = all();
    for (name, part, parts) in [
        ("gptq", "qzeros", ["down_proj.qzeros", "missing"]),
        ("gptq", "scales", ["down_proj.scales", "missing"]),
        ("awq", "qweight", ["down_proj.weight", "missing"]),
        ("packed-4", "weight_shape", ["down_proj.weight_shape", "missing"]),
        ("fp8-blocks", "weight_scale_inv", ["down_proj.weight_scale", "missing"]),
    ] {
        let model = models.get_mut(name).expect("in the fixture");
        let kept = model.codes.remove(&format!("{stem}.{part}")).expect("there");
        let dir = tempfile::tempdir().expect("a temporary directory");
        model.write(dir.path());
        let error = load(dir.path()).map(|_| ()).expect_err(name).to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{name} without {part}: {error}");
        if part == "weight_shape" {
            model.codes.insert(format!("{stem}.{part}"), kept);
            continue;
        }
        let odd = Codes { shape: vec![3, 5], ..kept.clone() };
        model.codes.insert(format!("{stem}.{part}"), odd);
        model.write(dir.path());
        let error = load(dir.path()).map(|_| ()).expect_err(name).to_string();
        assert!(error.contains(&format!("down_proj.{part}")), "{name} with odd {part}: {error}");
        model.codes.insert(format!("{stem}.{part}"), kept);
    }
    let gptq = models.get_mut("gptq").expect("in the fixture");
    gptq.model.config["quantization_config"] = json!({"quant_method": "aqlm"});
    let dir = tempfile::tempdir().expect("a temporary directory");
    gptq.write(dir.path());
    let error = load(dir.path()).map(|_| ()).expect_err("nobody reads it").to_string();
    assert!(error.contains("aqlm") && error.contains("compressed-tensors"), "{error}");
}
