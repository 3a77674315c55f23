//! The router and its layers, and the state that handlers share.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use rill_engine::{EngineHandle, Health, LoadedAdapter};
use rill_models::{FillInTheMiddle, Pooling, Tokenizer};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::adapters::Adapters;
use crate::auth::ApiKeys;
use crate::auth::caller::rate_limit_headers;
use crate::auth::layer::{CallerName, authorize};
use crate::body::BodyLimits;
use crate::chat_template::ChatTemplate;
use crate::drain::{Drain, InFlight};
use crate::grammars::Grammars;
use crate::leftover_body::hear_out;
use crate::prompt::PromptEncoder;
use crate::protocol::ApiError;
use crate::reasoning::ReasoningFormat;
use crate::response_store::ResponseStore;
use crate::routes;
use crate::routes::messages::MessagesError;
use crate::sampling_defaults::SamplingDefaults;
use crate::tools::ToolFormat;
use crate::validate::ModelLimits;

/// Seconds after which a client may find a loading or draining server's successor ready.
const RETRY_AFTER_S: u32 = 5;

/// How the API behaves whatever the model.
#[derive(Debug, Clone)]
pub struct AppOptions {
    pub keys: ApiKeys,
    pub body: BodyLimits,
    pub cors: CorsPolicy,
    /// Silence in a stream after which a comment is sent.
    pub keep_alive: Duration,
    /// Take `chat_template` from requests: it runs code of the client's in the template engine.
    pub trust_request_chat_template: bool,
    /// Answer `/debug/engine`.
    pub debug_endpoints: bool,
}

/// Which web pages may call the API from a browser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CorsPolicy {
    /// Pages of this machine, at any port.
    Local,
    Any,
    /// These origins, such as `https://app.example`.
    Only(Vec<HeaderValue>),
}

/// What a request asked for by name.
#[derive(Debug, Clone)]
pub struct Target {
    /// To answer with.
    pub name: String,
    pub adapter: Option<Arc<LoadedAdapter>>,
}

/// A loaded model and all that requests need of it.
pub struct Serving {
    pub engine: EngineHandle,
    /// What requests may call the model; the first is what responses do.
    pub names: Vec<String>,
    pub adapters: Adapters,
    pub prompts: PromptEncoder,
    /// `None`: the model has no chat template.
    pub template: Option<ChatTemplate>,
    pub eos_token_ids: Vec<u32>,
    /// Of requests that leave parameters out.
    pub sampling: SamplingDefaults,
    /// How embeddings are made.
    pub pooling: Pooling,
    /// The tokens that let the model fill in what is between two texts, if it has them.
    pub fill_in_the_middle: Option<FillInTheMiddle>,
    /// How the model writes calls.
    pub tool_format: ToolFormat,
    /// How it marks thoughts, if it has any.
    pub reasoning: Option<ReasoningFormat>,
    pub grammars: Arc<Grammars>,
    /// Unix seconds.
    pub created_s: u64,
    /// Changes when the same seed may give other tokens: another version or model.
    pub fingerprint: String,
}

impl Serving {
    pub fn tokenizer(&self) -> &Tokenizer {
        self.prompts.tokenizer()
    }

    pub fn context_len(&self) -> usize {
        self.engine.config().context_len
    }

    pub fn limits(&self) -> ModelLimits<'_> {
        ModelLimits {
            vocab_size: self.engine.vocab_size(),
            context_len: self.context_len(),
            eos_token_ids: &self.eos_token_ids,
            sampling: &self.sampling,
        }
    }

    /// What a request for `asked` runs: the model or one of its adapters; nothing and `default` mean the model.
    pub fn target(&self, asked: Option<&str>) -> Result<Target, ApiError> {
        if let Some(name) = asked
            && let Some(adapter) = self.adapters.get(name)
        {
            return Ok(Target { name: name.to_owned(), adapter: Some(adapter) });
        }
        match self.model_name(asked) {
            Ok(name) => Ok(Target { name: name.to_owned(), adapter: None }),
            Err(_) => {
                let adapters = self.adapters.list().into_iter().map(|adapter| adapter.name);
                let served: Vec<String> = self.names.iter().cloned().chain(adapters).collect();
                Err(ApiError::model_not_found(asked.unwrap_or_default(), &served))
            }
        }
    }

    /// The name to answer with, if `asked` is the model itself; nothing and `default` mean its first name.
    pub fn model_name(&self, asked: Option<&str>) -> Result<&str, ApiError> {
        match asked {
            None | Some("default") => Ok(&self.names[0]),
            Some(asked) => self
                .names
                .iter()
                .find(|name| *name == asked)
                .map(String::as_str)
                .ok_or_else(|| ApiError::model_not_found(asked, &self.names)),
        }
    }
}

