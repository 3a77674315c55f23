//! Bad clients and bad moments, over real sockets: the server answers clearly or waits no longer than its bounds, lives
//! on, and holds no block afterwards.

use rill_tests::http::{self, OpenResponse};
use rill_tests::server_process::ServerProcess;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::time::{Duration, Instant};

const LONG: &str =
    r#"{"prompt":"Once upon a time","max_tokens":4000,"ignore_eos":true,"temperature":0,"stream":true}"#;
const SHORT: &str = r#"{"prompt":"The capital of France is","max_tokens":4,"temperature":0}"#;

fn start(flags: &[&str]) -> ServerProcess {
    ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), flags)
}

fn assert_answers(server: &ServerProcess) {
    let response = server.post("/v1/completions", SHORT);
    assert_eq!(response.status, 200, "{}", response.text());
    assert!(response.json()["choices"][0]["text"].as_str().expect("text").contains("Paris"));
}

/// Opens a stream and reads its first event.
fn streaming(server: &ServerProcess) -> (OpenResponse, Vec<u8>) {
    let mut response = http::open(server.address, "POST", "/v1/completions", LONG).expect("connects");
    assert_eq!(response.status, 200);
    let mut pending = Vec::new();
    assert!(response.next_event(&mut pending).expect("an event").is_some());
    (response, pending)
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    let server = start(&[]);
    let streams: Vec<_> = (0..8).map(|_| streaming(&server)).collect();
    assert_eq!(server.metric("vllm:num_requests_running"), 8.0);
    assert!(server.metric("rill_kv_blocks_held") >= 8.0);
    drop(streams);
    server.assert_idle_soon();
    // A client that waits for a whole answer and leaves counts as well.
    let mut stream = http::connect(server.address, Duration::from_secs(10)).expect("connects");
    let body = LONG.replace(r#","stream":true"#, "");
    stream.write_all(&http::request_bytes("POST", "/v1/completions", &body)).expect("sends");
    let start = Instant::now();
    while server.metric("vllm:num_requests_running") == 0.0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the request never ran");
    }
    stream.shutdown(Shutdown::Both).expect("closes");
    drop(stream);
    server.assert_idle_soon();
    assert_answers(&server);
}

#[test]
fn a_full_queue_is_429_with_retry_after() {
    let server = start(&["--max-running", "2", "--max-queue", "3"]);
    let running: Vec<_> = (0..2).map(|_| streaming(&server)).collect();
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut stream = http::connect(server.address, Duration::from_secs(60)).expect("connects");
        stream.write_all(&http::request_bytes("POST", "/v1/completions", LONG)).expect("sends");
        waiting.push(stream);
    }
    let start = Instant::now();
    while server.metric("vllm:num_requests_waiting") < 3.0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the queue does not fill");
    }
    for _ in 0..5 {
        let refused = server.post("/v1/completions", SHORT);
        assert_eq!(refused.status, 429, "{}", refused.text());
        let seconds: u32 = refused.header("retry-after").expect("Retry-After").parse().expect("seconds");
        assert!(seconds >= 1);
        let error = &refused.json()["error"];
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains('3'), "the limit is not named: {message}");
        println!("429, Retry-After {seconds}: {message}");
    }
    // Probes are answered whatever the load.
    assert_eq!(server.get("/health").status, 200);
    drop(waiting);
    drop(running);
    server.assert_idle_soon();
    assert_answers(&server);
}

