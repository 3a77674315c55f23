//! [`ModelConfig`] from a directory's config.json, generation_config.json, tokenizer_config.json and templates.

mod sparse;

use std::path::Path;

use serde_json::Value;
use sparse::{experts, latent, latent_scale};

use super::{
    Activation, ChatTemplates, GenerationDefaults, ModelConfig, Pooling, RopeConfig, RopeScaling, RopeStyle,
};
use crate::ModelError;

/// Architectures whose published weights turn neighbours; all others turn halves.
const INTERLEAVED: [&str; 8] = [
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ernie4_5ForCausalLM",
    "GPTJForCausalLM",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
];

/// Whether files published for this class turn neighbours.
pub(crate) fn turns_neighbours(architecture: &str) -> bool {
    INTERLEAVED.contains(&architecture)
}

impl ModelConfig {
    /// Reads the configuration of a model directory. A missing or wrong field is [`ModelError::Format`] naming it.
    pub fn from_dir(dir: &Path) -> Result<ModelConfig, ModelError> {
        let config = JsonFile::read(&dir.join("config.json"))?;
        let generation = JsonFile::read_if_there(&dir.join("generation_config.json"))?;
        let tokenizer = JsonFile::read_if_there(&dir.join("tokenizer_config.json"))?;
        let architecture = match config.root["architectures"][0].as_str() {
            Some(name) => name.to_owned(),
            None => return Err(config.error("field architectures must list the model's class")),
        };
        // Models that also see or hear keep the decoder's fields one level down.
        let nested = config.root.get("text_config").filter(|value| value.is_object());
        let fields = Fields { file: &config, object: nested.unwrap_or(&config.root) };
        let family = architecture.to_ascii_lowercase();
        let gemma = family.starts_with("gemma");
        let falcon = family.starts_with("falcon");
        refuse_unknown_variants(&fields)?;
        // Gemma 3 files with pictures leave out what is the default of their class.
        let gemma3 = |value: usize| family.starts_with("gemma3").then_some(value);
        let hidden_size = fields.require_usize(&["hidden_size", "n_embd"])?;
        let layers = fields.require_usize(&["num_hidden_layers", "n_layer"])?;
        let recurrent = family.starts_with("mamba");
        let heads = match (fields.usize(&["num_attention_heads", "n_head"])?, gemma3(8)) {
            (Some(heads), _) | (None, Some(heads)) => heads,
            // Nothing depends on heads where nothing attends.
            _ if recurrent => 1,
            _ => fields.require_usize(&["num_attention_heads"])?,
        };
        let latent = latent(&fields)?;
        // Some files of latent attention give the turning part's width as head_dim.
        let (given, turning) = match &latent {
            Some(_) => {
                let turning = fields.require_usize(&["qk_rope_head_dim"])?;
                (Some(fields.require_usize(&["qk_nope_head_dim"])? + turning), Some(turning))
            }
            None => (fields.usize(&["head_dim"])?.or(gemma3(256)), None),
        };
        let head_dim = match given {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(config.error(format!(
                    "field head_dim is missing, and hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
                )));
            }
        };
        let norm_eps = fields
            .f32(&["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"])?
            .or(gemma3(0).map(|_| 1e-6))
            // Not in the files: its norms have no weights either.
            .or((family == "olmoforcausallm").then_some(1e-5))
            .ok_or_else(|| config.error("field rms_norm_eps is missing"))?;
        let context_len = fields
            .usize(&["max_position_embeddings", "n_positions"])?
            .or(gemma3(131_072))
            .or(falcon.then_some(2048))
            .or(family.starts_with("recurrentgemma").then_some(8192))
            .or(recurrent.then_some(RECURRENT_CONTEXT))
            .ok_or_else(|| config.error("field max_position_embeddings is missing"))?;
        let bias = fields.bool(&["attention_bias", "use_bias", "bias"])?;
        let window = sliding_window(&fields, &family)?;
        let rope = ropes(&fields, &architecture, turning.unwrap_or(head_dim), context_len)?;
        let (mut eos_token_ids, mut bos_token_id, mut pad_token_id) = (Vec::new(), None, None);
        for source in [generation.as_ref(), Some(&config)].into_iter().flatten() {
            let levels = [Some(&source.root), source.root.get("text_config")];
            for object in levels.into_iter().flatten() {
                let fields = Fields { file: source, object };
                for id in fields.ids("eos_token_id")? {
                    if !eos_token_ids.contains(&id) {
                        eos_token_ids.push(id);
                    }
                }
                bos_token_id = bos_token_id.or(fields.ids("bos_token_id")?.first().copied());
                pad_token_id = pad_token_id.or(fields.ids("pad_token_id")?.first().copied());
            }
        }
        let parsed = ModelConfig {
            vocab_size: match (fields.usize(&["vocab_size"])?, gemma3(262_208)) {
                (Some(size), _) | (None, Some(size)) => size,
                _ => fields.require_usize(&["vocab_size"])?,
            },
            hidden_size,
            layers,
            attention_layers: attention_layers(&fields, recurrent, layers)?,
            heads,
            kv_heads: match &latent {
                Some(_) => heads,
                None => match fields.usize(&["num_key_value_heads"])?.or(gemma3(4)) {
                    None if fields.bool(&["multi_query"])? == Some(true) => 1,
                    kv_heads => kv_heads.unwrap_or(heads),
                },
            },
            head_dim,
            intermediate_size: match fields.usize(&["intermediate_size", "n_inner", "ffn_dim", "block_ff_dim"])? {
                Some(size) => size,
                None if recurrent => fields.usize(&["expand"])?.unwrap_or(2) * hidden_size,
                None if family.starts_with("gpt") || falcon => 4 * hidden_size,
                None => return Err(config.error("field intermediate_size is missing")),
            },
            context_len,
            norm_eps,
            norm_weight_offset: if gemma { 1.0 } else { 0.0 },
            rope: rope.0,
            sliding_rope: rope.1,
            rope_layers: match family.starts_with("cohere2") {
                true => window.1.clone(),
                false => rope_layers(&fields, &family, layers)?,
            },
            learned_positions: family.starts_with("gpt2"),
            parallel_residual: family.starts_with("gptneox")
                && fields.bool(&["use_parallel_residual"])?.unwrap_or(true),
            latent,
            experts: experts(&fields, &family)?,
            tie_embeddings: fields
                .bool(&["tie_word_embeddings"])?
                .or(config.root["tie_word_embeddings"].as_bool()),
            activation: match activation(&fields)? {
                // The first Gemma's files say gelu and mean its approximation.
                Activation::Gelu if gemma => Activation::GeluTanh,
                activation => activation,
            },
            sliding_window: window.0,
            sliding_layers: window.1,
            qkv_bias: bias.unwrap_or(
                family.starts_with("qwen2") || family.starts_with("gpt") || family.starts_with("starcoder2"),
            ),
            attention_output_bias: bias.unwrap_or(family.starts_with("gpt") || family.starts_with("starcoder2")),
            mlp_bias: fields
                .bool(&["mlp_bias", "use_bias"])?
                .unwrap_or(family.starts_with("gpt") || family.starts_with("starcoder2")),
            attention_scale: match fields.f32(&["attention_multiplier"])? {
                None if turning.is_some() => Some(latent_scale(&fields, head_dim)?),
                None => fields
                    .f32(&["query_pre_attn_scalar"])?
                    .or(gemma3(256).map(|scalar| scalar as f32))
                    .map(|scalar| 1.0 / scalar.sqrt()),
                scale => scale,
            },
            embedding_scale: match fields.f32(&["embedding_multiplier"])? {
                None if gemma => Some((hidden_size as f32).sqrt()),
                scale => scale,
            },
            residual_scale: fields.f32(&["residual_multiplier"])?,
            logit_scale: match fields.f32(&["logits_scaling"])? {
                Some(divisor) => Some(1.0 / divisor),
                None => fields.f32(&["logit_scale"])?,
            },
            attention_softcap: fields.f32(&["attn_logit_softcapping"])?,
            final_logit_softcap: fields.f32(&["final_logit_softcapping"])?,
            bos_token_id,
            pad_token_id,
            eos_token_ids,
            chat_template: ChatTemplates::from_dir(dir, tokenizer.as_ref().map(|f| &f.root))?,
            generation: match &generation {
                Some(file) => defaults(file)?,
                None => GenerationDefaults::default(),
            },
            pooling: Pooling::from_dir(dir)?,
            fill_in_the_middle: None,
            architecture,
        };
        parsed.checked(&config.path)
    }
}

