//! Anthropic's `/v1/messages`: shapes, events, tools, errors; and the rendering endpoints.

use rill_tests::http;
use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};

const PATH: &str = "/v1/messages";

fn body(extra: Value) -> Value {
    let mut body = json!({"model": test_server::MODEL, "max_tokens": 12, "temperature": 0,
                          "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn weather() -> Value {
    json!([{"name": "weather", "description": "d", "input_schema": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": false}}])
}

/// Names and data of a stream's events.
fn events(server: &TestServer, body: Value) -> Vec<(String, Value)> {
    let text = http::call(server.address, "POST", PATH, &body.to_string()).unwrap().text();
    text.split("\n\n")
        .filter(|frame| !frame.is_empty())
        .map(|frame| {
            let (name, data) = frame.split_once('\n').unwrap_or_else(|| panic!("{frame}"));
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            let name = name.strip_prefix("event: ").unwrap().to_owned();
            assert_eq!(data["type"], name);
            (name, data)
        })
        .collect()
}

#[test]
fn a_message_and_its_stream_are_the_same() {
    let server = test_server::start();
    let answer = server.ok(PATH, body(json!({"system": [{"type": "text", "text": "s"}]})));
    assert!(answer["id"].as_str().unwrap().starts_with("msg"));
    assert_eq!((answer["type"].as_str(), answer["role"].as_str()), (Some("message"), Some("assistant")));
    assert_eq!((answer["stop_reason"].as_str(), &answer["stop_sequence"]), (Some("max_tokens"), &Value::Null));
    assert_eq!(answer["usage"]["output_tokens"], 12);
    let text = answer["content"][0]["text"].as_str().unwrap();
    assert!(!text.is_empty());

    let events = events(&server, body(json!({"system": "s", "stream": true})));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..2], ["message_start", "content_block_start"]);
    assert_eq!(names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let joined: String =
        events.iter().map(|(_, data)| data["delta"]["text"].as_str().unwrap_or_default().to_owned()).collect();
    assert_eq!(joined, text);
    let last = &events[events.len() - 2].1;
    assert_eq!(
        (last["delta"]["stop_reason"].as_str(), last["usage"]["output_tokens"].as_u64()),
        (Some("max_tokens"), Some(12))
    );
    let count = server
        .ok("/v1/messages/count_tokens", json!({"messages": [{"role": "user", "content": "hi"}], "system": "s"}));
    assert_eq!(events[0].1["message"]["usage"]["input_tokens"], count["input_tokens"]);

    let first: String = text.chars().skip(3).take(1).collect();
    let stopped = server.ok(PATH, body(json!({"system": "s", "stop_sequences": ["never", first]})));
    assert_eq!(
        (stopped["stop_reason"].as_str(), stopped["stop_sequence"].as_str()),
        (Some("stop_sequence"), Some(first.as_str()))
    );
    server.assert_idle_soon();
}

#[test]
fn tools_are_used() {
    let mut setup = Setup::default();
    setup.engine.context_len = 2048;
    let server = test_server::start_with(setup);
    let request = json!({"tools": weather(), "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 200, "temperature": 1});
    let answer = server.ok(PATH, body(request.clone()));
    let block = &answer["content"][0];
    assert_eq!(
        (block["type"].as_str(), block["name"].as_str(), answer["stop_reason"].as_str()),
        (Some("tool_use"), Some("weather"), Some("tool_use"))
    );
    assert!(block["input"]["city"] == "Rome" || block["input"]["city"] == "Oslo", "{block}");

    let mut streamed = request;
    streamed["stream"] = json!(true);
    let events = events(&server, body(streamed));
    let input: String = events
        .iter()
        .map(|(_, data)| data["delta"]["partial_json"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert!(serde_json::from_str::<Value>(&input).unwrap()["city"].is_string(), "{input}");

    // The whole exchange goes back in.
    let turns = json!([
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look"}, {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]}, {"type": "text", "text": "so?"}]},
    ]);
    let answer = server.ok(PATH, body(json!({"messages": turns, "tools": weather()})));
    assert_eq!(answer["content"][0]["type"], "text");
}

#[test]
fn thinking_is_the_templates_to_turn_off() {
    let template =
        "{{ 'thinks' if enable_thinking is not defined or enable_thinking else '' }}{{ messages[0].content }}";
    let server = test_server::start_with(Setup { template: Some(template), ..Setup::default() });
    let count = |thinking: Value| {
        server.ok("/v1/messages/count_tokens", body(json!({"thinking": thinking})))["input_tokens"]
            .as_u64()
            .unwrap()
    };
    let shown = count(json!({"type": "enabled", "budget_tokens": 1024}));
    assert_eq!((shown, shown - 6), (count(json!(null)), count(json!({"type": "disabled"}))));
}

#[test]
fn what_is_not_done_is_named() {
    let server = test_server::start();
    for (field, empty, asked) in [
        ("mcp_servers", json!([]), json!([{"type": "url", "url": "x", "name": "y"}])),
        ("container", json!(null), json!("c")),
    ] {
        server.ok(PATH, body(json!({field: empty})));
        let refused = server.post(PATH, &body(json!({field: asked})).to_string());
        assert_eq!(refused.status, 400, "{field}");
        assert!(refused.text().contains(&format!("{field} is not supported")), "{}", refused.text());
    }
}

#[test]
fn errors_have_anthropics_shape() {
    let server = test_server::start();
    for (request, status, kind, part) in [
        (body(json!({"max_tokens": null})), 400, "invalid_request_error", "max_tokens is missing"),
        (body(json!({"model": "other"})), 404, "not_found_error", "`other`"),
        (body(json!({"messages": []})), 400, "invalid_request_error", "at least one message"),
        (
            body(json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]})),
            400,
            "invalid_request_error",
            "`image`",
        ),
        (body(json!({"temperature": 9})), 400, "invalid_request_error", "temperature"),
        (body(json!({"stop_sequences": [""]})), 400, "invalid_request_error", "stop_sequences[0] must be"),
        (
            body(json!({"output_config": {"format": {"type": "yaml"}}})),
            400,
            "invalid_request_error",
            "output_config.format.type must be",
        ),
        (
            body(json!({"messages": [{"role": "user", "content": 5}]})),
            400,
            "invalid_request_error",
            "expected a string or an array of content blocks",
        ),
        (body(json!({"tool_choice": {"type": "x"}})), 400, "invalid_request_error", "tool_choice.type"),
        (
            body(json!({"tools": [{"type": "bash_20250124", "name": "bash"}]})),
            400,
            "invalid_request_error",
            "`bash_20250124`",
        ),
        (json!([]), 400, "invalid_request_error", "expected a JSON object"),
    ] {
        let response = server.post(PATH, &request.to_string());
        assert_eq!(response.status, status, "{request}: {}", response.text());
        let error = response.json();
        assert_eq!((error["type"].as_str(), error["error"]["type"].as_str()), (Some("error"), Some(kind)));
        assert!(error["error"]["message"].as_str().unwrap().contains(part), "{error}");
    }
}

#[test]
fn requests_can_be_rendered() {
    let server = test_server::start();
    let chat = server.ok("/v1/chat/completions/render", json!({"messages": [{"role": "user", "content": "hi"}]}));
    assert_eq!(chat["prompt"], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(chat["token_ids"].as_array().unwrap().len(), 21);
    let text = server.ok("/v1/completions/render", json!({"prompt": ["hello", "a"]}));
    assert_eq!(text["prompts"][0], json!({"prompt": "hello", "count": 1, "token_ids": [259]}));
}

#[test]
fn a_defect_in_a_handler_is_a_500() {
    let server = test_server::start();
    let response = server.get("/broken");
    assert_eq!((response.status, response.json()["error"]["type"].as_str()), (500, Some("server_error")));
    assert!(!response.text().contains("a defect\""), "the panic's words are for the log");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn silence_is_filled_with_comments() {
    let mut setup = Setup::default();
    setup.options.keep_alive = std::time::Duration::from_millis(20);
    let server = test_server::start_with(setup);
    server.knobs.stall();
    let request = json!({"prompt": "a", "max_tokens": 2, "stream": true});
    let mut response = http::open(server.address, "POST", "/v1/completions", &request.to_string()).unwrap();
    for _ in 0..3 {
        let piece = response.next_piece().unwrap().unwrap();
        assert!(String::from_utf8_lossy(&piece).starts_with(": ping\n\n"));
    }
    server.knobs.resume();
    assert_eq!(response.events().unwrap().pop().as_deref(), Some("[DONE]"));
}
