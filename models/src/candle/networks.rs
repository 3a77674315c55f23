//! Architecture names → candle-transformers' models.

use super::settings::settings;
use super::{Fresh, Network};
use crate::ModelError;
use crate::config::{ModelConfig, RopeScaling};
use crate::source::ModelKind;
use crate::weights::is_buffer;
use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use candle_transformers::models as candle;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Names in config.json `architectures`, and `general.architecture` of GGUF files.
///
/// Of the decoders candle has, these are left out:
/// - granite: it knows none of the four multipliers that every published Granite has.
/// - quantized_qwen3_moe: its experts run on CUDA alone.
/// - quantized_smollm3: it takes heads for 128 wide, rounds the projection to logits to 8 bits, and prints as it loads.
/// - quantized_{mistral, mpt, mixformer, recurrent_gemma, rwkv, stable_lm}: their files are candle's own, not llama.cpp's.
/// - mpt, yi: their configurations cannot be made from a file, nor by hand; Yi is published as Llama.
/// - persimmon: it is a configuration without a model.
/// - gemma4: its text part has neither the embeddings of each layer nor the keys that layers share.
/// - chatglm, codegeex4_9b, glm4, rwkv_{v5, v6, v7}: their vocabularies are no tokenizer.json, and transformers has no such
///   model to be measured against (GLM-4 in transformers' form is glm4_new).
/// - based, mixformer: transformers has no such model; MixFormer's is published as Phi.
pub(crate) const KNOWN: [&str; 35] = [
    "DeepseekV2ForCausalLM",
    "FalconForCausalLM",
    "GPTBigCodeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "HeliumForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "OlmoForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "RecurrentGemmaForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "gemma3",
    "glm4",
    "lfm2",
    "llama",
    "phi2",
    "phi3",
    "qwen2",
    "qwen3",
];

/// Whether candle has the architecture.
pub(crate) fn knows(architecture: &str) -> bool {
    KNOWN.contains(&architecture)
}

/// Whether even the first tokens of a sequence go one by one: recurrences are written for one, and a cache as long as
/// a window has forgotten what the first tokens of a longer chunk are to see.
pub(super) fn one_by_one(architecture: &str) -> bool {
    matches!(architecture, "MambaForCausalLM" | "Mamba2ForCausalLM" | "Gemma3ForCausalLM")
}

/// Whether sequences may be longer than the model's window: the others' masks are one token too wide in a first chunk,
/// and none at all after it.
pub(super) fn slides(architecture: &str) -> bool {
    architecture == "Gemma3ForCausalLM"
}

/// Whether heads may be of any width; the others reckon it from the hidden size, and some end the process if it is not.
fn reads_head_dim(architecture: &str) -> bool {
    ["DeepseekV2", "Gemma", "Glm4", "Helium", "Mamba", "Mistral", "Qwen3", "gemma3", "glm4", "qwen3"]
        .iter()
        .any(|start| architecture.starts_with(start))
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
    let path = match kind {
        ModelKind::Gguf { path } => path,
        ModelKind::Safetensors { dir, .. } => dir,
    };
    let loaded = as_reckoned(config).and_then(|()| match kind {
        ModelKind::Gguf { path } => from_gguf(path, config),
        ModelKind::Safetensors { dir, shards } => from_directory(dir, shards, config),
    });
    loaded.map_err(|error| ModelError::Unsupported(format!("{}: candle: {error}", path.display())))
}

fn as_reckoned(config: &ModelConfig) -> Result<()> {
    let (architecture, head_dim) = (config.architecture.as_str(), config.head_dim);
    if !reads_head_dim(architecture) && head_dim * config.heads != config.hidden_size {
        bail!(
            "head_dim is not followed for {architecture}: it is {head_dim}, and {} heads share {}",
            config.heads,
            config.hidden_size
        );
    }
    Ok(())
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

/// Models that can be neither copied nor cleared: each is made anew, the first one now.
fn made_again<M: Send + 'static>(
    make: impl Fn() -> Result<M> + Send + 'static,
    run: impl Fn(&mut M, &Tensor, usize) -> Result<Tensor> + Copy + Send + 'static,
) -> Result<Fresh> {
    let mut first = Some(make()?);
    Ok(Box::new(move || {
        let mut model = match first.take() {
            Some(model) => model,
            None => make()?,
        };
        let network: Network = Box::new(move |tokens, position| run(&mut model, tokens, position));
        Ok(network)
    }))
}