/// Longest sequence of models without positions, which have none of their own: everything has a bound.
const RECURRENT_CONTEXT: usize = 1 << 15;

/// The JSON object in a file.
pub(crate) fn read_json(path: &Path) -> Result<Value, ModelError> {
    JsonFile::read(path).map(|file| file.root)
}

/// A parsed JSON file and its path, for messages.
pub(super) struct JsonFile {
    path: String,
    pub(super) root: Value,
}

impl JsonFile {
    fn read(path: &Path) -> Result<JsonFile, ModelError> {
        let file = Self::read_any(path)?;
        if file.root.is_object() { Ok(file) } else { Err(file.error("must be a JSON object")) }
    }

    fn read_any(path: &Path) -> Result<JsonFile, ModelError> {
        let path_text = path.display().to_string();
        let text = std::fs::read(path).map_err(|e| ModelError::Source(format!("{path_text}: {e}")))?;
        match serde_json::from_slice::<Value>(&text).or_else(|e| without_infinity(&text).ok_or(e)) {
            Ok(root) => Ok(JsonFile { path: path_text, root }),
            Err(e) => Err(ModelError::Format { path: path_text, reason: format!("is not valid JSON: {e}") }),
        }
    }

    pub(super) fn read_if_there(path: &Path) -> Result<Option<JsonFile>, ModelError> {
        if path.is_file() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// The items of a file that holds a list; none if there is no such file.
    pub(super) fn read_list_if_there(path: &Path) -> Result<Vec<Value>, ModelError> {
        if !path.is_file() {
            return Ok(Vec::new());
        }
        let mut file = Self::read_any(path)?;
        match file.root.take() {
            Value::Array(items) => Ok(items),
            _ => Err(file.error("must be a JSON array")),
        }
    }

    fn error(&self, reason: impl Into<String>) -> ModelError {
        ModelError::Format { path: self.path.clone(), reason: reason.into() }
    }
}

/// JSON as Python writes it: with infinity, which JSON has no word for and which is read as null.
fn without_infinity(text: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(text).ok()?;
    let word = regex::Regex::new(r"(?m)([\[,:]\s*|^\s*)-?Infinity\b").ok()?;
    serde_json::from_str(&word.replace_all(text, "${1}null")).ok()
}

/// Typed look-ups in one object of a file. A field may go by several names; null counts as absent.
struct Fields<'a> {
    file: &'a JsonFile,
    object: &'a Value,
}

