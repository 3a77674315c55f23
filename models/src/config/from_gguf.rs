//! [`ModelConfig`] from the metadata of a GGUF file.

use super::{
    Activation, ChatTemplates, ExpertsConfig, GenerationDefaults, LatentConfig, ModelConfig, Pooling, RopeConfig,
    RopeScaling, RopeStyle, Routing,
};
use crate::gguf::{GgmlType, GgufFile, Metadata};
use crate::{FillInTheMiddle, ModelError};

/// Architectures whose converter permutes q and k so that neighbours turn together; all others turn halves.
const INTERLEAVED: [&str; 24] = [
    "arcee",
    "arctic",
    "baichuan",
    "bailingmoe",
    "chameleon",
    "chatglm",
    "cohere2",
    "command-r",
    "deci",
    "deepseek",
    "deepseek2",
    "ernie4_5",
    "gptj",
    "granite",
    "granitemoe",
    "internlm2",
    "llama",
    "llama4",
    "minicpm",
    "mistral3",
    "olmo",
    "plm",
    "smollm3",
    "xverse",
];

/// Control tokens that end a turn in the chat formats in use; files often name only one of them as their eos.
const END_OF_TURN: [&str; 15] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<|end_of_turn|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
];

/// llama.cpp's numbers for how a router's logits become weights.
const SOFTMAX_GATING: u32 = 1;
const SIGMOID_GATING: u32 = 2;

/// `tokenizer.ggml.token_type` of a control token, and of one the converter added by name.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Whether GGUF files of this architecture turn neighbours.
pub(crate) fn turns_neighbours(architecture: &str) -> bool {
    INTERLEAVED.contains(&architecture)
}