fn from_gguf(path: &Path, config: &ModelConfig) -> Result<Fresh> {
    refuse_in_gguf(config)?;
    let path = path.to_path_buf();
    let open = move || {
        let mut file = File::open(&path)?;
        Ok::<_, candle_core::Error>((Content::read(&mut file)?, file))
    };
    macro_rules! read {
        ($module:ident) => {{
            let (content, mut file) = open()?;
            candle::$module::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)
        }};
    }
    macro_rules! copied {
        ($model:expr) => {
            copies($model?, |model, tokens, position| model.forward(tokens, position))
        };
    }
    macro_rules! read_again {
        ($module:ident) => {
            made_again(move || read!($module), |model, tokens, position| model.forward(tokens, position))?
        };
    }
    Ok(match config.architecture.as_str() {
        "llama" => copied!(read!(quantized_llama)),
        "qwen3" => copied!(read!(quantized_qwen3)),
        "gemma3" => copied!(read!(quantized_gemma3)),
        "phi2" => copied!(read!(quantized_phi)),
        "phi3" => {
            let (content, mut file) = open()?;
            copied!(candle::quantized_phi3::ModelWeights::from_gguf(false, content, &mut file, &Device::Cpu))
        }
        "glm4" => {
            let (content, mut file) = open()?;
            copied!(candle::quantized_glm4::ModelWeights::from_gguf(content, &mut file, &Device::Cpu, DType::F32))
        }
        "qwen2" => read_again!(quantized_qwen2),
        "lfm2" => read_again!(quantized_lfm2),
        other => bail!("{other} is run from safetensors, not from GGUF files"),
    })
}

/// Metadata that candle's readers pass over.
fn refuse_in_gguf(config: &ModelConfig) -> Result<()> {
    let (architecture, rope) = (config.architecture.as_str(), &config.rope);
    if rope.scaling != RopeScaling::None {
        bail!("rope.scaling is not followed for {architecture} files: {:?}", rope.scaling);
    }
    if architecture == "glm4" && 2 * rope.dimension_count != config.head_dim {
        bail!("rope.dimension_count is not followed for glm4 files, unless it is half of a head");
    }
    let fixed = [(architecture.starts_with("phi"), rope.base), (architecture == "gemma3", local_base(config))];
    if let Some((_, base)) = fixed.iter().find(|(fixed, base)| *fixed && *base != 10_000.0) {
        bail!("a rope base of {base} is not followed for {architecture} files: candle takes 10000");
    }
    if architecture == "gemma3" {
        let every_sixth =
            |layers: &Vec<bool>| layers.iter().zip(1_usize..).all(|(s, n)| *s != n.is_multiple_of(6));
        if !config.sliding_layers.as_ref().is_none_or(every_sixth) {
            bail!("attention.sliding_window_pattern is not followed for gemma3 files, unless it is 6");
        }
        let usual = 1.0 / (config.head_dim as f32).sqrt();
        if config.attention_scale.is_some_and(|scale| (scale - usual).abs() > 1e-6) {
            bail!("attention.scale is not followed for gemma3 files, unless it is the heads' own");
        }
        if config.final_logit_softcap.is_some() {
            bail!("final_logit_softcapping is not followed for gemma3 files");
        }
    }
    Ok(())
}

fn local_base(config: &ModelConfig) -> f32 {
    config.sliding_rope.as_ref().map_or(10_000.0, |rope| rope.base)
}