impl<'a> Fields<'a> {
    fn typed<T>(
        &self,
        names: &[&str],
        wanted: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        for name in names {
            match self.object.get(name) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    return match convert(value) {
                        Some(value) => Ok(Some(value)),
                        None => Err(self.file.error(format!("field {name} must be {wanted}, found {value}"))),
                    };
                }
            }
        }
        Ok(None)
    }

    fn usize(&self, names: &[&str]) -> Result<Option<usize>, ModelError> {
        self.typed(names, "a non-negative integer", |value| value.as_u64().and_then(|v| v.try_into().ok()))
    }

    fn require_usize(&self, names: &[&str]) -> Result<usize, ModelError> {
        self.usize(names)?.ok_or_else(|| self.file.error(format!("field {} is missing", names[0])))
    }

    fn f32(&self, names: &[&str]) -> Result<Option<f32>, ModelError> {
        self.typed(names, "a number", |value| value.as_f64().map(|v| v as f32).filter(|v| v.is_finite()))
    }

    fn require_f32(&self, name: &str) -> Result<f32, ModelError> {
        self.f32(&[name])?.ok_or_else(|| self.file.error(format!("field {name} is missing")))
    }

    fn bool(&self, names: &[&str]) -> Result<Option<bool>, ModelError> {
        self.typed(names, "true or false", Value::as_bool)
    }

    fn str(&self, names: &[&str]) -> Result<Option<&'a str>, ModelError> {
        self.typed(names, "a string", Value::as_str)
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        self.typed(&[name], "a list of numbers", |value| {
            value.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32)).collect()
        })?
        .ok_or_else(|| self.file.error(format!("field {name} is missing")))
    }

    /// A token id or a list of them. Some files say -1 for none.
    fn ids(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| -> Option<Option<u32>> {
            match value.as_i64()? {
                -1 => Some(None),
                id => Some(Some(u32::try_from(id).ok()?)),
            }
        };
        let ids = self.typed(&[name], "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            single => Some(vec![id(single)?]),
        })?;
        Ok(ids.unwrap_or_default().into_iter().flatten().collect())
    }

    fn object(&self, name: &str) -> Option<Fields<'a>> {
        let object = self.object.get(name).filter(|value| value.is_object())?;
        Some(Fields { file: self.file, object })
    }
}