impl ModelConfig {
    /// Reads the configuration of a GGUF file. A missing or wrong key is [`ModelError::Format`] naming it.
    pub fn from_gguf(file: &GgufFile) -> Result<ModelConfig, ModelError> {
        let metadata = file.metadata();
        let arch = file.architecture()?;
        let key = |name: &str| format!("{arch}.{name}");
        let hidden_size = metadata.require_usize(&key("embedding_length"))?;
        let layers = metadata.require_usize(&key("block_count"))?;
        let heads = per_layer(metadata, &key("attention.head_count"))?
            .ok_or_else(|| metadata.error(format!("metadata key {} is missing", key("attention.head_count"))))?;
        if heads == 0 {
            return Err(metadata.error(format!("metadata key {} is 0", key("attention.head_count"))));
        }
        let latent = latent(metadata, arch)?;
        let (kv_heads, attention_layers) = match latent {
            Some(_) => (heads, layers),
            None if arch == "lfm2" => attending(metadata, &key("attention.head_count_kv"), layers)?,
            None => (per_layer(metadata, &key("attention.head_count_kv"))?.unwrap_or(heads), layers),
        };
        // Files made for attention in the narrow space give the heads' own width apart.
        let key_length = match metadata.usize(&key("attention.key_length_mla"))? {
            None => metadata.usize(&key("attention.key_length"))?,
            length => length,
        };
        let head_dim = match key_length {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(metadata.error(format!(
                    "{} is missing, and {} = {hidden_size} is not a multiple of the {heads} heads",
                    key("attention.key_length"),
                    key("embedding_length")
                )));
            }
        };
        let norm_eps = match metadata.f32(&key("attention.layer_norm_rms_epsilon"))? {
            Some(eps) => eps,
            None => metadata.require_f32(&key("attention.layer_norm_epsilon"))?,
        };
        let context_len = metadata.require_usize(&key("context_length"))?;
        let vocab_size = match file.tensor("token_embd.weight") {
            Some(table) => table.shape[0],
            None => match metadata.usize(&key("vocab_size"))? {
                Some(size) => size,
                None => metadata.require_strings("tokenizer.ggml.tokens")?.len(),
            },
        };
        let gemma = arch.starts_with("gemma");
        let has = |name: &str| file.tensor(name).is_some();
        let embedding_scale = match metadata.f32(&key("embedding_scale"))? {
            None if gemma => Some((hidden_size as f32).sqrt()),
            scale => scale,
        };
        // The granite family divides by its logit scale, the command family multiplies.
        let logit_scale = metadata
            .f32(&key("logit_scale"))?
            .map(|scale| if arch.starts_with("granite") { 1.0 / scale } else { scale });
        let sliding_window = match metadata.usize(&key("attention.sliding_window"))? {
            None if arch == "gemma2" => Some(4096),
            window => window.filter(|&window| window > 0),
        };
        let slides = match sliding_window {
            Some(_) => sliding_layers(metadata, arch, layers)?,
            None => None,
        };
        for name in ["attention.clamp_kqv", "attention.temperature_scale"] {
            if metadata.f32(&key(name))?.is_some_and(|value| value != 0.0) {
                return Err(ModelError::Unsupported(format!("{} is not supported", key(name))));
            }
        }
        if metadata.bool(&key("attention.causal"))? == Some(false) {
            return Err(ModelError::Unsupported(format!("{} is not supported if false", key("attention.causal"))));
        }
        let learned_positions = has("position_embd.weight");
        let mut rope = rope(file, arch, head_dim, context_len)?;
        if learned_positions {
            rope.dimension_count = 0;
        }
        let sliding_base = metadata.f32(&key("rope.freq_base_swa"))?;
        // Files of Gemma 2 leave their caps out where they are these.
        let gemma2 = |cap: f32| (arch == "gemma2").then_some(cap);
        // The largest Gemmas scale scores by their width a head, not by the heads' own; the file does not say.
        let attention_scale = match (metadata.f32(&key("attention.scale"))?, arch, layers) {
            (None, "deepseek2", _) => Some(latent_scale(metadata, arch, head_dim)?),
            (None, "gemma2", 46) | (None, "gemma3", 62) => Some(1.0 / (hidden_size as f32 / heads as f32).sqrt()),
            (scale, ..) => scale,
        };
        let config = ModelConfig {
            architecture: arch.to_owned(),
            vocab_size,
            hidden_size,
            layers,
            attention_layers,
            heads,
            kv_heads,
            head_dim,
            intermediate_size: per_layer(metadata, &key("feed_forward_length"))?.ok_or_else(|| {
                metadata.error(format!("metadata key {} is missing", key("feed_forward_length")))
            })?,
            context_len,
            norm_eps,
            // Converters fold the 1 of `(1 + w)` norms into the weights.
            norm_weight_offset: 0.0,
            sliding_rope: (arch == "gemma3" || arch == "olmo2" && sliding_window.is_some()).then(|| RopeConfig {
                base: sliding_base.unwrap_or(if arch == "gemma3" { 10_000.0 } else { rope.base }),
                scaling: RopeScaling::None,
                ..rope.clone()
            }),
            rope,
            // The file does not say: llama.cpp has every fourth layer of the architecture go without.
            rope_layers: match arch {
                "smollm3" => Some((1..=layers).map(|n| !n.is_multiple_of(4)).collect()),
                "cohere2" => slides.clone(),
                _ => None,
            },
            learned_positions,
            parallel_residual: arch == "gptneox" && metadata.bool(&key("use_parallel_residual"))?.unwrap_or(true),
            latent,
            experts: experts(metadata, arch)?,
            tie_embeddings: Some(!has("output.weight")),
            activation: activation(arch),
            sliding_window,
            sliding_layers: slides,
            qkv_bias: has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias"),
            attention_output_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_down.bias"),
            attention_scale,
            embedding_scale,
            residual_scale: metadata.f32(&key("residual_scale"))?,
            logit_scale,
            attention_softcap: metadata.f32(&key("attn_logit_softcapping"))?.or(gemma2(50.0)),
            final_logit_softcap: metadata.f32(&key("final_logit_softcapping"))?.or(gemma2(30.0)),
            bos_token_id: metadata.u32("tokenizer.ggml.bos_token_id")?,
            pad_token_id: metadata.u32("tokenizer.ggml.padding_token_id")?,
            eos_token_ids: eos_token_ids(metadata)?,
            chat_template: ChatTemplates::from_gguf(metadata)?,
            generation: generation(metadata)?,
            pooling: Pooling::from_gguf(metadata, arch)?,
            fill_in_the_middle: FillInTheMiddle::from_gguf(metadata)?,
        };
        config.checked(&file.path().display().to_string())
    }
}

