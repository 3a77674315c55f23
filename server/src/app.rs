//! The router and its layers, and the state that handlers share.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use rill_engine::Health;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::auth::ApiKeys;
use crate::auth::caller::rate_limit_headers;
use crate::auth::layer::{CallerName, authorize, offer_password};
use crate::body::BodyLimits;
use crate::drain::{Drain, InFlight};
use crate::leftover_body::hear_out;
use crate::protocol::ApiError;
use crate::response_store::ResponseStore;
use crate::routes;
use crate::routes::messages::MessagesError;
use crate::serving::Serving;

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
        .route("/debug/engine", get(routes::debug::engine));
    let pages = Router::new()
        .route("/", get(routes::ui::page))
        .route("/docs", get(routes::docs::page))
        .route("/openapi.json", get(routes::docs::description));
    let asks_for_key = middleware::from_fn_with_state(state.clone(), authorize);
    let pages = pages.route_layer(asks_for_key.clone()).route_layer(middleware::map_response(offer_password));
    layered(state, guarded.route_layer(asks_for_key).merge(pages).merge(more).merge(probes()))
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
