//! `/v1/responses`: shapes, events, going on from a kept response, tools, errors.

use rill_tests::http;
use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};

const PATH: &str = "/v1/responses";

fn server() -> TestServer {
    let mut setup = Setup::default();
    setup.engine.context_len = 2048;
    test_server::start_with(setup)
}

fn events(server: &TestServer, mut body: Value) -> Vec<Value> {
    body["stream"] = json!(true);
    let text = http::call(server.address, "POST", PATH, &body.to_string()).unwrap().text();
    let events: Vec<Value> = text
        .split("\n\n")
        .filter(|frame| !frame.is_empty())
        .map(|frame| {
            let (name, data) = frame.split_once('\n').unwrap_or_else(|| panic!("{frame}"));
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(format!("event: {}", data["type"].as_str().unwrap()), name);
            data
        })
        .collect();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    events
}

#[test]
fn a_response_and_its_stream_are_the_same() {
    let server = server();
    let body = json!({"input": "hi", "instructions": "s", "temperature": 0, "max_output_tokens": 20, "metadata": {"a": "b"}});
    let answer = server.ok(PATH, body.clone());
    assert_eq!((answer["object"].as_str(), answer["status"].as_str()), (Some("response"), Some("incomplete")));
    assert_eq!(answer["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(answer["metadata"]["a"], "b");
    let item = &answer["output"][0];
    assert_eq!((item["type"].as_str(), item["role"].as_str()), (Some("message"), Some("assistant")));
    let text = item["content"][0]["text"].as_str().unwrap();
    assert!(!text.is_empty() && answer["usage"]["output_tokens"] == 20);

    let events = events(&server, body);
    let names: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(
        names[..4],
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    assert_eq!(
        names[names.len() - 4..],
        [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete"
        ]
    );
    let joined: String = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(joined, text);
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"], item["content"]);
    server.assert_idle_soon();
}

#[test]
fn one_goes_on_from_another() {
    let server = server();
    let first = server.ok(PATH, json!({"input": "hi", "temperature": 0, "max_output_tokens": 5}));
    let id = first["id"].as_str().unwrap();
    let next = json!({"input": "more", "previous_response_id": id, "temperature": 0, "max_output_tokens": 5});
    let second = server.ok(PATH, next.clone());
    let text = first["output"][0]["content"][0]["text"].as_str().unwrap();
    let spelt = server.ok(
        PATH,
        json!({"temperature": 0, "max_output_tokens": 5, "store": false, "input": [
        {"role": "user", "content": "hi"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]},
        {"role": "user", "content": [{"type": "input_text", "text": "more"}]}]}),
    );
    assert_eq!(second["output"][0]["content"], spelt["output"][0]["content"]);
    assert_eq!(second["usage"]["input_tokens"], spelt["usage"]["input_tokens"]);
    assert_eq!(server.get(&format!("{PATH}/{id}")).json(), first);
    let gone = |id: &Value| server.get(&format!("{PATH}/{}", id.as_str().unwrap())).status;
    assert_eq!((gone(&second["id"]), gone(&spelt["id"])), (200, 404), "what is not to be stored is not");
    let deleted = http::call(server.address, "DELETE", &format!("{PATH}/{id}"), "").unwrap().json();
    assert_eq!(deleted["deleted"], true);
    let response = server.post(PATH, &next.to_string());
    assert_eq!((response.status, &response.json()["error"]["param"]), (404, &json!("previous_response_id")));
}

#[test]
fn functions_are_called_and_formats_hold() {
    let server = server();
    let tools = json!([{"type": "function", "name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": false}}]);
    let body = json!({"input": "hi", "tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "max_output_tokens": 200, "store": true});
    let answer = server.ok(PATH, body.clone());
    let call = &answer["output"][0];
    assert_eq!((call["type"].as_str(), call["name"].as_str()), (Some("function_call"), Some("weather")));
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["city"].is_string());
    // The result goes back by id of the call.
    let result = json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}]);
    let next =
        server.ok(PATH, json!({"input": result, "previous_response_id": answer["id"], "max_output_tokens": 5}));
    assert_eq!(next["output"][0]["type"], "message");
    let events = events(&server, body);
    let joined: String = events
        .iter()
        .filter(|event| event["type"] == "response.function_call_arguments.delta")
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    let done = events.iter().find(|event| event["type"] == "response.function_call_arguments.done").unwrap();
    assert_eq!(done["arguments"], joined);

    let format = json!({"type": "json_schema", "name": "n", "schema": {"enum": ["a", "b"]}, "strict": true});
    let answer = server.ok(PATH, json!({"input": "hi", "text": {"format": format}}));
    assert_eq!(answer["status"], "completed");
    assert!(["\"a\"", "\"b\""].contains(&answer["output"][0]["content"][0]["text"].as_str().unwrap()));
}

