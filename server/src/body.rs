//! Request bodies: bounded in size and time, parsed with errors that name the field.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::header;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::app::AppState;
use crate::protocol::ApiError;

/// A whole request body that says it is JSON; not parsed yet.
pub struct JsonBytes(pub Bytes);

impl FromRequest<Arc<AppState>> for JsonBytes {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        if let Some(kind) = request.headers().get(header::CONTENT_TYPE) {
            let kind = kind.to_str().unwrap_or("(not text)");
            let essence = kind.split(';').next().unwrap_or_default().trim();
            if !essence.eq_ignore_ascii_case("application/json") {
                return Err(ApiError::unsupported_media_type(kind));
            }
        }
        if let Some(coding) = request.headers().get(header::CONTENT_ENCODING)
            && !coding.as_bytes().eq_ignore_ascii_case(b"identity")
        {
            return Err(ApiError::unsupported_coding(coding.to_str().unwrap_or("(not text)")));
        }
        let limits = state.body_limits();
        let body = request.into_body();
        // Told before the client sends any of it, where it asks first.
        if body.size_hint().lower() > limits.bytes_max as u64 {
            return Err(ApiError::body_too_large(limits.bytes_max));
        }
        match tokio::time::timeout(limits.time_max, read(body, limits.bytes_max)).await {
            Ok(result) => result.map(JsonBytes),
            Err(_) => Err(ApiError::body_too_slow(limits.time_max.as_secs())),
        }
    }
}

/// How much body, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct BodyLimits {
    pub bytes_max: usize,
    pub time_max: Duration,
}

/// The whole body; what of a larger one is left is `leftover_body`'s.
async fn read(mut body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    let mut read = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| ApiError::bad_request(format!("the request body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > bytes_max {
            return Err(ApiError::body_too_large(bytes_max));
        }
        read.extend_from_slice(&data);
    }
    Ok(read.freeze())
}

/// Parses the fields of `T` out of a body, a JSON object; the others are not looked at.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // Serde would take an array for the fields in order.
    if body.trim_ascii_start().starts_with(b"[") {
        serde_json::from_slice::<IgnoredAny>(body).map_err(|error| not_json(&error))?;
        return Err(ApiError::bad_request("expected a JSON object, not an array"));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if !inner.is_data() {
            return not_json(&inner);
        }
        let words = in_plain_words(&inner.to_string());
        let missing = words.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
        match (path.as_str(), missing) {
            (".", Some(field)) => ApiError::invalid(field, format!("{field} is missing")),
            (".", None) => ApiError::bad_request(words),
            (path, _) => ApiError::invalid(path, format!("{path}: {words}")),
        }
    })?;
    deserializer.end().map_err(|error| not_json(&error))?;
    Ok(value)
}

/// Serde's words for what it found and wanted, in those of JSON.
fn in_plain_words(message: &str) -> String {
    let mut words = message.to_owned();
    if let Some((before, rest)) = message.split_once("expected struct ") {
        let after = rest.find(' ').map_or("", |end| &rest[end..]);
        words = format!("{before}expected an object{after}");
    }
    for (theirs, ours) in [
        ("expected i64", "expected an integer"),
        ("expected u32", "expected a whole number from 0 on"),
        ("expected f64", "expected a number"),
        ("expected a map", "expected an object"),
        ("expected a sequence", "expected an array"),
        ("invalid type: map", "invalid type: object"),
        ("invalid type: sequence", "invalid type: array"),
    ] {
        words = words.replace(theirs, ours);
    }
    words
}

fn not_json(error: &serde_json::Error) -> ApiError {
    ApiError::bad_request(format!("the request body is not valid JSON: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::sampling::SharedFields;

    #[track_caller]
    fn check(body: &str, param: Option<&str>, part: &str) {
        let error = parse::<SharedFields>(body.as_bytes()).unwrap_err();
        assert_eq!(error.status, 400, "{body}");
        assert_eq!(error.param.as_deref(), param, "{body}: {}", error.message);
        assert!(error.message.contains(part), "{body}: {}", error.message);
    }

    #[test]
    fn errors_name_the_field() {
        for (body, param, part) in [
            ("", None, "not valid JSON"),
            ("{", None, "not valid JSON"),
            ("{} x", None, "not valid JSON"),
            (r#"{"temperature":NaN}"#, None, "not valid JSON"),
            (r#"{"temperature":1e999}"#, None, "not valid JSON: number out of range"),
            (r#"{"user":"\ud800"}"#, None, "not valid JSON"),
            ("[]", None, "expected a JSON object, not an array"),
            (" [", None, "not valid JSON"),
            ("null", None, "expected an object"),
            (r#"{"temperature":"hot"}"#, Some("temperature"), "temperature: invalid type: string \"hot\""),
            (r#"{"n":1.5}"#, Some("n"), "n: invalid type: floating point `1.5`"),
            (r#"{"n":18446744073709551615}"#, Some("n"), "n: invalid value"),
            (r#"{"n":true}"#, Some("n"), "n: invalid type: boolean `true`, expected an integer"),
            (r#"{"response_format":5}"#, Some("response_format"), "expected an object at line"),
            (r#"{"response_format":{}}"#, Some("response_format"), "missing field `type`"),
            (r#"{"stream":"yes"}"#, Some("stream"), "expected a boolean"),
            (r#"{"stream":1}"#, Some("stream"), "expected a boolean"),
            (r#"{"stop":5}"#, Some("stop"), "expected a string or an array of strings"),
            (r#"{"stop":["a",5]}"#, Some("stop[1]"), "expected a string"),
            (r#"{"stop_token_ids":[1,"a"]}"#, Some("stop_token_ids[1]"), "invalid type"),
            (r#"{"logit_bias":[1]}"#, Some("logit_bias"), "invalid type: array, expected an object"),
            (r#"{"logit_bias":{"1":"x"}}"#, Some("logit_bias.1"), "invalid type"),
            (r#"{"stream_options":true}"#, Some("stream_options"), "invalid type"),
            (r#"{"n":1,"n":2}"#, None, "duplicate field `n`"),
        ] {
            check(body, param, part);
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        let body = format!(r#"{{"metadata":{{"a":{}1{}}}}}"#, "[".repeat(5000), "]".repeat(5000));
        check(&body, None, "recursion limit");
    }
}
