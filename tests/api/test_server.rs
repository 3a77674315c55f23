//! A server in this process: the real listener, router and engine over the scripted runner.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rill_engine::{Engine, EngineConfig, EngineHandle};
use rill_models::{FillInTheMiddle, Pooling, Tokenizer};
use rill_server::adapters::{AdapterLimits, Adapters};
use rill_server::app::{AppOptions, AppState, CorsPolicy, metrics, router_with};
use rill_server::auth::ApiKeys;
use rill_server::body::BodyLimits;
use rill_server::chat_template::ChatTemplate;
use rill_server::grammars::Grammars;
use rill_server::listen::{self, ListenLimits};
use rill_server::prompt::PromptEncoder;
use rill_server::reasoning::ReasoningFormat;
use rill_server::sampling_defaults::SamplingDefaults;
use rill_server::serving::Serving;
use rill_server::tools::ToolFormat;
use rill_tests::http::{self, Response};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::scripted_runner::{Knobs, ScriptedRunner};
use crate::tiny_tokenizer::{IM_END, tokenizer};

pub const MODEL: &str = "org/tiny";
pub const BODY_BYTES_MAX: usize = 64 << 10;
pub const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}\
                          {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub struct TestServer {
    pub address: SocketAddr,
    pub state: Arc<AppState>,
    pub engine: EngineHandle,
    pub knobs: Arc<Knobs>,
    pooling: Pooling,
    fill_in_the_middle: Option<FillInTheMiddle>,
    tokenizer: Arc<Tokenizer>,
    stop: watch::Sender<bool>,
    /// Last, so that it is dropped last.
    runtime: Runtime,
}

/// What tests vary.
pub struct Setup {
    pub engine: EngineConfig,
    pub options: AppOptions,
    pub listen: ListenLimits,
    pub template: Option<&'static str>,
    pub pooling: Pooling,
    pub fill_in_the_middle: Option<FillInTheMiddle>,
    pub tokenizer: fn() -> Arc<Tokenizer>,
    /// Leave the model "loading" until `TestServer::load`.
    pub loading: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            engine: EngineConfig {
                block_size: 16,
                num_blocks: 256,
                context_len: 512,
                max_batch_tokens: 64,
                max_running: 8,
                max_waiting: 16,
                ..EngineConfig::default()
            },
            options: AppOptions {
                keys: ApiKeys::default(),
                body: BodyLimits { bytes_max: BODY_BYTES_MAX, time_max: Duration::from_secs(1) },
                cors: CorsPolicy::Local,
                keep_alive: Duration::from_secs(15),
                trust_request_chat_template: false,
                debug_endpoints: true,
            },
            listen: ListenLimits {
                connections_max: 64,
                head_time_max: Duration::from_secs(1),
                write_stall_max: Duration::from_secs(1),
            },
            template: Some(CHATML),
            pooling: Pooling::Last,
            fill_in_the_middle: None,
            tokenizer,
            loading: false,
        }
    }
}

pub fn start() -> TestServer {
    start_with(Setup::default())
}

pub fn start_with(setup: Setup) -> TestServer {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let knobs = Arc::new(Knobs::default());
    let state = AppState::new(setup.options);
    let tokenizer = (setup.tokenizer)();
    let runner = ScriptedRunner::new(knobs.clone());
    let engine = Engine::start(Box::new(runner), tokenizer.clone(), setup.engine).expect("a sound configuration");
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let address = listener.local_addr().expect("bound");
    let (stop, stopping) = watch::channel(false);
    // A handler with a defect, for the layer that catches it.
    let broken =
        axum::Router::new().route("/broken", axum::routing::get(async || -> &'static str { panic!("a defect") }));
    let routes = router_with(state.clone(), broken.merge(metrics()));
    runtime.spawn(listen::serve(listener, routes, setup.listen, stopping));
    runtime.spawn(state.keys().clone().watch());
    let (pooling, fill_in_the_middle) = (setup.pooling, setup.fill_in_the_middle);
    let server =
        TestServer { address, state, engine, knobs, pooling, fill_in_the_middle, tokenizer, stop, runtime };
    if !setup.loading {
        server.load(setup.template);
    }
    server
}

impl TestServer {
    /// The model is loaded from now on.
    pub fn load(&self, template: Option<&str>) {
        self.state.serve(Serving {
            engine: self.engine.clone(),
            names: vec![MODEL.to_owned(), "alias".to_owned()],
            adapters: Adapters::new(
                None,
                AdapterLimits { count_max: 2, rank_max: 8, at_run_time: false },
                &[MODEL.to_owned()],
            ),
            prompts: PromptEncoder::new(self.tokenizer.clone(), self.engine.config().context_len),
            template: template.map(|source| ChatTemplate::new(source, "", "<|im_end|>").expect("compiles")),
            eos_token_ids: vec![IM_END],
            sampling: SamplingDefaults::OPENAI,
            pooling: self.pooling,
            fill_in_the_middle: self.fill_in_the_middle,
            tool_format: template.map_or(ToolFormat::Json, ToolFormat::of_template),
            reasoning: template.and_then(ReasoningFormat::of_template),
            grammars: Arc::new(Grammars::new(self.tokenizer.clone(), self.engine.vocab_size(), vec![IM_END])),
            created_s: 1,
            fingerprint: "rill_test".to_owned(),
        });
    }

    pub fn get(&self, path: &str) -> Response {
        http::call(self.address, "GET", path, "").unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    pub fn post(&self, path: &str, body: &str) -> Response {
        http::call(self.address, "POST", path, body).unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// A request that must succeed.
    #[track_caller]
    pub fn ok(&self, path: &str, body: Value) -> Value {
        let response = self.post(path, &body.to_string());
        assert_eq!(response.status, 200, "{path} {body}: {}", response.text());
        response.json()
    }

    /// A streamed request's events, `[DONE]` checked and left out.
    #[track_caller]
    pub fn events(&self, path: &str, body: Value) -> Vec<Value> {
        let response = http::open(self.address, "POST", path, &body.to_string()).expect("the server answers");
        assert_eq!(response.status, 200);
        let mut events = response.events().expect("the stream is well formed");
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }

    /// Sends raw bytes and returns all that comes back until the server closes.
    pub fn raw(&self, bytes: &[u8]) -> String {
        use std::io::{Read, Write};

        let mut stream = http::connect(self.address, Duration::from_secs(20)).expect("the server listens");
        stream.write_all(bytes).expect("the server reads");
        let mut answer = Vec::new();
        // A reset after the answer still leaves the answer.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Waits until the condition holds.
    #[track_caller]
    pub fn wait_until(&self, what: &str, condition: impl Fn(&TestServer) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < Duration::from_secs(10), "still not: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Nothing runs, waits or holds a block any more.
    #[track_caller]
    pub fn assert_idle_soon(&self) {
        self.wait_until("idle", |server| {
            let stats = server.engine.stats();
            stats.running() == 0
                && stats.waiting() == 0
                && stats.blocks_held() == 0
                && server.state.drain().in_flight() == 0
        });
        let stats = self.engine.stats();
        assert_eq!(stats.blocks_free() + stats.blocks_cached(), stats.blocks_total(), "a block leaked");
    }

    /// What the binary does on SIGTERM, up to closing the listener.
    pub fn start_draining(&self) {
        self.state.drain().start();
        self.engine.drain();
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.knobs.resume();
        self.engine.shutdown();
        // The listener has ended already if nobody hears it.
        let _ = self.stop.send(true);
    }
}
