//! API keys over the wire: what they guard, their limits and how these are told, their names, and a file that changes.

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use rill_server::auth::ApiKeys;
use rill_server::auth::key_file::{KeyEntry, KeyLimits, hash};
use rill_tests::http::{self, OpenResponse, Response};
use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};

const PATH: &str = "/v1/completions";

fn line(name: &str, limits: KeyLimits) -> String {
    let hash = hash(format!("key of {name}").as_bytes());
    KeyEntry { name: name.to_owned(), hash, limits }.to_line() + "\n"
}

/// A server whose keys are `lines`, and their file. The key of NAME is "key of NAME".
fn start(lines: &str) -> (TestServer, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys.jsonl");
    std::fs::write(&path, lines).expect("writes");
    let mut setup = Setup::default();
    setup.options.keys = ApiKeys::open(&[], Some(&path)).expect("sound lines");
    (test_server::start_with(setup), folder)
}

fn send(server: &TestServer, name: &str, method: &str, path: &str, body: &str) -> TcpStream {
    let mut stream = http::connect(server.address, Duration::from_secs(20)).expect("connects");
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer key of {name}\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + body).as_bytes()).expect("sends");
    stream
}

fn ask(server: &TestServer, name: &str, body: Value) -> Response {
    let stream = send(server, name, "POST", PATH, &body.to_string());
    OpenResponse::read_head(stream).expect("answered").read_to_end().expect("whole")
}

/// `found` is `expected` or a little more: time passes, and buckets fill.
#[track_caller]
fn assert_about(found: u64, expected: u64) {
    assert!((expected..expected + 10).contains(&found), "{found}, not {expected}");
}

/// The numbers of the headers for `kind`: limit and what remains.
fn left(response: &Response, kind: &str) -> (u64, u64) {
    let number = |what: &str| {
        let name = format!("x-ratelimit-{what}-{kind}");
        response
            .header(&name)
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("{name}: {response:?}"))
    };
    assert!(response.header(&format!("x-ratelimit-reset-{kind}")).is_some_and(|value| value.ends_with('s')));
    (number("limit"), number("remaining"))
}

