//! Raw flags → a validated `ServeConfig`, once. clap reads the environment (`RILL_*`); nothing else here does, and
//! nothing below asks again.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use axum::http::HeaderValue;
use rill_models::Pooling;

use crate::adapters::AdapterLimits;
use crate::app::{AppOptions, CorsPolicy};
use crate::auth::ApiKeys;
use crate::body::BodyLimits;
use crate::cli::serve::ServeFlags;
use crate::event_stream::KEEP_ALIVE;
use crate::flag_values::{Device, ReasoningParser};
use crate::listen::ListenLimits;
use crate::machine::Machine;
use crate::sampling_defaults::GenerationConfig;
use crate::tools::ToolFormat;

/// Request bodies arrive within this.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// Request heads arrive within this; also how long an idle connection is kept.
const HEAD_TIME_MAX: Duration = Duration::from_secs(60);
/// A client that takes no byte for this long is cut off.
const WRITE_STALL_MAX: Duration = Duration::from_secs(60);

/// A flag's value makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}: {reason}")]
pub struct ConfigError {
    flag: &'static str,
    reason: String,
}

impl ConfigError {
    pub fn new(flag: &'static str, reason: String) -> ConfigError {
        ConfigError { flag, reason }
    }
}

/// Everything `rill serve` was told, checked.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Path, hub repository, or rill's default model.
    pub model: String,
    pub draft_model: Option<String>,
    /// Where to look for it.
    pub source: rill_models::SourceOptions,
    /// Empty: the model's own name.
    pub served_names: Vec<String>,
    pub address: SocketAddr,
    /// `None`: metrics are at `address`.
    pub metrics_address: Option<SocketAddr>,
    pub threads: usize,
    /// What weights, cache and activations may take together, on the CPU.
    pub memory_bytes: u64,
    pub engine: EngineLimits,
    pub app: AppOptions,
    pub listen: ListenLimits,
    pub drain_time_max: Duration,
    /// In place of the model's own.
    pub chat_template: Option<PathBuf>,
    pub device: Device,
    /// `None`: the fastest the processor has.
    pub isa: Option<rill_models::Isa>,
    /// Above 0 and up to 1.
    pub gpu_memory_utilization: f64,
    pub kv_dtype: rill_models::KvDtype,
    pub preallocate: bool,
    pub cuda_graphs: bool,
    pub row_dtype: Option<rill_models::RowDtype>,
    pub runner: rill_models::Runner,
    pub quantize: Option<rill_models::Quantize>,
    pub generation_config: GenerationConfig,
    pub tool_call_parser: Option<ToolFormat>,
    pub reasoning_parser: Option<ReasoningParser>,
    /// `None`: as the model's files say.
    pub pooling: Option<Pooling>,
    /// LoRA adapters to load at start, by name.
    pub lora: Vec<(String, PathBuf)>,
    pub lora_limits: AdapterLimits,
}

/// What the engine may use; sizes that depend on the model are worked out when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineLimits {
    pub running_max: usize,
    pub queue_max: usize,
    pub queue_tokens_max: usize,
    pub queue_wait_ms_max: Option<u64>,
    pub batch_tokens_max: usize,
    pub block_size: usize,
    pub kv_cache_bytes: KvCacheBytes,
    pub prefix_caching: bool,
    pub drafts_max: usize,
    /// Where evicted blocks are kept, and how many bytes of them.
    pub spill: Option<(PathBuf, u64)>,
}

/// Memory for keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCacheBytes {
    Exactly(u64),
    /// A quarter of what this many available bytes are, or less if no request mix could use it.
    QuarterOf(u64),
}

