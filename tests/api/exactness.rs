//! Whatever is asked, and wherever the text is cut, what is streamed adds up to what is not; and usage counts tokens.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

use crate::scripted_runner::SCRIPT;
use crate::test_server::{self, Setup, TestServer};
use crate::tiny_tokenizer::IM_END;

const THINKING: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{# <think> #}";
const OPENED: &str = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n";
const CALLING: &str = "{% if tools %}<tool_call>{{ tools }}{% endif %}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}";

/// One to four characters of the script, which greedy decoding is sure to write.
fn stop() -> impl Strategy<Value = String> {
    let count = SCRIPT.chars().count();
    (0..count, 1..5_usize).prop_map(|(from, len)| SCRIPT.chars().cycle().skip(from).take(len).collect())
}

fn shared() -> impl Strategy<Value = Map<String, Value>> {
    let stops = prop::collection::vec(prop_oneof![stop(), "[a-z ]{1,2}"], 0..3);
    let first = (1..4_u32, 0..70_u32, prop_oneof![Just(0.0), Just(1.0)], 0..1000_u32, stops);
    let second = (any::<bool>(), 0..8_u32, prop_oneof![Just(0), Just(28), Just(34)], any::<bool>());
    (first, second).prop_map(|((n, max_tokens, temperature, seed, stops), (include, min, end_bias, skip))| {
        let mut body = Map::new();
        body.insert("n".to_owned(), json!(n));
        body.insert("max_tokens".to_owned(), json!(max_tokens));
        body.insert("temperature".to_owned(), json!(temperature));
        body.insert("seed".to_owned(), json!(seed));
        body.insert("stop".to_owned(), json!(stops));
        body.insert("include_stop_str_in_output".to_owned(), json!(include));
        body.insert("min_tokens".to_owned(), json!(min.min(max_tokens)));
        body.insert("skip_special_tokens".to_owned(), json!(skip));
        if end_bias > 0 {
            body.insert("logit_bias".to_owned(), json!({IM_END.to_string(): end_bias}));
        }
        body
    })
}

/// What a client puts together of one choice.
#[derive(Debug, Default, PartialEq)]
struct Gathered {
    text: String,
    thoughts: String,
    /// Names and arguments.
    calls: Vec<(String, String)>,
    /// Entries of completions' arrays or chat's list, by key.
    logprobs: BTreeMap<String, Vec<Value>>,
    reason: Option<String>,
}

impl Gathered {
    fn add(&mut self, choice: &Value) {
        assert!(self.reason.is_none(), "a delta after the last: {choice}");
        let part = if choice["delta"].is_object() { &choice["delta"] } else { &choice["message"] };
        for text in [&choice["text"], &part["content"]] {
            self.text.push_str(text.as_str().unwrap_or_default());
        }
        self.thoughts.push_str(part["reasoning_content"].as_str().unwrap_or_default());
        for (position, call) in part["tool_calls"].as_array().into_iter().flatten().enumerate() {
            let index = call["index"].as_u64().map_or(position, |index| index as usize);
            if self.calls.len() <= index {
                self.calls.push(Default::default());
            }
            let (name, arguments) = &mut self.calls[index];
            name.push_str(call["function"]["name"].as_str().unwrap_or_default());
            arguments.push_str(call["function"]["arguments"].as_str().unwrap_or_default());
        }
        for (key, entries) in choice["logprobs"].as_object().into_iter().flatten() {
            if let Some(entries) = entries.as_array().filter(|entries| !entries.is_empty()) {
                self.logprobs.entry(key.clone()).or_default().extend(entries.iter().cloned());
            }
        }
        self.reason = choice["finish_reason"].as_str().map(str::to_owned);
    }
}

/// Entries of `key` over all choices.
fn entries(choices: &BTreeMap<u64, Gathered>, key: &str) -> u64 {
    choices.values().map(|choice| choice.logprobs.get(key).map_or(0, Vec::len) as u64).sum()
}

fn gathered(answers: &[Value]) -> BTreeMap<u64, Gathered> {
    let mut choices: BTreeMap<u64, Gathered> = BTreeMap::new();
    for choice in answers.iter().flat_map(|answer| answer["choices"].as_array().expect("choices")) {
        choices.entry(choice["index"].as_u64().expect("an index")).or_default().add(choice);
    }
    choices
}

/// Usage without what the prefix cache held, which differs from call to call.
fn counts(usage: &Value) -> [u64; 3] {
    ["prompt_tokens", "completion_tokens", "total_tokens"].map(|key| usage[key].as_u64().expect("a count"))
}

/// Asks twice, at once and streamed, and returns the choices and the usage both agree on.
fn same(server: &TestServer, path: &str, body: &Map<String, Value>) -> (BTreeMap<u64, Gathered>, [u64; 3]) {
    let whole = server.ok(path, Value::Object(body.clone()));
    let mut streamed = body.clone();
    streamed.insert("stream".to_owned(), json!(true));
    streamed.insert("stream_options".to_owned(), json!({"include_usage": true}));
    let events = server.events(path, Value::Object(streamed));
    let (last, earlier) = events.split_last().expect("usage comes last");
    assert_eq!(counts(&last["usage"]), counts(&whole["usage"]), "{body:?}");
    let choices = gathered(std::slice::from_ref(&whole));
    assert_eq!(gathered(earlier), choices, "{body:?}");
    (choices, counts(&whole["usage"]))
}

fn cases(count: u32) -> TestRunner {
    TestRunner::new(Config { cases: count, failure_persistence: None, ..Config::default() })
}

#[test]
fn completions() {
    let server = test_server::start();
    let own = (any::<bool>(), prop::option::of(0..3_u32), prop::collection::vec("[a-zäé ]{1,5}|hello", 1..3));
    cases(100)
        .run(&(shared(), own), |(mut body, (echo, logprobs, prompts))| {
            body.insert("echo".to_owned(), json!(echo));
            body.insert("logprobs".to_owned(), json!(logprobs));
            body.insert("prompt".to_owned(), json!(prompts));
            let (choices, [prompt, completion, total]) = same(&server, "/v1/completions", &body);
            assert_eq!(total, prompt + completion);
            let n = body["n"].as_u64().unwrap_or(1);
            assert_eq!(choices.len() as u64, n * prompts.len() as u64);
            if logprobs.is_some() {
                let echoed = if echo { prompt * n } else { 0 };
                assert_eq!(
                    entries(&choices, "tokens"),
                    completion + echoed,
                    "an entry for every token that counts: {body:?}"
                );
            }
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
    server.assert_idle_soon();
}

#[test]
fn chats() {
    let server = test_server::start();
    cases(60)
        .run(&(shared(), prop::option::of(0..3_u32)), |(mut body, logprobs)| {
            body.insert("messages".to_owned(), json!([{"role": "user", "content": "hi"}]));
            body.insert("logprobs".to_owned(), json!(logprobs.is_some()));
            body.insert("top_logprobs".to_owned(), json!(logprobs));
            let (choices, [_, completion, _]) = same(&server, "/v1/chat/completions", &body);
            if logprobs.is_some() {
                assert_eq!(entries(&choices, "content"), completion);
            }
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
    server.assert_idle_soon();
}

/// Thoughts, calls and text, as a grammar makes the runner write them, cut wherever tokens, stop strings and the
/// limit cut them.
#[test]
fn thoughts_and_calls() {
    let call =
        r#"<tool_call>\n?\{"name": "(weather|now)", "arguments": \{("a": "[a-z\\é]{0,3}")?\}\}\n?</tool_call>"#;
    let mut seen = [0; 2];
    for (template, pattern) in [
        (THINKING, "[a-z <]{0,6}".to_owned()),
        (OPENED, "[a-z <]{0,6}".to_owned()),
        (CALLING, format!(r"[a-z <]{{0,6}}({call}\n?){{1,2}}[a-z ]{{0,3}}")),
    ] {
        let mut setup = Setup { template: Some(template), ..Setup::default() };
        setup.engine.context_len = 1024;
        let server = test_server::start_with(setup);
        let seen = std::cell::RefCell::new(&mut seen);
        cases(25)
            .run(&(shared(), any::<bool>(), any::<bool>()), |(mut body, logprobs, parallel)| {
                let tools = ["weather", "now"].map(|name| json!({"type": "function", "function": {"name": name}}));
                body.insert("messages".to_owned(), json!([{"role": "user", "content": "hi"}]));
                body.insert("guided_regex".to_owned(), json!(pattern));
                body.insert("logprobs".to_owned(), json!(logprobs));
                if template == CALLING {
                    body.insert("tools".to_owned(), json!(tools));
                    body.insert("parallel_tool_calls".to_owned(), json!(parallel));
                    // Long enough for a call, most of the time, and not stopped by single letters.
                    body.insert("max_tokens".to_owned(), json!(200));
                    body.insert("stop".to_owned(), json!(["é", "now\""]));
                } else {
                    // `<` likely enough for tags to come.
                    body.insert("logit_bias".to_owned(), json!({"60": 3}));
                }
                let (choices, [_, completion, _]) = same(&server, "/v1/chat/completions", &body);
                for choice in choices.values() {
                    seen.borrow_mut()[0] += choice.thoughts.len();
                    seen.borrow_mut()[1] += choice.calls.len();
                }
                if logprobs {
                    assert_eq!(entries(&choices, "content"), completion);
                }
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{error}"));
        server.assert_idle_soon();
    }
    assert!(seen[0] > 100 && seen[1] > 10, "{seen:?}: nothing to tell apart");
}
