//! One description of a decoder's shape and habits for all architectures, whichever format it came in.

mod from_gguf;
mod from_json;
mod pooling;
mod templates;

use std::collections::BTreeMap;

use crate::FillInTheMiddle;
use crate::ModelError;
pub(crate) use from_gguf::turns_neighbours as turns_neighbours_in_gguf;
pub(crate) use from_json::{read_json, turns_neighbours as turns_neighbours_on_hub};
pub use pooling::Pooling;
pub use rill_kernels::Activation;

/// What a model file says about the model. Sizes are in elements, lengths in tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// As the file spells it: `llama` (GGUF `general.architecture`) or `LlamaForCausalLM` (config.json
    /// `architectures`). The registry knows both.
    pub architecture: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub layers: usize,
    /// Layers that keep keys and values of every token; recurrences and short convolutions keep a state of one size.
    pub attention_layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    /// Longest sequence the model was made for.
    pub context_len: usize,
    pub norm_eps: f32,
    /// Added to every norm weight: 1 where the file stores `w` of a `(1 + w)` norm, else 0.
    pub norm_weight_offset: f32,
    pub rope: RopeConfig,
    /// How layers that slide turn, where they differ.
    pub sliding_rope: Option<RopeConfig>,
    /// Which layers turn queries and keys at all, one entry a layer; `None`: all of them.
    pub rope_layers: Option<Vec<bool>>,
    /// Positions have embeddings of their own, `context_len` of them.
    pub learned_positions: bool,
    /// Attention and feed-forward read the same residual stream.
    pub parallel_residual: bool,
    /// Where keys and values come from one narrow vector a token.
    pub latent: Option<LatentConfig>,
    /// Where some layers are mixtures of experts.
    pub experts: Option<ExpertsConfig>,
    /// The output projection is the embedding table; `None`: where the weights hold no other.
    pub tie_embeddings: Option<bool>,
    pub activation: Activation,
    /// A token sees at most this many, itself included, in layers that slide.
    pub sliding_window: Option<usize>,
    /// Which layers slide, one entry a layer; `None`: all of them, if there is a window.
    pub sliding_layers: Option<Vec<bool>>,
    pub qkv_bias: bool,
    pub attention_output_bias: bool,
    pub mlp_bias: bool,
    /// Factor on `q · k`; `None`: `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f32>,
    /// Factor on the embeddings.
    pub embedding_scale: Option<f32>,
    /// Factor on each sub-layer's output before it joins the residual stream.
    pub residual_scale: Option<f32>,
    /// Factor on the logits.
    pub logit_scale: Option<f32>,
    /// `cap * tanh(x / cap)` over attention scores.
    pub attention_softcap: Option<f32>,
    /// `cap * tanh(x / cap)` over the logits.
    pub final_logit_softcap: Option<f32>,
    pub bos_token_id: Option<u32>,
    pub pad_token_id: Option<u32>,
    /// Every token that ends a turn or a text, without repeats, the main one first.
    pub eos_token_ids: Vec<u32>,
    pub chat_template: Option<ChatTemplates>,
    pub generation: GenerationDefaults,
    /// How hidden states become an embedding; `None`: the files do not say.
    pub pooling: Option<Pooling>,
    /// Where the file names these tokens itself.
    pub fill_in_the_middle: Option<FillInTheMiddle>,
}

/// Multi-head latent attention. Of a head's dimensions, the rope's `dimension_count` turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatentConfig {
    /// Width queries are narrowed to on their way; `None`: they are not.
    pub query_rank: Option<usize>,
    /// Width of the vector keys and values come from.
    pub kv_rank: usize,
    /// Dimensions of a head's values.
    pub value_dim: usize,
}

/// How a router's logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    Softmax,
    /// Each on its own.
    Sigmoid,
}

/// Sparse mixtures of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsConfig {
    pub count: usize,
    /// How many each token picks.
    pub per_token: usize,
    /// Width of one expert.
    pub intermediate_size: usize,
    /// The weights of a token's experts add up to one.
    pub normalise: bool,
    /// Width of an expert every token goes through.
    pub shared_size: Option<usize>,
    pub routing: Routing,
    /// Number of groups experts are in, and how many of them a token picks from.
    pub groups: Option<(usize, usize)>,
    /// Factor on the weights of a token's experts.
    pub scale: f32,
}

