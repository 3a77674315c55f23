//! Random input where clients' text is read: requests, templates, grammars, calls, tokens and stop strings. Nothing may
//! panic, hang or answer 5xx. `corpus/` holds what once did or is likely to. For a long run: `PROPTEST_CASES=100000
//! cargo test -p rill-tests --release --test api fuzz`.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rill_engine::{Detokenizer, StopMatcher, TokenText};
use rill_server::answer::{AnswerFormat, Piece};
use rill_server::chat_template::{ChatTemplate, RenderInput, TemplateMessage};
use rill_server::gbnf;
use rill_server::reasoning::ReasoningFormat;
use rill_server::tools::{Tool, ToolFormat, ToolParser, Tools};
use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};
use crate::tiny_tokenizer::{VOCAB_SIZE, tokenizer};

/// No answer may take longer, on a machine that does other things too.
const TIME_MAX: Duration = Duration::from_secs(8);

/// proptest's own number of cases, which the environment may raise; failures are kept in `corpus/` by hand.
fn runner() -> TestRunner {
    TestRunner::new(Config { failure_persistence: None, ..Config::default() })
}

/// Lines of a corpus file, each a JSON value.
fn corpus(text: &str) -> Vec<Value> {
    let line = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    text.lines().filter(|line| !line.trim().is_empty()).map(line).collect()
}

fn server() -> TestServer {
    let mut setup = Setup { template: Some(test_server::CHATML), ..Setup::default() };
    setup.engine.max_waiting = 512;
    test_server::start_with(setup)
}

/// Sends a body; the answer must be one that the API may give.
fn ask(server: &TestServer, path: &str, body: &[u8]) -> Result<(), TestCaseError> {
    let shown = String::from_utf8_lossy(body);
    let start = Instant::now();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let answer = server.raw(&[head.as_bytes(), body].concat());
    let elapsed = start.elapsed();
    prop_assert!(elapsed < TIME_MAX, "{path} took {elapsed:?}: {shown}");
    let status: u16 = answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
    prop_assert!((200..500).contains(&status), "{path} {shown}: {answer}");
    if status != 200 {
        let (_, text) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let error: Value = serde_json::from_str(text).unwrap_or_default();
        prop_assert!(error["error"]["message"].is_string(), "{path} {shown}: {answer}");
        if !path.starts_with("/v1/messages") {
            let keys = error["error"].as_object().map_or(0, |keys| keys.len());
            prop_assert_eq!(keys, 4, "{} {}: {}", path, shown, answer);
        }
    }
    Ok(())
}

/// Sound requests, of which random ones are made.
fn sound() -> Vec<(&'static str, Value)> {
    let user = json!([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
    let called = json!([
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "r"},
    ]);
    let tools = json!([{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]}}}]);
    let schema = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object",
        "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}, "strict": true}});
    vec![
        (
            "/v1/completions",
            json!({"model": "default", "prompt": "ab", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
                   "min_p": 0.1, "seed": 1, "n": 2, "best_of": 2, "logprobs": 1, "echo": true, "stop": ["x"],
                   "stop_token_ids": [1], "logit_bias": {"65": 1.5}, "stream": false, "metadata": {"a": "b"}}),
        ),
        (
            "/v1/completions",
            json!({"prompt": [[1, 2], [3]], "max_tokens": 2, "prompt_logprobs": 1, "min_tokens": 1}),
        ),
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": "[ab]+"}})),
        ("/v1/completions", json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": true}})),
        (
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 3, "logprobs": true, "top_logprobs": 1, "response_format": schema}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": called, "max_tokens": 3, "tools": tools, "tool_choice": "auto",
                   "parallel_tool_calls": true, "chat_template_kwargs": {"a": [1]}, "documents": [{"text": "t"}]}),
        ),
        ("/v1/chat/completions/render", json!({"messages": user, "add_generation_prompt": true})),
        ("/v1/completions/render", json!({"prompt": ["a", "b"]})),
        (
            "/v1/responses",
            json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
                   "instructions": "i", "max_output_tokens": 3, "store": false, "text": {"format": {"type": "text"}}}),
        ),
        (
            "/v1/messages",
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 3,
                   "system": "s", "stop_sequences": ["x"], "tools": [{"name": "f", "input_schema": {"type": "object"}}],
                   "tool_choice": {"type": "auto"}}),
        ),
        ("/v1/messages/count_tokens", json!({"messages": [{"role": "user", "content": "hi"}]})),
        ("/v1/embeddings", json!({"input": ["a", "b"], "dimensions": 2, "encoding_format": "base64"})),
        ("/tokenize", json!({"prompt": "a b", "return_token_strs": true})),
        ("/detokenize", json!({"tokens": [1, 2]})),
    ]
}

