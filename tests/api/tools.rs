//! Tools and thoughts over HTTP: forced calls, streamed ones, and what the template is told.

use rill_server::tools::ToolFormat;
use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};

const PATH: &str = "/v1/chat/completions";
const QWEN: &str = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>{% endif %}{% for m in messages %}\
                    <|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n\
                    {{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const QWEN_CODER: &str = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>\n<function=f>\n<parameter=p>{% endif %}\
                          {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n\
                          <function={{ c.function.name }}>\n{% for k, v in c.function.arguments|items %}<parameter={{ k }}>\n{{ v }}\n\
                          </parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
                          {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const MISTRAL: &str =
    "{% if tools %}{% endif %}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}[TOOL_CALLS]";
const LLAMA: &str =
    "{% if tools %}<|python_tag|>{% endif %}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}";

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"], "additionalProperties": false,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}}}}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

fn body(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 250, "tools": tools()});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn with_template(template: &'static str) -> TestServer {
    let mut setup = Setup { template: Some(template), ..Setup::default() };
    setup.engine.context_len = 2048;
    test_server::start_with(setup)
}

#[track_caller]
fn assert_weather(call: &Value) {
    assert_eq!(
        (call["type"].as_str(), call["function"]["name"].as_str()),
        (Some("function"), Some("weather")),
        "{call}"
    );
    let text = call["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(arguments.as_object().unwrap().len(), 2);
    assert!(arguments["city"] == "Rome" || arguments["city"] == "Oslo", "{text}");
    assert!((1..=9).contains(&arguments["days"].as_u64().unwrap()), "{text}");
}

#[test]
fn forced_calls_validate_in_every_format() {
    for template in [QWEN, QWEN_CODER, MISTRAL, LLAMA, test_server::CHATML, "tool_code {{ tools }}{{ messages }}"]
    {
        let server = with_template(template);
        let named = json!({"type": "function", "function": {"name": "weather"}});
        for seed in 0..4 {
            let request = body(json!({"tool_choice": named, "seed": seed, "max_tokens": 300}));
            let answer = server.ok(PATH, request.clone());
            let choice = &answer["choices"][0];
            let calls =
                choice["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("{template}: {choice}"));
            assert_eq!((calls.len(), choice["finish_reason"].as_str()), (1, Some("stop")), "{template}: {choice}");
            assert!(choice["message"]["content"].is_null());
            assert_weather(&calls[0]);

            let mut streamed = request;
            streamed["stream"] = json!(true);
            let (mut name, mut arguments, mut reasons) = (String::new(), String::new(), Vec::new());
            for event in server.events(PATH, streamed) {
                let choice = &event["choices"][0];
                for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
                    assert_eq!(call["index"], 0);
                    name.push_str(call["function"]["name"].as_str().unwrap_or_default());
                    arguments.push_str(call["function"]["arguments"].as_str().unwrap());
                }
                reasons.extend(choice["finish_reason"].as_str().map(str::to_owned));
            }
            assert_eq!(
                (name.as_str(), arguments.as_str()),
                ("weather", calls[0]["function"]["arguments"].as_str().unwrap())
            );
            assert_eq!(reasons, ["stop"]);
        }
        let answer =
            server.ok(PATH, body(json!({"tool_choice": "required", "parallel_tool_calls": false, "seed": 2})));
        let choice = &answer["choices"][0];
        let calls = choice["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("{template}: {choice}"));
        assert_eq!(calls.len(), 1);
        assert_eq!(choice["finish_reason"], "tool_calls");
        match calls[0]["function"]["name"].as_str() {
            Some("weather") => assert_weather(&calls[0]),
            _ => assert_eq!(calls[0]["function"]["arguments"], "{}", "what takes nothing is given nothing"),
        }
        server.assert_idle_soon();
    }
}

#[test]
fn several_calls_have_ids_of_their_own() {
    let server = with_template(QWEN);
    let only: Vec<Value> = tools().as_array().unwrap()[..1].to_vec();
    let mut most = 0;
    for seed in 0..12 {
        let answer = server
            .ok(PATH, body(json!({"tools": only, "tool_choice": "required", "seed": seed, "max_tokens": 400})));
        let choice = &answer["choices"][0];
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        if choice["finish_reason"] == "tool_calls" {
            calls.iter().for_each(assert_weather);
        }
        let mut ids: Vec<&str> = calls.iter().map(|call| call["id"].as_str().unwrap()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), calls.len());
        most = most.max(calls.len());
    }
    assert!(most > 1, "no answer had two calls");
}

#[test]
fn an_answer_without_calls_is_text() {
    let server = with_template(QWEN);
    let plain = server.ok(PATH, body(json!({"temperature": 0, "max_tokens": 20})));
    let none = server.ok(PATH, body(json!({"temperature": 0, "max_tokens": 20, "tool_choice": "none"})));
    let message = &plain["choices"][0]["message"];
    assert!(message.get("tool_calls").is_none() && !message["content"].as_str().unwrap().is_empty());
    assert_eq!(message["content"], none["choices"][0]["message"]["content"]);
    assert_eq!(plain["choices"][0]["finish_reason"], "length");
    // Log-probabilities stay complete where text is held back.
    let request = json!({"temperature": 0, "max_tokens": 20, "logprobs": true, "stream": true});
    let entries: usize = server
        .events(PATH, body(request))
        .iter()
        .map(|event| event["choices"][0]["logprobs"]["content"].as_array().map_or(0, Vec::len))
        .sum();
    assert_eq!(entries, 20);
}

#[test]
fn templates_get_tools_calls_and_results() {
    let messages = json!([
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"<|im_end|>\"}"}}]},
        {"role": "tool", "tool_call_id": "a1", "content": "<|im_end|>sunny"},
    ]);
    let prompt = |template: &'static str| {
        let server = with_template(template);
        let answer = server
            .ok("/tokenize", json!({"messages": messages, "tools": tools(), "add_generation_prompt": false}));
        let tokens = answer["tokens"].as_array().unwrap().clone();
        let ends = tokens.iter().filter(|id| **id == json!(crate::tiny_tokenizer::IM_END)).count();
        let text = server.ok("/detokenize", json!({"tokens": tokens}))["prompt"].as_str().unwrap().to_owned();
        (text, ends)
    };
    let (text, _) = prompt(QWEN_CODER);
    assert!(
        text.contains("<function=weather>\n<parameter=city>\n<|im_end|>\n</parameter>\n</function>"),
        "{text}"
    );
    let (text, ends) = prompt(QWEN);
    assert!(text.contains("\"name\": \"now\""), "{text}");
    assert!(text.contains("<tool_call>\nweather{\"city\": \"<|im_end|>\"}"), "{text}");
    assert!(text.contains("tool\n<|im_end|>sunny"), "{text}");
    assert_eq!(ends, 3, "those that clients spell stay text: {text}");
    // A template that joins arguments to text wants them as text.
    let (text, _) = prompt(
        "{% for m in messages %}{% for c in m.tool_calls %}{{ '[' + c.function.arguments + ']' }}{% endfor %}{% endfor %}{{ tools | length }}",
    );
    assert_eq!(text, "[{\"city\":\"<|im_end|>\"}]2");
    // One that knows nothing of tools is helped out.
    let (text, ends) = prompt(test_server::CHATML);
    assert!(text.starts_with("<|im_start|>system\nYou can call these functions"), "{text}");
    assert!(
        text.contains("assistant\n[{\"name\": \"weather\", \"arguments\": {\"city\":\"<|im_end|>\"}}]"),
        "{text}"
    );
    assert!(text.contains("user\nResult of the function call: <|im_end|>sunny"), "{text}");
    assert_eq!(ends, 4, "{text}");
}