fn from_directory(dir: &Path, shards: &[PathBuf], config: &ModelConfig) -> Result<Fresh> {
    let cpu = &Device::Cpu;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for shard in shards {
        for (name, tensor) in candle_core::safetensors::load(shard, cpu)? {
            tensors.insert(name, tensor.to_dtype(DType::F32)?);
        }
    }
    let asked = Arc::new(Mutex::new(HashSet::new()));
    let noted = asked.clone();
    let weights = VarBuilder::from_tensors(tensors.clone(), DType::F32, cpu).rename_f(move |name| {
        // Candle has the name of files that transformers did not write.
        let name = name.replace("backbone.embedding.", "backbone.embeddings.");
        noted.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        name
    });
    let fresh = with_weights(dir, config, weights)?;
    // What a file has and candle never asks for (biases, norms, experts, a head of its own) would be missing from the sums.
    let asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
    let mut left_out: Vec<&String> =
        tensors.keys().filter(|&name| !asked.contains(name) && !is_buffer(name)).collect();
    left_out.sort();
    for name in left_out {
        if name != "lm_head.weight" || !is_embedding_table(&tensors[name], &tensors)? {
            bail!("it would leave out the tensor {name}");
        }
    }
    Ok(fresh)
}

/// Whether a head is a copy of the embedding table, as files keep it that were saved with both.
fn is_embedding_table(head: &Tensor, tensors: &HashMap<String, Tensor>) -> Result<bool> {
    let names = ["embed_tokens.weight", "embedding.weight", "embeddings.weight", "wte.weight"];
    let named = |name: &str| names.iter().any(|end| name.ends_with(end));
    for (_, table) in tensors.iter().filter(|(name, table)| named(name) && table.shape() == head.shape()) {
        if table.eq(head)?.min_all()?.to_scalar::<u8>()? == 1 {
            return Ok(true);
        }
    }
    Ok(false)
}

