//! Adapters as PEFT saves them: adapter_config.json says how to scale, adapter_model.safetensors holds the factors under
//! `base_model.model.<module>.lora_A.weight` and `….lora_B.weight`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use regex::Regex;
use rill_kernels::{Dtype, Stored};
use serde_json::Value;

use super::{Adapter, AdapterSites, FileOrder, Found};
use crate::ModelError;
use crate::config::turns_neighbours_on_hub;
use crate::gguf::map_file;
use crate::layers::QkvOrder;
use crate::registry;

const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Settings that change what is computed and are not implemented: none of them may be set.
const REFUSED: [(&str, &str); 12] = [
    ("use_dora", "weight-decomposed updates (DoRA)"),
    ("modules_to_save", "whole modules beside the low-rank updates"),
    ("lora_bias", "biases of updates"),
    ("trainable_token_indices", "new embeddings of tokens"),
    ("target_parameters", "updates of parameters that are no linear layers"),
    ("layer_replication", "layers used more than once"),
    ("alora_invocation_tokens", "adapters that start at invocation tokens (aLoRA)"),
    ("use_qalora", "quantisation-aware updates (QA-LoRA)"),
    ("use_bdlora", "block-diagonal updates (BD-LoRA)"),
    ("arrow_config", "routing between adapters (Arrow)"),
    ("monteclora_config", "sampled updates (MonteCLoRA)"),
    ("kasa_config", "updates with singular values of their own (KaSA)"),
];

/// What adapter_config.json says of scales.
struct Config {
    rank: usize,
    alpha: f32,
    rank_patterns: Vec<(Regex, usize)>,
    alpha_patterns: Vec<(Regex, f32)>,
    /// Scales by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
    root: bool,
}