/// A count that some files give once and some for every layer; layers that differ are refused.
fn per_layer(metadata: &Metadata, key: &str) -> Result<Option<usize>, ModelError> {
    match metadata.get(key).map(|value| value.as_ints()) {
        Some(Some(values)) => {
            let Some(&first) = values.first() else {
                return Err(metadata.error(format!("metadata key {key} is an empty array")));
            };
            if values.iter().any(|&value| value != first) {
                return Err(ModelError::Unsupported(format!(
                    "metadata key {key} differs from layer to layer, which is not supported"
                )));
            }
            usize::try_from(first)
                .map(Some)
                .map_err(|_| metadata.error(format!("metadata key {key} holds {first}")))
        }
        _ => metadata.usize(key),
    }
}

/// Key/value heads of the layers that attend, and how many these are: layers of another kind say that they have none.
fn attending(metadata: &Metadata, key: &str, layers: usize) -> Result<(usize, usize), ModelError> {
    let Some(values) = metadata.get(key).and_then(|value| value.as_ints()) else {
        return Ok((metadata.require_usize(key)?, layers));
    };
    let attending: Vec<i64> = values.iter().copied().filter(|&heads| heads != 0).collect();
    match attending.first().map(|&heads| usize::try_from(heads)) {
        Some(Ok(heads)) if attending.iter().all(|other| Some(other) == attending.first()) => {
            Ok((heads, attending.len()))
        }
        _ => {
            Err(metadata.error(format!("metadata key {key} must name one number of heads, and 0, not {values:?}")))
        }
    }
}

fn rope(file: &GgufFile, arch: &str, head_dim: usize, context_len: usize) -> Result<RopeConfig, ModelError> {
    let metadata = file.metadata();
    let key = |name: &str| format!("{arch}.rope.{name}");
    let dimension_count = metadata.usize(&key("dimension_count"))?.unwrap_or(head_dim);
    let original_context = metadata.usize(&key("scaling.original_context_length"))?.unwrap_or(context_len);
    let factor = match metadata.f32(&key("scaling.factor"))? {
        None => metadata.f32(&key("scale_linear"))?,
        factor => factor,
    };
    let usual_factor = 0.1 * factor.unwrap_or(1.0).max(1.0).ln() + 1.0;
    let own_factor = metadata.f32(&key("scaling.attn_factor"))?;
    let attention_factor = match (arch, metadata.f32(&key("scaling.yarn_log_multiplier"))?) {
        // The usual factor goes into the scores alone.
        ("deepseek2", Some(multiplier)) if multiplier != 0.0 => Some(1.0 / usual_factor),
        // What the file gives is the whole factor.
        ("olmo2", _) => own_factor.map(|own| own / usual_factor),
        _ => own_factor,
    };
    let scaling = match metadata.str(&key("scaling.type"))? {
        // Old files give a factor without a type.
        None => match factor {
            Some(factor) if factor != 1.0 && factor != 0.0 => RopeScaling::Linear { factor },
            _ => RopeScaling::None,
        },
        Some("none") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: factor.unwrap_or(1.0) },
        Some("yarn") => RopeScaling::Yarn {
            factor: factor.unwrap_or(1.0),
            original_context,
            // llama.cpp multiplies the usual factor by the file's.
            attention_factor: attention_factor.map(|own| own * usual_factor),
            beta_fast: metadata.f32(&key("scaling.yarn_beta_fast"))?.unwrap_or(32.0),
            beta_slow: metadata.f32(&key("scaling.yarn_beta_slow"))?.unwrap_or(1.0),
        },
        Some("longrope") => RopeScaling::None,
        Some(other) => {
            return Err(ModelError::Unsupported(format!(
                "{}: rope scaling type {other:?} is not supported (none, linear, yarn, longrope are)",
                file.path().display()
            )));
        }
    };
    let scaling = if let Some(values) = floats(file, "rope_freqs.weight")? {
        match scaling {
            RopeScaling::None => RopeScaling::FreqFactors(values),
            other => {
                return Err(ModelError::Unsupported(format!(
                    "{}: rope_freqs.weight together with {other:?} is not supported",
                    file.path().display()
                )));
            }
        }
    } else if let (Some(short_factors), Some(long_factors)) =
        (floats(file, "rope_factors_short.weight")?, floats(file, "rope_factors_long.weight")?)
    {
        let stretch = context_len as f32 / original_context.max(1) as f32;
        RopeScaling::LongRope { short_factors, long_factors, original_context, attention_factor, stretch }
    } else {
        scaling
    };
    Ok(RopeConfig {
        base: metadata.f32(&key("freq_base"))?.unwrap_or(10_000.0),
        dimension_count,
        style: if INTERLEAVED.contains(&arch) { RopeStyle::Interleaved } else { RopeStyle::Half },
        scaling,
    })
}

