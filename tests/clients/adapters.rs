//! LoRA adapters over HTTP: named at start, loaded and unloaded at run time, bounded, and never mixed up.

use rill_tests::http;
use rill_tests::server_process::ServerProcess;
use rill_tests::tiny_adapters::{Scales, TinyAdapter};
use rill_tests::tiny_models;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A tiny model's folder, and those of three adapters of rank 3.
fn folders() -> (TempDir, [TempDir; 3]) {
    let model = &tiny_models::all()["llama"];
    let folder = || tempfile::tempdir().expect("a temporary directory");
    let base = folder();
    model.write_directory(base.path(), true);
    let adapters = [1, 2, 3].map(|seed| {
        let dir = folder();
        TinyAdapter::new(model, seed, Scales::Plain).write_directory(dir.path());
        dir
    });
    (base, adapters)
}

fn text(dir: &TempDir) -> &str {
    dir.path().to_str().expect("UTF-8")
}

fn start(base: &TempDir, flags: &[&str]) -> ServerProcess {
    let flags = [&["--model", text(base), "--served-model-name", "base", "--device", "cpu"], flags].concat();
    ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), &flags)
}

/// Greedy text after a prompt of 40 tokens, and how many of them were cached.
fn complete(server: &ServerProcess, model: &str) -> (String, u64) {
    let prompt: Vec<u32> = (3..43).collect();
    let body = json!({"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true});
    let response = server.post("/v1/completions", &body.to_string());
    assert_eq!(response.status, 200, "{}", response.text());
    let answer = response.json();
    assert_eq!(answer["model"], model);
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    (answer["choices"][0]["text"].as_str().expect("text").to_owned(), cached)
}

#[track_caller]
fn error(server: &ServerProcess, path: &str, body: Value, status: u16) -> String {
    let response = server.post(path, &body.to_string());
    assert_eq!(response.status, status, "{}", response.text());
    response.json()["error"]["message"].as_str().expect("a message").to_owned()
}

fn load(server: &ServerProcess, body: Value) {
    let response = server.post("/v1/load_lora_adapter", &body.to_string());
    assert_eq!(response.status, 200, "{}", response.text());
}

#[test]
fn adapters_are_models_of_their_own() {
    let (base, [one, two, _]) = folders();
    let (named_one, named_two) = (format!("one={}", text(&one)), format!("two={}", text(&two)));
    let server = start(&base, &["--lora", &named_one, "--lora", &named_two]);

    let list = server.get("/v1/models").json();
    let shown: Vec<(&str, &Value, &str)> = list["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|card| (card["id"].as_str().unwrap(), &card["parent"], card["root"].as_str().unwrap()))
        .collect();
    let parent = json!("base");
    assert_eq!(
        shown[..],
        [("base", &Value::Null, "base"), ("one", &parent, text(&one)), ("two", &parent, text(&two))]
    );
    assert_eq!(server.get("/v1/models/two").json()["parent"], "base");

    let names = ["base", "one", "two"];
    let alone = names.map(|name| complete(&server, name).0);
    assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2], "{alone:?}");
    let server = &server;
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..12).map(|i| (i, scope.spawn(move || complete(server, names[i % 3]).0))).collect();
        for (i, answer) in asked {
            assert_eq!(answer.join().expect("answered"), alone[i % 3], "{} in company", names[i % 3]);
        }
    });
    assert_eq!(
        error(server, "/v1/completions", json!({"model": "three", "prompt": [5]}), 404),
        "the model `three` is not served here; served: base, one, two"
    );
    let refused = json!({"lora_name": "three", "lora_path": text(&one)});
    let message = error(server, "/v1/load_lora_adapter", refused, 403);
    assert!(message.contains("--enable-runtime-lora"), "{message}");
    assert!(
        server
            .get("/metrics")
            .text()
            .contains("vllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"\",")
    );
    server.assert_idle_soon();
}

/// Embeddings of two texts with each of `models`.
fn embeddings(server: &ServerProcess, models: &[&str]) -> Vec<Vec<f64>> {
    let ask = |model: &&str| {
        // Long enough for blocks of the first to be found by the second.
        let inputs: [Vec<u32>; 2] = [(3..43).collect(), (3..63).collect()];
        let response = server.post("/v1/embeddings", &json!({"model": model, "input": inputs}).to_string());
        assert_eq!(response.status, 200, "{}", response.text());
        let answer = response.json();
        assert_eq!(answer["model"], *model);
        let data = answer["data"].as_array().expect("a list").clone();
        data.into_iter()
            .flat_map(|one| {
                one["embedding"]
                    .as_array()
                    .expect("values")
                    .iter()
                    .map(|v| v.as_f64().expect("a number"))
                    .collect::<Vec<_>>()
            })
            .collect()
    };
    models.iter().map(ask).collect()
}