pub(super) fn load(sites: &AdapterSites, dir: &Path, rank_max: usize) -> Result<Adapter, ModelError> {
    let config = Config::read(dir)?;
    let path = dir.join("adapter_model.safetensors");
    if !path.exists() {
        let hint = match dir.join("adapter_model.bin").exists() {
            true => "; adapter_model.bin is a pickle, which rill does not read: save it again as safetensors",
            false => "",
        };
        return Err(ModelError::Source(format!("{} has no adapter_model.safetensors{hint}", dir.display())));
    }
    let map = map_file(&path)?;
    let wrong = |reason: String| ModelError::Format { path: path.display().to_string(), reason };
    let tensors = safetensors::SafeTensors::deserialize(&map)
        .map_err(|error| wrong(format!("is not a safetensors file: {error}")))?;

    let mut factors: BTreeMap<String, [Option<Stored<'_>>; 2]> = BTreeMap::new();
    for (name, view) in tensors.iter() {
        let plain = name.strip_prefix("base_model.model.").unwrap_or(name);
        let (module, factor) = match (plain.strip_suffix(".lora_A.weight"), plain.strip_suffix(".lora_B.weight")) {
            (Some(module), _) => (module, 0),
            (_, Some(module)) => (module, 1),
            _ => {
                return Err(ModelError::Unsupported(format!(
                    "{}: tensor {name} is no factor of a linear layer's update, and nothing else is supported",
                    path.display()
                )));
            }
        };
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::BF16,
            other => {
                return Err(wrong(format!("tensor {name} is stored as {other:?}; F32, F16 and BF16 are read")));
            }
        };
        let &[rows, cols] = view.shape() else {
            return Err(wrong(format!("tensor {name} is {:?}, not a matrix", view.shape())));
        };
        factors.entry(module.to_owned()).or_default()[factor] =
            Some(Stored { dtype, rows, cols, data: view.data() });
    }

    let places: HashMap<String, (usize, &'static str)> =
        sites.published_names().into_iter().map(|(name, layer, part)| (name, (layer, part))).collect();
    let mut found = Vec::with_capacity(factors.len());
    for (module, factors) in factors {
        let [Some(a), Some(b)] = factors else {
            return Err(wrong(format!("{module} has only one of lora_A and lora_B")));
        };
        let Some(&(layer, part)) = places.get(&module) else {
            return Err(ModelError::Unsupported(format!(
                "{}: adapters of {module} are not supported; those of the linear layers of attention and feed-forward are",
                path.display()
            )));
        };
        let (rank, scale) = config.of(&module);
        if a.rows != rank {
            return Err(wrong(format!("{module} has rank {}; adapter_config.json says {rank}", a.rows)));
        }
        found.push(Found { layer, part, module, a, b, scale });
    }
    if found.is_empty() {
        return Err(wrong("holds no update".to_owned()));
    }
    sites.place(&path, found, sites.published_order(), rank_max)
}

impl AdapterSites {
    /// How published files lay out what the forward pass lays out in its own way.
    fn published_order(&self) -> FileOrder {
        let hub = registry::hub_name(&self.architecture);
        let qkv = if self.from_hub {
            self.layers.iter().find_map(|layer| layer.attention)
        } else {
            // A GGUF file says nothing of how its fused matrix was published.
            match hub {
                "GPTNeoXForCausalLM" => Some(QkvOrder::Heads),
                "GPT2LMHeadModel" | "Phi3ForCausalLM" => Some(QkvOrder::Blocks),
                _ => None,
            }
        };
        FileOrder { interleaved: turns_neighbours_on_hub(hub), qkv }
    }
}

impl Config {
    fn read(dir: &Path) -> Result<Config, ModelError> {
        let path = dir.join("adapter_config.json");
        let failed = |reason: String| ModelError::Source(format!("{}: {reason}", path.display()));
        let length = std::fs::metadata(&path).map_err(|error| failed(error.to_string()))?.len();
        if length > CONFIG_BYTES_MAX {
            return Err(failed(format!("is {length} bytes long; at most {CONFIG_BYTES_MAX} are read")));
        }
        let text = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
        let wrong = |reason: String| ModelError::Format { path: path.display().to_string(), reason };
        let value: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let unsupported = |what: String| ModelError::Unsupported(format!("{}: {what}", path.display()));

        let kind = value["peft_type"].as_str().unwrap_or("missing");
        if kind != "LORA" {
            return Err(unsupported(format!("peft_type is {kind}; LORA is supported")));
        }
        for (field, what) in REFUSED {
            if is_set(&value[field]) {
                return Err(unsupported(format!("{field} is set: {what} are not supported")));
            }
        }
        if let Some(bias) = value["bias"].as_str().filter(|bias| *bias != "none") {
            return Err(unsupported(format!("bias is {bias}: adapters that change biases are not supported")));
        }
        let rank = value["r"].as_u64().ok_or_else(|| wrong("field r must be a whole number".to_owned()))?;
        let number = |field: &str, value: &Value| {
            value.as_f64().map(|x| x as f32).ok_or_else(|| wrong(format!("field {field} must be a number")))
        };
        let alpha = number("lora_alpha", &value["lora_alpha"])?;
        let patterns = |field: &str| {
            let entries = value[field].as_object().into_iter().flatten();
            let compile = |(key, value): (&String, &Value)| match Regex::new(&format!("^(?:.*\\.)?(?:{key})$")) {
                Ok(pattern) => Ok((pattern, number(field, value)?)),
                Err(error) => Err(unsupported(format!("{field}: {key} is not a pattern rill knows: {error}"))),
            };
            entries.map(compile).collect::<Result<Vec<(Regex, f32)>, ModelError>>()
        };
        let ranks = patterns("rank_pattern")?.into_iter().map(|(key, rank)| (key, rank as usize)).collect();
        Ok(Config {
            rank: rank as usize,
            alpha,
            rank_patterns: ranks,
            alpha_patterns: patterns("alpha_pattern")?,
            root: value["use_rslora"].as_bool().unwrap_or(false),
        })
    }

    /// Rank and scale of a module's update.
    fn of(&self, module: &str) -> (usize, f32) {
        fn pick<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
            patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
        }
        let rank = pick(&self.rank_patterns, module).unwrap_or(self.rank);
        let alpha = pick(&self.alpha_patterns, module).unwrap_or(self.alpha);
        let size = rank.max(1) as f32;
        (rank, alpha / if self.root { size.sqrt() } else { size })
    }
}

/// Neither absent, null, false nor empty.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}