fn experts(metadata: &Metadata, arch: &str) -> Result<Option<ExpertsConfig>, ModelError> {
    let key = |name: &str| format!("{arch}.{name}");
    let Some(count) = metadata.usize(&key("expert_count"))?.filter(|&count| count > 0) else {
        return Ok(None);
    };
    let per_token = metadata.require_usize(&key("expert_used_count"))?;
    let gating = metadata.u32(&key("expert_gating_func"))?.unwrap_or(SOFTMAX_GATING);
    let scale = metadata.f32(&key("expert_weights_scale"))?.unwrap_or(1.0);
    let routing = match gating {
        SOFTMAX_GATING => Routing::Softmax,
        SIGMOID_GATING => Routing::Sigmoid,
        other => {
            return Err(ModelError::Unsupported(format!(
                "experts with gating function {other} are not supported"
            )));
        }
    };
    let width = match metadata.usize(&key("expert_feed_forward_length"))? {
        None => per_layer(metadata, &key("feed_forward_length"))?,
        width => width,
    };
    let width = width.unwrap_or(0);
    // The architecture decides where the file does not say.
    let never = ["qwen2moe", "olmoe", "deepseek2"].contains(&arch);
    let shared_size = match metadata.usize(&key("expert_shared_feed_forward_length"))? {
        None => metadata.usize(&key("expert_shared_count"))?.map(|shared| shared * width),
        size => size,
    };
    let groups =
        match (metadata.usize(&key("expert_group_count"))?, metadata.usize(&key("expert_group_used_count"))?) {
            (Some(groups), Some(kept)) if groups > 1 => Some((groups, kept)),
            _ => None,
        };
    Ok(Some(ExpertsConfig {
        normalise: metadata.bool(&key("expert_weights_norm"))?.unwrap_or(!never),
        shared_size: shared_size.filter(|&size| size > 0),
        routing,
        groups,
        scale: if scale == 0.0 { 1.0 } else { scale },
        ..ExpertsConfig::softmax(count, per_token, width)
    }))
}

