//! What `rill serve` was told to serve → a model that answers: files, memory plan, weights, engine, template, adapters.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use rill_engine::spill::{DiskTier, SpillTier};
use rill_engine::{Engine, EngineConfig, Extras, ModelRunner, Runner};
use rill_models::{
    AdapterSites, ChatTemplates, FillInTheMiddle, LoadOptions, LoadedModel, MemoryNeeds, ModelFiles, OpenDevice,
    Pooling,
};
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;

use crate::adapters::{AdapterError, AdapterLimits, Adapters};
use crate::app::unix_seconds;
use crate::chat_template::{ChatTemplate, TemplateError};
use crate::config::{ConfigError, KvCacheBytes, ServeConfig};
use crate::draft_model;
use crate::fetch_progress::TerminalProgress;
use crate::grammars::Grammars;
use crate::memory_plan;
use crate::prompt::PromptEncoder;
use crate::reasoning::ReasoningFormat;
use crate::sampling_defaults::{GenerationConfig, SamplingDefaults};
use crate::serving::Serving;
use crate::start::StartError;
use crate::tools::ToolFormat;

/// A model ready to answer, and what to say about it.
pub struct Loaded {
    pub serving: Serving,
    /// Of the model, in words.
    pub description: String,
    pub kv_bytes: usize,
}

/// Loads on a thread "rill-load"; the answer comes when it is done.
pub fn on_own_thread(config: ServeConfig) -> std::io::Result<oneshot::Receiver<Result<Loaded, StartError>>> {
    let (done, loading) = oneshot::channel();
    std::thread::Builder::new().name("rill-load".to_owned()).spawn(move || {
        // Nobody waits any more if a signal came first.
        let _ = done.send(load(&config));
    })?;
    Ok(loading)
}

fn load(config: &ServeConfig) -> Result<Loaded, StartError> {
    let fetch = |spec: &str| rill_models::resolve(spec, &config.source, &mut TerminalProgress::default());
    let files = fetch(&config.model)?;
    let draft_files = config.draft_model.as_deref().map(fetch).transpose()?;
    let options = LoadOptions {
        threads: config.threads,
        device: config.device.0,
        isa: config.isa,
        gpu_memory_utilization: config.gpu_memory_utilization,
        kv_dtype: config.kv_dtype,
        preallocate: config.preallocate,
        cuda_graphs: config.cuda_graphs,
        row_dtype: config.row_dtype,
        runner: config.runner,
        quantize: config.quantize,
    };
    let device = OpenDevice::new(&options)?;
    let mut limits = config.engine.clone();
    if device.is_cpu() {
        let needs = MemoryNeeds::of(&files, config.kv_dtype)?;
        let of_draft = |files| MemoryNeeds::of(files, config.kv_dtype);
        let draft = draft_files.as_ref().map(of_draft).transpose()?;
        let bytes =
            memory_plan::kv_cache_bytes(&needs, draft.as_ref(), &limits, config.quantize, config.memory_bytes)?;
        limits.kv_cache_bytes = KvCacheBytes::Exactly(bytes);
    }
    let LoadedModel { model, tokenizer, config: model_config, name, description } =
        device.load(&files, &options)?;
    let template = template(config, model_config.chat_template.unwrap_or_default(), &tokenizer)?;

    let names = if config.served_names.is_empty() { vec![name] } else { config.served_names.clone() };
    let adapters = adapters(config, model.adapter_sites().cloned(), &names)?;

    let shape = model.shape().clone();
    let sampling = match config.generation_config {
        GenerationConfig::Auto => {
            SamplingDefaults::of_model(&model_config.generation, shape.vocab_size).map_err(StartError::Sampling)?
        }
        GenerationConfig::Vllm => SamplingDefaults::OPENAI,
    };
    if let Some(words) = sampling.words() {
        tracing::info!("the model's sampling parameters hold where requests set none: {words}");
    }
    let draft = match config.draft_model.as_deref().zip(draft_files.as_ref()) {
        Some((spec, files)) => Some(draft_model::load(spec, files, &options, (&tokenizer, shape.vocab_size))?),
        None => None,
    };
    let kv_bytes_per_token =
        shape.kv_bytes_per_token + draft.as_ref().map_or(0, |draft| draft.model.shape().kv_bytes_per_token);
    let device_free = model.device_memory_free().map(|free| device_bytes_free(free, &adapters)).transpose()?;
    let num_blocks = limits.blocks(kv_bytes_per_token, shape.context_len, device_free)?;
    let capacity = num_blocks * limits.block_size;
    if capacity < shape.context_len {
        tracing::warn!(
            context_tokens = shape.context_len,
            kv_cache_tokens = capacity,
            "the KV cache is smaller than the model's context: requests may be no longer than it"
        );
    }
    let engine_config = EngineConfig {
        block_size: limits.block_size,
        num_blocks,
        context_len: shape.context_len.min(capacity),
        max_batch_tokens: limits.batch_tokens_max,
        max_running: limits.running_max.min(shape.running_max.unwrap_or(usize::MAX)),
        max_waiting: limits.queue_max,
        max_waiting_tokens: limits.queue_tokens_max,
        max_queue_wait_ms: limits.queue_wait_ms_max,
        prefix_caching: limits.prefix_caching,
        // Candle takes a sequence's tokens one by one, so a draft costs what it saves, and a refused one all before it anew.
        max_drafts: if shape.running_max == Some(1) && draft.is_none() { 0 } else { limits.drafts_max },
    };
    let runner = ModelRunner::new(model, &engine_config)?;
    let context_len = engine_config.context_len;
    let draft = match draft {
        Some(draft) => Some(Box::new(ModelRunner::new(draft.model, &engine_config)?) as Box<dyn Runner>),
        None => None,
    };
    let tier = match &limits.spill {
        Some((path, bytes)) => {
            let identity = spill_identity(&files, &description, limits.block_size, config)?;
            let tier = DiskTier::open(path, *bytes, identity, runner.block_bytes())?;
            Some(Box::new(tier) as Box<dyn SpillTier>)
        }
        None => None,
    };
    let engine = Engine::start_with(Box::new(runner), tokenizer.clone(), engine_config, Extras { tier, draft })?;

    let mut hasher = DefaultHasher::new();
    (&names[0], &description, env!("CARGO_PKG_VERSION")).hash(&mut hasher);
    let serving = Serving {
        engine,
        names,
        adapters,
        tool_format: config.tool_call_parser.unwrap_or_else(|| {
            template
                .as_ref()
                .map_or(ToolFormat::Json, |template| ToolFormat::of_template(template.of_request(true).source()))
        }),
        reasoning: match config.reasoning_parser {
            Some(parser) => parser.format(),
            None => template.as_ref().and_then(|template| ReasoningFormat::of_template(template.source())),
        },
        grammars: Arc::new(Grammars::new(tokenizer.clone(), shape.vocab_size, model_config.eos_token_ids.clone())),
        prompts: PromptEncoder::new(tokenizer.clone(), context_len),
        template,
        pooling: config.pooling.unwrap_or(model_config.pooling.unwrap_or(Pooling::Last)),
        fill_in_the_middle: model_config.fill_in_the_middle.or_else(|| FillInTheMiddle::of_vocabulary(&tokenizer)),
        eos_token_ids: model_config.eos_token_ids,
        sampling,
        created_s: unix_seconds(),
        fingerprint: format!("rill_{:016x}", hasher.finish()),
    };
    Ok(Loaded { serving, description, kv_bytes: capacity * kv_bytes_per_token })
}