impl ExpertsConfig {
    /// Weights that are a softmax over all experts.
    pub(crate) const fn softmax(count: usize, per_token: usize, intermediate_size: usize) -> ExpertsConfig {
        ExpertsConfig {
            count,
            per_token,
            intermediate_size,
            normalise: false,
            shared_size: None,
            routing: Routing::Softmax,
            groups: None,
            scale: 1.0,
        }
    }
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    pub base: f32,
    /// Leading dimensions of a head that turn; even, at most `head_dim`.
    pub dimension_count: usize,
    pub style: RopeStyle,
    pub scaling: RopeScaling,
}

/// Which two elements of a head form a pair that turns together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `2i` and `2i + 1` (GGUF files of the llama family, whose q and k rows are permuted for it).
    Interleaved,
    /// `i` and `i + dimension_count / 2`.
    Half,
}

/// How positions beyond the original context are brought back into it.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f32,
    },
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: usize,
    },
    Yarn {
        factor: f32,
        original_context: usize,
        /// Factor on cos and sin; `None`: `0.1 * ln(factor) + 1`.
        attention_factor: Option<f32>,
        beta_fast: f32,
        beta_slow: f32,
    },
    Dynamic {
        factor: f32,
        original_context: usize,
    },
    LongRope {
        /// `dimension_count / 2` divisors of the inverse frequencies, for contexts within the original one.
        short_factors: Vec<f32>,
        /// The same, for longer contexts.
        long_factors: Vec<f32>,
        original_context: usize,
        /// Factor on cos and sin; `None`: from the stretch.
        attention_factor: Option<f32>,
        /// Full context over original one.
        stretch: f32,
    },
    /// `dimension_count / 2` divisors of the inverse frequencies (GGUF `rope_freqs.weight`; llama 3's scaling,
    /// worked out by the converter).
    FreqFactors(Vec<f32>),
}

/// A model's own chat templates (Jinja source).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatTemplates {
    pub default: Option<String>,
    /// Templates for a purpose, such as `tool_use`.
    pub named: BTreeMap<String, String>,
}

/// Sampling the model's makers suggest; `None` where they say nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<usize>,
    pub suppress_tokens: Vec<u32>,
    /// Settings that change what is generated in ways rill does not follow.
    pub not_honoured: Vec<String>,
}

/// No model we could run has more, and every product of two of them fits 64 bits.
const SIZE_MAX: usize = 1 << 28;
/// More layers than any published model has.
const LAYERS_MAX: usize = 1 << 14;
/// More experts than any published model has.
const EXPERTS_MAX: usize = 1 << 12;

impl ModelConfig {
    /// Whether `layer` sees its window only.
    pub(crate) fn slides(&self, layer: usize) -> bool {
        self.sliding_window.is_some() && self.sliding_layers.as_ref().is_none_or(|layers| layers[layer])
    }