/// Settings that change the arithmetic of a known architecture in ways rill does not follow.
fn refuse_unknown_variants(fields: &Fields<'_>) -> Result<(), ModelError> {
    for name in [
        "scale_attn_by_inverse_layer_idx",
        "use_bidirectional_attention",
        "add_cross_attention",
        "alibi",
        "use_mrope",
    ] {
        if fields.bool(&[name])? == Some(true) {
            return Err(ModelError::Unsupported(format!("{}: {name} is not supported", fields.file.path)));
        }
    }
    // Embedding models made of decoders see what follows as well.
    if fields.bool(&["is_causal"])? == Some(false) {
        return Err(ModelError::Unsupported(format!("{}: is_causal is not supported if false", fields.file.path)));
    }
    for name in ["clip_qkv", "llama_4_scaling_beta", "attn_temperature_tuning"] {
        if fields.object.get(name).or(fields.file.root.get(name)).is_some_and(|value| !value.is_null()) {
            return Err(ModelError::Unsupported(format!("{}: {name} is not supported", fields.file.path)));
        }
    }
    Ok(())
}

/// The rotation of all layers, and of those that slide where it is another.
fn ropes(
    fields: &Fields<'_>,
    architecture: &str,
    head_dim: usize,
    context_len: usize,
) -> Result<(RopeConfig, Option<RopeConfig>), ModelError> {
    let read = |nested: Option<&Fields<'_>>| rope(fields, nested, architecture, head_dim, context_len);
    // Its layers that slide leave long contexts to the others.
    let plain = architecture.starts_with("Olmo3");
    // Newer files keep everything in rope_parameters, for each kind of layer where there are two; older ones keep the
    // base beside and the rest in rope_scaling.
    if let Some(parameters) = fields.object("rope_parameters") {
        return Ok(match (parameters.object("full_attention"), parameters.object("sliding_attention")) {
            (Some(full), sliding) => {
                (read(Some(&full))?, sliding.map(|sliding| read(Some(&sliding))).transpose()?)
            }
            _ => {
                let full = read(Some(&parameters))?;
                let sliding = plain.then(|| RopeConfig { scaling: RopeScaling::None, ..full.clone() });
                (full, sliding)
            }
        });
    }
    let full = read(fields.object("rope_scaling").as_ref())?;
    let local = match fields.f32(&["rope_local_base_freq"])? {
        None if architecture.starts_with("Gemma3") => Some(10_000.0),
        base => base,
    };
    let sliding = local.or(plain.then_some(full.base)).map(|base| RopeConfig {
        base,
        scaling: RopeScaling::None,
        ..full.clone()
    });
    let gemma3_default = architecture.starts_with("Gemma3") && fields.f32(&["rope_theta"])?.is_none();
    Ok((if gemma3_default { RopeConfig { base: 1_000_000.0, ..full } } else { full }, sliding))
}

