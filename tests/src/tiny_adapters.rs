//! LoRA adapters of tiny models: written as PEFT writes them, or merged into the weights.

use crate::tiny_models::{TinyModel, TinyTensor, float_safetensors, halves, number};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

const RANK: usize = 3;
const ALPHA: f32 = 8.0;
/// Modules of another rank and another alpha, as PEFT's patterns spell them.
const RANK_PATTERN: (&str, usize) = ("o_proj|attention.dense|c_proj", 6);
const ALPHA_PATTERN: (&str, f32) = ("layers.1.self_attn.(k|v)_proj", 5.0);

/// Linear layers of attention and feed-forward, by the end of their published names.
const MODULES: [&str; 17] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.qkv_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "mlp.gate_up_proj",
    "attn.c_attn",
    "attn.c_proj",
    "mlp.c_fc",
    "mlp.c_proj",
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
];

/// How an adapter's scales are said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// One rank, one alpha.
    Plain,
    /// The same with this rank.
    OfRank(usize),
    /// Patterns for both, and the root of the rank in place of the rank.
    Patterns,
}

impl Scales {
    /// Of modules that no pattern names.
    fn rank(self) -> usize {
        if let Scales::OfRank(rank) = self { rank } else { RANK }
    }
}

/// Factors of every module, by its published name.
pub struct TinyAdapter {
    scales: Scales,
    pub modules: BTreeMap<String, Factors>,
}

/// What PEFT makes of an adapter. See models/make_adapters.py.
#[derive(Debug, Deserialize)]
pub struct PeftReference {
    /// adapter_config.json as PEFT saves it.
    pub config: serde_json::Value,
    /// Tensors of adapter_model.safetensors.
    pub names: Vec<String>,
    logits_f16: String,
}

impl PeftReference {
    /// Every model of the fixture, by name: with adapter 1 and [`Scales::Patterns`].
    pub fn all() -> BTreeMap<String, PeftReference> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/adapters.json");
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// What PEFT computes in f32, a row for each token.
    pub fn logits(&self) -> Vec<f32> {
        halves(&self.logits_f16)
    }
}

/// One module's update: `scale` · B · A.
pub struct Factors {
    pub a: TinyTensor,
    pub b: TinyTensor,
    pub scale: f32,
}

impl TinyAdapter {
    /// Updates of all linear layers of `model` but experts; another adapter for each `seed`.
    pub fn new(model: &TinyModel, seed: u64, scales: Scales) -> TinyAdapter {
        let input_major = model.config["model_type"] == "gpt2";
        let shapes = model.tensors.iter().filter_map(|(name, shape)| {
            let module =
                name.strip_suffix(".weight").filter(|name| MODULES.iter().any(|end| name.ends_with(end)))?;
            Some((module.to_owned(), if input_major { (shape[1], shape[0]) } else { (shape[0], shape[1]) }))
        });
        TinyAdapter::of_modules(shapes, seed, scales, 0.25)
    }

    /// Updates of modules of these outputs and inputs, with values up to `size`.
    pub fn of_modules(
        shapes: impl Iterator<Item = (String, (usize, usize))>,
        seed: u64,
        scales: Scales,
        size: f32,
    ) -> TinyAdapter {
        let patterns = scales == Scales::Patterns;
        let mut modules = BTreeMap::new();
        for (index, (module, (outputs, inputs))) in shapes.enumerate() {
            let ends = RANK_PATTERN.0.split('|').any(|end| module.ends_with(&format!(".{end}")));
            let rank = if patterns && ends { RANK_PATTERN.1 } else { scales.rank() };
            let second = ["k", "v"].iter().any(|m| module.ends_with(&format!("layers.1.self_attn.{m}_proj")));
            let alpha = if patterns && second { ALPHA_PATTERN.1 } else { ALPHA };
            let scale = alpha / if patterns { (rank as f32).sqrt() } else { rank as f32 };
            let tensor = |kind: u64, shape: [usize; 2]| {
                let seed = seed.wrapping_mul(1 << 32) + (index as u64) * 2 + kind;
                let values = (0..(shape[0] * shape[1]) as u64).map(|i| number(seed, i) * size).collect();
                TinyTensor { shape: shape.to_vec(), values }
            };
            let (a, b) = (tensor(0, [rank, inputs]), tensor(1, [outputs, rank]));
            modules.insert(module, Factors { a, b, scale });
        }
        assert!(!modules.is_empty(), "the model has a linear layer");
        TinyAdapter { scales, modules }
    }

    /// adapter_config.json.
    pub fn config(&self) -> serde_json::Value {
        let mut config = serde_json::json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": self.scales.rank(),
            "lora_alpha": ALPHA, "lora_dropout": 0.1, "bias": "none", "use_rslora": false, "use_dora": false,
            "fan_in_fan_out": false, "modules_to_save": null, "target_modules": ["q_proj"], "rank_pattern": {},
            "alpha_pattern": {}, "inference_mode": true, "layers_to_transform": null, "layer_replication": null,
        });
        if self.scales == Scales::Patterns {
            config["use_rslora"] = true.into();
            config["rank_pattern"] = serde_json::json!({RANK_PATTERN.0: RANK_PATTERN.1});
            config["alpha_pattern"] = serde_json::json!({ALPHA_PATTERN.0: ALPHA_PATTERN.1});
        }
        config
    }

    /// Tensors of adapter_model.safetensors.
    pub fn tensors(&self) -> BTreeMap<String, TinyTensor> {
        let mut tensors = BTreeMap::new();
        for (module, Factors { a, b, .. }) in &self.modules {
            tensors.insert(format!("base_model.model.{module}.lora_A.weight"), a.clone());
            tensors.insert(format!("base_model.model.{module}.lora_B.weight"), b.clone());
        }
        tensors
    }

    /// Writes what PEFT's `save_pretrained` does.
    pub fn write_directory(&self, dir: &Path) {
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.join(name);
            std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        };
        write("adapter_config.json", self.config().to_string().as_bytes());
        write("adapter_model.safetensors", &float_safetensors(&self.tensors(), true));
    }

    /// The model's weights with the updates in them.
    pub fn merged(&self, model: &TinyModel) -> BTreeMap<String, TinyTensor> {
        let input_major = model.config["model_type"] == "gpt2";
        let mut weights = model.weights();
        for (module, Factors { a, b, scale }) in &self.modules {
            let weight = weights.get_mut(&format!("{module}.weight")).expect("the module's own weight");
            let (rank, inputs, outputs) = (a.shape[0], a.shape[1], b.shape[0]);
            for output in 0..outputs {
                for input in 0..inputs {
                    let products = (0..rank)
                        .map(|k| f64::from(b.values[output * rank + k]) * f64::from(a.values[k * inputs + input]));
                    let at = if input_major { input * outputs + output } else { output * inputs + input };
                    weight.values[at] += (f64::from(*scale) * products.sum::<f64>()) as f32;
                }
            }
        }
        weights
    }
}
