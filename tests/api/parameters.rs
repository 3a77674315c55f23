//! Parameters that no other file here tries; and that each parameter is tried by some file.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};

use crate::test_server::{self, Setup};
use crate::tiny_tokenizer::{END_OF_TEXT, beginning_tokenizer};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Every property of the description's request bodies is named by a test.
#[test]
fn each_parameter_has_a_test() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("api");
    let mut sources = String::new();
    for entry in std::fs::read_dir(folder).expect("the tests can be listed") {
        let path = entry.expect("the tests can be listed").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // These name fields without looking at what they do.
        if name.ends_with(".rs") && name != "fuzz.rs" && name != "openapi.rs" {
            sources.push_str(&std::fs::read_to_string(&path).expect("a test's source"));
        }
    }
    // Adapters take a model that has weights.
    sources.push_str(include_str!("../clients/adapters.rs"));
    let document = test_server::start().get("/openapi.json").json();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let mut untried = Vec::new();
    for schema in request_schemas(&document) {
        for name in schemas[&schema]["properties"].as_object().into_iter().flat_map(|properties| properties.keys())
        {
            if !sources.contains(&format!("\"{name}\"")) {
                untried.push(format!("{schema}.{name}"));
            }
        }
    }
    assert!(untried.is_empty(), "no test tries {untried:?}");
}

/// Names of the schemas that request bodies are made of, those of their parts included.
fn request_schemas(document: &Value) -> BTreeSet<String> {
    fn add(value: &Value, document: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                let target =
                    fields.get("$ref").and_then(|target| target.as_str()?.strip_prefix("#/components/schemas/"));
                if let Some(name) = target.filter(|name| found.insert((*name).to_owned())) {
                    add(&document["components"]["schemas"][name], document, found);
                }
                fields.values().for_each(|value| add(value, document, found));
            }
            Value::Array(items) => items.iter().for_each(|value| add(value, document, found)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    for operation in
        document["paths"].as_object().unwrap().values().flat_map(|path| path.as_object().unwrap().values())
    {
        add(&operation["requestBody"], document, &mut found);
    }
    assert!(found.len() > 15, "{found:?}");
    found
}

#[test]
fn priority_decides_who_runs_next() {
    let mut setup = Setup::default();
    setup.engine.max_running = 1;
    let server = test_server::start_with(setup);
    let order = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let ask = |name: &'static str, priority: i32| {
            let (server, order) = (&server, &order);
            scope.spawn(move || {
                let body = json!({"prompt": "a", "max_tokens": 30, "priority": priority});
                server.ok(COMPLETIONS, body);
                order.lock().unwrap().push(name);
            });
        };
        server.knobs.stall();
        ask("first", 0);
        server.wait_until("one runs", |server| server.engine.stats().steps.get() >= 1);
        ask("later", 5);
        server.wait_until("one waits", |server| server.engine.stats().waiting() >= 1);
        ask("sooner", -5);
        server.wait_until("two wait", |server| server.engine.stats().waiting() >= 2);
        server.knobs.slow(Duration::from_millis(2));
        server.knobs.resume();
    });
    let order = order.into_inner().unwrap();
    let place = |name: &str| order.iter().position(|&done| done == name).unwrap();
    assert!(place("sooner") < place("later"), "{order:?}");
}