#[test]
fn tokens_of_thoughts_are_told_apart() {
    // The prompt opens the thoughts; the script never closes them, unless the grammar of an answer does.
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n";
    let server = test_server::start_with(Setup { template: Some(template), ..Setup::default() });
    let body = json!({"input": "hi", "max_output_tokens": 9, "temperature": 0});
    let usage = server.ok(PATH, body.clone())["usage"].clone();
    assert_eq!(
        (&usage["output_tokens"], &usage["output_tokens_details"]["reasoning_tokens"]),
        (&json!(9), &json!(9))
    );
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let last = events(&server, streamed).pop().unwrap();
    assert_eq!(last["response"]["usage"]["output_tokens_details"], usage["output_tokens_details"]);
    let plain = self::server().ok(PATH, json!({"input": "hi", "max_output_tokens": 9}));
    assert_eq!(plain["usage"]["output_tokens_details"]["reasoning_tokens"], 0);
}

#[test]
fn what_is_not_done_is_named() {
    let server = server();
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": 5}), "input"),
        (json!({"input": [{"type": "item_reference"}]}), "input"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input"),
        (json!({"input": "a", "background": true}), "background"),
        (json!({"input": "a", "conversation": "c"}), "conversation"),
        (json!({"input": "a", "truncation": "auto"}), "truncation"),
        (json!({"input": "a", "context_management": [{"type": "compaction"}]}), "context_management"),
        (json!({"input": "a", "moderation": "auto"}), "moderation"),
        (json!({"input": "a", "include": ["reasoning.encrypted_content"]}), "include"),
        (json!({"input": "a", "max_tool_calls": 3}), "max_tool_calls"),
        (json!({"input": "a", "text": {"verbosity": "low"}}), "text.verbosity"),
        (json!({"input": "a", "reasoning": {"effort": "high"}}), "reasoning"),
        (json!({"input": "a", "tools": [{"type": "web_search"}]}), "tools"),
        // Nor are fields called as in the API that they are translated to.
        (json!({"input": []}), "input"),
        (json!({"input": {"a": 1}}), "input"),
        (json!({"input": "a".repeat(3000)}), "input"),
        (json!({"input": [{"role": "robot", "content": "a"}], "instructions": "b"}), "input"),
        (json!({"input": "a", "max_output_tokens": -1}), "max_output_tokens"),
        (json!({"input": "a", "max_output_tokens": 100_000}), "max_output_tokens"),
        (json!({"input": "a", "text": {"format": {"type": "yaml"}}}), "text.format.type"),
    ] {
        let response = server.post(PATH, &body.to_string());
        assert_eq!(response.status, 400, "{body}: {}", response.text());
        let error = &response.json()["error"];
        assert_eq!(error["param"], param, "{body}");
        let message = error["message"].as_str().unwrap();
        let named = param == "input" || message.contains(param.split('.').next().unwrap());
        assert!(named && !message.contains("messages") && !message.contains("max_tokens"), "{message}");
        assert!(!message.contains("untagged"), "{message}");
    }
    assert!(server.post(PATH, "[]").text().contains("expected a JSON object, not an array"));
}