/// Latent attention, where the file speaks of it.
fn latent(metadata: &Metadata, arch: &str) -> Result<Option<LatentConfig>, ModelError> {
    let key = |name: &str| format!("{arch}.attention.{name}");
    let Some(kv_rank) = metadata.usize(&key("kv_lora_rank"))? else { return Ok(None) };
    let value_dim = match metadata.usize(&key("value_length_mla"))? {
        None => metadata.require_usize(&key("value_length"))?,
        Some(length) => length,
    };
    let query_rank = metadata.usize(&key("q_lora_rank"))?.filter(|&rank| rank > 0);
    Ok(Some(LatentConfig { query_rank, kv_rank, value_dim }))
}

/// Factor on `q · k` of latent attention: long contexts sharpen it.
fn latent_scale(metadata: &Metadata, arch: &str, head_dim: usize) -> Result<f32, ModelError> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    let stretch = metadata.f32(&key("factor"))?.unwrap_or(1.0).max(1.0);
    let sharper = 1.0 + metadata.f32(&key("yarn_log_multiplier"))?.unwrap_or(0.0) * stretch.ln();
    Ok(sharper * sharper / (head_dim as f32).sqrt())
}

/// A small F32 tensor's values, if it is there.
fn floats(file: &GgufFile, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(info) = file.tensor(name) else {
        return Ok(None);
    };
    if info.dtype != GgmlType::F32 {
        return Err(file.metadata().error(format!("tensor {name} must be F32, found {}", info.dtype)));
    }
    let values = file.tensor_data(info).chunks_exact(4);
    Ok(Some(values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
}

fn activation(arch: &str) -> Activation {
    match arch {
        "gemma" | "gemma2" | "gemma3" | "gpt2" | "phi2" | "starcoder" | "starcoder2" => Activation::GeluTanh,
        "bloom" | "falcon" | "gptneox" | "mpt" => Activation::Gelu,
        "nemotron" => Activation::ReluSquared,
        _ => Activation::Silu,
    }
}

/// Which layers slide: as the file says, else by the architecture's own rule.
fn sliding_layers(metadata: &Metadata, arch: &str, layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let key = format!("{arch}.attention.sliding_window_pattern");
    if let Some(pattern) = metadata.get(&key).and_then(|value| value.as_bools()) {
        return Ok(Some(pattern.to_vec()));
    }
    let period = match (metadata.usize(&key)?, arch) {
        (Some(period), _) => period,
        (None, "gemma2") => 2,
        (None, "gemma3") => 6,
        (None, "cohere2" | "olmo2") => 4,
        (None, _) => return Ok(None),
    };
    if period == 0 {
        return Err(metadata.error(format!("metadata key {key} is 0")));
    }
    Ok(Some((1..=layers).map(|n| !n.is_multiple_of(period)).collect()))
}

/// The file's own end tokens, and every well-known one its vocabulary holds as a control token.
fn eos_token_ids(metadata: &Metadata) -> Result<Vec<u32>, ModelError> {
    let mut ids = Vec::new();
    for name in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ids.extend(metadata.u32(&format!("tokenizer.ggml.{name}"))?);
    }
    ids.extend(
        metadata
            .ints("tokenizer.ggml.eos_token_ids")?
            .unwrap_or_default()
            .into_iter()
            .filter_map(|id| u32::try_from(id).ok()),
    );
    let tokens = metadata.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = metadata.ints("tokenizer.ggml.token_type")?.unwrap_or_default();
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        if (kind == CONTROL || kind == USER_DEFINED) && END_OF_TURN.contains(&token.as_str()) {
            ids.push(id as u32);
        }
    }
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(ids)
}

fn generation(metadata: &Metadata) -> Result<GenerationDefaults, ModelError> {
    Ok(GenerationDefaults {
        temperature: metadata.f32("general.sampling.temp")?,
        top_p: metadata.f32("general.sampling.top_p")?,
        top_k: metadata.u32("general.sampling.top_k")?,
        min_p: metadata.f32("general.sampling.min_p")?,
        repetition_penalty: metadata.f32("general.sampling.penalty_repeat")?,
        ..GenerationDefaults::default()
    })
}