#[test]
fn add_special_tokens_begins_a_text_as_the_tokenizer_does() {
    let tokens = rill_models::FillInTheMiddle { prefix: 261, suffix: 262, middle: 259 };
    let setup = Setup { tokenizer: beginning_tokenizer, fill_in_the_middle: Some(tokens), ..Setup::default() };
    let server = test_server::start_with(setup);
    let ids = |extra: Value| {
        let mut body = json!({"prompt": "ab"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok("/v1/completions/render", body)["prompts"][0]["token_ids"].clone()
    };
    assert_eq!(ids(json!({})), json!([END_OF_TEXT, 97, 98]));
    assert_eq!(ids(json!({"add_special_tokens": false})), json!([97, 98]));
    // The text's beginning comes before what marks the prefix.
    assert_eq!(ids(json!({"suffix": "c"})), json!([END_OF_TEXT, 261, 97, 98, 262, 99, 259]));
    assert_eq!(ids(json!({"suffix": "c", "add_special_tokens": false})), json!([261, 97, 98, 262, 99, 259]));
    // A chat's template writes the beginning itself, unless asked.
    let chat = |add: Value| {
        let body = json!({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": add});
        server.ok("/v1/chat/completions/render", body)["token_ids"][0].clone()
    };
    assert_ne!(chat(json!(null)), json!(END_OF_TEXT));
    assert_eq!(chat(json!(true)), json!(END_OF_TEXT));
    let embedded = |add: bool| {
        let body = json!({"input": "ab", "add_special_tokens": add, "priority": 1});
        server.ok("/v1/embeddings", body)["usage"]["prompt_tokens"].clone()
    };
    assert_eq!((embedded(true), embedded(false)), (json!(3), json!(2)));
}

#[test]
fn documents_reach_the_template() {
    let template = "{% for d in documents %}[{{ d.title }}]{% endfor %}{{ messages[0].content }}";
    let server = test_server::start_with(Setup { template: Some(template), ..Setup::default() });
    let body =
        json!({"messages": [{"role": "user", "content": "q"}], "documents": [{"title": "A"}, {"title": "B"}]});
    assert_eq!(server.ok("/v1/chat/completions/render", body)["prompt"], "[A][B]q");
}

#[test]
fn grammars_and_spaces_in_the_older_spelling() {
    let server = test_server::start();
    let text = |extra: Value| {
        let mut body = json!({"prompt": "x", "max_tokens": 60, "seed": 3});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(COMPLETIONS, body)["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(text(json!({"guided_grammar": "root ::= \"one\" | \"one\" \"!\""})).replace('!', ""), "one");
    let schema = json!({"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3});
    let spaced = text(json!({"guided_json": schema, "guided_whitespace_pattern": " {3}"}));
    assert!(spaced.contains("   ") && spaced.replace(' ', "") == "[1,1,1]", "{spaced}");
}

#[test]
fn metadata_and_tiers_are_held_to_openais_limits() {
    let server = test_server::start();
    let many: Value = (0..17).map(|i| (i.to_string(), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    for (path, base) in [
        (COMPLETIONS, json!({"prompt": "a", "max_tokens": 1})),
        (CHAT, json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})),
        ("/v1/responses", json!({"input": "a", "max_output_tokens": 1})),
    ] {
        for (metadata, part) in [
            (json!({"a": "b", "user": "u"}), None),
            (json!(null), None),
            (json!({"a": 1}), Some("the value of `a` must be a string")),
            (many.clone(), Some("at most 16 entries, not 17")),
            (json!({("k".repeat(65)): "v"}), Some("at most 64 characters")),
            (json!({"k": "v".repeat(513)}), Some("at most 512 characters")),
        ] {
            let mut body = base.clone();
            body["metadata"] = metadata;
            body["user"] = json!("somebody");
            let answer = server.post(path, &body.to_string());
            match part {
                None => assert_eq!(answer.status, 200, "{path} {body}: {}", answer.text()),
                Some(part) => {
                    assert_eq!(answer.status, 400, "{path} {body}");
                    assert_eq!(answer.json()["error"]["param"], "metadata");
                    assert!(answer.text().contains(part), "{}", answer.text());
                }
            }
        }
    }
    let tier = |tier: &str| {
        let body = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "service_tier": tier});
        server.post(CHAT, &body.to_string())
    };
    assert_eq!(tier("auto").json()["service_tier"], "default");
    let refused = tier("flex");
    assert_eq!((refused.status, refused.json()["error"]["param"].clone()), (400, json!("service_tier")));
}