/// Shared by all handlers.
pub struct AppState {
    options: AppOptions,
    drain: Arc<Drain>,
    serving: OnceLock<Arc<Serving>>,
    responses: ResponseStore,
}

impl AppState {
    /// A server whose model is still loading.
    pub fn new(options: AppOptions) -> Arc<Self> {
        Arc::new(AppState {
            options,
            drain: Arc::default(),
            serving: OnceLock::new(),
            responses: ResponseStore::default(),
        })
    }

    /// From now on requests are answered. The first call counts.
    pub fn serve(&self, serving: Serving) {
        if self.serving.set(Arc::new(serving)).is_err() {
            tracing::error!("a second model was loaded and is not served");
        }
    }

    pub fn debug_endpoints(&self) -> bool {
        self.options.debug_endpoints
    }

    pub fn keys(&self) -> &ApiKeys {
        &self.options.keys
    }

    pub fn drain(&self) -> &Arc<Drain> {
        &self.drain
    }

    pub fn body_limits(&self) -> BodyLimits {
        self.options.body
    }

    /// Responses that later requests may go on from.
    pub fn responses(&self) -> &ResponseStore {
        &self.responses
    }

    pub fn keep_alive(&self) -> Duration {
        self.options.keep_alive
    }

    pub fn trusts_request_chat_template(&self) -> bool {
        self.options.trust_request_chat_template
    }

    /// The model, once loaded, draining or not.
    pub fn serving(&self) -> Result<&Arc<Serving>, ApiError> {
        self.serving.get().ok_or_else(|| ApiError::unavailable("the model is still loading", RETRY_AFTER_S))
    }

    /// The model, loaded, alive and not draining.
    pub fn ready(&self) -> Result<&Arc<Serving>, ApiError> {
        let serving = self.serving()?;
        if self.drain.is_draining() {
            return Err(draining());
        }
        match serving.engine.health() {
            Health::Ready => Ok(serving),
            Health::Draining | Health::Stopped => Err(draining()),
            Health::Dead(reason) => {
                Err(ApiError::unavailable(&format!("the engine has stopped: {reason}"), RETRY_AFTER_S))
            }
        }
    }

    /// The model for a request that drains with the server.
    pub fn enter(&self) -> Result<(Arc<Serving>, InFlight), ApiError> {
        let serving = self.serving()?.clone();
        let in_flight = self.drain.enter().ok_or_else(draining)?;
        Ok((serving, in_flight))
    }
}

fn draining() -> ApiError {
    ApiError::unavailable("the server is shutting down", RETRY_AFTER_S)
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs())
}

/// All routes; `/metrics` too unless it has a listener of its own.
pub fn router(state: Arc<AppState>, with_metrics: bool) -> Router {
    router_with(state, if with_metrics { metrics() } else { Router::new() })
}

/// What the metrics' own listener answers.
pub fn metrics_router(state: Arc<AppState>) -> Router {
    layered(state, probes().merge(metrics()))
}

/// `/metrics` alone.
pub fn metrics() -> Router<Arc<AppState>> {
    Router::new().route("/metrics", get(routes::metrics::metrics))
}

fn probes() -> Router<Arc<AppState>> {
    Router::new().route("/health", get(routes::health::health)).route("/ready", get(routes::health::ready))
}

