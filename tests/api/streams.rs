//! Streams: every frame's exact shape, and that deltas add up to the answer that is not streamed.

use std::collections::BTreeMap;

use rill_tests::http;
use serde_json::{Value, json};

use crate::test_server::{self, TestServer};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn with(mut body: Value, extra: Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// Each choice's text, all deltas together, and its finish reason.
fn gather(events: &[Value], text: impl Fn(&Value) -> Option<&str>) -> BTreeMap<u64, (String, Option<String>)> {
    let mut choices: BTreeMap<u64, (String, Option<String>)> = BTreeMap::new();
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let (gathered, reason) = choices.entry(choice["index"].as_u64().unwrap()).or_default();
        assert!(reason.is_none(), "a delta after the last: {choice}");
        gathered.push_str(text(choice).unwrap_or_default());
        *reason = choice["finish_reason"].as_str().map(str::to_owned);
    }
    choices
}

fn frames(server: &TestServer, path: &str, body: &Value) -> String {
    let response = http::call(server.address, "POST", path, &body.to_string()).unwrap();
    assert_eq!(response.status, 200, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    assert_eq!(response.header("cache-control"), Some("no-cache"));
    assert_eq!(response.header("content-encoding"), None);
    let text = response.text();
    // The parts that differ from call to call.
    let id = text.split("\"id\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned();
    let created = text.split("\"created\":").nth(1).and_then(|rest| rest.split(',').next()).unwrap().to_owned();
    text.replace(&id, "ID").replace(&format!("\"created\":{created}"), "\"created\":0")
}

#[test]
fn completion_frames_byte_for_byte() {
    let server = test_server::start();
    let body = json!({"prompt": "a", "temperature": 0, "max_tokens": 2, "stream": true});
    let head = r#"data: {"id":"ID","object":"text_completion","created":0,"model":"org/tiny","system_fingerprint":"rill_test","choices":["#;
    let choice = |text: &str, reason: &str| {
        format!(r#"{head}{{"index":0,"text":"{text}","logprobs":null,"finish_reason":{reason}}}]"#)
    };
    assert_eq!(
        frames(&server, COMPLETIONS, &body),
        format!(
            "{}}}\n\n{}}}\n\n{}}}\n\ndata: [DONE]\n\n",
            choice("E", "null"),
            choice("i", "null"),
            choice("", "\"length\"")
        )
    );
    let body = with(body, json!({"stream_options": {"include_usage": true}}));
    assert_eq!(
        frames(&server, COMPLETIONS, &body),
        format!(
            "{},\"usage\":null}}\n\n{},\"usage\":null}}\n\n{},\"usage\":null}}\n\n{head}],\"usage\":{}}}\n\ndata: [DONE]\n\n",
            choice("E", "null"),
            choice("i", "null"),
            choice("", "\"length\""),
            r#"{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"prompt_tokens_details":{"cached_tokens":0}}"#
        )
    );
}

#[test]
fn chat_frames_byte_for_byte() {
    let server = test_server::start();
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": true,
                      "logit_bias": {"34": 100}});
    let head = r#"data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"org/tiny","system_fingerprint":"rill_test","choices":[{"index":0,"#;
    assert_eq!(
        frames(&server, CHAT, &body),
        [
            head,
            r#""delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
            "\n\n",
            head,
            r#""delta":{"content":"\""},"logprobs":null,"finish_reason":null}]}"#,
            "\n\n",
            head,
            r#""delta":{},"logprobs":null,"finish_reason":"length"}]}"#,
            "\n\ndata: [DONE]\n\n",
        ]
        .concat()
    );
}

#[test]
fn deltas_add_up_to_the_whole() {
    let server = test_server::start();
    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 70, "seed": 3});
    let completion = json!({"prompt": "abc", "max_tokens": 70, "seed": 3});
    for extra in [
        json!({}),
        json!({"temperature": 0}),
        json!({"temperature": 0, "stop": ["says", "🏞️ x"]}),
        json!({"temperature": 0, "stop": "川 🏞", "include_stop_str_in_output": true}),
        json!({"temperature": 0, "max_tokens": 7}),
        json!({"temperature": 0, "max_tokens": 19}),
        json!({"temperature": 0, "max_tokens": 1}),
        json!({"n": 3}),
    ] {
        let whole = server.ok(COMPLETIONS, with(completion.clone(), extra.clone()));
        let events =
            server.events(COMPLETIONS, with(with(completion.clone(), extra.clone()), json!({"stream": true})));
        let choices = gather(&events, |choice| choice["text"].as_str());
        for choice in whole["choices"].as_array().unwrap() {
            let (text, reason) = &choices[&choice["index"].as_u64().unwrap()];
            assert_eq!(choice["text"], *text, "{extra}");
            assert_eq!(choice["finish_reason"].as_str(), reason.as_deref(), "{extra}");
        }
        let whole = server.ok(CHAT, with(chat.clone(), extra.clone()));
        let events = server.events(CHAT, with(with(chat.clone(), extra.clone()), json!({"stream": true})));
        let choices = gather(&events, |choice| choice["delta"]["content"].as_str());
        assert_eq!(choices.len(), whole["choices"].as_array().unwrap().len());
        for choice in whole["choices"].as_array().unwrap() {
            let (text, reason) = &choices[&choice["index"].as_u64().unwrap()];
            assert_eq!(choice["message"]["content"], *text, "{extra}");
            assert_eq!(choice["finish_reason"].as_str(), reason.as_deref(), "{extra}");
        }
    }
}