fn odd_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop::sample::select(vec![0, 1, -1, 2, 64, 65, 1 << 31, 1 << 32, i64::MAX, i64::MIN])
            .prop_map(Value::from),
        prop::sample::select(vec![0.0, -0.0, 0.5, -1e300, 1e300, 5e-324, 2.0000001]).prop_map(Value::from),
        Just(json!(u64::MAX)),
        prop::sample::select(vec![
            "",
            "a",
            "\0",
            "\u{feff}",
            "小川🏞️",
            "<|im_end|>",
            "auto",
            "required",
            "function",
            "{\"",
            "]",
            "(a+)+$",
            "%json {",
            "object",
            "{{ x }}",
            "text",
            "json_object",
            "../..",
            "assistant",
        ])
        .prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec(("type|name|function|a|\\$ref|properties|", inner), 0..3)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// Every place in a value.
fn places(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| places(item, format!("{at}/{i}"), found));
        }
        Value::Object(fields) => {
            fields.iter().for_each(|(key, field)| places(field, format!("{at}/{key}"), found))
        }
        _ => {}
    }
    found.push(at);
}

#[test]
fn requests() {
    let server = server();
    for entry in corpus(include_str!("corpus/requests.jsonl")) {
        let (path, body) = (entry["path"].as_str().unwrap(), entry["body"].as_str().unwrap());
        ask(&server, path, body.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
    }
    let sound = sound();
    for (path, body) in &sound {
        assert_eq!(server.post(path, &body.to_string()).status, 200, "{path} {body}");
    }
    let change = (any::<prop::sample::Index>(), odd_value());
    let strategy = (any::<prop::sample::Index>(), prop::collection::vec(change, 1..3));
    runner()
        .run(&strategy, |(which, changes)| {
            let (path, body) = which.get(&sound);
            let mut body = body.clone();
            for (place, value) in changes {
                let mut found = Vec::new();
                places(&body, String::new(), &mut found);
                if let Some(target) = body.pointer_mut(place.get::<String>(&found)) {
                    *target = value;
                }
            }
            ask(&server, path, body.to_string().as_bytes())
        })
        .unwrap_or_else(|error| panic!("{error}"));
    server.assert_idle_soon();
}

/// Bytes cut out of, put into and changed in sound requests: mostly no JSON, or no UTF-8.
#[test]
fn bodies_of_bytes() {
    let server = server();
    let sound = sound();
    let cut = (any::<prop::sample::Index>(), 0..12_usize, prop::collection::vec(any::<u8>(), 0..4));
    runner()
        .run(&(any::<prop::sample::Index>(), prop::collection::vec(cut, 1..3)), |(which, cuts)| {
            let (path, body) = which.get(&sound);
            let mut bytes = body.to_string().into_bytes();
            for (place, len, new) in cuts {
                let from = place.index(bytes.len() + 1);
                let to = bytes.len().min(from + len);
                bytes.splice(from..to, new);
            }
            ask(&server, path, &bytes)
        })
        .unwrap_or_else(|error| panic!("{error}"));
    server.assert_idle_soon();
}

#[test]
fn grammars() {
    let server = server();
    let of = |field: &str, text: &str| {
        let body = json!({"prompt": "a", "max_tokens": 2, field: text}).to_string();
        ask(&server, "/v1/completions", body.as_bytes())
    };
    for entry in corpus(include_str!("corpus/grammars.jsonl")) {
        let text = entry.as_str().unwrap();
        for field in ["guided_grammar", "guided_regex", "guided_json"] {
            of(field, text).unwrap_or_else(|error| panic!("{error}"));
        }
    }
    let part = prop::sample::select(vec![
        "root ::= ",
        "start: ",
        "\"a\"",
        "[a-c]",
        "[^\"\\n]",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{2,3}",
        "{0,}",
        "\n",
        " ",
        "b",
        "b ::= ",
        "b: ",
        "/x+/",
        "\\",
        "#",
        "%json {}",
        "%lark {",
        "}",
        "é",
        "\u{0}",
        "<[5]>",
        "::=",
        "@",
    ]);
    runner()
        .run(&(prop::collection::vec(part, 0..14), any::<bool>()), |(parts, regex)| {
            let text = parts.concat();
            let _ = gbnf::to_lark(&text);
            of(if regex { "guided_regex" } else { "guided_grammar" }, &text)
        })
        .unwrap_or_else(|error| panic!("{error}"));
    server.assert_idle_soon();
}

fn render(source: &str, contents: &[String]) -> Result<(), TestCaseError> {
    let start = Instant::now();
    if let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") {
        let messages: Vec<TemplateMessage> = contents
            .iter()
            .zip(["user", "assistant"].iter().cycle())
            .map(|(content, role)| TemplateMessage::new(role, content.clone()))
            .collect();
        let tools = [json!({"type": "function", "function": {"name": "f"}})];
        for continue_final_message in [false, true] {
            let input = RenderInput {
                messages: &messages,
                tools: Some(&tools),
                add_generation_prompt: !continue_final_message,
                continue_final_message,
                ..RenderInput::default()
            };
            // An error is fine.
            let _ = template.render(&input);
        }
    }
    prop_assert!(start.elapsed() < TIME_MAX, "{}", source);
    Ok(())
}