fn with_weights(dir: &Path, config: &ModelConfig, weights: VarBuilder<'static>) -> Result<Fresh> {
    let architecture = config.architecture.as_str();
    macro_rules! settings {
        () => {
            settings(dir, architecture)?
        };
    }
    macro_rules! model {
        ($module:ident, $model:ident) => {
            copies(candle::$module::$model::new(&settings!(), weights)?, |model, tokens, position| {
                model.forward(tokens, position)
            })
        };
        (without_flash: $module:ident) => {
            copies(candle::$module::Model::new(false, &settings!(), weights)?, |model, tokens, position| {
                model.forward(tokens, position)
            })
        };
    }
    macro_rules! recurrence {
        ($module:ident) => {{
            let config: candle::$module::Config = settings!();
            let model = candle::$module::Model::new(&config, weights.pp("backbone"))?;
            Box::new(move || {
                let model = model.clone();
                let mut state = candle::$module::State::new(1, &config, DType::F32, &Device::Cpu)?;
                let network: Network = Box::new(move |tokens, _| model.forward(&tokens.squeeze(0)?, &mut state));
                Ok(network)
            })
        }};
    }
    Ok(match architecture {
        "Gemma2ForCausalLM" => model!(without_flash: gemma2),
        "Gemma3ForCausalLM" => model!(without_flash: gemma3),
        "GemmaForCausalLM" => model!(without_flash: gemma),
        "Glm4ForCausalLM" => model!(glm4_new, ModelForCausalLM),
        "HeliumForCausalLM" => model!(helium, Model),
        "MistralForCausalLM" => model!(mistral, Model),
        "MixtralForCausalLM" => model!(mixtral, Model),
        "Olmo2ForCausalLM" => model!(olmo2, Model),
        "OlmoForCausalLM" => model!(olmo, Model),
        "Phi3ForCausalLM" => model!(phi3, Model),
        "Qwen2ForCausalLM" => model!(qwen2, ModelForCausalLM),
        "Qwen2MoeForCausalLM" => model!(qwen2_moe, Model),
        "Qwen3ForCausalLM" => model!(qwen3, ModelForCausalLM),
        "Qwen3MoeForCausalLM" => model!(qwen3_moe, ModelForCausalLM),
        "Starcoder2ForCausalLM" => model!(starcoder2, Model),
        "MambaForCausalLM" => recurrence!(mamba),
        "Mamba2ForCausalLM" => recurrence!(mamba2),
        "RecurrentGemmaForCausalLM" => copies(
            candle::recurrent_gemma::Model::new(&settings!(), weights.pp("model"))?,
            |model, tokens, position| model.forward(tokens, position),
        ),
        "SmolLM3ForCausalLM" => copies(
            candle::smol::smollm3::ModelForCausalLM::new(&settings!(), weights)?,
            |model, tokens, position| model.forward(tokens, position),
        ),
        "PhiForCausalLM" => {
            copies(candle::phi::Model::new(&settings!(), weights)?, |model, tokens, _| model.forward(tokens))
        }
        "FalconForCausalLM" => {
            let config: candle::falcon::Config = settings!();
            config.validate()?;
            copies(candle::falcon::Falcon::load(weights, config)?, |model, tokens, _| model.forward(tokens))
        }
        "LlamaForCausalLM" => {
            let config = settings::<candle::llama::LlamaConfig>(dir, architecture)?.into_config(false);
            let cache = candle::llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
            copies((candle::llama::Llama::load(weights, &config)?, cache), |(model, cache), tokens, position| {
                model.forward(tokens, position, cache)
            })
        }
        "Lfm2ForCausalLM" => {
            let mut config = settings::<candle::lfm2::Lfm2Config>(dir, architecture)?.into_config(false);
            // Candle reckons the width by a rule of its own, which not all files follow.
            config.intermediate_size = weights.get_unchecked("model.layers.0.feed_forward.w1.weight")?.dim(0)?;
            let cache = candle::lfm2::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
            copies((candle::lfm2::Model::new(&config, weights)?, cache), |(model, cache), tokens, position| {
                model.forward(tokens, position, cache)
            })
        }
        "GraniteMoeHybridForCausalLM" => {
            use candle::granitemoehybrid as granite;
            let config = settings::<granite::GraniteMoeHybridConfig>(dir, architecture)?.into_config(false);
            let cache = granite::GraniteMoeHybridCache::new(true, DType::F32, &config, &Device::Cpu)?;
            let model = granite::GraniteMoeHybrid::load(weights, &config)?;
            copies((model, cache), |(model, cache), tokens, position| model.forward(tokens, position, cache))
        }
        "GPTBigCodeForCausalLM" => {
            // Candle's configuration can be made, but not of a file.
            let _: serde::de::IgnoredAny = settings!();
            let config = config.clone();
            let make = move || {
                let config = candle::bigcode::Config {
                    vocab_size: config.vocab_size,
                    max_position_embeddings: config.context_len,
                    num_hidden_layers: config.layers,
                    hidden_size: config.hidden_size,
                    layer_norm_epsilon: f64::from(config.norm_eps),
                    n_inner: Some(config.intermediate_size),
                    num_attention_heads: config.heads,
                    multi_query: true,
                    use_cache: true,
                };
                candle::bigcode::GPTBigCode::load(weights.clone(), config)
            };
            made_again(make, |model, tokens, position| model.forward(tokens, position))?
        }
        "DeepseekV2ForCausalLM" => {
            let config: candle::deepseek2::DeepSeekV2Config = settings!();
            made_again(
                move || candle::deepseek2::DeepSeekV2::new(&config, weights.clone()),
                |model, tokens, position| model.forward(tokens, position),
            )?
        }
        "StableLmForCausalLM" => {
            let config: candle::stable_lm::Config = settings!();
            made_again(
                move || candle::stable_lm::Model::new(&config, weights.clone()),
                |model, tokens, position| model.forward(tokens, position),
            )?
        }
        other => bail!("{other} is run from GGUF files, not from safetensors"),
    })
}