fn rope(
    fields: &Fields<'_>,
    nested: Option<&Fields<'_>>,
    architecture: &str,
    head_dim: usize,
    context_len: usize,
) -> Result<RopeConfig, ModelError> {
    let base = match nested {
        Some(parameters) => parameters.f32(&["rope_theta"])?,
        None => None,
    };
    let base = match base {
        None => fields.f32(&["rope_theta", "rotary_emb_base"])?.unwrap_or(10_000.0),
        Some(base) => base,
    };
    let partial = match nested {
        Some(parameters) => parameters.f32(&["partial_rotary_factor"])?,
        None => None,
    };
    let partial = match partial {
        None => match fields.f32(&["partial_rotary_factor", "rotary_pct"])? {
            None if architecture == "GPTNeoXForCausalLM" => 0.25,
            partial => partial.unwrap_or(1.0),
        },
        Some(partial) => partial,
    };
    let scaling = match nested {
        Some(parameters) => rope_scaling(fields, parameters, context_len)?,
        None => RopeScaling::None,
    };
    let turns = !architecture.starts_with("GPT2");
    Ok(RopeConfig {
        base,
        dimension_count: if turns { (head_dim as f32 * partial) as usize } else { 0 },
        style: match fields.bool(&["rope_interleave"])? {
            Some(false) => RopeStyle::Half,
            _ if INTERLEAVED.contains(&architecture) => RopeStyle::Interleaved,
            _ => RopeStyle::Half,
        },
        scaling,
    })
}

/// Layers with keys and values, by kinds that are listed (a shorter list is repeated) or by number.
fn attention_layers(fields: &Fields<'_>, recurrent: bool, layers: usize) -> Result<usize, ModelError> {
    if recurrent {
        return Ok(0);
    }
    let kinds = fields.typed(&["layer_types", "block_types", "_block_types"], "a list of names", |value| {
        value.as_array()?.iter().map(Value::as_str).collect::<Option<Vec<_>>>()
    })?;
    if let Some(kinds) = kinds.filter(|kinds| !kinds.is_empty()) {
        let attends = |kind: &&str| kind.contains("attention") && *kind != "linear_attention";
        return Ok(kinds.iter().cycle().take(layers).filter(|kind| attends(kind)).count());
    }
    let numbers = fields.typed(&["full_attn_idxs"], "a list of layers", |value| value.as_array().map(Vec::len))?;
    Ok(numbers.map_or(layers, |attending| attending.min(layers)))
}

/// Layers that turn queries and keys: SmolLM3 leaves some out.
fn rope_layers(fields: &Fields<'_>, family: &str, layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    if !family.starts_with("smollm3") {
        return Ok(None);
    }
    let listed = fields.typed(&["no_rope_layers"], "a list of 0 and 1", |value| {
        value.as_array()?.iter().map(|v| v.as_u64().map(|v| v != 0)).collect::<Option<Vec<_>>>()
    })?;
    let interval = fields.usize(&["no_rope_layer_interval"])?.unwrap_or(4).max(1);
    Ok(Some(listed.unwrap_or_else(|| (1..=layers).map(|n| !n.is_multiple_of(interval)).collect())))
}