fn small(max_tokens: u32) -> Value {
    json!({"prompt": "a", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

#[test]
fn keys_guard_everything_but_probes_and_metrics() {
    let mut setup = Setup::default();
    setup.options.keys = ApiKeys::open(&["sesame".to_owned(), "other".to_owned()], None).expect("keys");
    let server = test_server::start_with(setup);
    let ask = |method: &str, path: &str, key: &str| {
        let authorization =
            if key.is_empty() { String::new() } else { format!("Authorization: Bearer {key}\r\n") };
        let body = r#"{"prompt":"a","max_tokens":1}"#;
        let answer = server.raw(
            format!(
                "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{authorization}Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        );
        answer[9..12].parse::<u16>().unwrap_or_else(|_| panic!("{answer}"))
    };
    for (method, path) in [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions/render"),
        ("POST", "/v1/chat/completions/render"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/x"),
        ("DELETE", "/v1/responses/x"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"),
        ("GET", "/version"),
        ("GET", "/debug/engine"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ] {
        assert_eq!(ask(method, path, ""), 401, "{path}");
        assert_eq!(ask(method, path, "sesam"), 401, "{path}");
        assert_ne!(ask(method, path, "other"), 401, "{path}");
    }
    assert_eq!(ask("POST", "/v1/completions", "sesame"), 200);
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(ask("GET", path, ""), 200, "{path}");
    }
    let refused = server.get("/v1/models");
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    // A browser that opens a page is told to ask for a password, and its user what to give.
    for page in ["/", "/docs", "/openapi.json"] {
        let refused = server.get(page);
        assert!(
            refused.header("www-authenticate").is_some_and(|value| value.starts_with("Basic realm=")),
            "{page}"
        );
        assert!(refused.text().contains("give it to a browser as the password"), "{}", refused.text());
    }
    // The page's own requests bear it then; those that another page makes a browser send do not get in.
    let from_page = |origin: &str| {
        let body = r#"{"prompt":"a","max_tokens":1}"#;
        let password = "YW55Ym9keTpvdGhlcg=="; // anybody:other
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: rill.example\r\nConnection: close\r\nAuthorization: Basic {password}\r\n\
             Origin: {origin}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        server.raw(head.as_bytes())[9..12].to_owned()
    };
    assert_eq!(
        (from_page("http://rill.example"), from_page("http://evil.example")),
        ("200".to_owned(), "401".to_owned())
    );
    // Twice for each of the 22 routes, and the five after that.
    let metrics = server.get("/metrics").text();
    assert!(metrics.contains("\nrill_unauthorized_requests_total 49\n"), "{metrics}");
    assert!(metrics.contains("\nrill_key_requests_total{key=\"api-key-1\"} 1\n"), "{metrics}");
}

/// Of the routes that the description lists, none but the probes and the metrics answers without a key.
#[test]
fn every_route_described_asks_for_a_key() {
    let described = test_server::start().get("/openapi.json").json();
    let mut setup = Setup::default();
    setup.options.keys = ApiKeys::open(&["sesame".to_owned()], None).expect("keys");
    let server = test_server::start_with(setup);
    for (path, methods) in described["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            let filled = path.replace("{id}", "x");
            let answer = http::call(server.address, &method.to_uppercase(), &filled, "{}").expect("answered");
            let open = ["/health", "/ready", "/metrics"].contains(&path.as_str());
            assert_eq!(answer.status == 401, !open, "{method} {path}: {}", answer.status);
            assert_eq!(operation.get("security").is_none(), open, "{method} {path}");
        }
    }
}

#[test]
fn requests_a_minute() {
    let limits = KeyLimits { requests_per_minute: Some(2), ..KeyLimits::default() };
    let (server, _folder) = start(&(line("anna", limits) + &line("bert", KeyLimits::default())));
    for remaining in [1, 0] {
        let response = ask(&server, "anna", small(1));
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(left(&response, "requests"), (2, remaining));
        assert_eq!(response.header("x-ratelimit-limit-tokens"), None);
    }
    let refused = ask(&server, "anna", small(1));
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert_eq!(left(&refused, "requests"), (2, 0));
    let wait: u32 = refused.header("retry-after").expect("Retry-After").parse().expect("seconds");
    assert!((20..=30).contains(&wait), "{wait}");
    let error = &refused.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("requests"), &json!("rate_limit_exceeded")));
    assert_eq!(error["message"], "the key anna may send 2 requests a minute");
    // Anthropic's clients are told in their own shape.
    let stream = send(&server, "anna", "POST", "/v1/messages", "{}");
    let refused = OpenResponse::read_head(stream).expect("answered").read_to_end().expect("whole");
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (429, &json!("rate_limit_error")));
    // Others have limits of their own, and looking things up is not limited.
    assert_eq!(ask(&server, "bert", small(1)).status, 200);
    let stream = send(&server, "anna", "GET", "/v1/models", "");
    let models = OpenResponse::read_head(stream).expect("answered").read_to_end().expect("whole");
    assert_eq!((models.status, left(&models, "requests")), (200, (2, 0)));
    let metrics = server.get("/metrics").text();
    for series in [
        "rill_key_requests_total{key=\"anna\"} 2",
        "rill_key_requests_total{key=\"bert\"} 1",
        "rill_key_limited_total{key=\"anna\",limit=\"requests\"} 2",
        "rill_key_prompt_tokens_total{key=\"anna\"} 2",
        "rill_key_generation_tokens_total{key=\"anna\"} 2",
        "rill_key_requests_in_flight{key=\"anna\"} 0",
    ] {
        assert!(metrics.contains(&format!("\n{series}\n")), "{series}: {metrics}");
    }
}

#[test]
fn tokens_a_minute_are_set_aside_and_settled() {
    let limits = KeyLimits { tokens_per_minute: Some(100), ..KeyLimits::default() };
    let (server, _folder) = start(&line("anna", limits));
    // One token of 80 set aside was used: the stop string came first.
    let stopped = json!({"prompt": "a", "max_tokens": 79, "temperature": 0, "stop": ["i"], "min_tokens": 0});
    let response = ask(&server, "anna", stopped);
    assert_eq!(response.status, 200, "{}", response.text());
    let used = response.json()["usage"]["total_tokens"].as_u64().expect("usage");
    assert!(used < 10, "{used}");
    assert_about(left(&response, "tokens").1, 100 - used);
    // A stream's head comes before its end: what is set aside counts.
    let mut body = small(60);
    body["stream"] = json!(true);
    server.knobs.slow(Duration::from_millis(5));
    let streamed =
        OpenResponse::read_head(send(&server, "anna", "POST", PATH, &body.to_string())).expect("a head");
    let remaining = streamed.headers.iter().find(|(name, _)| name == "x-ratelimit-remaining-tokens");
    assert_about(remaining.expect("a header").1.parse().expect("a number"), 39 - used);
    let refused = ask(&server, "anna", small(60));
    assert_eq!(refused.status, 429, "{}", refused.text());
    let error = &refused.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("tokens"), &json!("rate_limit_exceeded")));
    assert!(error["message"].as_str().expect("text").contains("100 tokens a minute"), "{error}");
    let wait: u32 = refused.header("retry-after").expect("Retry-After").parse().expect("seconds");
    assert!((1..=60).contains(&wait), "{wait}");
    // Cut off in the middle: what was not generated comes back.
    drop(streamed);
    server.assert_idle_soon();
    let response = ask(&server, "anna", small(20));
    assert_eq!(response.status, 200, "{}", response.text());
    // A prompt above the limit never gets in, and clients are told not to try again.
    let refused = ask(&server, "anna", json!({"prompt": "ab".repeat(150), "max_tokens": 1}));
    assert_eq!((refused.status, refused.header("retry-after")), (429, None), "{}", refused.text());
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    let metrics = server.get("/metrics").text();
    assert!(metrics.contains("\nrill_key_limited_total{key=\"anna\",limit=\"tokens\"} 2\n"), "{metrics}");
}

#[test]
fn the_choices_of_a_prompt_share_its_tokens() {
    let limits = KeyLimits { tokens_per_minute: Some(100), ..KeyLimits::default() };
    let (server, _folder) = start(&line("anna", limits));
    let body = json!({"prompt": ["abcd", "efgh"], "n": 3, "max_tokens": 5, "ignore_eos": true, "temperature": 0});
    let response = ask(&server, "anna", body);
    let used = response.json()["usage"]["total_tokens"].as_u64().expect("usage");
    assert_eq!(used, 2 * 4 + 6 * 5, "{}", response.text());
    assert_about(left(&response, "tokens").1, 100 - used);
    // Embeddings count as well.
    let request = json!({"input": ["abcd", "efgh"]}).to_string();
    let stream = send(&server, "anna", "POST", "/v1/embeddings", &request);
    let response = OpenResponse::read_head(stream).expect("answered").read_to_end().expect("whole");
    assert_eq!(response.status, 200, "{}", response.text());
    let used = used + 8;
    assert_about(left(&response, "tokens").1, 100 - used);
    // What the engine refuses costs nothing.
    let response = ask(&server, "anna", json!({"prompt": "a", "n": 30, "max_tokens": 1}));
    assert_eq!((response.status, &response.json()["error"]["code"]), (429, &json!("queue_full")));
    assert_about(left(&response, "tokens").1, 100 - used);
}

#[test]
fn a_kept_response_is_its_keys_own() {
    let (server, _folder) = start(&(line("anna", KeyLimits::default()) + &line("bert", KeyLimits::default())));
    let call = |name: &str, method: &str, path: &str, body: Value| {
        let stream = send(&server, name, method, path, &body.to_string());
        OpenResponse::read_head(stream).expect("answered").read_to_end().expect("whole")
    };
    let kept = call("anna", "POST", "/v1/responses", json!({"input": "a", "max_output_tokens": 2})).json();
    let id = kept["id"].as_str().expect("an id");
    let path = format!("/v1/responses/{id}");
    let next = json!({"input": "b", "previous_response_id": id, "max_output_tokens": 2});
    for (name, status) in [("bert", 404), ("anna", 200)] {
        assert_eq!(call(name, "GET", &path, json!({})).status, status, "{name}");
        assert_eq!(call(name, "POST", "/v1/responses", next.clone()).status, status, "{name}");
        assert_eq!(call(name, "DELETE", &path, json!({})).status, status, "{name}");
    }
}

#[test]
fn requests_at_once() {
    let limits = KeyLimits { concurrency: Some(2), ..KeyLimits::default() };
    let (server, _folder) = start(&line("anna", limits));
    server.knobs.slow(Duration::from_millis(5));
    let mut body = small(400);
    body["stream"] = json!(true);
    let open = |body: &Value| {
        OpenResponse::read_head(send(&server, "anna", "POST", PATH, &body.to_string())).expect("a head")
    };
    let (first, second) = (open(&body), open(&body));
    assert_eq!((first.status, second.status), (200, 200));
    let refused = ask(&server, "anna", small(1));
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")), "{}", refused.text());
    assert_eq!(refused.json()["error"]["type"], "concurrency");
    // The place of one that is gone is free, and so is that of one that has ended.
    drop(first);
    server.wait_until("a place", |server| ask(server, "anna", small(1)).status == 200);
    assert_eq!(second.events().expect("a whole stream").last().map(String::as_str), Some("[DONE]"));
    let (_third, fourth) = (open(&body), open(&body));
    assert_eq!(fourth.status, 200);
}

#[test]
fn a_keys_requests_have_its_priority_or_a_later_one() {
    let late = KeyLimits { priority: Some(5), ..KeyLimits::default() };
    let mut setup = Setup::default();
    setup.engine.max_running = 1;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys");
    std::fs::write(&path, line("late", late) + &line("plain", KeyLimits::default())).expect("writes");
    setup.options.keys = ApiKeys::open(&[], Some(&path)).expect("sound lines");
    let server = test_server::start_with(setup);
    server.knobs.slow(Duration::from_millis(20));
    let running = send(&server, "plain", "POST", PATH, &small(60).to_string());
    server.wait_until("running", |server| server.engine.stats().running() == 1);
    // It may not overtake by asking for an earlier one.
    let mut eager = small(20);
    eager["priority"] = json!(-100);
    let mut waiting = Vec::new();
    for (count, (name, body)) in [("late", &eager), ("plain", &small(4))].into_iter().enumerate() {
        waiting.push(send(&server, name, "POST", PATH, &body.to_string()));
        server.wait_until("waiting", |server| server.engine.stats().waiting() == count + 1);
    }
    let plain = waiting.pop().expect("two");
    let answer = OpenResponse::read_head(plain).expect("answered").read_to_end().expect("whole");
    assert_eq!(answer.status, 200);
    let metrics = server.get("/metrics").text();
    assert!(
        metrics.contains("rill_key_requests_in_flight{key=\"late\"} 1\n"),
        "the late one was first: {metrics}"
    );
    for stream in [running, waiting.pop().expect("one")] {
        assert_eq!(OpenResponse::read_head(stream).expect("answered").status, 200);
    }
}

#[test]
fn a_key_that_floods_the_queue_holds_up_nobody_else() {
    let mut setup = Setup::default();
    setup.engine.max_running = 1;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys");
    let lines = line("anna", KeyLimits::default()) + &line("bert", KeyLimits::default());
    std::fs::write(&path, lines).expect("writes");
    setup.options.keys = ApiKeys::open(&[], Some(&path)).expect("sound lines");
    let server = test_server::start_with(setup);
    server.knobs.slow(Duration::from_millis(10));
    let flood: Vec<TcpStream> =
        (0..8).map(|_| send(&server, "anna", "POST", PATH, &small(40).to_string())).collect();
    server.wait_until("a full queue", |server| server.engine.stats().waiting() >= 6);
    assert_eq!(ask(&server, "bert", small(2)).status, 200);
    let metrics = server.get("/metrics").text();
    let anna = metrics.lines().find_map(|line| line.strip_prefix("rill_key_requests_in_flight{key=\"anna\"} "));
    let left: u32 = anna.and_then(|value| value.parse().ok()).expect("a number");
    assert!(left >= 5, "bert came after {} of anna's 8", 8 - left);
    drop(flood);
    server.assert_idle_soon();
}

#[test]
fn the_file_is_read_again_when_it_changes() {
    let (server, folder) = start(&line("anna", KeyLimits::default()));
    let status = |name: &str| ask(&server, name, small(1)).status;
    let replace = |text: &str| {
        let new = folder.path().join("new");
        std::fs::write(&new, text).expect("writes");
        std::fs::rename(&new, folder.path().join("keys.jsonl")).expect("renames");
    };
    assert_eq!((status("anna"), status("bert")), (200, 401));
    // One more, written in place; with a limit for the one that was there.
    let limits = KeyLimits { requests_per_minute: Some(1000), ..KeyLimits::default() };
    let path = folder.path().join("keys.jsonl");
    std::fs::write(&path, line("anna", limits) + &line("bert", KeyLimits::default())).expect("writes");
    server.wait_until("bert is let in", |_| status("bert") == 200);
    assert_eq!(left(&ask(&server, "anna", small(1)), "requests"), (1000, 999));
    // Nonsense, and no file at all, change nothing.
    replace("nonsense");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((status("anna"), status("bert")), (200, 200));
    std::fs::remove_file(&path).expect("removes");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((status("anna"), status("bert")), (200, 200));
    replace(&line("bert", KeyLimits::default()));
    server.wait_until("anna is not let in", |_| status("anna") == 401);
    assert_eq!(status("bert"), 200);
    let metrics = server.get("/metrics").text();
    assert!(metrics.contains("{key=\"bert\"}") && !metrics.contains("{key=\"anna\"}"), "{metrics}");
    assert!(Path::new(&path).exists());
}