#[test]
fn embeddings_with_an_adapter_are_those_of_merged_weights() {
    let model = &tiny_models::all()["llama"];
    let adapter = TinyAdapter::new(model, 1, Scales::Plain);
    let (base, one, merged) = (tempfile::tempdir(), tempfile::tempdir(), tempfile::tempdir());
    let (base, one, merged) = (base.expect("a folder"), one.expect("a folder"), merged.expect("a folder"));
    model.write_directory(base.path(), true);
    model.write_directory_with(merged.path(), &adapter.merged(model), true);
    adapter.write_directory(one.path());
    for pooling in ["last", "mean", "cls"] {
        let named = format!("one={}", text(&one));
        let server = start(&base, &["--lora", &named, "--pooling", pooling]);
        let given = embeddings(&server, &["base", "one", "base"]);
        let expected = embeddings(&start(&merged, &["--pooling", pooling]), &["base"]);
        let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(distance(&given[1], &expected[0]) < 0.01, "{pooling}: {}", distance(&given[1], &expected[0]));
        assert!(distance(&given[0], &expected[0]) > 0.05, "{pooling}: the adapter changes little");
        assert_eq!(given[0], given[2], "{pooling}: the model's own are not the adapter's");
        server.assert_idle_soon();
    }
}

#[test]
fn adapters_come_and_go_while_the_server_runs() {
    let (base, [one, two, three]) = folders();
    let flags = ["--enable-runtime-lora", "--max-loras", "2", "--max-lora-rank", "4"];
    let server = start(&base, &flags);
    load(&server, json!({"lora_name": "a", "lora_path": text(&one)}));
    let first = complete(&server, "a");
    assert_eq!(first.1, 0);
    assert_eq!(complete(&server, "a"), (first.0.clone(), 32));

    let again = json!({"lora_name": "a", "lora_path": text(&two)});
    assert!(error(&server, "/v1/load_lora_adapter", again, 400).contains("already been loaded"));
    let taken = json!({"lora_name": "base", "lora_path": text(&two)});
    assert!(error(&server, "/v1/load_lora_adapter", taken, 400).contains("the model itself"));
    let nowhere = json!({"lora_name": "b", "lora_path": "/nowhere"});
    assert!(error(&server, "/v1/load_lora_adapter", nowhere, 400).contains("/nowhere/adapter_config.json"));
    assert!(error(&server, "/v1/load_lora_adapter", json!({"lora_name": "b"}), 400).contains("lora_path"));
    assert!(
        error(&server, "/v1/unload_lora_adapter", json!({"lora_name": "b"}), 404).contains("`b` cannot be found")
    );

    // Other weights under the same name find none of the first ones' cached prefixes.
    load(&server, json!({"lora_name": "a", "lora_path": text(&two), "load_inplace": true}));
    let second = complete(&server, "a");
    assert!(second.0 != first.0 && second.1 == 0, "{first:?}, {second:?}");
    // The first weights find theirs again, under any name.
    load(&server, json!({"lora_name": "b", "lora_path": text(&one)}));
    assert_eq!(complete(&server, "b"), (first.0, 32));

    let full = json!({"lora_name": "c", "lora_path": text(&three)});
    let message = error(&server, "/v1/load_lora_adapter", full.clone(), 400);
    assert!(message.contains("the limit is 2 (--max-loras)"), "{message}");

    // Unloaded while a request uses it: the request goes on, and its memory counts until then.
    let long = json!({"model": "a", "prompt": [5, 6], "max_tokens": 120, "ignore_eos": true, "temperature": 0, "stream": true});
    let mut stream = http::open(server.address, "POST", "/v1/completions", &long.to_string()).expect("connects");
    assert_eq!(stream.status, 200);
    let mut pending = Vec::new();
    assert!(stream.next_event(&mut pending).expect("an event").is_some());
    let response = server.post("/v1/unload_lora_adapter", &json!({"lora_name": "a"}).to_string());
    assert_eq!(response.status, 200, "{}", response.text());
    error(&server, "/v1/completions", json!({"model": "a", "prompt": [5]}), 404);
    let mut events = 0;
    while stream.next_event(&mut pending).expect("a whole stream").is_some_and(|event| event != "[DONE]") {
        events += 1;
    }
    assert!(events >= 100, "{events} events");
    let started = Instant::now();
    while server.post("/v1/load_lora_adapter", &full.to_string()).status != 200 {
        assert!(started.elapsed() < Duration::from_secs(10), "an unloaded adapter is still there");
    }
    assert_ne!(complete(&server, "c").0, second.0);
    assert!(server.get("/metrics").text().contains("vllm:lora_requests_info{max_lora=\"2\","));
    server.assert_idle_soon();
}

#[test]
fn running_adapters_are_in_the_metrics() {
    let (base, [one, ..]) = folders();
    let named = format!("one={}", text(&one));
    let server = start(&base, &["--lora", &named, "--max-running", "1"]);
    let long =
        json!({"model": "one", "prompt": [5, 6], "max_tokens": 120, "n": 64, "ignore_eos": true, "stream": true});
    let mut stream = http::open(server.address, "POST", "/v1/completions", &long.to_string()).expect("connects");
    let mut pending = Vec::new();
    assert!(stream.next_event(&mut pending).expect("an event").is_some());
    let page = server.get("/metrics").text();
    assert!(page.contains("running_lora_adapters=\"one\",waiting_lora_adapters=\"one\""), "{page}");
    drop(stream);
    let started = Instant::now();
    while !server.get("/metrics").text().contains("running_lora_adapters=\"\",waiting_lora_adapters=\"\"") {
        assert!(started.elapsed() < Duration::from_secs(10), "an adapter is still counted");
    }
}