fn rope_scaling(fields: &Fields<'_>, scaling: &Fields<'_>, context_len: usize) -> Result<RopeScaling, ModelError> {
    let original_context = match scaling.usize(&["original_max_position_embeddings"])? {
        None => fields.usize(&["original_max_position_embeddings"])?.unwrap_or(context_len),
        Some(context) => context,
    };
    let mut attention_factor = scaling.f32(&["attention_factor"])?;
    Ok(match scaling.str(&["rope_type", "type"])?.unwrap_or("default") {
        "default" | "mrope" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: scaling.require_f32("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: scaling.require_f32("factor")?, original_context },
        "llama3" => RopeScaling::Llama3 {
            factor: scaling.require_f32("factor")?,
            low_freq_factor: scaling.require_f32("low_freq_factor")?,
            high_freq_factor: scaling.require_f32("high_freq_factor")?,
            original_context,
        },
        "yarn" => {
            // DeepSeek's way to say the attention factor.
            if let (None, Some(mscale), Some(all)) =
                (attention_factor, scaling.f32(&["mscale"])?, scaling.f32(&["mscale_all_dim"])?)
            {
                let stretch = scaling.require_f32("factor")?.max(1.0).ln();
                attention_factor = Some((0.1 * mscale * stretch + 1.0) / (0.1 * all * stretch + 1.0));
            }
            RopeScaling::Yarn {
                factor: scaling.require_f32("factor")?,
                original_context,
                attention_factor,
                beta_fast: scaling.f32(&["beta_fast"])?.unwrap_or(32.0),
                beta_slow: scaling.f32(&["beta_slow"])?.unwrap_or(1.0),
            }
        }
        "longrope" | "su" => RopeScaling::LongRope {
            short_factors: scaling.floats("short_factor")?,
            long_factors: scaling.floats("long_factor")?,
            original_context,
            attention_factor,
            stretch: context_len as f32 / original_context.max(1) as f32,
        },
        other => {
            return Err(ModelError::Unsupported(format!(
                "{}: rope type {other:?} is not supported (default, linear, dynamic, llama3, yarn, longrope are)",
                fields.file.path
            )));
        }
    })
}

fn activation(fields: &Fields<'_>) -> Result<Activation, ModelError> {
    let name = fields.str(&["hidden_activation", "hidden_act", "activation_function"])?.unwrap_or("silu");
    Ok(match name {
        "silu" | "swish" | "swiglu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "relu2" => Activation::ReluSquared,
        other => {
            return Err(ModelError::Unsupported(format!(
                "{}: activation {other:?} is not supported",
                fields.file.path
            )));
        }
    })
}

/// The window, and which layers it holds for.
fn sliding_window(fields: &Fields<'_>, family: &str) -> Result<(Option<usize>, Option<Vec<bool>>), ModelError> {
    let window = fields.usize(&["sliding_window", "attention_window_size"])?.filter(|&window| window > 0);
    // Qwen's files carry a window that is switched off.
    if window.is_none() || fields.bool(&["use_sliding_window"])? == Some(false) {
        return Ok((None, None));
    }
    let layers = fields.require_usize(&["num_hidden_layers"])?;
    if let Some(kinds) = fields.typed(&["layer_types"], "a list of names", |value| {
        value.as_array()?.iter().map(Value::as_str).collect::<Option<Vec<_>>>()
    })? {
        let slides = kinds.iter().map(|&kind| kind == "sliding_attention");
        return Ok((window, Some(slides.collect())));
    }
    let period = match fields.usize(&["sliding_window_pattern", "_sliding_window_pattern"])? {
        None if family.starts_with("gemma2") => Some(2),
        None if family.starts_with("gemma3") => Some(6),
        None if family.starts_with("cohere2") || family.starts_with("olmo3") => Some(4),
        period => period.filter(|&period| period > 0),
    };
    if let Some(period) = period {
        let slides = (1..=layers).map(|n| !n.is_multiple_of(period));
        return Ok((window, Some(slides.collect())));
    }
    if let Some(first) = fields.usize(&["max_window_layers"])? {
        return Ok((window, Some((0..layers).map(|n| n >= first).collect())));
    }
    Ok((window, None))
}

fn defaults(file: &JsonFile) -> Result<GenerationDefaults, ModelError> {
    let fields = Fields { file, object: &file.root };
    // Each with the value that says nothing; null does as well.
    let idle = [
        ("begin_suppress_tokens", Value::Array(Vec::new())),
        ("forced_bos_token_id", Value::Null),
        ("forced_eos_token_id", Value::Null),
        ("forced_decoder_ids", Value::Array(Vec::new())),
        ("bad_words_ids", Value::Array(Vec::new())),
        ("sequence_bias", Value::Null),
        ("no_repeat_ngram_size", Value::from(0)),
        ("num_beams", Value::from(1)),
        ("penalty_alpha", Value::from(0)),
    ];
    let says = |name: &str, idle: &Value| {
        let value = &file.root[name];
        !value.is_null() && value != idle && value.as_f64().is_none_or(|value| Some(value) != idle.as_f64())
    };
    let not_honoured = idle.iter().filter(|(name, idle)| says(name, idle)).map(|(name, _)| (*name).to_owned());
    Ok(GenerationDefaults {
        do_sample: fields.bool(&["do_sample"])?,
        temperature: fields.f32(&["temperature"])?,
        top_p: fields.f32(&["top_p"])?,
        top_k: fields.usize(&["top_k"])?.map(|k| k.try_into().unwrap_or(u32::MAX)),
        min_p: fields.f32(&["min_p"])?,
        repetition_penalty: fields.f32(&["repetition_penalty"])?,
        max_new_tokens: fields.usize(&["max_new_tokens"])?,
        suppress_tokens: fields.ids("suppress_tokens")?,
        not_honoured: not_honoured.collect(),
    })
}
