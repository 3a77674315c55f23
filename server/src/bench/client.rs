//! The load generator's HTTP client: one connection a request, times of what comes in.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// A request that takes longer has failed.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(600);
/// Longest line of an event stream, and longest answer that is no stream.
const BODY_BYTES_MAX: usize = 4 << 20;

/// Why a request failed, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RequestError(String);

fn failed(what: &'static str) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> RequestError {
    move |error| RequestError(format!("{what}: {error}"))
}

/// A server under `/v1`.
#[derive(Debug, Clone)]
pub struct Client {
    authority: String,
    /// What precedes `/completions`, such as `/v1`.
    base: String,
    api_key: Option<String>,
}

/// What one streamed completion was like.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// From sending to the first piece of text.
    pub first: Duration,
    /// Between one piece of text and the next.
    pub gaps: Vec<Duration>,
}

/// Of an engine since its start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineCounts {
    pub steps: f64,
    pub step_s: f64,
    /// Tokens drawn under grammars, and the time of steps that these took.
    pub grammar_tokens: f64,
    pub grammar_s: f64,
}

impl std::ops::Sub for EngineCounts {
    type Output = EngineCounts;

    fn sub(self, earlier: EngineCounts) -> EngineCounts {
        EngineCounts {
            steps: self.steps - earlier.steps,
            step_s: self.step_s - earlier.step_s,
            grammar_tokens: self.grammar_tokens - earlier.grammar_tokens,
            grammar_s: self.grammar_s - earlier.grammar_s,
        }
    }
}

/// `response_format` of documents as programs ask for them, longer than anybody waits.
fn document_format() -> Value {
    let person = serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "role": {"enum": ["author", "editor", "reader"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "role", "tags"],
        "additionalProperties": false,
    });
    let schema = serde_json::json!({"type": "array", "items": person, "minItems": 1000});
    serde_json::json!({"type": "json_schema", "json_schema": {"name": "people", "schema": schema, "strict": true}})
}

impl Client {
    /// For a base address such as `http://127.0.0.1:8000/v1`.
    pub fn new(url: &str, api_key: Option<String>) -> Result<Client, RequestError> {
        let wrong = || RequestError(format!("must be an address such as http://127.0.0.1:8000/v1, not {url}"));
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        if uri.scheme_str() != Some("http") {
            return Err(RequestError(format!("must begin with http://, which is all `rill bench` speaks: {url}")));
        }
        let host = uri.host().ok_or_else(wrong)?;
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        Ok(Client { authority, base: uri.path().trim_end_matches('/').to_owned(), api_key })
    }

    async fn send(&self, method: &str, path: &str, body: String) -> Result<Response<Incoming>, RequestError> {
        let stream = TcpStream::connect(&self.authority)
            .await
            .map_err(|error| RequestError(format!("cannot connect to {}: {error}", self.authority)))?;
        stream.set_nodelay(true).map_err(|error| RequestError(error.to_string()))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed("connecting")(e.into()))?;
        // Ends with the response's body; its errors show there.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.authority)
            .header(CONNECTION, "close")
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|e| failed("the request")(e.into()))?;
        sender.send_request(request).await.map_err(|e| failed("sending")(e.into()))
    }

    /// The body of a GET below the server's root.
    pub async fn get(&self, path: &str) -> Result<String, RequestError> {
        let response = self.send("GET", path, String::new()).await?;
        let status = response.status();
        let body = whole(response).await?;
        if status.is_success() { Ok(body) } else { Err(RequestError(format!("{path}: {status}: {body}"))) }
    }

    /// The first model the server lists, else `default`.
    pub async fn model(&self) -> String {
        let first = |page: String| -> Option<String> {
            let page: Value = serde_json::from_str(&page).ok()?;
            Some(page["data"][0]["id"].as_str()?.to_owned())
        };
        let page = self.get(&format!("{}/models", self.base)).await;
        page.ok().and_then(first).unwrap_or_else(|| "default".to_owned())
    }

    /// What rill's engine has counted so far, where it is rill.
    pub async fn counts(&self) -> Option<EngineCounts> {
        let page = self.get("/metrics").await.ok()?;
        let value = |name: &str| -> Option<f64> {
            let line =
                page.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')))?;
            line.rsplit(' ').next()?.parse().ok()
        };
        Some(EngineCounts {
            steps: value("rill_steps_total")?,
            step_s: value("rill_step_seconds_total")?,
            grammar_tokens: value("rill_grammar_tokens_total")?,
            grammar_s: value("rill_grammar_seconds_total")?,
        })
    }

    /// Streams a greedy completion of exactly `max_tokens` tokens, if the server honours `ignore_eos`; `structured`: one
    /// that begins a JSON document.
    pub async fn complete(
        &self,
        model: &str,
        prompt: &str,
        max_tokens: usize,
        structured: bool,
    ) -> Result<Sample, RequestError> {
        let mut body = serde_json::json!({
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": true,
            "ignore_eos": true, "stream_options": {"include_usage": true},
        });
        if structured {
            body["response_format"] = document_format();
        }
        tokio::time::timeout(REQUEST_TIME_MAX, self.stream(body.to_string()))
            .await
            .map_err(|_| RequestError(format!("no end after {} s", REQUEST_TIME_MAX.as_secs())))?
    }

    async fn stream(&self, body: String) -> Result<Sample, RequestError> {
        let start = Instant::now();
        let response = self.send("POST", &format!("{}/completions", self.base), body).await?;
        if response.status() != hyper::StatusCode::OK {
            let status = response.status();
            let text = whole(response).await?;
            return Err(RequestError(format!("{status}: {}", text.chars().take(300).collect::<String>())));
        }
        let mut events = Events { sample: Sample::default(), last: None, pieces: 0, usage: false, error: None };
        let (mut body, mut pending) = (response.into_body(), Vec::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| failed("the stream broke")(e.into()))?;
            let Some(data) = frame.data_ref() else { continue };
            pending.extend_from_slice(data);
            let now = Instant::now();
            let mut done = 0;
            while let Some(end) = pending[done..].iter().position(|&b| b == b'\n') {
                events.line(&pending[done..done + end], start, now);
                done += end + 1;
            }
            pending.drain(..done);
            if pending.len() > BODY_BYTES_MAX {
                return Err(RequestError(format!("a line of more than {BODY_BYTES_MAX} bytes")));
            }
        }
        events.finish()
    }
}

