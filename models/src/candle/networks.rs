//! Architecture names → candle-transformers' models.

use super::{Fresh, Network};
use crate::ModelError;
use crate::config::ModelConfig;
use crate::source::ModelKind;
use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models as candle;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Names in config.json `architectures`, and `general.architecture` of GGUF files.
pub(crate) const KNOWN: [&str; 21] = [
    "FalconForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "HeliumForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "OlmoForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "gemma3",
    "llama",
    "phi2",
    "phi3",
    "qwen3",
];

/// Whether candle has the architecture.
pub(crate) fn knows(architecture: &str) -> bool {
    KNOWN.contains(&architecture)
}

/// Reads the weights of the model `config` describes.
pub(super) fn load(kind: &ModelKind, config: &ModelConfig) -> std::result::Result<Fresh, ModelError> {
    let architecture = config.architecture.as_str();
    if !knows(architecture) {
        return Err(ModelError::Unsupported(format!(
            "candle does not run the architecture {architecture}; it runs {}",
            KNOWN.join(", ")
        )));
    }
    let (path, loaded) = match kind {
        ModelKind::Gguf { path } => (path, from_gguf(path, architecture)),
        ModelKind::Safetensors { dir, shards } => (dir, from_directory(dir, shards, architecture)),
    };
    loaded.map_err(|error| ModelError::Unsupported(format!("{}: candle: {error}", path.display())))
}

/// Copies of `model`, whose tensors are shared.
fn copies<M: Clone + Send + 'static>(
    model: M,
    run: impl Fn(&mut M, &Tensor, usize) -> Result<Tensor> + Copy + Send + 'static,
) -> Fresh {
    Box::new(move || {
        let mut model = model.clone();
        let network: Network = Box::new(move |tokens, position| run(&mut model, tokens, position));
        Ok(network)
    })
}

fn from_gguf(path: &Path, architecture: &str) -> Result<Fresh> {
    let mut file = File::open(path)?;
    let content = Content::read(&mut file)?;
    let cpu = &Device::Cpu;
    Ok(match architecture {
        "llama" => copies(
            candle::quantized_llama::ModelWeights::from_gguf(content, &mut file, cpu)?,
            |model, tokens, position| model.forward(tokens, position),
        ),
        "qwen3" => copies(
            candle::quantized_qwen3::ModelWeights::from_gguf(content, &mut file, cpu)?,
            |model, tokens, position| model.forward(tokens, position),
        ),
        "gemma3" => copies(
            candle::quantized_gemma3::ModelWeights::from_gguf(content, &mut file, cpu)?,
            |model, tokens, position| model.forward(tokens, position),
        ),
        "phi3" => copies(
            candle::quantized_phi3::ModelWeights::from_gguf(false, content, &mut file, cpu)?,
            |model, tokens, position| model.forward(tokens, position),
        ),
        "phi2" => copies(
            candle::quantized_phi::ModelWeights::from_gguf(content, &mut file, cpu)?,
            |model, tokens, position| model.forward(tokens, position),
        ),
        other => candle_core::bail!("{other} is run from safetensors, not from GGUF files"),
    })
}