    /// Checks what every architecture relies on. `name` turns a field into the spelling of the file, for messages.
    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocabulary size", self.vocab_size),
            ("hidden size", self.hidden_size),
            ("number of layers", self.layers),
            ("number of attention heads", self.heads),
            ("number of key/value heads", self.kv_heads),
            ("head dimension", self.head_dim),
            ("feed-forward size", self.intermediate_size),
            ("context length", self.context_len),
        ];
        for (what, value) in sizes {
            if value == 0 || value > SIZE_MAX {
                return Err(format!("the {what} is {value}; it must be 1 to {SIZE_MAX}"));
            }
        }
        if self.layers > LAYERS_MAX {
            return Err(format!("the number of layers is {}; it must be 1 to {LAYERS_MAX}", self.layers));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} attention heads are not a multiple of {} key/value heads",
                self.heads, self.kv_heads
            ));
        }
        let turning = self.rope.dimension_count;
        if !turning.is_multiple_of(2) || turning > self.head_dim {
            return Err(format!(
                "the rope dimension count is {turning}; it must be even and at most the head dimension {}",
                self.head_dim
            ));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(format!("the norm epsilon is {}; it must be between 0 and 1", self.norm_eps));
        }
        if !(self.rope.base > 0.0 && self.rope.base.is_finite()) {
            return Err(format!("the rope base is {}; it must be above 0", self.rope.base));
        }
        for rope in [Some(&self.rope), self.sliding_rope.as_ref()].into_iter().flatten() {
            rope.check()?;
        }
        if let Some(experts) = &self.experts {
            experts.check()?;
        }
        if let Some(LatentConfig { query_rank, kv_rank, value_dim }) = self.latent {
            let sizes = [query_rank.unwrap_or(1), kv_rank, value_dim];
            if sizes.iter().any(|&size| size == 0 || size > SIZE_MAX) || value_dim > self.head_dim || turning == 0
            {
                return Err(format!(
                    "latent attention of ranks {query_rank:?} and {kv_rank}, with {value_dim} of {} dimensions for \
                     values, {turning} of which turn, is not possible",
                    self.head_dim
                ));
            }
        }
        if self.sliding_window == Some(0) {
            return Err("the sliding window is 0; it must be at least 1".to_owned());
        }
        let patterns = [("sliding-window", &self.sliding_layers), ("rotation", &self.rope_layers)];
        for (what, pattern) in patterns {
            if let Some(layers) = pattern
                && layers.len() != self.layers
            {
                return Err(format!(
                    "the {what} pattern names {} layers, the model has {}",
                    layers.len(),
                    self.layers
                ));
            }
        }
        if let Some(id) = self.eos_token_ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(format!("the end-of-text id {id} is outside the vocabulary of {}", self.vocab_size));
        }
        Ok(())
    }

    fn checked(self, path: &str) -> Result<ModelConfig, ModelError> {
        match self.check() {
            Ok(()) => Ok(self),
            Err(reason) => Err(ModelError::Format { path: path.to_owned(), reason }),
        }
    }
}

impl ExpertsConfig {
    fn check(&self) -> Result<(), String> {
        let ExpertsConfig { count, per_token, intermediate_size, .. } = *self;
        if count == 0 || count > EXPERTS_MAX || per_token == 0 || per_token > count {
            return Err(format!(
                "{per_token} of {count} experts a token; it must be 1 or more of at most {EXPERTS_MAX}"
            ));
        }
        if let Some((groups, kept)) = self.groups
            && (groups == 0
                || kept == 0
                || kept > groups
                || !count.is_multiple_of(groups)
                || per_token > count / groups * kept)
        {
            return Err(format!("{per_token} of {count} experts from {kept} of {groups} groups cannot be picked"));
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return Err(format!("the factor on the experts' weights is {}; it must be above 0", self.scale));
        }
        let sizes = [intermediate_size, self.shared_size.unwrap_or(1)];
        match sizes.iter().find(|&&size| size == 0 || size > SIZE_MAX) {
            Some(size) => Err(format!("experts are {size} wide; it must be 1 to {SIZE_MAX}")),
            None => Ok(()),
        }
    }
}

impl RopeConfig {
    fn check(&self) -> Result<(), String> {
        let positive = |what: &str, value: f32| {
            if value > 0.0 && value.is_finite() {
                Ok(())
            } else {
                Err(format!("the rope scaling's {what} is {value}; it must be above 0"))
            }
        };
        let factors = |what: &str, values: &[f32]| {
            if values.len() != self.dimension_count / 2 {
                return Err(format!(
                    "the rope scaling's {what} holds {} values, but {} dimensions turn in pairs",
                    values.len(),
                    self.dimension_count
                ));
            }
            values.iter().try_for_each(|&value| positive(what, value))
        };
        let context = |tokens: usize| {
            if tokens == 0 {
                return Err("the rope scaling's original context length is 0".to_owned());
            }
            Ok(())
        };
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Dynamic { factor, original_context } => {
                context(*original_context)?;
                positive("factor", *factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                context(*original_context)?;
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                if high_freq_factor > low_freq_factor {
                    return Ok(());
                }
                Err(format!(
                    "the rope scaling's high_freq_factor {high_freq_factor} must be above its low_freq_factor {low_freq_factor}"
                ))
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
                context(*original_context)?;
                positive("factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)
            }
            RopeScaling::LongRope { short_factors, long_factors, original_context, .. } => {
                context(*original_context)?;
                factors("short_factor", short_factors)?;
                factors("long_factor", long_factors)
            }
            RopeScaling::FreqFactors(values) => factors("frequency factors", values),
        }
    }
}
