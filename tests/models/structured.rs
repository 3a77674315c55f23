//! Structured output from the real model: documents validated by a JSON-schema library that has nothing to do with
//! how they were made, expressions by the regex crate.

use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use rill_engine::{Constraint, GrammarCompiler};
use rill_server::structured::{Spacing, json_term};
use rill_tests::default_model;
use rill_tests::http;
use rill_tests::server_process::ServerProcess;
use serde_json::{Value, json};

/// Documents asked for at once.
const CLIENTS: usize = 8;

fn server() -> ServerProcess {
    ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), &["--max-running", "16"])
}

/// Sends all requests, some at a time; their answers in order.
fn all(server: &ServerProcess, requests: &[Value]) -> Vec<Value> {
    let next = Mutex::new(0);
    let answers = Mutex::new(vec![Value::Null; requests.len()]);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let index = {
                        let mut next = next.lock().expect("not poisoned");
                        *next += 1;
                        *next - 1
                    };
                    let Some(request) = requests.get(index) else { return };
                    let path = "/v1/chat/completions";
                    let response =
                        http::call(server.address, "POST", path, &request.to_string()).expect("answers");
                    assert_eq!(response.status, 200, "{request}: {}", response.text());
                    answers.lock().expect("not poisoned")[index] = response.json();
                }
            });
        }
    });
    answers.into_inner().expect("not poisoned")
}

fn chat(prompt: &str, seed: u64, extra: Value) -> Value {
    let mut request = json!({
        "messages": [{"role": "user", "content": prompt}], "temperature": 1.0, "seed": seed, "max_tokens": 200,
    });
    request.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    request
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "properties": {
            "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "email": {"type": "string", "format": "email", "maxLength": 30}}, "required": ["name", "age"], "additionalProperties": false}),
        json!({"type": "array", "items": {"type": "number", "minimum": -1, "exclusiveMaximum": 1}, "minItems": 1, "maxItems": 4}),
        json!({"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"enum": [7, 9, null, "many"]}}, "required": ["kind", "lives"], "additionalProperties": false}),
        json!({"anyOf": [{"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}, {"type": "boolean"}, {"type": "null"}]}),
        json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
            "value": {"type": "integer", "minimum": 0, "maximum": 99}, "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}},
            "required": ["value", "children"], "additionalProperties": false},
            "leaf": {"type": "object", "properties": {"leaf": {"type": "boolean"}}, "required": ["leaf"], "additionalProperties": false}}}),
        json!({"type": "object", "properties": {"when": {"type": "string", "format": "date"}, "at": {"type": "string", "format": "ipv4"}, "id": {"type": "string", "format": "uuid"}},
            "required": ["when", "at", "id"], "additionalProperties": false}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "string", "minLength": 2, "maxLength": 12}}, "required": ["b"]}], "maxProperties": 2}),
        json!({"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}, "minProperties": 1, "maxProperties": 3}),
        json!({"type": "array", "prefixItems": [{"type": "string", "maxLength": 10}, {"type": "integer", "minimum": 0, "maximum": 50}], "items": false, "minItems": 2}),
        json!({"type": ["string", "integer"], "maxLength": 16, "minimum": -20, "maximum": 20}),
    ]
}

/// `rounds` documents of each schema.
fn documents_validate(server: &ServerProcess, rounds: u64) {
    let schemas = schemas();
    let requests: Vec<Value> = (0..rounds)
        .flat_map(|seed| {
            schemas.iter().map(move |schema| {
                let format = json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": true}});
                chat("Make up an example.", seed, json!({"response_format": format}))
            })
        })
        .collect();
    let validators: Vec<jsonschema::Validator> = schemas
        .iter()
        .map(|schema| jsonschema::options().should_validate_formats(true).build(schema).expect("a sound schema"))
        .collect();
    let mut complete = 0;
    for (number, answer) in all(server, &requests).iter().enumerate() {
        let choice = &answer["choices"][0];
        let text = choice["message"]["content"].as_str().expect("a text");
        if number < schemas.len() {
            println!("{text}");
        }
        if choice["finish_reason"] == "length" {
            continue;
        }
        complete += 1;
        let document: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let schema = number % schemas.len();
        if let Err(error) = validators[schema].validate(&document) {
            panic!("{text} is not a document of {}: {error}", schemas[schema]);
        }
    }
    println!("{complete} of {} documents came to their end and validate", requests.len());
    assert!(complete * 10 >= requests.len() * 9, "{complete} of {}", requests.len());
}

