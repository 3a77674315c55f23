//! `response_format`, `structured_outputs` and `guided_*`: whatever the runner would say, the text matches.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn body(extra: Value) -> Value {
    let mut body = json!({"prompt": "x", "max_tokens": 200, "temperature": 1, "seed": 5});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn complete(server: &TestServer, extra: Value) -> (String, String) {
    let answer = server.ok(COMPLETIONS, body(extra));
    let choice = &answer["choices"][0];
    (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    })
}

#[track_caller]
fn assert_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let fields = value.as_object().unwrap();
    assert_eq!(fields.len(), 3, "{text}");
    assert!(fields["name"].as_str().unwrap().chars().count() <= 8, "{text}");
    assert!(fields["age"].as_u64().unwrap() <= 150, "{text}");
    assert!(fields["tags"].as_array().unwrap().iter().all(|tag| tag == "a" || tag == "b"), "{text}");
}

#[test]
fn every_kind_holds() {
    let server = test_server::start();
    for seed in 0..5 {
        for extra in [
            json!({"guided_json": person()}),
            json!({"guided_json": person().to_string()}),
            json!({"structured_outputs": {"json": person(), "disable_any_whitespace": true}}),
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": person(), "strict": true}}}),
        ] {
            let mut extra = extra;
            extra["seed"] = json!(seed);
            let (text, reason) = complete(&server, extra);
            assert_person(&text);
            assert_eq!(reason, "stop");
        }
        let (text, reason) = complete(&server, json!({"seed": seed, "guided_regex": "[ab]{3}-[0-9]+x"}));
        let (letters, rest) = text.split_once('-').unwrap();
        assert!(letters.len() == 3 && letters.chars().all(|c| "ab".contains(c)), "{text}");
        if reason == "stop" {
            let digits = rest.strip_suffix('x').unwrap();
            assert!(!digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit()), "{text}");
        }
        let choices = ["yes", "no", "say \"perhaps\"\n"];
        let (text, reason) = complete(&server, json!({"seed": seed, "guided_choice": choices}));
        assert!(choices.contains(&text.as_str()) && reason == "stop", "{text:?} {reason}");
        for grammar in [
            "start: pair+ \".\"\npair: \"<\" /[a-c]/ \">\"",
            "root ::= pair+ \".\"\npair ::= \"<\" [a-c] \">\" # GBNF",
        ] {
            let (text, reason) =
                complete(&server, json!({"seed": seed, "structured_outputs": {"grammar": grammar}}));
            let pairs = if reason == "stop" { text.strip_suffix('.').unwrap() } else { &text };
            assert!(
                pairs.len() >= 3
                    && pairs.bytes().enumerate().all(|(at, byte)| match at % 3 {
                        0 => byte == b'<',
                        1 => (b'a'..=b'c').contains(&byte),
                        _ => byte == b'>',
                    }),
                "{text}"
            );
        }
    }
    // An object of whatever the runner likes: it may not find the end, but never leaves the path.
    let (text, reason) = complete(&server, json!({"response_format": {"type": "json_object"}}));
    assert!(text.starts_with('{'), "{text}");
    if reason == "stop" {
        assert!(serde_json::from_str::<Value>(&text).unwrap().is_object());
    }
    server.assert_idle_soon();
}