#[test]
fn templates() {
    let messages = ["a".to_owned(), "{{ x }}<|im_end|>".to_owned()];
    for entry in corpus(include_str!("corpus/templates.jsonl")) {
        render(entry.as_str().unwrap(), &messages).unwrap_or_else(|error| panic!("{error}"));
    }
    let part = prop::sample::select(vec![
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m.content }}",
        "{{ m['role'] | upper }}",
        "{% if m.x is defined %}",
        "{% endif %}",
        "{% set ns = namespace(a=1) %}",
        "{% set ns.a = ns.a + 1 %}",
        "{{ ns.a * 10 ** 30 }}",
        "{{ range(10 ** 9) }}",
        "{% for i in range(100000) %}",
        "{{ m.content.split('a')[-1] }}",
        "{{ m.content[1:-1:0] }}",
        "{{ tools | tojson(indent=4) }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%q%Y%') }}",
        "{% macro f(x) %}",
        "{% endmacro %}",
        "{{ f(f) }}",
        "{{ 1 / 0 }}",
        "{{ 'a' * 1000000000 }}",
        "{%- generation -%}",
        "{{",
        "%}",
        "{#",
        "{{ messages | map(attribute='content') | join }}",
        "{{ none.x.y }}",
        "{{ 'é'[0] ~ '\\u0000' }}",
        "{{ messages[9999999999999].content }}",
    ]);
    let contents = prop::collection::vec(".{0,6}", 0..3);
    runner()
        .run(&(prop::collection::vec(part, 0..9), contents), |(parts, contents)| {
            render(&parts.concat(), &contents)
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Thoughts and calls of any text, whole and in pieces: the same, and nothing lost where there are none.
fn read_answer(format: ToolFormat, text: &str, cuts: &[prop::sample::Index]) -> Result<(), TestCaseError> {
    let schema = json!({"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "array"}}});
    let names = json!([{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "weather", "parameters": schema}}]);
    let tools = Tools::new(names.as_array().map(Vec::as_slice), None, None).expect("sound tools");
    for reasoning in [None, Some((ReasoningFormat::Think, false)), Some((ReasoningFormat::Mistral, true))] {
        let answers = AnswerFormat::new(reasoning, tools.as_ref(), format).expect("random numbers");
        let (whole, _) = answers.message(0, text, "stop");
        let mut places: Vec<usize> =
            cuts.iter().map(|cut| cut.index(text.len() + 1)).filter(|&at| text.is_char_boundary(at)).collect();
        places.extend([0, text.len()]);
        places.sort_unstable();
        let mut reader = answers.reader(0);
        let mut pieces = Vec::new();
        for pair in places.windows(2) {
            pieces.extend(reader.push(&text[pair[0]..pair[1]]));
        }
        pieces.extend(reader.finish());
        let (mut thoughts, mut content, mut calls) =
            (String::new(), String::new(), Vec::<(String, String)>::new());
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => thoughts.push_str(&text),
                Piece::Content(text) => content.push_str(&text),
                Piece::Call { index, name, .. } => {
                    prop_assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                Piece::Arguments { index, text } => calls[index].1.push_str(&text),
            }
        }
        prop_assert_eq!(thoughts, whole.reasoning_content.unwrap_or_default(), "{}", text);
        prop_assert_eq!(content, whole.content.unwrap_or_default(), "{}", text);
        let expected: Vec<(String, String)> = whole
            .tool_calls
            .unwrap_or_default()
            .into_iter()
            .map(|call| (call.function.name, call.function.arguments))
            .collect();
        prop_assert_eq!(calls, expected, "{}", text);
    }
    Ok(())
}

#[test]
fn answers() {
    use ToolFormat::{Hermes, Json, Llama3, Mistral, Pythonic, Qwen3Coder};

    const FORMATS: [ToolFormat; 6] = [Hermes, Qwen3Coder, Llama3, Mistral, Pythonic, Json];
    for entry in corpus(include_str!("corpus/answers.jsonl")) {
        let text = entry.as_str().unwrap();
        for format in FORMATS {
            read_answer(format, text, &[]).unwrap_or_else(|error| panic!("{error}"));
            // Nothing that deep is parsed by recursion.
            let tool = Tool { name: "f".to_owned(), parameters: serde_json::Map::new() };
            let mut parser = ToolParser::new(format, [tool].into(), true);
            let mut deltas = Vec::new();
            parser.push(&text.repeat(2000), &mut deltas);
            parser.finish(&mut deltas);
        }
    }
    let part = prop_oneof![
        prop::sample::select(vec![
            "<think>",
            "</think>",
            "[THINK]",
            "[/THINK]",
            "<tool_call>",
            "</tool_call>",
            "<function=weather>",
            "<parameter=a>\n",
            "<parameter=n>\n",
            "\n</parameter>\n",
            "</function>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "<|python_tag|>",
            "```json\n",
            "```tool_code\n",
            "```",
            "{\"name\": \"f\", \"arguments\": {\"a\": [1, {}]}}",
            "{\"name\": \"weather\", \"parameters\": \"{\\\"a\\\": 1}\"}",
            "f(a='x', b=[1, None])",
            "weather()",
            "[",
            "]",
            "(",
            "{",
            "}",
            "\"",
            "\\",
            "'",
            "; ",
            ", ",
            "\n",
            " ",
            "f",
            "{\"name\": \"f\", ",
        ])
        .prop_map(str::to_owned),
        "[a-f\"{}:,é小 \n]{0,4}",
    ];
    let cuts = prop::collection::vec(any::<prop::sample::Index>(), 0..8);
    runner()
        .run(
            &(prop::sample::select(FORMATS.to_vec()), prop::collection::vec(part, 0..9), cuts),
            |(format, parts, cuts)| read_answer(format, &parts.concat(), &cuts),
        )
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Any tokens through the detokeniser and the stop matcher: text is what all their bytes decode to, up to the stop.
#[test]
fn tokens_and_stop_strings() {
    let tokenizer = tokenizer();
    let ids = prop::collection::vec(0..VOCAB_SIZE as u32 + 3, 0..40);
    let stops = prop::collection::vec(".{0,3}|[a-c]{1,2}", 0..4);
    runner()
        .run(&(ids, stops, any::<bool>(), any::<bool>()), |(ids, stops, include, skip)| {
            let mut detokenizer = Detokenizer::new(skip, false);
            let mut matcher = StopMatcher::new(&stops, include);
            let text: &dyn TokenText = &*tokenizer;
            let (mut decoded, mut shown, mut stopped) = (String::new(), String::new(), false);
            for &id in &ids {
                let mut piece = String::new();
                detokenizer.push(id, text, &mut piece);
                decoded.push_str(&piece);
                stopped = stopped || matcher.push(&piece, true, &mut shown).is_some();
                if stopped {
                    break;
                }
            }
            if !stopped {
                let mut piece = String::new();
                detokenizer.finish(&mut piece);
                decoded.push_str(&piece);
                stopped = matcher.push(&piece, true, &mut shown).is_some();
                prop_assert_eq!(&decoded, &tokenizer.decode(&ids, skip));
            }
            if !stopped {
                matcher.finish(&mut shown);
                prop_assert_eq!(&shown, &decoded);
            }
            let found = stops.iter().any(|stop| !stop.is_empty() && decoded.contains(stop.as_str()));
            prop_assert_eq!(found, stopped);
            prop_assert!(decoded.starts_with(shown.as_str()));
            let leaks = |stop: &String| !stop.is_empty() && shown.contains(stop.as_str());
            prop_assert!(include || !stops.iter().any(leaks), "{:?} in {}", stops, shown);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}