#[test]
fn what_the_model_writes_matches() {
    let server = server();
    documents_validate(&server, 4);

    let patterns =
        [r"[A-Z][a-z]{3,9} (is|was) [a-z ]{4,30}\.", r"\d{4}-\d{2}-\d{2}", r"(\+|-)?[0-9]{1,3}(,[0-9]{3}){2}"];
    let requests: Vec<Value> = (0..9)
        .map(|seed| chat("Say something.", seed, json!({"guided_regex": patterns[seed as usize % 3]})))
        .collect();
    for (answer, request) in all(&server, &requests).iter().zip(&requests) {
        let text = answer["choices"][0]["message"]["content"].as_str().expect("a text");
        let pattern = request["guided_regex"].as_str().expect("a pattern");
        let whole = regex::Regex::new(&format!("^(?:{pattern})$")).expect("sound");
        assert!(whole.is_match(text), "{text:?} does not match {pattern}");
    }

    let choices = ["Paris", "London", "a small village in Wales"];
    let requests: Vec<Value> = (0..6)
        .map(|seed| chat("What is the capital of France?", seed, json!({"guided_choice": choices})))
        .collect();
    for answer in all(&server, &requests) {
        let choice = &answer["choices"][0];
        assert!(choices.contains(&choice["message"]["content"].as_str().expect("a text")), "{choice}");
        assert_eq!(choice["finish_reason"], "stop");
    }

    // The same document alone as among seven others.
    let format = json!({"response_format": {"type": "json_object"}, "temperature": 0.9});
    let request = chat("Describe a dog as JSON.", 11, format);
    let alone = all(&server, std::slice::from_ref(&request));
    let mut crowd: Vec<Value> = (0..8).map(|seed| chat("Describe a cat.", seed, json!({}))).collect();
    crowd[5] = request;
    let text = |answer: &Value| answer["choices"][0]["message"]["content"].clone();
    assert_eq!(text(&all(&server, &crowd)[5]), text(&alone[0]));
}

/// As many documents as one is willing to wait for: `cargo test --test structured -- --ignored`.
#[test]
#[ignore = "takes minutes"]
fn a_thousand_documents_validate() {
    documents_validate(&server(), 100);
}

/// What a mask costs beside a step: `cargo test --release --test structured masks -- --ignored --nocapture`.
#[test]
#[ignore = "measures"]
fn masks_cost_little_beside_a_step() {
    let loaded = default_model::load();
    let (tokenizer, ends) = (loaded.tokenizer, loaded.config.eos_token_ids);
    let compiler = GrammarCompiler::new(&*tokenizer, loaded.config.vocab_size, &ends).expect("a sound vocabulary");
    let documents = [
        (0, r#"{"name": "Ada Lovelace", "age": 36, "email": "ada@example.org"}"#),
        (1, "[0.25, -0.5, 0.125]"),
        (4, r#"{"value": 17, "children": [{"leaf": true}, {"leaf": false}]}"#),
        (5, r#"{"when": "1843-09-01", "at": "10.0.0.1", "id": "123e4567-e89b-12d3-a456-426614174000"}"#),
        (7, r#"{"one": 1, "two": 2, "three": 3}"#),
    ];
    let mut micros = Vec::new();
    for (schema, document) in documents {
        let term = json_term("schema", &schemas()[schema], Spacing::Free).expect("a schema");
        let start = Instant::now();
        let grammar = compiler.compile(&format!("start: {term}")).expect("compiles");
        println!("schema {schema} compiled in {:?}", start.elapsed());
        let tokens = tokenizer.encode(document, false, false).expect("a text");
        for _ in 0..20 {
            let mut constraint = Constraint::new(&grammar);
            for &token in &tokens {
                let start = Instant::now();
                let allowed = constraint.mask().expect("a mask").allows(token);
                micros.push(start.elapsed().as_secs_f64() * 1e6);
                assert!(allowed, "{document}");
                constraint.accept(token).expect("an allowed token");
            }
        }
    }
    micros.sort_by(f64::total_cmp);
    let at = |share: f64| micros[((micros.len() - 1) as f64 * share) as usize];
    let mean = micros.iter().sum::<f64>() / micros.len() as f64;
    println!(
        "{} masks over {} tokens: mean {mean:.1} us, median {:.1}, 99 % within {:.1}, longest {:.1}",
        micros.len(),
        loaded.config.vocab_size,
        at(0.5),
        at(0.99),
        at(1.0)
    );
}