#[test]
fn bodies_that_are_too_large_or_never_end_are_refused() {
    let server = start(&[]);
    let body = format!(r#"{{"prompt":"{}","max_tokens":4}}"#, "a ".repeat(5 << 20));
    let refused = server.post("/v1/completions", &body);
    assert_eq!(refused.status, 413, "{}", refused.text());
    println!("413: {}", refused.text());
    // Half a request and silence; half a request and gone; a head that never ends.
    let whole = http::request_bytes("POST", "/v1/completions", SHORT);
    let mut silent = http::connect(server.address, Duration::from_secs(90)).expect("connects");
    silent.write_all(&whole[..whole.len() - 10]).expect("sends");
    let mut gone = http::connect(server.address, Duration::from_secs(10)).expect("connects");
    gone.write_all(&whole[..whole.len() - 10]).expect("sends");
    drop(gone);
    let mut endless = http::connect(server.address, Duration::from_secs(10)).expect("connects");
    endless.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n").expect("sends");
    assert_answers(&server);
    let start = Instant::now();
    let mut answer = String::new();
    silent.read_to_string(&mut answer).expect("the server answers or closes");
    println!("half a body, after {:?}: {answer}", start.elapsed());
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(start.elapsed() < Duration::from_secs(60), "bounded");
    drop(endless);
    server.assert_idle_soon();
    assert_answers(&server);
}

#[test]
fn a_slow_reader_slows_nobody_and_loses_nothing() {
    let server = start(&[]);
    let body = r#"{"prompt":"Count: 1, 2, 3,","max_tokens":200,"ignore_eos":true,"temperature":0,"stream":true}"#;
    let prompt =
        http::open(server.address, "POST", "/v1/completions", body).expect("connects").events().expect("events");
    // Reads nothing while the whole text is generated, then a little at a time.
    let mut slow = http::open(server.address, "POST", "/v1/completions", body).expect("connects");
    let start = Instant::now();
    assert_answers(&server);
    assert!(start.elapsed() < Duration::from_secs(20), "another request waited {:?}", start.elapsed());
    server.assert_idle_soon();
    std::thread::sleep(Duration::from_secs(1));
    let mut events = Vec::new();
    let mut pending = Vec::new();
    while let Some(event) = slow.next_event(&mut pending).expect("events") {
        events.push(event);
        std::thread::sleep(Duration::from_millis(2));
    }
    let text = |events: &[String]| -> String {
        events
            .iter()
            .filter(|event| *event != "[DONE]")
            .map(|event| serde_json::from_str::<serde_json::Value>(event).expect("JSON"))
            .map(|event| event["choices"][0]["text"].as_str().unwrap_or_default().to_owned())
            .collect()
    };
    assert_eq!(text(&events), text(&prompt));
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
}

#[test]
fn a_thousand_idle_connections_cost_nobody_anything() {
    let server = start(&[]);
    // This process must hold them all as well.
    let mut idle = Vec::new();
    for count in 0..1000 {
        match http::connect(server.address, Duration::from_secs(10)) {
            Ok(stream) => idle.push(stream),
            Err(error) => {
                assert!(count >= 900, "only {count} connections: {error}");
                // The last places are for the checks below.
                idle.truncate(count - 50);
                break;
            }
        }
    }
    println!("{} idle connections", idle.len());
    assert_answers(&server);
    let (stream, _) = streaming(&server);
    drop(stream);
    server.assert_idle_soon();
    drop(idle);
    assert_answers(&server);
}

#[test]
fn more_connections_than_allowed_wait_their_turn() {
    let server = start(&["--max-connections", "4"]);
    let idle: Vec<_> =
        (0..4).map(|_| http::connect(server.address, Duration::from_secs(10)).expect("connects")).collect();
    std::thread::sleep(Duration::from_millis(200));
    let mut waiting =
        http::connect(server.address, Duration::from_secs(30)).expect("the kernel's backlog takes it");
    waiting.write_all(&http::request_bytes("GET", "/health", "")).expect("sends");
    waiting.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    let mut byte = [0];
    assert!(waiting.read(&mut byte).is_err(), "a fifth connection was answered");
    drop(idle);
    waiting.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    assert_eq!(OpenResponse::read_head(waiting).expect("answered").status, 200);
}

#[test]
fn sigterm_lets_streams_finish_and_exits_with_0() {
    let mut server = start(&[]);
    let body = r#"{"prompt":"Once upon a time","max_tokens":300,"ignore_eos":true,"temperature":0,"stream":true}"#;
    let mut response = http::open(server.address, "POST", "/v1/completions", body).expect("connects");
    let mut pending = Vec::new();
    assert!(response.next_event(&mut pending).expect("an event").is_some());
    // A connection from before, so that what a draining server answers can be seen.
    let mut kept = http::connect(server.address, Duration::from_secs(10)).expect("connects");
    server.signal("TERM");
    std::thread::sleep(Duration::from_millis(300));
    kept.write_all(&http::request_bytes("POST", "/v1/completions", SHORT)).expect("sends");
    let refused = OpenResponse::read_head(kept).expect("answered").read_to_end().expect("whole");
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.header("retry-after").is_some(), "{:?}", refused.headers);
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.get("/health").status, 200);
    let mut events = Vec::new();
    while let Some(event) = response.next_event(&mut pending).expect("the stream goes on") {
        events.push(event);
    }
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let last: serde_json::Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
    assert_eq!(last["choices"][0]["finish_reason"], "length", "{last}");
    let status = server.wait(Duration::from_secs(15));
    assert_eq!(status.code(), Some(0), "{status}\n{}", server.log());
}

