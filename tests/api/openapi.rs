//! `/openapi.json`: every route is in it, its limits are those that requests are held to, and answers match it.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::test_server::{self, MODEL, TestServer};

fn document(server: &TestServer) -> Value {
    let response = server.get("/openapi.json");
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    response.json()
}

/// `METHOD path` of every route in the router's source.
fn routes() -> BTreeSet<String> {
    let source = include_str!("../../server/src/app.rs");
    let mut found = BTreeSet::new();
    for route in source.split(".route(\"").skip(1) {
        let (path, rest) = route.split_once('"').expect("a path ends");
        let handlers = rest.split(".route").next().unwrap_or_default();
        for method in ["get", "post", "delete", "put"] {
            if handlers.contains(&format!("{method}(routes::")) {
                found.insert(format!("{method} {}", path.replace("{*", "{")));
            }
        }
    }
    found
}

#[test]
fn every_route_is_described() {
    let server = test_server::start();
    let document = document(&server);
    assert_eq!(document["openapi"], "3.1.0");
    let described: BTreeSet<String> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(move |method| format!("{method} {path}"))
        })
        .collect();
    let routes = routes();
    assert!(routes.len() > 15, "{routes:?}");
    assert_eq!(described, routes, "server/src/openapi.rs and the router in server/src/app.rs disagree");
}

/// Every reference leads somewhere.
#[test]
fn references_resolve() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|field| references(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }
    let server = test_server::start();
    let document = document(&server);
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 20);
    for reference in found {
        assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
}

/// A validator for the schema at `pointer` of the document.
fn validator(document: &Value, pointer: &str) -> jsonschema::Validator {
    let mut schema = document.pointer(pointer).unwrap_or_else(|| panic!("{pointer}")).clone();
    schema["components"] = document["components"].clone();
    jsonschema::draft202012::new(&schema).unwrap_or_else(|error| panic!("{pointer}: {error}"))
}

#[track_caller]
fn check(document: &Value, pointer: &str, value: &Value) {
    let errors: Vec<String> = validator(document, pointer)
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path))
        .collect();
    assert!(errors.is_empty(), "{pointer}: {errors:#?}\n{value}");
}

fn escaped(path: &str) -> String {
    path.replace('~', "~0").replace('/', "~1")
}

