//! `rill serve` from configuration to exit: bind, load, answer, drain.

use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rill_engine::spill::{DiskTier, SpillError, SpillTier};
use rill_engine::{Engine, EngineConfig, EngineHandle, Extras, ModelRunner, Runner};
use rill_models::{
    AdapterSites, ChatTemplates, FillInTheMiddle, LoadOptions, LoadedModel, MemoryNeeds, ModelError, ModelFiles,
    OpenDevice, Pooling,
};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tracing_subscriber::EnvFilter;

use crate::adapters::{AdapterError, Adapters};
use crate::app::{AppState, Serving, metrics_router, router, unix_seconds};
use crate::chat_template::{ChatTemplate, TemplateError};
use crate::cli::serve::ServeFlags;
use crate::config::{ConfigError, KvCacheBytes, Machine, ReasoningParser, ServeConfig};
use crate::draft_model;
use crate::fetch_progress::TerminalProgress;
use crate::grammars::Grammars;
use crate::listen::{self, ListenLimits};
use crate::memory_plan::{self, DoesNotFit};
use crate::prompt::PromptEncoder;
use crate::reasoning::ReasoningFormat;
use crate::sampling_defaults::{GenerationConfig, SamplingDefaults};
use crate::tools::ToolFormat;

/// The network needs little; the cores belong to the model.
const NETWORK_THREADS: usize = 2;
/// Threads that tokenise long prompts.
const BLOCKING_THREADS_MAX: usize = 4;
/// Scrapers and probes are few.
const METRICS_CONNECTIONS_MAX: usize = 64;
/// For responses to reach clients after the last has been written, and for the engine thread to end.
const CLOSING_TIME_MAX: Duration = Duration::from_secs(5);

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("--log: {0}")]
    Log(String),
    #[error("cannot listen on {address}: {error}")]
    Listen { address: SocketAddr, error: std::io::Error },
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Memory(#[from] DoesNotFit),
    #[error("the model's own sampling parameters: {0}; --generation-config vllm leaves them all out")]
    Sampling(String),
    #[error("--chat-template {path}: {reason}")]
    TemplateFile { path: String, reason: String },
    #[error(transparent)]
    Engine(#[from] rill_engine::StartError),
    #[error("--lora {name}={path}: {error}")]
    Adapter { name: String, path: String, error: AdapterError },
    #[error("--kv-spill-path: {0}")]
    Spill(#[from] SpillError),
    #[error("loading the model failed; see the log")]
    LoaderDied,
}

/// Serves until a signal and everything under way is done.
pub fn serve(flags: ServeFlags) -> Result<(), StartError> {
    let filter = EnvFilter::try_new(&flags.log).map_err(|error| StartError::Log(error.to_string()))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let mut config = ServeConfig::new(flags, &Machine::detect())?;
    config.listen.connections_max = listen::allowed_connections(config.listen.connections_max);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(NETWORK_THREADS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_name("rill-http")
        .enable_all()
        .build()?;
    let result = runtime.block_on(run(config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn run(config: ServeConfig) -> Result<(), StartError> {
    let mut signals = Signals::new()?;
    let (listener, address) = bind(config.address).await?;
    let state = AppState::new(config.app.clone());
    let (stop, stopping) = watch::channel(false);
    let with_metrics = config.metrics_address.is_none();
    let mut listening = JoinSet::new();
    let routes = router(state.clone(), with_metrics);
    listening.spawn(listen::serve(listener, routes, config.listen, stopping.clone()));
    let mut metrics_address = None;
    if let Some(wanted) = config.metrics_address {
        let (listener, bound) = bind(wanted).await?;
        metrics_address = Some(bound);
        let limits = ListenLimits { connections_max: METRICS_CONNECTIONS_MAX, ..config.listen };
        listening.spawn(listen::serve(listener, metrics_router(state.clone()), limits, stopping));
    }
    tokio::spawn(config.app.keys.clone().watch());

    // Answers probes while the model loads.
    let loading = load_on_own_thread(config.clone())?;
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(|_| StartError::LoaderDied)??,
        () = signals.next() => return Ok(()),
    };
    let engine = loaded.serving.engine.clone();
    let banner = loaded.banner(&config, address, metrics_address);
    state.serve(loaded.serving);
    print!("{banner}");
    std::io::stdout().flush()?;

    signals.next().await;
    tokio::spawn(async move {
        signals.next().await;
        eprintln!("rill: stopped at once");
        std::process::exit(1);
    });
    drain(&config, &state, &engine).await;
    // Nobody listens only if the listener has ended already.
    let _ = stop.send(true);
    bounded(CLOSING_TIME_MAX, "connections are still open", listening.join_all()).await;
    engine.shutdown();
    bounded(CLOSING_TIME_MAX, "the engine is still running", engine.stopped()).await;
    Ok(())
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let listener = TcpListener::bind(address).await.map_err(|error| StartError::Listen { address, error })?;
    let bound = listener.local_addr()?;
    Ok((listener, bound))
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

/// Refuses new work and waits for what is under way, up to the timeout.
async fn drain(config: &ServeConfig, state: &AppState, engine: &EngineHandle) {
    state.drain().start();
    engine.drain();
    let under_way = state.drain().in_flight();
    tracing::info!(under_way, timeout_s = config.drain_time_max.as_secs(), "draining");
    if tokio::time::timeout(config.drain_time_max, state.drain().idle()).await.is_err() {
        tracing::warn!(unfinished = state.drain().in_flight(), "the drain timeout is over");
        // Ends each stream with an error that says so.
        engine.shutdown();
        bounded(CLOSING_TIME_MAX, "streams are still open", state.drain().idle()).await;
    }
}

async fn bounded(time_max: Duration, otherwise: &str, done: impl Future) {
    if tokio::time::timeout(time_max, done).await.is_err() {
        tracing::warn!("{otherwise}");
    }
}

/// SIGTERM and SIGINT, which mean the same.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// A model ready to answer, and what to say about it.
struct Loaded {
    serving: Serving,
    description: String,
    kv_bytes: usize,
}

fn load_on_own_thread(config: ServeConfig) -> std::io::Result<oneshot::Receiver<Result<Loaded, StartError>>> {
    let (done, loading) = oneshot::channel();
    std::thread::Builder::new().name("rill-load".to_owned()).spawn(move || {
        // Nobody waits any more if a signal came first.
        let _ = done.send(load(&config));
    })?;
    Ok(loading)
}

fn load(config: &ServeConfig) -> Result<Loaded, StartError> {
    let files = rill_models::resolve(&config.model, &config.source, &mut TerminalProgress::default())?;
    let options = LoadOptions {
        threads: config.threads,
        device: config.device.0,
        isa: config.isa,
        gpu_memory_utilization: config.gpu_memory_utilization,
        kv_dtype: config.kv_dtype,
        cuda_graphs: config.cuda_graphs,
        row_dtype: config.row_dtype,
        runner: config.runner,
        quantize: config.quantize,
    };
    let device = OpenDevice::new(&options)?;
    let mut limits = config.engine.clone();
    if device.is_cpu() {
        let needs = MemoryNeeds::of(&files, config.kv_dtype)?;
        let bytes = memory_plan::kv_cache_bytes(&needs, &limits, config.quantize, config.memory_bytes)?;
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
    let draft = match &config.draft_model {
        Some(spec) => Some(draft_model::load(spec, &config.source, &options, (&tokenizer, shape.vocab_size))?),
        None => None,
    };
    let kv_bytes_per_token =
        shape.kv_bytes_per_token + draft.as_ref().map_or(0, |draft| draft.model.shape().kv_bytes_per_token);
    let num_blocks = limits.blocks(kv_bytes_per_token, shape.context_len, model.device_memory_free())?;
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
        max_drafts: limits.drafts_max,
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
            Some(ReasoningParser::None) => None,
            Some(ReasoningParser::Think) => Some(ReasoningFormat::Think),
            Some(ReasoningParser::Mistral) => Some(ReasoningFormat::Mistral),
            Some(ReasoningParser::Thought) => Some(ReasoningFormat::Thought),
            Some(ReasoningParser::Seed) => Some(ReasoningFormat::Seed),
            Some(ReasoningParser::Cohere) => Some(ReasoningFormat::Cohere),
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

/// The adapters named on the command line. Without a place for any, what would load them is refused.
fn adapters(config: &ServeConfig, sites: Option<AdapterSites>, names: &[String]) -> Result<Adapters, StartError> {
    if sites.is_none() && config.lora_limits.at_run_time {
        return Err(ConfigError::new("enable-runtime-lora", AdapterError::Device.to_string()).into());
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

fn url(address: SocketAddr) -> String {
    let host = if address.ip().is_unspecified() { "127.0.0.1".to_owned() } else { address.ip().to_string() };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    format!("http://{host}:{}", address.port())
}

impl Loaded {
    fn banner(&self, config: &ServeConfig, address: SocketAddr, metrics_address: Option<SocketAddr>) -> String {
        let engine = self.serving.engine.config();
        let url = url(address);
        let metrics = metrics_address
            .map(|address| format!("  metrics   {}/metrics\n", self::url(address)))
            .unwrap_or_default();
        let key = if !config.app.keys.required() { "" } else { "-H \"Authorization: Bearer $RILL_API_KEY\" " };
        let (path, body) = match self.serving.template {
            Some(_) => {
                ("chat/completions", r#"{"messages":[{"role":"user","content":"Hello!"}],"max_tokens":64}"#)
            }
            None => ("completions", r#"{"prompt":"Once upon a time","max_tokens":64}"#),
        };
        format!(
            "rill {version}\n  model     {name}\n            {description}\n  context   {context} tokens\n  KV cache  {tokens} tokens in {blocks} blocks \
             of {block_size} ({mib} MiB)\n  address   {url}\n{metrics}\nTry it in a browser, or:\n  curl {url}/v1/{path} -H 'Content-Type: application/json' {key}-d '{body}'\n\n",
            version = env!("CARGO_PKG_VERSION"),
            name = self.serving.names.join(", "),
            description = self.description,
            context = engine.context_len,
            tokens = engine.capacity_tokens(),
            blocks = engine.num_blocks,
            block_size = engine.block_size,
            mib = self.kv_bytes >> 20,
        )
    }
}