impl ServeConfig {
    pub fn new(flags: ServeFlags, machine: &Machine) -> Result<Self, ConfigError> {
        let at_least_one = |flag: &'static str, value: usize, high: usize| {
            if (1..=high).contains(&value) {
                Ok(value)
            } else {
                Err(ConfigError { flag, reason: format!("must be between 1 and {high}, not {value}") })
            }
        };
        let running_max = at_least_one("max-running", flags.max_running, 4096)?;
        let batch_tokens_max = at_least_one("max-batch-tokens", flags.max_batch_tokens, 1 << 20)?;
        if batch_tokens_max < running_max {
            return Err(ConfigError {
                flag: "max-batch-tokens",
                reason: format!("must be at least --max-running, {running_max}, not {batch_tokens_max}"),
            });
        }
        let memory_bytes = match flags.memory.as_deref() {
            Some(text) => bytes("memory", text)?,
            None => machine.available_bytes,
        };
        let kv_cache_bytes = match flags.kv_cache_memory.as_deref() {
            Some(text) => KvCacheBytes::Exactly(bytes("kv-cache-memory", text)?),
            None => KvCacheBytes::QuarterOf(memory_bytes),
        };
        let body_bytes_max = bytes("max-body", &flags.max_body)?;
        let body_bytes_max = usize::try_from(body_bytes_max)
            .ok()
            .filter(|bytes| (1024..=1 << 30).contains(bytes))
            .ok_or_else(|| ConfigError {
                flag: "max-body",
                reason: format!("must be between 1KiB and 1GiB, not {}", flags.max_body),
            })?;
        let gpu_memory_utilization = flags.gpu_memory_utilization;
        if !(gpu_memory_utilization > 0.0 && gpu_memory_utilization <= 1.0) {
            return Err(ConfigError {
                flag: "gpu-memory-utilization",
                reason: format!("must be above 0 and up to 1, not {gpu_memory_utilization}"),
            });
        }
        if let Some(key) = flags.api_key.iter().find(|key| key.trim().is_empty()) {
            return Err(ConfigError { flag: "api-key", reason: format!("must not be empty, as {key:?} is") });
        }
        let keys: Vec<String> = flags.api_key.iter().map(|key| key.trim().to_owned()).collect();
        let keys = ApiKeys::open(&keys, flags.api_key_file.as_deref())
            .map_err(|reason| ConfigError { flag: "api-key-file", reason })?;
        if let Some(name) = flags.served_model_name.iter().find(|name| name.trim().is_empty()) {
            return Err(ConfigError {
                flag: "served-model-name",
                reason: format!("must not be empty, as {name:?} is"),
            });
        }
        let host = host("host", &flags.host)?;
        let metrics_address = match (flags.metrics_port, flags.metrics_host.as_deref()) {
            (Some(port), Some(text)) => Some(SocketAddr::new(self::host("metrics-host", text)?, port)),
            (Some(port), None) => Some(SocketAddr::new(host, port)),
            (None, None) => None,
            (None, Some(_)) => {
                return Err(ConfigError { flag: "metrics-host", reason: "needs --metrics-port".to_owned() });
            }
        };
        if flags.kv_spill_path.is_some() && flags.no_prefix_caching {
            let reason = "keeps what the prefix cache evicts, and --no-prefix-caching turns that off".to_owned();
            return Err(ConfigError { flag: "kv-spill-path", reason });
        }
        let spill_bytes = bytes("kv-spill-size", &flags.kv_spill_size)?;
        let spill = flags.kv_spill_path.map(|path| (path, spill_bytes));
        Ok(ServeConfig {
            model: flags.model,
            draft_model: flags.draft_model,
            source: flags.source.options(),
            served_names: flags.served_model_name,
            address: SocketAddr::new(host, flags.port),
            memory_bytes,
            metrics_address,
            threads: at_least_one("threads", flags.threads.unwrap_or(machine.cores), 1024)?,
            engine: EngineLimits {
                running_max,
                queue_max: at_least_one("max-queue", flags.max_queue, 1 << 20)?,
                queue_tokens_max: at_least_one("max-queue-tokens", flags.max_queue_tokens, 1 << 40)?,
                queue_wait_ms_max: flags.max_queue_wait,
                batch_tokens_max,
                block_size: at_least_one("block-size", flags.block_size, 1024)?,
                kv_cache_bytes,
                prefix_caching: !flags.no_prefix_caching,
                drafts_max: flags.draft_tokens,
                spill,
            },
            app: AppOptions {
                keys,
                body: BodyLimits { bytes_max: body_bytes_max, time_max: BODY_TIME_MAX },
                cors: cors(&flags.cors_origin)?,
                keep_alive: KEEP_ALIVE,
                trust_request_chat_template: flags.trust_request_chat_template,
                debug_endpoints: flags.debug_endpoints,
            },
            listen: ListenLimits {
                connections_max: at_least_one("max-connections", flags.max_connections, 1 << 20)?,
                head_time_max: HEAD_TIME_MAX,
                write_stall_max: WRITE_STALL_MAX,
            },
            drain_time_max: Duration::from_secs(flags.drain_timeout),
            chat_template: flags.chat_template,
            device: flags.device,
            isa: flags.isa.instructions()?,
            gpu_memory_utilization,
            kv_dtype: flags.kv_cache_dtype.into(),
            preallocate: flags.preallocate_kv_cache,
            cuda_graphs: flags.cuda_graphs,
            row_dtype: flags.dtype.row_dtype(),
            runner: flags.runner.into(),
            quantize: flags.quantize.map(Into::into),
            generation_config: flags.generation_config,
            tool_call_parser: flags.tool_call_parser,
            reasoning_parser: flags.reasoning_parser,
            pooling: flags.pooling.map(Pooling::from),
            lora: flags.lora.iter().map(|text| named_path(text)).collect::<Result<_, _>>()?,
            lora_limits: AdapterLimits {
                count_max: at_least_one("max-loras", flags.max_loras, 4096)?,
                rank_max: at_least_one("max-lora-rank", flags.max_lora_rank, 4096)?,
                at_run_time: flags.enable_runtime_lora,
            },
        })
    }
}