#[test]
fn answers_match_their_schemas() {
    let server = test_server::start();
    let document = document(&server);
    let user = json!([{"role": "user", "content": "hi"}]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "abc", "max_tokens": 3})),
        (
            "/v1/completions",
            json!({"prompt": ["abc", "d"], "n": 2, "logprobs": 2, "echo": true, "prompt_logprobs": 1, "seed": 1}),
        ),
        ("/v1/completions/render", json!({"prompt": [[1, 2], [3]]})),
        ("/v1/chat/completions", json!({"messages": user, "max_tokens": 3})),
        (
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 3, "logprobs": true, "top_logprobs": 2, "prompt_logprobs": 0}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 60, "tools": tools, "tool_choice": "required"}),
        ),
        ("/v1/chat/completions/render", json!({"messages": user, "tools": tools})),
        ("/v1/embeddings", json!({"input": ["hi", "there"], "dimensions": 2})),
        ("/v1/embeddings", json!({"input": [1, 2], "encoding_format": "base64"})),
        ("/v1/responses", json!({"input": "hi", "max_output_tokens": 3, "metadata": {"a": "b"}, "user": "u"})),
        ("/v1/messages", json!({"messages": user, "max_tokens": 3})),
        ("/v1/messages/count_tokens", json!({"messages": user})),
        ("/tokenize", json!({"prompt": "abc", "return_token_strs": true})),
        ("/tokenize", json!({"messages": user})),
        ("/detokenize", json!({"tokens": [1, 2]})),
    ] {
        let operation = format!("/paths/{}/post", escaped(path));
        check(&document, &format!("{operation}/requestBody/content/application~1json/schema"), &body);
        let answer = server.ok(path, body);
        check(&document, &format!("{operation}/responses/200/content/application~1json/schema"), &answer);
        for bad in [json!([]), json!({"model": 1}), json!({"model": "unknown", "prompt": "a", "messages": user})] {
            let refused = server.post(path, &bad.to_string());
            assert!(refused.status == 400 || refused.status == 404, "{path} {bad}: {}", refused.text());
            check(
                &document,
                &format!("{operation}/responses/default/content/application~1json/schema"),
                &refused.json(),
            );
        }
    }
    let kept = server.ok("/v1/responses", json!({"input": "hi", "max_output_tokens": 3}));
    let id = kept["id"].as_str().unwrap();
    for (path, template) in [
        (format!("/v1/responses/{id}"), "/v1/responses/{id}"),
        ("/v1/models".to_owned(), "/v1/models"),
        (format!("/v1/models/{MODEL}"), "/v1/models/{id}"),
        ("/health".to_owned(), "/health"),
        ("/ready".to_owned(), "/ready"),
        ("/version".to_owned(), "/version"),
        ("/tokenizer_info".to_owned(), "/tokenizer_info"),
        ("/openapi.json".to_owned(), "/openapi.json"),
    ] {
        let answer = server.get(&path);
        assert_eq!(answer.status, 200, "{path}");
        let pointer = format!("/paths/{}/get/responses/200/content/application~1json/schema", escaped(template));
        check(&document, &pointer, &answer.json());
    }
    let refused = server.get("/v1/messages");
    assert_eq!(refused.status, 405);
    check(
        &document,
        "/paths/~1v1~1messages/post/responses/default/content/application~1json/schema",
        &refused.json(),
    );
}

/// Just beyond each limit of a number a request is refused by its name; on the limit it is not.
#[test]
fn limits_are_those_that_hold() {
    let server = test_server::start();
    let document = document(&server);
    let mut checked = 0;
    for (path, schemas, base) in [
        ("/v1/completions", &["SharedFields", "CompletionFields"][..], json!({"prompt": "a", "max_tokens": 1})),
        (
            "/v1/chat/completions",
            &["SharedFields", "ChatFields"],
            json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "logprobs": true}),
        ),
    ] {
        for schema in schemas {
            let properties = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
            for (name, property) in properties {
                let integer = property["type"].as_array().is_some_and(|types| types.contains(&json!("integer")));
                for (key, beyond) in [("minimum", -1.0), ("maximum", 1.0), ("exclusiveMinimum", 0.0)] {
                    let Some(limit) = property[key].as_f64() else { continue };
                    // What a context of 512 tokens cannot hold is refused for another reason.
                    if limit.abs() > 1e6 {
                        continue;
                    }
                    let of = |value: f64| {
                        let mut body = base.clone();
                        body[name] = if integer { json!(value as i64) } else { json!(value) };
                        server.post(path, &body.to_string())
                    };
                    let refused = of(limit + beyond);
                    assert_eq!(refused.status, 400, "{path} {name} beyond {limit}: {}", refused.text());
                    assert_eq!(refused.json()["error"]["param"], name.as_str(), "{path}: {}", refused.text());
                    checked += 1;
                    if key != "exclusiveMinimum" {
                        let taken = of(limit);
                        let blamed = taken.json()["error"]["param"] == name.as_str();
                        let names_limit = taken.text().contains("must be between");
                        assert!(!(blamed && names_limit), "{path} {name} at {limit}: {}", taken.text());
                    }
                }
            }
        }
    }
    assert!(checked > 30, "{checked} limits");
}

#[test]
fn the_page_that_shows_it_needs_nothing_from_outside() {
    let server = test_server::start();
    let page = server.get("/docs");
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let text = page.text();
    assert!(text.contains("fetch(\"/openapi.json\")") && !text.contains("://"));
}
