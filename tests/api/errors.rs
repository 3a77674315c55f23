//! Bad input: the status, OpenAI's shape, the field at fault, and a server that lives on.

use std::io::Write;
use std::time::Duration;

use rill_tests::http::{self, Response};
use serde_json::{Value, json};

use crate::test_server::{self, BODY_BYTES_MAX, TestServer};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Checks the shape and returns the message.
#[track_caller]
fn error_of(response: &Response, status: u16) -> (String, Value, Value) {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/json"));
    let json = response.json();
    assert_eq!(json.as_object().unwrap().len(), 1);
    let error = json["error"].as_object().unwrap();
    assert_eq!(error.keys().map(String::as_str).collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    assert!(error["type"].is_string());
    (error["message"].as_str().unwrap().to_owned(), error["param"].clone(), error["code"].clone())
}

#[track_caller]
fn check(server: &TestServer, path: &str, body: &str, status: u16, param: Value, part: &str) {
    let shown = &body[..body.len().min(100)];
    let (message, got, _) = error_of(&server.post(path, body), status);
    assert!(message.contains(part), "{path} {shown}: {message}");
    assert_eq!(got, param, "{path} {shown}: {message}");
}

#[test]
fn bodies_that_are_not_what_they_should_be() {
    let server = test_server::start();
    for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        for body in ["", "{", "{\"prompt\":", "hello", "{\"tokens\":[]}{}", "\u{0}", "{\"model\":\"\\ud800\"}"] {
            check(&server, path, body, 400, json!(null), "not valid JSON");
        }
    }
    for path in [COMPLETIONS, CHAT] {
        for body in ["[]", "null", "1", "\"x\""] {
            check(&server, path, body, 400, json!(null), "expected a JSON object");
        }
        // In a field we keep; those we pass over are skipped without recursion.
        let nested = format!("{{\"metadata\":{{\"x\":{}{}}}}}", "[".repeat(20_000), "]".repeat(20_000));
        check(&server, path, &nested, 400, json!(null), "recursion limit");
    }
    server.assert_idle_soon();
}

#[test]
fn completions_refuse() {
    let server = test_server::start();
    for (body, param, part) in [
        (json!({}), json!("prompt"), "prompt must not be empty"),
        (json!({"prompt": null}), json!("prompt"), "prompt must not be empty"),
        (json!({"prompt": ""}), json!("prompt"), "prompt must not be empty"),
        (json!({"prompt": []}), json!("prompt"), "prompt must not be empty"),
        (json!({"prompt": [[]]}), json!("prompt"), "prompt must not be empty"),
        (json!({"prompt": ["a", ""]}), json!("prompt"), "prompt must not be empty"),
        (json!({"prompt": 5}), json!("prompt"), "expected a string, an array of strings"),
        (json!({"prompt": {"a": 1}}), json!("prompt"), "expected a string, an array of strings"),
        (json!({"prompt": [1, "a"]}), json!("prompt"), "mixed"),
        (json!({"prompt": [263]}), json!("prompt"), "263 is not a token id; the vocabulary has ids 0 to 262"),
        (json!({"prompt": [-1]}), json!("prompt[0]"), "-1 is not a token id"),
        (json!({"prompt": "a", "temperature": "hot"}), json!("temperature"), "invalid type: string"),
        (json!({"prompt": "a", "temperature": -1}), json!("temperature"), "between 0 and 2, not -1"),
        (json!({"prompt": "a", "max_tokens": -3}), json!("max_tokens"), "not -3"),
        (json!({"prompt": "a", "max_tokens": 1.5}), json!("max_tokens"), "floating point"),
        (json!({"prompt": "a", "max_tokens": 100_000}), json!("max_tokens"), "context length is 512 tokens"),
        (json!({"prompt": "a", "max_tokens": u64::MAX}), json!("max_tokens"), "invalid value"),
        (json!({"prompt": "a", "n": 0}), json!("n"), "between 1 and 64"),
        (json!({"prompt": "a", "n": 1_000_000}), json!("n"), "between 1 and 64"),
        (json!({"prompt": vec!["a"; 257]}), json!("n"), "at most 256 choices"),
        (json!({"prompt": "a", "stop": ""}), json!("stop"), "stop[0] must be 1 to"),
        (json!({"prompt": "a", "stream": "yes"}), json!("stream"), "expected a boolean"),
        (json!({"prompt": "a", "logprobs": 21}), json!("logprobs"), "between 0 and 20"),
        (json!({"prompt": "a", "logprobs": true}), json!("logprobs"), "invalid type: boolean"),
        (json!({"prompt": "a", "logit_bias": {"999": 1}}), json!("logit_bias"), "999 is not a token id"),
        (json!({"prompt": "a", "logit_bias": {"9": 1000}}), json!("logit_bias"), "between -100 and 100"),
        (json!({"prompt": "a", "model": 5}), json!("model"), "invalid type"),
        (
            json!({"prompt": "a", "suffix": "x"}),
            json!("suffix"),
            "suffix needs a model with fill-in-the-middle tokens",
        ),
        (json!({"prompt": "a", "guided_json": 5}), json!("guided_json"), "an object or true"),
        (json!({"prompt": "a", "use_beam_search": true}), json!("use_beam_search"), "not supported"),
        (json!({"prompt": "a", "response_format": {"type": "yaml"}}), json!("response_format.type"), "not `yaml`"),
    ] {
        check(&server, COMPLETIONS, &body.to_string(), 400, param, part);
    }
    server.assert_idle_soon();
}

