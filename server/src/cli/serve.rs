//! `rill serve`: its flags as typed; `config` makes sense of them.

use std::path::PathBuf;

use clap::Args;

use crate::cli::models::SourceFlags;
use crate::flag_values::{
    ComputeDtype, Device, IsaChoice, KvCacheDtype, PoolingFlag, ReasoningParser, RunnerChoice, WeightBits,
};
use crate::sampling_defaults::GenerationConfig;
use crate::tools::ToolFormat;

#[derive(Debug, Clone, Args)]
pub struct ServeFlags {
    /// A .gguf file, a directory with config.json and safetensors, or org/repo[:file-or-quant] on the hub.
    #[arg(long, env = "RILL_MODEL", default_value = rill_models::DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub source: SourceFlags,
    /// Name requests call the model by, instead of its own; several may be given.
    #[arg(long, env = "RILL_SERVED_MODEL_NAME", value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    /// Address to listen on.
    #[arg(long, env = "RILL_HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, env = "RILL_PORT", default_value_t = 8000)]
    pub port: u16,
    /// Compute threads [default: all cores].
    #[arg(long, env = "RILL_THREADS")]
    pub threads: Option<usize>,
    /// Sequences computed at once.
    #[arg(long, env = "RILL_MAX_RUNNING", default_value_t = 64)]
    pub max_running: usize,
    /// Sequences that may wait; more are answered 429.
    #[arg(long, env = "RILL_MAX_QUEUE", default_value_t = 256)]
    pub max_queue: usize,
    /// Prompt tokens that may wait, over all sequences; a request that would exceed them is answered 429, unless nothing
    /// else waits.
    #[arg(long, env = "RILL_MAX_QUEUE_TOKENS", default_value_t = 1 << 20)]
    pub max_queue_tokens: usize,
    /// Milliseconds a request may wait for its first step before it is answered 503 [default: no limit].
    #[arg(long, env = "RILL_MAX_QUEUE_WAIT")]
    pub max_queue_wait: Option<u64>,
    /// Tokens computed in one step, over all sequences.
    #[arg(long, env = "RILL_MAX_BATCH_TOKENS", default_value_t = 256)]
    pub max_batch_tokens: usize,
    /// Tokens in a block of the KV cache.
    #[arg(long, env = "RILL_BLOCK_SIZE", default_value_t = 16)]
    pub block_size: usize,
    /// Memory for the KV cache, such as 2GiB [default: a quarter of what is available, or less if that is of no use].
    #[arg(long, env = "RILL_KV_CACHE_MEMORY")]
    pub kv_cache_memory: Option<String>,
    /// Take the KV cache's memory before serving, not as blocks are used.
    #[arg(long, env = "RILL_PREALLOCATE_KV_CACHE")]
    pub preallocate_kv_cache: bool,
    /// Memory to plan with on the CPU: weights, KV cache and activations [default: what is available].
    #[arg(long, env = "RILL_MEMORY")]
    pub memory: Option<String>,
    /// Compute every prompt anew instead of reusing what earlier ones share with it.
    #[arg(long, env = "RILL_NO_PREFIX_CACHING")]
    pub no_prefix_caching: bool,
    /// Tokens that may be proposed to follow a sequence and checked in one step; 0 proposes none. What is generated does
    /// not depend on it.
    #[arg(long, env = "RILL_DRAFT_TOKENS", default_value_t = 8)]
    pub draft_tokens: usize,
    /// A smaller model of the same vocabulary that proposes them; without one they are looked up in the sequence's own past.
    #[arg(long, env = "RILL_DRAFT_MODEL")]
    pub draft_model: Option<String>,
    /// Directory of a file that keeps KV-cache blocks evicted from memory, also over restarts.
    #[arg(long, env = "RILL_KV_SPILL_PATH")]
    pub kv_spill_path: Option<PathBuf>,
    /// Size of that file, at most.
    #[arg(long, env = "RILL_KV_SPILL_SIZE", default_value = "4GiB", requires = "kv_spill_path")]
    pub kv_spill_size: String,
    /// Answer GET /debug/engine, which tells the engine's queues, blocks and sequences.
    #[arg(long, env = "RILL_DEBUG_ENDPOINTS")]
    pub debug_endpoints: bool,
    /// Key that requests must carry as `Authorization: Bearer KEY`; several may be given.
    #[arg(long, env = "RILL_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_key: Vec<String>,
    /// File of keys, one a line with its name and limits, as `rill keys new NAME` prints them; read again when it changes.
    #[arg(long, env = "RILL_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Answer /metrics, /health and /ready at this port, and /metrics there alone; 0 takes a free one.
    #[arg(long, env = "RILL_METRICS_PORT")]
    pub metrics_port: Option<u16>,
    /// Address of --metrics-port [default: that of --host].
    #[arg(long, env = "RILL_METRICS_HOST")]
    pub metrics_host: Option<String>,
    /// Web origin whose pages may call the API; several may be given, `*` is all [default: pages of this machine].
    #[arg(long, env = "RILL_CORS_ORIGIN", value_delimiter = ',')]
    pub cors_origin: Vec<String>,
    /// Largest request body.
    #[arg(long, env = "RILL_MAX_BODY", default_value = "8MiB")]
    pub max_body: String,
    /// Connections open at once; more wait.
    #[arg(long, env = "RILL_MAX_CONNECTIONS", default_value_t = 4096)]
    pub max_connections: usize,
    /// Seconds that streams have to finish after SIGTERM or SIGINT.
    #[arg(long, env = "RILL_DRAIN_TIMEOUT", default_value_t = 30)]
    pub drain_timeout: u64,
    /// Jinja file to use in place of the model's own chat template.
    #[arg(long, env = "RILL_CHAT_TEMPLATE")]
    pub chat_template: Option<PathBuf>,
    /// Take `chat_template` from requests, too.
    #[arg(long, env = "RILL_TRUST_REQUEST_CHAT_TEMPLATE")]
    pub trust_request_chat_template: bool,
    /// Sampling parameters of requests that leave them out: the model's own (generation_config.json), or the API's.
    #[arg(long, env = "RILL_GENERATION_CONFIG", value_enum, default_value = "auto")]
    pub generation_config: GenerationConfig,
    /// How the model writes tool calls [default: what its chat template shows].
    #[arg(long, env = "RILL_TOOL_CALL_PARSER", value_enum)]
    pub tool_call_parser: Option<ToolFormat>,
    /// How the model marks its thoughts [default: what its chat template shows]; `none` leaves them in the content.
    #[arg(long, env = "RILL_REASONING_PARSER", value_enum)]
    pub reasoning_parser: Option<ReasoningParser>,
    /// What embeddings are made of [default: what the model's files say, or else `last`].
    #[arg(long, env = "RILL_POOLING", value_enum)]
    pub pooling: Option<PoolingFlag>,
    /// LoRA adapter to offer as a model, NAME=PATH: a directory as PEFT saves it or a GGUF file; several may be given.
    #[arg(long, env = "RILL_LORA", value_delimiter = ',')]
    pub lora: Vec<String>,
    /// LoRA adapters in memory at once.
    #[arg(long, env = "RILL_MAX_LORAS", default_value_t = 8)]
    pub max_loras: usize,
    /// Largest rank of a LoRA adapter.
    #[arg(long, env = "RILL_MAX_LORA_RANK", default_value_t = 64)]
    pub max_lora_rank: usize,
    /// Let requests load and unload LoRA adapters: they name files of this machine.
    #[arg(long, env = "RILL_ENABLE_RUNTIME_LORA")]
    pub enable_runtime_lora: bool,
    /// What to log to stderr: error, warn, info, debug, or per module as tracing's filters spell it.
    #[arg(long, env = "RILL_LOG", default_value = "info")]
    pub log: String,
    /// Where to run the model: cpu, cuda, cuda:N, or auto, which is a GPU where there is one that works.
    #[arg(long, env = "RILL_DEVICE", default_value = "auto")]
    pub device: Device,
    /// What computes the model: rill, or candle, which runs one sequence at a time on the CPU; auto takes candle for
    /// architectures that only candle has.
    #[arg(long, env = "RILL_RUNNER", value_enum, default_value = "auto")]
    pub runner: RunnerChoice,
    /// Instructions the CPU kernels use; all give the same tokens.
    #[arg(long, env = "RILL_ISA", value_enum, default_value = "auto")]
    pub isa: IsaChoice,
    /// What activations that meet bf16 weights are rounded to.
    #[arg(long, env = "RILL_DTYPE", value_enum, default_value = "auto")]
    pub dtype: ComputeDtype,
    /// Quantise weights that are floats (bf16, f16, f32) as they are loaded: to 8 bits, or 4 with 8 for embeddings and head.
    #[arg(long, env = "RILL_QUANTIZE", value_enum)]
    pub quantize: Option<WeightBits>,
    /// Share of a GPU's free memory to take, above 0 and up to 1.
    #[arg(long, env = "RILL_GPU_MEMORY_UTILIZATION", default_value_t = 0.9)]
    pub gpu_memory_utilization: f64,
    /// Replay a GPU's launches as CUDA graphs where the same ones come again: fewer calls a step. Not yet tried on a GPU.
    #[arg(long, env = "RILL_CUDA_GRAPHS")]
    pub cuda_graphs: bool,
    /// How keys and values are kept: bf16, or int8, which takes half the memory; on a GPU f16 and fp8 (e4m3), too.
    #[arg(long, env = "RILL_KV_CACHE_DTYPE", value_enum, default_value = "auto")]
    pub kv_cache_dtype: KvCacheDtype,
}