/// All routes but `/metrics`, and `more`, which asks for no key, under the same layers.
pub fn router_with(state: Arc<AppState>, more: Router<Arc<AppState>>) -> Router {
    let guarded = Router::new()
        .route("/v1/completions", post(routes::completions::completions))
        .route("/v1/chat/completions", post(routes::chat::chat_completions))
        .route("/v1/completions/render", post(routes::completions::render))
        .route("/v1/chat/completions/render", post(routes::chat::render))
        .route("/v1/responses", post(routes::responses::responses))
        .route("/v1/responses/{id}", get(routes::responses::one).delete(routes::responses::delete))
        .route("/v1/embeddings", post(routes::embeddings::embeddings))
        .route("/v1/messages", post(routes::messages::messages))
        .route("/v1/messages/count_tokens", post(routes::messages::count_tokens))
        .route("/v1/load_lora_adapter", post(routes::adapters::load))
        .route("/v1/unload_lora_adapter", post(routes::adapters::unload))
        .route("/v1/models", get(routes::models::list))
        .route("/v1/models/{*id}", get(routes::models::one))
        .route("/tokenize", post(routes::tokenize::tokenize))
        .route("/detokenize", post(routes::tokenize::detokenize))
        .route("/tokenizer_info", get(routes::tokenize::info))
        .route("/version", get(routes::health::version))
        .route("/debug/engine", get(routes::debug::engine))
        .route_layer(middleware::from_fn_with_state(state.clone(), authorize));
    // The same for everyone; the pages ask for a key themselves.
    let pages = Router::new()
        .route("/", get(routes::ui::page))
        .route("/docs", get(routes::docs::page))
        .route("/openapi.json", get(routes::docs::description));
    layered(state, guarded.merge(more).merge(pages).merge(probes()))
}

fn layered(state: Arc<AppState>, routes: Router<Arc<AppState>>) -> Router {
    routes
        .fallback(async |request: Request| {
            let path = request.uri().path();
            in_shape_of(path, ApiError::route_not_found(request.method().as_str(), path))
        })
        .method_not_allowed_fallback(async |request: Request| {
            let path = request.uri().path();
            in_shape_of(path, ApiError::method_not_allowed(request.method().as_str(), path))
        })
        .layer(cors(&state.options.cors))
        .layer(CatchPanicLayer::custom(|panic: Box<dyn std::any::Any + Send>| {
            let what = panic
                .downcast_ref::<&str>()
                .copied()
                .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
                .unwrap_or("no message");
            tracing::error!(panic = what, "a handler panicked");
            ApiError::internal("a defect in the server was caught; see its log").into_response()
        }))
        .layer(middleware::map_request(async |request: Request| hear_out(request)))
        .layer(middleware::from_fn(log))
        .with_state(state)
}

/// An error as the API that `path` belongs to writes it.
pub fn in_shape_of(path: &str, error: ApiError) -> Response {
    match path.starts_with("/v1/messages") {
        true => MessagesError(error).into_response(),
        false => error.into_response(),
    }
}

async fn log(request: Request, next: Next) -> Response {
    let start = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    let key = response.extensions().get::<CallerName>().map(|name| &*name.0);
    tracing::debug!(%method, path, status, key, headers_ms = start.elapsed().as_millis() as u64, "answered");
    response
}

fn cors(policy: &CorsPolicy) -> CorsLayer {
    let origins = match policy {
        CorsPolicy::Any => AllowOrigin::any(),
        CorsPolicy::Only(origins) => AllowOrigin::list(origins.iter().cloned()),
        CorsPolicy::Local => AllowOrigin::predicate(|origin, _| is_local(origin)),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Clients' SDKs add headers of their own (`x-stainless-…`).
        .allow_headers(tower_http::cors::AllowHeaders::mirror_request())
        .expose_headers(rate_limit_headers().chain([header::RETRY_AFTER]).collect::<Vec<_>>())
}

fn is_local(origin: &HeaderValue) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    let Some(host) = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) else {
        return false;
    };
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|local| {
        host.strip_prefix(local).is_some_and(|rest| {
            rest.is_empty() || rest.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_origins() {
        for (origin, expected) in [
            ("http://localhost", true),
            ("http://localhost:3000", true),
            ("https://127.0.0.1:8443", true),
            ("http://[::1]:80", true),
            ("http://localhost.evil.example", false),
            ("http://localhost:80.evil.example", false),
            ("http://evil.example", false),
            ("null", false),
            ("file://", false),
        ] {
            assert_eq!(is_local(&HeaderValue::from_static(origin)), expected, "{origin}");
        }
    }
}