#[test]
fn chat_refuses() {
    let server = test_server::start();
    let hi = json!([{"role": "user", "content": "hi"}]);
    for (body, param, part) in [
        (json!({}), json!("messages"), "messages must hold 1 to 4096 messages, not 0"),
        (json!({"messages": []}), json!("messages"), "messages must hold 1 to 4096 messages, not 0"),
        (json!({"messages": "hi"}), json!("messages"), "expected an array"),
        (json!({"messages": [{"content": "hi"}]}), json!("messages[0]"), "missing field `role`"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), json!("messages[0].role"), "not `robot`"),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            json!("messages[0].content"),
            "expected a string or an array",
        ),
        (json!({"messages": [{"role": "user"}]}), json!("messages[0].content"), "is missing"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
            json!("messages[0].content"),
            "messages[0].content[0] of type `image_url` is not supported by this server yet",
        ),
        (
            json!({"messages": hi, "tools": [{"type": "function"}]}),
            json!("tools"),
            "tools[0].function.name is missing",
        ),
        (json!({"messages": hi, "tool_choice": "required"}), json!("tool_choice"), "needs tools"),
        (json!({"messages": hi, "functions": [{"name": "f"}]}), json!("functions"), "not supported"),
        (
            json!({"messages": hi, "response_format": {"type": "json_schema"}}),
            json!("response_format.json_schema"),
            "is missing",
        ),
        (json!({"messages": hi, "audio": {"voice": "a"}}), json!("audio"), "not supported"),
        (json!({"messages": hi, "modalities": ["audio"]}), json!("modalities"), "not supported"),
        (json!({"messages": hi, "prediction": {}}), json!("prediction"), "not supported"),
        (json!({"messages": hi, "echo": true}), json!("echo"), "not supported"),
        (json!({"messages": hi, "top_logprobs": 3}), json!("top_logprobs"), "needs logprobs to be true"),
        (json!({"messages": hi, "logprobs": true, "top_logprobs": 21}), json!("top_logprobs"), "between 0 and 20"),
        (json!({"messages": hi, "logprobs": 1}), json!("logprobs"), "expected a boolean"),
        (json!({"messages": hi, "chat_template": "x"}), json!("chat_template"), "--trust-request-chat-template"),
    ] {
        check(&server, CHAT, &body.to_string(), 400, param, part);
    }
    for body in [
        json!({"messages": hi, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none", "max_tokens": 1}),
        json!({"messages": hi, "tools": [], "response_format": {"type": "text"}, "store": false, "max_tokens": 1}),
        json!({"messages": hi, "user": "u", "metadata": {"k": "v"}, "some_new_field": [1], "max_tokens": 1}),
    ] {
        server.ok(CHAT, body);
    }
}

#[test]
fn prompts_beyond_the_context_are_told_both_numbers() {
    let server = test_server::start();
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": "x".repeat(600)})),
        (COMPLETIONS, json!({"prompt": vec![5; 600]})),
        (CHAT, json!({"messages": [{"role": "user", "content": "x".repeat(600)}]})),
        // So long that it is not even tokenised.
        (COMPLETIONS, json!({"prompt": "x".repeat(50_000)})),
    ] {
        let (message, _, code) = error_of(&server.post(path, &body.to_string()), 400);
        assert_eq!(code, "context_length_exceeded");
        assert!(message.contains("512") && (message.contains("6") || message.contains("50000")), "{message}");
    }
    server.assert_idle_soon();
}