impl EngineLimits {
    /// KV-cache blocks for a model of `bytes_per_token` and `context_len` tokens; `device_free` bytes are left on a
    /// device with memory of its own, of which a tenth stays free for activations.
    pub fn blocks(
        &self,
        bytes_per_token: usize,
        context_len: usize,
        device_free: Option<usize>,
    ) -> Result<usize, ConfigError> {
        let bytes_per_block = (bytes_per_token * self.block_size).max(1) as u64;
        let bytes = match self.kv_cache_bytes {
            KvCacheBytes::Exactly(bytes) => bytes,
            KvCacheBytes::QuarterOf(available) => {
                let blocks_of_all = (context_len.div_ceil(self.block_size) * self.running_max) as u64;
                let share = device_free.map_or(available / 4, |free| (free - free / 10) as u64);
                share.min(blocks_of_all * bytes_per_block)
            }
        };
        match usize::try_from(bytes / bytes_per_block) {
            Ok(blocks) if blocks >= 1 => Ok(blocks),
            _ => Err(ConfigError {
                flag: "kv-cache-memory",
                reason: format!(
                    "{bytes} bytes hold no block of {} tokens, which takes {bytes_per_block} bytes",
                    self.block_size
                ),
            }),
        }
    }
}

/// `NAME=PATH`.
fn named_path(text: &str) -> Result<(String, PathBuf), ConfigError> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.to_owned(), PathBuf::from(path))),
        _ => Err(ConfigError { flag: "lora", reason: format!("must be NAME=PATH, not {text}") }),
    }
}

fn cors(origins: &[String]) -> Result<CorsPolicy, ConfigError> {
    if origins.is_empty() {
        return Ok(CorsPolicy::Local);
    }
    if origins.iter().any(|origin| origin == "*") {
        return Ok(CorsPolicy::Any);
    }
    origins
        .iter()
        .map(|origin| match HeaderValue::from_str(origin) {
            Ok(value) if origin.contains("://") && !origin.ends_with('/') => Ok(value),
            _ => Err(ConfigError {
                flag: "cors-origin",
                reason: format!("must be `*` or an origin such as `https://app.example`, not {origin}"),
            }),
        })
        .collect::<Result<_, _>>()
        .map(CorsPolicy::Only)
}

fn host(flag: &'static str, text: &str) -> Result<IpAddr, ConfigError> {
    match text {
        "localhost" => Ok(IpAddr::from([127, 0, 0, 1])),
        other => other.parse().map_err(|_| ConfigError {
            flag,
            reason: format!("must be an IP address such as 127.0.0.1 or 0.0.0.0, not {other}"),
        }),
    }
}

/// `512`, `64KiB`, `2GiB`, `1.5G`: binary units, with or without the `iB`.
fn bytes(flag: &'static str, text: &str) -> Result<u64, ConfigError> {
    let wrong = || ConfigError { flag, reason: format!("must be a size such as 512MiB or 2GiB, not {text}") };
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = number * (1u64 << shift) as f64;
    if !(1.0..=(1u64 << 50) as f64).contains(&bytes) {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
