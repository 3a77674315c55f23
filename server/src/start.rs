//! `rill serve` from configuration to exit: bind, load, answer, drain.

use std::future::Future;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::time::Duration;

use rill_engine::EngineHandle;
use rill_engine::spill::SpillError;
use rill_models::ModelError;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing_subscriber::EnvFilter;

use crate::adapters::AdapterError;
use crate::app::{AppState, metrics_router, router};
use crate::cli::serve::ServeFlags;
use crate::config::{ConfigError, ServeConfig};
use crate::listen::{self, ListenLimits};
use crate::load::{self, Loaded};
use crate::machine::Machine;
use crate::memory_plan::DoesNotFit;

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
    let loading = load::on_own_thread(config.clone())?;
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(|_| StartError::LoaderDied)??,
        () = signals.next() => return Ok(()),
    };
    let engine = loaded.serving.engine.clone();
    let banner = banner(&loaded, &config, address, metrics_address);
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

fn url(address: SocketAddr) -> String {
    let host = if address.ip().is_unspecified() { "127.0.0.1".to_owned() } else { address.ip().to_string() };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    format!("http://{host}:{}", address.port())
}

/// What is printed once requests are answered.
fn banner(
    loaded: &Loaded,
    config: &ServeConfig,
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
) -> String {
    let engine = loaded.serving.engine.config();
    let url = url(address);
    let metrics =
        metrics_address.map(|address| format!("  metrics   {}/metrics\n", self::url(address))).unwrap_or_default();
    let key = if !config.app.keys.required() { "" } else { "-H \"Authorization: Bearer $RILL_API_KEY\" " };
    let (path, body) = match loaded.serving.template {
        Some(_) => ("chat/completions", r#"{"messages":[{"role":"user","content":"Hello!"}],"max_tokens":64}"#),
        None => ("completions", r#"{"prompt":"Once upon a time","max_tokens":64}"#),
    };
    format!(
        "rill {version}\n  model     {name}\n            {description}\n  context   {context} tokens\n  KV cache  {tokens} tokens in {blocks} blocks \
             of {block_size} ({mib} MiB)\n  address   {url}\n{metrics}\nTry it in a browser, or:\n  curl {url}/v1/{path} -H 'Content-Type: application/json' {key}-d '{body}'\n\n",
        version = env!("CARGO_PKG_VERSION"),
        name = loaded.serving.names.join(", "),
        description = loaded.description,
        context = engine.context_len,
        tokens = engine.capacity_tokens(),
        blocks = engine.num_blocks,
        block_size = engine.block_size,
        mib = loaded.kv_bytes >> 20,
    )
}