#[test]
fn roles_come_once_and_reasons_last() {
    let server = test_server::start();
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "n": 2, "stream": true});
    let mut seen: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
    for event in server.events(CHAT, body) {
        assert!(event.get("usage").is_none());
        for choice in event["choices"].as_array().unwrap() {
            seen.entry(choice["index"].as_u64().unwrap()).or_default().push(choice.clone());
        }
    }
    assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [0, 1]);
    for choices in seen.values() {
        assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
        assert!(choices[1..].iter().all(|choice| choice["delta"].get("role").is_none()));
        let (last, earlier) = choices.split_last().unwrap();
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
        assert!(earlier.iter().all(|choice| choice["finish_reason"].is_null()));
    }
}

#[test]
fn choices_interleave() {
    let server = test_server::start();
    // Slow enough that nothing is gathered into one write.
    server.knobs.slow(std::time::Duration::from_millis(3));
    let body = json!({"prompt": ["a", "bb"], "n": 2, "max_tokens": 12, "temperature": 0, "stream": true});
    let events = server.events(COMPLETIONS, body);
    let order: Vec<u64> = events.iter().map(|event| event["choices"][0]["index"].as_u64().unwrap()).collect();
    let switches = order.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(switches > 12, "{order:?}");
    let choices = gather(&events, |choice| choice["text"].as_str());
    assert_eq!(choices.len(), 4);
    assert_eq!(choices[&0].0, choices[&1].0);
    assert_ne!(choices[&1].0, choices[&2].0, "index = prompt * n + j");
    assert_eq!(choices[&2].0, choices[&3].0);
}

#[test]
fn usage_comes_once_at_the_end() {
    let server = test_server::start();
    let body = json!({"prompt": ["ab", "c"], "n": 2, "max_tokens": 3, "stream": true,
                      "stream_options": {"include_usage": true}});
    let events = server.events(COMPLETIONS, body);
    let (last, earlier) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"],
        json!({"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15,
               "prompt_tokens_details": {"cached_tokens": 0}})
    );
    assert!(earlier.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some()));
}

#[test]
fn streamed_logprobs_add_up_to_the_whole() {
    let server = test_server::start();
    let body = json!({"prompt": "hello ä", "max_tokens": 30, "temperature": 0, "logprobs": 2});
    for extra in [json!({}), json!({"echo": true}), json!({"stop": "says"})] {
        let body = with(body.clone(), extra.clone());
        let whole = server.ok(COMPLETIONS, body.clone())["choices"][0]["logprobs"].clone();
        let mut gathered = json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []});
        let mut text = String::new();
        for event in server.events(COMPLETIONS, with(body.clone(), json!({"stream": true}))) {
            let choice = &event["choices"][0];
            text.push_str(choice["text"].as_str().unwrap());
            for (key, values) in choice["logprobs"].as_object().into_iter().flatten() {
                gathered[key].as_array_mut().unwrap().extend(values.as_array().unwrap().clone());
            }
        }
        assert_eq!(gathered, whole, "{extra}");
        assert_eq!(text.starts_with("hello ä"), extra["echo"] == true);
    }
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30, "temperature": 0,
                      "logprobs": true, "top_logprobs": 3});
    let whole = server.ok(CHAT, body.clone())["choices"][0]["logprobs"]["content"].clone();
    let streamed: Vec<Value> = server
        .events(CHAT, with(body, json!({"stream": true})))
        .iter()
        .flat_map(|event| event["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(json!(streamed), whole);
}

#[test]
fn each_token_is_sent_at_once() {
    let server = test_server::start();
    server.knobs.slow(std::time::Duration::from_millis(40));
    let body = json!({"prompt": "a", "max_tokens": 10, "temperature": 0, "stream": true}).to_string();
    let mut response = http::open(server.address, "POST", COMPLETIONS, &body).unwrap();
    let mut pending = Vec::new();
    let mut arrivals = Vec::new();
    while response.next_event(&mut pending).unwrap().is_some() {
        arrivals.push(std::time::Instant::now());
    }
    let spread = arrivals[9] - arrivals[0];
    assert!(spread >= std::time::Duration::from_millis(250), "ten tokens of 40 ms came within {spread:?}");
}
