//! `rill perplexity`: its flags as typed.

use std::path::PathBuf;

use clap::Args;

use crate::cli::models::SourceFlags;
use crate::flag_values::{ComputeDtype, IsaChoice, KvCacheDtype, WeightBits};

/// How well a model foresees a text: e to the mean surprise of a token. Windows are read one by one; of each, tokens of
/// the second half are scored, as llama.cpp's tool of that name does it.
#[derive(Debug, Clone, Args)]
pub struct PerplexityFlags {
    /// A .gguf file, a directory with config.json and safetensors, or org/repo[:file-or-quant] on the hub.
    #[arg(long, env = "RILL_MODEL", default_value = rill_models::DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub source: SourceFlags,
    /// The text, in UTF-8.
    #[arg(long)]
    pub file: PathBuf,
    /// Tokens in a window.
    #[arg(long, default_value_t = 512)]
    pub window: usize,
    /// Tokens of a window that are read but not scored [default: half].
    #[arg(long)]
    pub unscored: Option<usize>,
    /// Read no more than this many windows.
    #[arg(long)]
    pub max_windows: Option<usize>,
    /// Compute threads [default: all cores].
    #[arg(long, env = "RILL_THREADS")]
    pub threads: Option<usize>,
    /// Instructions the CPU kernels use.
    #[arg(long, env = "RILL_ISA", value_enum, default_value = "auto")]
    pub isa: IsaChoice,
    /// What activations that meet bf16 weights are rounded to.
    #[arg(long, env = "RILL_DTYPE", value_enum, default_value = "auto")]
    pub dtype: ComputeDtype,
    /// How keys and values are kept.
    #[arg(long, env = "RILL_KV_CACHE_DTYPE", value_enum, default_value = "auto")]
    pub kv_cache_dtype: KvCacheDtype,
    /// Quantise weights that are floats as they are loaded.
    #[arg(long, env = "RILL_QUANTIZE", value_enum)]
    pub quantize: Option<WeightBits>,
}
