//! The other routes: models, tokenising, CORS, metrics, the page.

use rill_server::app::CorsPolicy;
use serde_json::{Value, json};

use crate::test_server::{self, MODEL, Setup};

#[test]
fn models_are_listed() {
    let server = test_server::start();
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let card = &list["data"][0];
    assert_eq!(
        *card,
        json!({"id": MODEL, "object": "model", "created": 1, "owned_by": "rill", "root": MODEL, "parent": null,
                "max_model_len": 512})
    );
    assert_eq!(list["data"][1]["id"], "alias");
    // An id with a slash, escaped or not.
    assert_eq!(server.get("/v1/models/org/tiny").json(), *card);
    assert_eq!(server.get("/v1/models/org%2Ftiny").json(), *card);
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn text_goes_to_tokens_and_back() {
    let server = test_server::start();
    for text in ["hello world", "ä — 小川 🏞️", " ", "<|im_start|>user"] {
        let tokens = server.ok("/tokenize", json!({"prompt": text}))["tokens"].clone();
        assert_eq!(server.ok("/detokenize", json!({"tokens": tokens}))["prompt"], text);
    }
    assert_eq!(
        server.ok("/tokenize", json!({"prompt": ""})),
        json!({"count": 0, "max_model_len": 512, "tokens": [], "token_strs": null})
    );
    assert_eq!(
        server.get("/tokenizer_info").json(),
        json!({"bos_token": null, "eos_token": "<|im_end|>", "chat_template": test_server::CHATML, "model_max_length": 512})
    );
    for (path, body) in [
        ("/tokenize", json!({})),
        ("/tokenize", json!({"prompt": "a", "messages": []})),
        ("/tokenize", json!({"messages": []})),
        ("/detokenize", json!({})),
        ("/detokenize", json!({"tokens": [263]})),
        ("/detokenize", json!({"tokens": "a"})),
    ] {
        assert_eq!(server.post(path, &body.to_string()).status, 400, "{path} {body}");
    }
}

#[test]
fn cors() {
    let allowed = |policy: CorsPolicy, origin: &str| {
        let mut setup = Setup::default();
        setup.options.cors = policy;
        let server = test_server::start_with(setup);
        let answer = server.raw(
            format!(
                "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: {origin}\r\n\
                 Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type,x-stainless-os\r\n\r\n"
            )
            .as_bytes(),
        );
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let name = "access-control-allow-origin: ";
        answer.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned)
    };
    assert_eq!(allowed(CorsPolicy::Local, "http://localhost:3000").as_deref(), Some("http://localhost:3000"));
    assert_eq!(allowed(CorsPolicy::Local, "http://evil.example"), None);
    assert_eq!(allowed(CorsPolicy::Any, "http://evil.example").as_deref(), Some("*"));
    let only = CorsPolicy::Only(vec!["http://a.example".parse().unwrap()]);
    assert_eq!(allowed(only.clone(), "http://a.example").as_deref(), Some("http://a.example"));
    assert_eq!(allowed(only, "http://localhost"), None);
}

#[test]
fn metrics_are_prometheus_text_under_both_names() {
    let server = test_server::start();
    server.ok("/v1/completions", json!({"prompt": "hello there", "max_tokens": 5, "temperature": 0}));
    let response = server.get("/metrics");
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = response.text();
    let mut typed = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            typed.push(rest.split(' ').next().unwrap());
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let name = series.split('{').next().unwrap();
            assert!(name.starts_with(typed.last().unwrap()), "{line} is not below its TYPE");
        }
    }
    for gauge in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        assert!(text.contains(&format!("\nvllm:{gauge}{{model_name=\"org/tiny\"}} 0\n")), "{gauge}");
    }
    for (counter, value) in [
        ("prompt_tokens_total", 6),
        ("generation_tokens_total", 5),
        ("num_preemptions_total", 0),
        ("prefix_cache_queries_total", 6),
        ("prefix_cache_hits_total", 0),
    ] {
        for prefix in ["vllm:", "rill_"] {
            let line = format!("\n{prefix}{counter}{{model_name=\"org/tiny\"}} {value}\n");
            assert!(text.contains(&line), "{line}");
        }
    }
    assert!(text.contains("vllm:request_success_total{model_name=\"org/tiny\",finished_reason=\"length\"} 1\n"));
    assert!(
        text.contains("vllm:cache_config_info{model_name=\"org/tiny\",block_size=\"16\",num_gpu_blocks=\"256\"")
    );
    assert!(text.contains(
        "vllm:lora_requests_info{max_lora=\"0\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"}"
    ));
    for histogram in [
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "iteration_tokens_total",
    ] {
        for part in ["_bucket{model_name=\"org/tiny\",le=\"+Inf\"} ", "_sum{", "_count{"] {
            assert!(text.contains(&format!("\nvllm:{histogram}{part}")), "{histogram}{part}");
        }
    }
}

#[test]
fn the_page_needs_nothing_from_outside() {
    let server = test_server::start();
    let page = server.get("/");
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let text = page.text();
    assert!(text.contains("/v1/chat/completions") && text.contains("tokens/s"));
    // The only address in it names the SVG vocabulary inside the icon.
    let addresses: Vec<&str> = text.match_indices("http").map(|(at, _)| &text[at..at + 26]).collect();
    assert_eq!(addresses, ["http://www.w3.org/2000/svg"]);
}

#[test]
fn two_requests_of_one_seed_agree_whatever_else_runs() {
    let server = test_server::start();
    let body = json!({"prompt": "abc", "max_tokens": 40, "seed": 11});
    let alone = server.ok("/v1/completions", body.clone())["choices"][0]["text"].clone();
    let texts: Vec<Value> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..8)
            .map(|i| {
                let (server, mut body) = (&server, body.clone());
                if i % 2 == 1 {
                    body["prompt"] = json!("something else");
                }
                scope.spawn(move || (i, server.ok("/v1/completions", body)["choices"][0]["text"].clone()))
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).filter(|(i, _)| i % 2 == 0).map(|(_, text)| text).collect()
    });
    assert!(texts.iter().all(|text| *text == alone));
}