/// config.json as candle's own configurations have it: the newer files' `rope_parameters` and what they leave out. What
/// candle would pass over in silence is refused.
fn settings<C: DeserializeOwned>(dir: &Path) -> Result<C> {
    let text = std::fs::read(dir.join("config.json"))?;
    let mut value: Value = serde_json::from_slice(&text).map_err(candle_core::Error::wrap)?;
    let architecture = value["architectures"][0].as_str().unwrap_or_default().to_owned();
    for field in ["rope_scaling", "rope_parameters"] {
        let scaling = &value[field];
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
        let followed = matches!(
            (architecture.as_str(), kind),
            (_, "default") | ("LlamaForCausalLM", "llama3") | ("Phi3ForCausalLM", "longrope" | "su")
        );
        if !followed {
            candle_core::bail!("rope scaling {kind:?} is not followed for {architecture}");
        }
    }
    for field in ["use_parallel_residual", "qk_layernorm"] {
        if architecture == "StableLmForCausalLM" && value[field] == true {
            candle_core::bail!("{field} is not followed for {architecture}");
        }
    }
    let theta = value["rope_parameters"]["rope_theta"].clone();
    if let Some(fields) = value.as_object_mut() {
        fields.entry("rope_theta").or_insert(theta);
        fields.entry("tie_word_embeddings").or_insert(false.into());
        fields.entry("use_cache").or_insert(true.into());
        fields.entry("attention_bias").or_insert(false.into());
        fields.entry("use_sliding_window").or_insert(false.into());
        let layers = fields.get("num_hidden_layers").cloned().unwrap_or_default();
        fields.entry("max_window_layers").or_insert(layers);
        // A window that is switched off is one that nothing reaches.
        if architecture.starts_with("Qwen") && fields["use_sliding_window"] == false {
            let all = fields.get("max_position_embeddings").cloned().unwrap_or_default();
            fields.insert("sliding_window".to_owned(), all);
        }
        fields.retain(|_, value| !value.is_null());
    }
    serde_json::from_value(value)
        .map_err(|error| candle_core::Error::Msg(format!("config.json does not suit it: {error}")))
}

fn from_directory(dir: &Path, shards: &[PathBuf], architecture: &str) -> Result<Fresh> {
    let cpu = &Device::Cpu;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for shard in shards {
        for (name, tensor) in candle_core::safetensors::load(shard, cpu)? {
            tensors.insert(name, tensor.to_dtype(DType::F32)?);
        }
    }
    let weights = VarBuilder::from_tensors(tensors, DType::F32, cpu);
    macro_rules! model {
        ($module:ident, $model:ident) => {
            copies(candle::$module::$model::new(&settings(dir)?, weights)?, |model, tokens, position| {
                model.forward(tokens, position)
            })
        };
    }
    Ok(match architecture {
        "GemmaForCausalLM" => {
            copies(candle::gemma::Model::new(false, &settings(dir)?, weights)?, |model, tokens, position| {
                model.forward(tokens, position)
            })
        }
        "Gemma3ForCausalLM" => {
            copies(candle::gemma3::Model::new(false, &settings(dir)?, weights)?, |model, tokens, position| {
                model.forward(tokens, position)
            })
        }
        "Glm4ForCausalLM" => model!(glm4_new, ModelForCausalLM),
        "HeliumForCausalLM" => model!(helium, Model),
        "MistralForCausalLM" => model!(mistral, Model),
        "Olmo2ForCausalLM" => model!(olmo2, Model),
        "OlmoForCausalLM" => model!(olmo, Model),
        "Phi3ForCausalLM" => model!(phi3, Model),
        "Qwen2ForCausalLM" => model!(qwen2, ModelForCausalLM),
        "Qwen3ForCausalLM" => model!(qwen3, ModelForCausalLM),
        "Qwen3MoeForCausalLM" => model!(qwen3_moe, ModelForCausalLM),
        "Starcoder2ForCausalLM" => model!(starcoder2, Model),
        "PhiForCausalLM" => {
            copies(candle::phi::Model::new(&settings(dir)?, weights)?, |model, tokens, _| model.forward(tokens))
        }
        "FalconForCausalLM" => {
            let config: candle::falcon::Config = settings(dir)?;
            config.validate()?;
            copies(candle::falcon::Falcon::load(weights, config)?, |model, tokens, _| model.forward(tokens))
        }
        "LlamaForCausalLM" => {
            let config = settings::<candle::llama::LlamaConfig>(dir)?.into_config(false);
            let cache = candle::llama::Cache::new(true, DType::F32, &config, cpu)?;
            copies((candle::llama::Llama::load(weights, &config)?, cache), |(model, cache), tokens, position| {
                model.forward(tokens, position, cache)
            })
        }
        "StableLmForCausalLM" => {
            // It can be neither copied nor cleared, but made again of the same tensors.
            let config: candle::stable_lm::Config = settings(dir)?;
            Box::new(move || {
                let mut model = candle::stable_lm::Model::new(&config, weights.clone())?;
                let network: Network = Box::new(move |tokens, position| model.forward(tokens, position));
                Ok(network)
            })
        }
        other => candle_core::bail!("{other} is run from GGUF files, not from safetensors"),
    })
}