#[test]
fn a_drain_timeout_ends_streams_with_an_error_and_exits_with_0() {
    let mut server = start(&["--drain-timeout", "1"]);
    let (mut response, mut pending) = streaming(&server);
    server.signal("TERM");
    let mut events = Vec::new();
    while let Some(event) = response.next_event(&mut pending).expect("the stream ends in order") {
        events.push(event);
    }
    let last: serde_json::Value = serde_json::from_str(events.last().expect("events")).expect("JSON");
    assert!(last["error"]["message"].is_string(), "{last}");
    let status = server.wait(Duration::from_secs(15));
    assert_eq!(status.code(), Some(0), "{status}\n{}", server.log());
}

#[test]
fn a_second_sigterm_exits_at_once() {
    let mut server = start(&[]);
    let (_response, _pending) = streaming(&server);
    server.signal("TERM");
    std::thread::sleep(Duration::from_millis(200));
    server.signal("TERM");
    let status = server.wait(Duration::from_secs(3));
    assert_ne!(status.code(), Some(0), "streams were dropped");
}

#[test]
fn what_cannot_start_says_why_and_fails() {
    let binary = Path::new(env!("CARGO_BIN_EXE_rill-under-test"));
    let folder = tempfile::tempdir().expect("a folder");
    let garbage = folder.path().join("garbage.gguf");
    std::fs::write(&garbage, b"this is no model").expect("writes");
    let empty = folder.path().join("empty.gguf");
    std::fs::write(&empty, b"").expect("writes");
    let truncated = folder.path().join("truncated.gguf");
    let whole = std::fs::read(rill_tests::default_model::gguf_path()).expect("reads");
    std::fs::write(&truncated, &whole[..whole.len() / 2]).expect("writes");
    let other = folder.path().join("other.gguf");
    // Another architecture's file: its name and its keys, which are as long as llama's.
    let mut renamed = whole;
    let metadata_end =
        renamed.windows(21).position(|bytes| bytes == b"tokenizer.ggml.tokens").expect("the vocabulary");
    for at in 0..metadata_end {
        if renamed[at..].starts_with(b"llama") {
            renamed[at..at + 5].copy_from_slice(b"zebra");
        }
    }
    std::fs::write(&other, renamed).expect("writes");
    let missing = folder.path().join("missing.gguf");
    for (model, words) in [
        (&garbage, "garbage.gguf"),
        (&empty, "empty.gguf"),
        (&truncated, "truncated"),
        (&other, "zebra is not supported; supported are llama"),
        (&missing, "missing.gguf"),
    ] {
        let output = std::process::Command::new(binary)
            .args(["serve", "--port", "0", "--log", "error", "--model"])
            .arg(model)
            .output()
            .expect("runs");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{:?}: {message}", output.status.code());
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(words), "{words} is not named: {message}");
        assert!(message.trim().lines().count() <= 3, "one clear message: {message}");
        assert!(!message.contains("panicked"), "{message}");
    }
}