/// What a device has left for the KV cache: adapters that requests may load find room beside it.
fn device_bytes_free(free: usize, adapters: &Adapters) -> Result<usize, ConfigError> {
    let AdapterLimits { count_max, rank_max, .. } = adapters.limits();
    let to_come = adapters.bytes_to_come();
    if to_come == 0 || to_come < free {
        return Ok(free - to_come);
    }
    let reason = format!(
        "{count_max} adapters of rank {rank_max} may take {to_come} bytes beside the model, and {free} are free on the \
         device: lower --max-loras or --max-lora-rank"
    );
    Err(ConfigError::new("enable-runtime-lora", reason))
}

/// The adapters named on the command line. Without a place for any, what would load them is refused.
fn adapters(config: &ServeConfig, sites: Option<AdapterSites>, names: &[String]) -> Result<Adapters, StartError> {
    if sites.is_none() && config.lora_limits.at_run_time {
        return Err(ConfigError::new("enable-runtime-lora", AdapterError::Model.to_string()).into());
    }
    let adapters = Adapters::new(sites, config.lora_limits, names);
    for (name, path) in &config.lora {
        adapters.load(name, path, false).map_err(|error| StartError::Adapter {
            name: name.clone(),
            path: path.display().to_string(),
            error,
        })?;
    }
    Ok(adapters)
}

/// The operator's template, else the model's. A model's own that does not compile costs chat, not the server.
fn template(
    config: &ServeConfig,
    own: ChatTemplates,
    tokenizer: &Arc<rill_models::Tokenizer>,
) -> Result<Option<ChatTemplate>, StartError> {
    let spelling = |id: Option<u32>| {
        id.map_or_else(String::new, |id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned())
    };
    let compile = |source: &str| -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::new(source, &spelling(tokenizer.bos_token_id()), &spelling(tokenizer.eos_token_id()))
    };
    if let Some(path) = &config.chat_template {
        let failed = |reason: String| StartError::TemplateFile { path: path.display().to_string(), reason };
        let source = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        return compile(&source).map(Some).map_err(|error| failed(error.to_string()));
    }
    // As transformers does it: named templates are for those who name them, but one of them is taken for tools.
    let compiled = own.default.map(|source| {
        let template = compile(&source)?;
        match own.named.get("tool_use") {
            Some(source) => template.with_tool_use(source),
            None => Ok(template),
        }
    });
    match compiled.transpose() {
        Ok(template) => Ok(template),
        Err(error) => {
            tracing::warn!(%error, "chat is off: give a template with --chat-template");
            Ok(None)
        }
    }
}

/// What blocks on disk belong to: another model, cache layout or version of rill has no use for them.
fn spill_identity(
    files: &ModelFiles,
    description: &str,
    block_size: usize,
    config: &ServeConfig,
) -> Result<[u8; 32], StartError> {
    let mut hasher = Sha256::new();
    hasher.update(files.fingerprint()?);
    let layout = (env!("CARGO_PKG_VERSION"), description, block_size, config.kv_dtype, config.row_dtype);
    hasher.update(format!("{layout:?}"));
    Ok(hasher.finalize().into())
}
