//! `/v1/chat/completions`, not streamed.

use serde_json::{Value, json};

use crate::test_server::{self, MODEL, Setup};

const PATH: &str = "/v1/chat/completions";

fn hi() -> Value {
    json!([{"role": "user", "content": "hi"}])
}

#[test]
fn the_answer_has_openais_shape() {
    let server = test_server::start();
    let answer = server.ok(PATH, json!({"model": MODEL, "messages": hi(), "temperature": 0, "max_tokens": 3}));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["system_fingerprint"], "rill_test");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["refusal"].is_null() && choice["logprobs"].is_null());
    assert!(!choice["message"]["content"].as_str().unwrap().is_empty());
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!((choice["index"].as_u64(), choice["finish_reason"].as_str()), (Some(0), Some("length")));
    // <|im_start|> user \n hi <|im_end|> \n <|im_start|> assistant \n
    assert_eq!(answer["usage"]["prompt_tokens"], 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1);
}

#[test]
fn the_default_runs_to_the_end_of_the_context() {
    let server = test_server::start();
    let answer = server.ok(PATH, json!({"messages": hi(), "temperature": 0}));
    assert_eq!(answer["usage"]["total_tokens"], 512);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    server.assert_idle_soon();
}

#[test]
fn logprobs_have_bytes_and_alternatives() {
    let server = test_server::start();
    let body = json!({"messages": hi(), "temperature": 0, "max_tokens": 30, "logprobs": true, "top_logprobs": 2});
    let answer = server.ok(PATH, body);
    let choice = &answer["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 30);
    let mut bytes = Vec::new();
    for entry in entries {
        bytes.extend(entry["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8));
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&entry["token"], &entry["logprob"]));
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
    assert_eq!(String::from_utf8_lossy(&bytes), choice["message"]["content"].as_str().unwrap());
    let plain = server.ok(PATH, json!({"messages": hi(), "max_tokens": 2, "logprobs": true}));
    assert_eq!(plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[test]
fn n_choices_differ_and_share_the_prompt() {
    let server = test_server::start();
    let answer = server.ok(PATH, json!({"messages": hi(), "max_tokens": 20, "n": 3, "seed": 1}));
    let texts: Vec<&str> =
        answer["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 3);
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    assert_eq!(
        (answer["usage"]["prompt_tokens"].as_u64(), answer["usage"]["completion_tokens"].as_u64()),
        (Some(21), Some(60))
    );
}

#[test]
fn the_prompts_end_can_be_chosen() {
    let server = test_server::start();
    let count = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                              "max_tokens": 1});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(PATH, body)["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let whole = count(json!({"add_generation_prompt": false}));
    assert_eq!(count(json!({})), whole + 11);
    // Without <|im_end|> and the newline.
    assert_eq!(count(json!({"continue_final_message": true})), whole - 2);
    let both = json!({"messages": hi(), "continue_final_message": true, "add_generation_prompt": true});
    assert_eq!(server.post(PATH, &both.to_string()).status, 400);
}

#[test]
fn requests_bring_templates_only_where_trusted() {
    let body = json!({"messages": hi(), "max_tokens": 1, "chat_template": "{{ messages[0].content }}{{ more }}",
                      "chat_template_kwargs": {"more": "xyz"}});
    let refused = test_server::start().post(PATH, &body.to_string());
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["param"], "chat_template");

    let mut setup = Setup::default();
    setup.options.trust_request_chat_template = true;
    let server = test_server::start_with(setup);
    assert_eq!(server.ok(PATH, body)["usage"]["prompt_tokens"], 5);
    let broken = json!({"messages": hi(), "chat_template": "{% for"});
    let response = server.post(PATH, &broken.to_string());
    assert_eq!((response.status, &response.json()["error"]["param"]), (400, &json!("chat_template")));
}

#[test]
fn a_model_without_template_says_so() {
    let server = test_server::start_with(Setup { template: None, ..Setup::default() });
    let response = server.post(PATH, &json!({"messages": hi()}).to_string());
    assert_eq!(response.status, 400);
    assert!(response.text().contains("no chat template"), "{}", response.text());
}

#[test]
fn templates_refuse_with_their_own_words() {
    let template = "{% if messages[0].role != 'user' %}{{ raise_exception('the first message must be the user\\'s') }}{% endif %}x";
    let server = test_server::start_with(Setup { template: Some(template), ..Setup::default() });
    let response = server.post(PATH, r#"{"messages":[{"role":"system","content":"a"}]}"#);
    assert_eq!(response.status, 400);
    assert!(response.text().contains("the first message must be the user's"), "{}", response.text());
}
