//! Errors in OpenAI's shape: status, and a body with `message`, `type`, `param` and `code`, all four always there.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rill_engine::{FailureKind, SubmitError};
use schemars::JsonSchema;
use serde::Serialize;

/// An error on its way to the client.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// OpenAI's coarse class, such as `invalid_request_error`.
    pub kind: &'static str,
    /// The request field at fault.
    pub param: Option<String>,
    /// A stable word for programs, such as `context_length_exceeded`.
    pub code: Option<&'static str>,
    /// Sent as the `Retry-After` header.
    pub retry_after_s: Option<u32>,
}

/// The body of an error.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Error")]
pub struct ErrorBody<'a> {
    pub error: ErrorDetail<'a>,
}

#[derive(Serialize, JsonSchema)]
pub struct ErrorDetail<'a> {
    pub message: &'a str,
    /// A coarse class, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: &'a str,
    /// The request field at fault.
    pub param: Option<&'a str>,
    /// A stable word for programs, such as `context_length_exceeded`.
    pub code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: String) -> Self {
        ApiError { status, message, kind, param: None, code: None, retry_after_s: None }
    }

    /// 400, the field `param` at fault.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        ApiError {
            param: Some(param.to_owned()),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message.into())
        }
    }

    /// 400 with no single field at fault.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message.into())
    }

    /// 400 for a field we know and do not implement.
    pub fn unsupported(field: &str) -> Self {
        Self::unsupported_value(field, field)
    }

    /// 400 where only some values of a field are not implemented; `what` says which.
    pub fn unsupported_value(field: &str, what: &str) -> Self {
        ApiError {
            code: Some("unsupported_parameter"),
            ..Self::invalid(field, format!("{what} is not supported by this server yet"))
        }
    }

    /// 400: the prompt alone, or with what was asked for, is longer than the model's context. Begins with OpenAI's own
    /// words: clients that shorten their prompts look for them.
    pub fn context_length(param: &str, context_len: usize, detail: &str) -> Self {
        let message = format!("this model's maximum context length is {context_len} tokens; {detail}");
        ApiError { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    /// The same in an API whose fields have other names: each first name stands for the second.
    pub fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        let Some(param) = &self.param else { return self };
        let of =
            |name: &str| param.strip_prefix(name).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
        if let Some((rest, (ours, theirs))) = names.iter().find_map(|pair| Some((of(pair.0)?, *pair))) {
            self.message = self.message.replace(ours, theirs);
            self.param = Some(format!("{theirs}{rest}"));
        }
        self
    }

    pub fn unauthorized() -> Self {
        ApiError {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "a valid API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`, or give it to a \
                 browser as the password, under any name"
                    .to_owned(),
            )
        }
    }

    /// 429: the key's limit named by `kind` is reached; `None`: this request is above it whenever it comes.
    pub fn rate_limited(kind: &'static str, message: String, retry_after_s: Option<u32>) -> Self {
        ApiError {
            code: Some("rate_limit_exceeded"),
            retry_after_s,
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, kind, message)
        }
    }

    pub fn model_not_found(asked: &str, served: &[String]) -> Self {
        ApiError {
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("the model `{}` is not served here; served: {}", shorten(asked), served.join(", ")),
            )
        }
    }

    /// 404, what the field `param` names is not there.
    pub fn not_found(param: &str, message: String) -> Self {
        ApiError {
            param: Some(param.to_owned()),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
        }
    }

    /// 403: the operator has not allowed it.
    pub fn forbidden(message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message.to_owned())
    }

    pub fn route_not_found(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("there is no route {method} {}", shorten(path)),
        )
    }

    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            format!("{} does not take {method}", shorten(path)),
        )
    }

    pub fn unsupported_media_type(given: &str) -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            format!("the content type must be application/json, not {}", shorten(given)),
        )
    }

    pub fn unsupported_coding(given: &str) -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            format!("the request body must be sent as it is, not in the content encoding {}", shorten(given)),
        )
    }

    /// 400: the path is no text.
    pub fn bad_path(reason: &str) -> Self {
        Self::bad_request(format!("the path of the request makes no sense: {reason}"))
    }

    pub fn body_too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("the request body is larger than the limit of {limit} bytes"),
        )
    }

    pub fn body_too_slow(seconds: u64) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            format!("the request body did not arrive within {seconds} s"),
        )
    }

    /// 503 while the model loads or the server drains.
    pub fn unavailable(message: &str, retry_after_s: u32) -> Self {
        ApiError {
            code: Some("unavailable"),
            retry_after_s: Some(retry_after_s),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message.to_owned())
        }
    }

    /// 429: something bounded is full for the moment.
    pub fn overloaded(message: &str) -> Self {
        ApiError {
            code: Some("queue_full"),
            retry_after_s: Some(1),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded_error", message.to_owned())
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message.into())
    }

    /// The engine ended a request that it had accepted.
    pub fn failed(kind: FailureKind, message: String) -> Self {
        match kind {
            FailureKind::Overloaded => ApiError {
                code: Some("overloaded"),
                retry_after_s: Some(1),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", message)
            },
            FailureKind::ShuttingDown => Self::unavailable(&message, 5),
            FailureKind::Grammar => ApiError { code: Some("grammar_failed"), ..Self::bad_request(message) },
            FailureKind::Internal => Self::internal(message),
        }
    }

    /// The body: `{"error":{…}}`.
    pub fn to_json(&self) -> String {
        let detail =
            ErrorDetail { message: &self.message, kind: self.kind, param: self.param.as_deref(), code: self.code };
        serde_json::to_string(&ErrorBody { error: detail }).unwrap_or_default()
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { .. } | SubmitError::QueueTokensFull { .. } => Self::overloaded(&message),
            SubmitError::TooLarge { .. } => {
                ApiError { code: Some("context_length_exceeded"), ..Self::bad_request(message) }
            }
            SubmitError::Invalid(_) => Self::bad_request(message),
            SubmitError::Draining => Self::unavailable(&message, 5),
            SubmitError::Dead(_) => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.to_json();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::TOO_MANY_REQUESTS && self.retry_after_s.is_none() {
            // OpenAI's clients try a 429 again unless told not to.
            response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// What a client sent, short enough to quote back at it.
pub fn shorten(text: &str) -> String {
    const SHOWN_CHARS: usize = 80;
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_all_four_keys() {
        for error in [
            ApiError::bad_request("x"),
            ApiError::invalid("n", "x"),
            ApiError::unauthorized(),
            ApiError::internal("x"),
            ApiError::unavailable("x", 1),
            ApiError::from(SubmitError::QueueFull { waiting: 3, limit: 3 }),
        ] {
            let json: serde_json::Value = serde_json::from_str(&error.to_json()).unwrap();
            let detail = json["error"].as_object().unwrap();
            let keys: Vec<&str> = detail.keys().map(String::as_str).collect();
            assert_eq!(keys, ["message", "type", "param", "code"]);
            assert!(detail["message"].is_string() && detail["type"].is_string());
        }
    }

    #[test]
    fn quoting_is_bounded_and_keeps_characters_whole() {
        assert_eq!(shorten("short"), "short");
        assert_eq!(shorten(&"é".repeat(100)), format!("{}…", "é".repeat(80)));
    }
}