async fn whole(response: Response<Incoming>) -> Result<String, RequestError> {
    let body = Limited::new(response.into_body(), BODY_BYTES_MAX);
    let bytes = body.collect().await.map_err(failed("the answer broke off"))?.to_bytes();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads an event stream line by line.
struct Events {
    sample: Sample,
    last: Option<Instant>,
    pieces: u64,
    usage: bool,
    error: Option<String>,
}

impl Events {
    fn line(&mut self, line: &[u8], start: Instant, now: Instant) {
        let Some(data) = line.strip_prefix(b"data:") else { return };
        let Ok(event) = serde_json::from_slice::<Value>(data) else { return };
        if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
            self.usage = true;
            self.sample.prompt_tokens = usage["prompt_tokens"].as_u64().unwrap_or(0);
            self.sample.completion_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
        }
        if let Some(error) = event.get("error") {
            self.error = Some(error.to_string());
        }
        let choice = &event["choices"][0];
        let text = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str());
        if text.is_none_or(str::is_empty) {
            return;
        }
        self.pieces += 1;
        match self.last {
            None => self.sample.first = now - start,
            Some(last) => self.sample.gaps.push(now - last),
        }
        self.last = Some(now);
    }

    fn finish(mut self) -> Result<Sample, RequestError> {
        if let Some(error) = self.error {
            return Err(RequestError(error));
        }
        if self.last.is_none() {
            return Err(RequestError("the stream held no text".to_owned()));
        }
        if !self.usage {
            self.sample.completion_tokens = self.pieces;
        }
        Ok(self.sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let client = Client::new("http://localhost:8000/v1/", None).unwrap();
        assert_eq!((client.authority.as_str(), client.base.as_str()), ("localhost:8000", "/v1"));
        assert_eq!(Client::new("http://[::1]/v1", None).unwrap().authority, "[::1]:80");
        for (url, message) in [("https://x/v1", "must begin with http://"), ("no address", "such as http://")] {
            assert!(Client::new(url, None).unwrap_err().to_string().contains(message));
        }
    }

    fn read(lines: &[(&str, u64)]) -> Result<Sample, RequestError> {
        let mut events = Events { sample: Sample::default(), last: None, pieces: 0, usage: false, error: None };
        let start = Instant::now();
        for (line, ms) in lines {
            events.line(line.as_bytes(), start, start + Duration::from_millis(*ms));
        }
        events.finish()
    }

    #[test]
    fn streams_are_read() {
        let found = read(&[
            (": a comment", 1),
            ("data: {\"choices\":[{\"text\":\"\"}]}", 2),
            ("data: {\"choices\":[{\"text\":\"a\"}],\"usage\":null}", 5),
            ("data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}", 9),
            ("data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}", 10),
            ("data: [DONE]", 10),
        ])
        .unwrap();
        let ms = Duration::from_millis;
        let expected = Sample { prompt_tokens: 7, completion_tokens: 3, first: ms(5), gaps: vec![ms(4)] };
        assert_eq!(found, expected);
        assert_eq!(read(&[("data: {\"choices\":[{\"text\":\"a\"}]}", 1)]).unwrap().completion_tokens, 1);
        assert!(read(&[("data: {\"error\":{\"message\":\"no\"}}", 1)]).unwrap_err().to_string().contains("no"));
        assert!(read(&[]).is_err());
    }
}