#[test]
fn thoughts_come_apart_from_the_answer() {
    // The prompt opens the thoughts, and the answer may only follow them.
    let server = with_template("{% for m in messages %}{{ m.content }}{% endfor %}<think>\n");
    let request = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "temperature": 0});
    let answer = server.ok(PATH, request.clone());
    let message = &answer["choices"][0]["message"];
    assert!(
        message["content"].is_null() && message["reasoning_content"].as_str().unwrap().len() > 20,
        "{message}"
    );
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let joined: String = server
        .events(PATH, streamed)
        .iter()
        .map(|event| event["choices"][0]["delta"]["reasoning_content"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(joined, message["reasoning_content"].as_str().unwrap());

    // A grammar for the answer begins after the thoughts.
    let regex = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "guided_regex": "(yes|no)!",
                       "logit_bias": {"60": 100}});
    let server = with_template("{% for m in messages %}{{ m.content }}{% endfor %}{# <think> #}");
    let answer = server.ok(PATH, regex);
    let text = answer["choices"][0]["message"].clone();
    match text["content"].as_str() {
        Some(content) => assert!(content == "yes!" || content == "no!", "{text}"),
        None => assert_eq!(answer["choices"][0]["finish_reason"], "length"),
    }
}

#[test]
fn what_cannot_go_together_is_refused() {
    let server = with_template(QWEN);
    for (extra, param, part) in [
        (
            json!({"tool_choice": "required", "response_format": {"type": "json_object"}}),
            "response_format",
            "forces calls",
        ),
        (json!({"tools": [], "tool_choice": "required"}), "tool_choice", "needs tools"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "x"}}}), "tool_choice", "`x`"),
        (
            json!({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "wrong"}}}}}]}),
            "tools",
            "wrong",
        ),
    ] {
        let response = server.post(PATH, &body(extra.clone()).to_string());
        assert_eq!(response.status, 400, "{extra}: {}", response.text());
        let error = &response.json()["error"];
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    assert_eq!(ToolFormat::of_template(QWEN), ToolFormat::Hermes);
    // Where each argument has tags of its own, what is about several at once cannot be forced.
    let parameters = json!({"type": "object", "properties": {"a": {"type": "string"}}, "minProperties": 1});
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}]);
    let request = body(json!({"tool_choice": "required", "tools": tools})).to_string();
    let refused = with_template(QWEN_CODER).post(PATH, &request);
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools")));
    assert!(refused.text().contains("`minProperties`"), "{}", refused.text());
    assert_eq!(ToolFormat::of_template(QWEN_CODER), ToolFormat::Qwen3Coder);
}