#[test]
fn other_options_go_with_it() {
    let server = test_server::start();
    let messages = json!([{"role": "user", "content": "hi"}]);
    let format = json!({"type": "json_schema", "json_schema": {"name": "p", "schema": person()}});
    let request = json!({"messages": messages, "response_format": format, "n": 4, "seed": 3, "max_tokens": 150,
                         "logprobs": true, "top_logprobs": 2});
    let answer = server.ok(CHAT, request.clone());
    let texts: Vec<&str> =
        answer["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap()).collect();
    texts.iter().for_each(|text| assert_person(text));
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
    // Log-probabilities are the model's own: a token the grammar forced may be far from the most likely.
    let entries = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(entries.iter().any(|entry| entry["token"] != entry["top_logprobs"][0]["token"]));

    let mut streamed = request.clone();
    streamed["stream"] = json!(true);
    let mut joined = vec![String::new(); 4];
    for event in server.events(CHAT, streamed) {
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            joined[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        }
    }
    assert_eq!(joined, texts);
    // The same alone as among three others.
    let mut alone = request;
    alone["n"] = json!(1);
    assert_eq!(server.ok(CHAT, alone)["choices"][0]["message"]["content"], texts[0]);

    let (text, reason) = complete(&server, json!({"guided_choice": ["one,two"], "stop": ","}));
    assert_eq!((text.as_str(), reason.as_str()), ("one", "stop"));
    let (text, reason) = complete(&server, json!({"guided_choice": ["one,two"], "max_tokens": 2}));
    assert_eq!((text.as_str(), reason.as_str()), ("on", "length"));
    // A minimum holds while the grammar leaves a choice.
    let (text, _) = complete(&server, json!({"guided_regex": "a{1,9}", "min_tokens": 7}));
    assert!((7..=9).contains(&text.len()), "{text}");
    let (text, reason) = complete(&server, json!({"guided_regex": "a{1,9}", "ignore_eos": true}));
    assert_eq!((text.as_str(), reason.as_str()), ("aaaaaaaaa", "stop"));
    let (text, reason) = complete(&server, json!({"guided_choice": ["end"], "min_tokens": 50}));
    assert_eq!((text.as_str(), reason.as_str()), ("end", "stop"));
}

#[test]
fn a_hostile_grammar_is_refused_within_a_second() {
    let mut setup = Setup::default();
    setup.options.body.bytes_max = 1 << 20;
    let server = test_server::start_with(setup);
    let chain = |length: usize| {
        let mut defs = serde_json::Map::new();
        for at in 0..length {
            defs.insert(format!("d{at}"), json!({"allOf": [{"$ref": format!("#/$defs/d{}", at + 1)}]}));
        }
        defs.insert(format!("d{length}"), json!({"type": "integer"}));
        json!({"$ref": "#/$defs/d0", "$defs": defs})
    };
    let wide: Vec<Value> = (0..400)
        .map(|at| json!({"type": "object", "properties": {format!("k{at}"): {"type": "string", "pattern": "(a|b)*c{1,50}"}}}))
        .collect();
    for (what, extra) in [
        ("deep references", json!({"guided_json": chain(900)})),
        ("a huge repetition", json!({"guided_regex": "((a{1,1000}){1,1000}){1,1000}"})),
        ("alternatives with overlaps", json!({"guided_json": {"allOf": wide.clone(), "anyOf": wide}})),
        ("an endless string", json!({"guided_json": {"type": "string", "minLength": 1_000_000_000}})),
        (
            "a wide array",
            json!({"guided_json": {"type": "array", "items": {"type": "integer"}, "minItems": 10_000_000}}),
        ),
        (
            "nested groups",
            json!({"structured_outputs": {"grammar": format!("start: {}\"x\"{}", "(".repeat(20_000), ")".repeat(20_000))}}),
        ),
        ("left recursion", json!({"structured_outputs": {"grammar": "start: start"}})),
        ("nothing", json!({"structured_outputs": {"grammar": ""}})),
        ("not a grammar", json!({"structured_outputs": {"grammar": "\u{0}\u{0}%%%"}})),
        ("never satisfied", json!({"guided_json": {"allOf": [{"type": "string"}, {"type": "integer"}]}})),
        ("a bad reference", json!({"guided_json": {"$ref": "#/$defs/nowhere"}})),
        ("a remote reference", json!({"guided_json": {"$ref": "http://localhost:1/schema"}})),
        ("a lookahead", json!({"guided_regex": "(?=a)b"})),
    ] {
        let start = Instant::now();
        let response = server.post(COMPLETIONS, &json!({"prompt": "x", "max_tokens": 3, "structured_outputs": extra.get("structured_outputs"), "guided_json": extra.get("guided_json"), "guided_regex": extra.get("guided_regex")}).to_string());
        let elapsed = start.elapsed();
        println!(
            "{what}: {} after {elapsed:?}: {}",
            response.status,
            &response.text()[..response.text().len().min(300)]
        );
        assert!(elapsed < Duration::from_secs(1), "{what}: {elapsed:?}");
        if response.status != 200 {
            assert_eq!(response.status, 400, "{what}: {}", response.text());
            let error = &response.json()["error"];
            let param = error["param"].as_str().unwrap();
            assert!(param.starts_with("guided_") || param == "structured_outputs", "{what}: {error}");
            assert!(error["message"].as_str().unwrap().starts_with(param), "{what}: {error}");
        }
    }
    assert_person(&complete(&server, json!({"guided_json": person()})).0);
    server.assert_idle_soon();
}

#[test]
fn preemption_changes_nothing() {
    let texts = |blocks: usize| {
        let mut setup = Setup::default();
        setup.engine.num_blocks = blocks;
        let server = test_server::start_with(setup);
        let answer = server.ok(COMPLETIONS, body(json!({"n": 8, "guided_json": person()})));
        let texts: Vec<String> =
            answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect();
        (texts, server.engine.stats().preemptions.get())
    };
    let (roomy, none) = texts(256);
    let (tight, some) = texts(20);
    assert!(none == 0 && some > 0, "{none} {some}");
    assert_eq!(roomy, tight);
    roomy.iter().for_each(|text| assert_person(text));
}

#[test]
fn what_grammars_take_is_counted() {
    let server = test_server::start();
    let value = |name: &str| -> f64 {
        let page = server.get("/metrics").text();
        let line = page.lines().find(|line| line.starts_with(&format!("{name}{{")));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{name}: {page}"))
    };
    complete(&server, json!({}));
    assert_eq!((value("rill_grammar_tokens_total"), value("rill_grammar_seconds_total")), (0.0, 0.0));
    let without = value("rill_step_seconds_total");
    assert!(without > 0.0);
    let answer = server.ok(COMPLETIONS, body(json!({"guided_json": person(), "n": 2})));
    assert_eq!(value("rill_grammar_tokens_total"), answer["usage"]["completion_tokens"].as_f64().unwrap());
    let (grammars, steps) = (value("rill_grammar_seconds_total"), value("rill_step_seconds_total") - without);
    assert!(grammars > 0.0 && grammars < steps, "{grammars} s of {steps} s");
}

#[test]
fn structured_outputs_by_kind() {
    let server = test_server::start();
    let text = |outputs: Value| complete(&server, json!({"structured_outputs": outputs})).0;
    assert_eq!(text(json!({"regex": "a{3}"})), "aaa");
    assert!(["left", "right"].contains(&text(json!({"choice": ["left", "right"]})).as_str()));
    let one = json!({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2});
    let spaced = text(json!({"json": one, "whitespace_pattern": " {2}"}));
    assert!(spaced.contains("  ") && spaced.replace(' ', "") == "[1,1]", "{spaced}");
    assert_eq!(text(json!({"json": one, "disable_any_whitespace": true})), "[1,1]");
    assert!(text(json!({"json_object": true})).starts_with('{'));
    for (outputs, part) in [
        (json!({"structural_tag": "{}"}), "structural_tag is not supported"),
        (
            json!({"json": one, "disable_additional_properties": true}),
            "disable_additional_properties is not supported",
        ),
        (json!({"regex": "a", "choice": ["b"]}), "only one of"),
    ] {
        let refused = server.post(COMPLETIONS, &body(json!({"structured_outputs": outputs})).to_string());
        assert_eq!(refused.status, 400, "{outputs}: {}", refused.text());
        assert!(refused.text().contains(part), "{}", refused.text());
    }
}