#[test]
fn unknown_models_routes_and_methods() {
    let server = test_server::start();
    let hi = json!([{"role": "user", "content": "hi"}]);
    for (path, body) in [
        (COMPLETIONS, json!({"model": "gpt-4", "prompt": "a"})),
        (CHAT, json!({"model": "gpt-4", "messages": hi})),
        ("/tokenize", json!({"model": "gpt-4", "prompt": "a"})),
    ] {
        let (message, param, code) = error_of(&server.post(path, &body.to_string()), 404);
        assert!(message.contains("gpt-4") && message.contains("org/tiny"), "{message}");
        assert_eq!((param, code), (json!("model"), json!("model_not_found")));
    }
    error_of(&server.get("/v1/models/gpt-4"), 404);
    for path in ["/nothing", "/v1", "/v1/", "/v1/completions/", "/v1/images"] {
        let (message, _, _) = error_of(&server.get(path), 404);
        assert!(message.contains(path), "{message}");
    }
    for (method, path) in
        [("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/v1/models"), ("PUT", "/health"), ("POST", "/")]
    {
        let response = http::call(server.address, method, path, "").unwrap();
        let (message, _, _) = error_of(&response, 405);
        assert!(message.contains(method), "{message}");
        assert!(response.header("allow").is_some());
    }
}

#[test]
fn bodies_are_bounded() {
    let server = test_server::start();
    for size in [BODY_BYTES_MAX + 1, 10 << 20] {
        let body = json!({"prompt": "x".repeat(size)}).to_string();
        let (message, _, _) = error_of(&server.post(COMPLETIONS, &body), 413);
        assert!(message.contains(&BODY_BYTES_MAX.to_string()), "{message}");
    }
    // Chunked, with no length announced.
    let mut bytes =
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..80 {
        bytes.extend(format!("{:x}\r\n{}\r\n", 1024, "x".repeat(1024)).into_bytes());
    }
    bytes.extend(b"0\r\n\r\n");
    assert!(server.raw(&bytes).starts_with("HTTP/1.1 413 "));
}

#[test]
fn content_types() {
    let server = test_server::start();
    let ask = |kind: &str| {
        let body = r#"{"prompt":"a","max_tokens":1}"#;
        server.raw(
            format!(
                "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{kind}Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
    };
    assert!(ask("").starts_with("HTTP/1.1 200 "));
    assert!(ask("Content-Type: application/json; charset=utf-8\r\n").starts_with("HTTP/1.1 200 "));
    assert!(ask("Content-Type: text/plain\r\n").starts_with("HTTP/1.1 415 "));
}

#[test]
fn half_sent_requests_end_in_bounded_time() {
    let server = test_server::start();
    let start = std::time::Instant::now();
    // A head that never ends is cut off; a body that never ends is answered.
    server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n");
    let answer =
        server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"prompt\":");
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("did not arrive within 1 s"), "{answer}");
    assert!(start.elapsed() < Duration::from_secs(10));
    // A body that breaks off leaves nothing behind.
    let mut stream = http::connect(server.address, Duration::from_secs(5)).unwrap();
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{").unwrap();
    drop(stream);
    assert!(server.raw(b"nonsense\r\n\r\n").starts_with("HTTP/1.1 400 "));
    server.ok(COMPLETIONS, json!({"prompt": "a", "max_tokens": 1}));
    server.assert_idle_soon();
}
