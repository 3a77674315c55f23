//! Loading, draining, dying: what probes and clients are told.

use std::time::Duration;

use rill_tests::http;
use serde_json::json;

use crate::test_server::{self, CHATML, Setup};

const PATH: &str = "/v1/completions";

#[test]
fn while_loading_only_health_is_well() {
    let server = test_server::start_with(Setup { loading: true, ..Setup::default() });
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/version").status, 200);
    assert_eq!(server.get("/").status, 200);
    assert!(server.get("/metrics").text().contains("rill_ready 0\n"));
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
    for response in [server.get("/ready"), server.get("/v1/models"), server.post(PATH, &body)] {
        assert_eq!(response.status, 503);
        assert!(response.header("retry-after").is_some());
        assert!(response.text().contains("still loading"));
    }
    server.load(Some(CHATML));
    assert_eq!(server.get("/ready").status, 200);
    assert!(server.get("/metrics").text().contains("rill_ready 1\n"));
    assert_eq!(server.post(PATH, &body).status, 200);
}

#[test]
fn draining_finishes_streams_and_takes_nothing_new() {
    let server = test_server::start();
    server.knobs.slow(Duration::from_millis(10));
    let body = json!({"prompt": "a", "max_tokens": 40, "temperature": 0, "stream": true}).to_string();
    let mut stream = http::open(server.address, "POST", PATH, &body).unwrap();
    let mut pending = Vec::new();
    stream.next_event(&mut pending).unwrap();
    server.start_draining();
    assert_eq!(server.get("/health").status, 200);
    for response in [server.get("/ready"), server.get("/v1/models"), server.post(PATH, &body)] {
        assert_eq!(response.status, 503, "{}", response.text());
        assert!(response.header("retry-after").is_some());
    }
    let mut last = None;
    let mut frames = 1;
    while let Some(event) = stream.next_event(&mut pending).unwrap() {
        frames += 1;
        last = Some(event);
    }
    assert_eq!(last.as_deref(), Some("[DONE]"));
    assert!(frames > 20, "{frames}");
    server.block_on(async {
        tokio::time::timeout(Duration::from_secs(5), server.state.drain().idle()).await.unwrap()
    });
}

#[test]
fn streams_cut_by_the_drain_timeout_are_told_in_band() {
    let server = test_server::start();
    server.knobs.slow(Duration::from_millis(10));
    let body = json!({"prompt": "a", "max_tokens": 400, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = http::open(server.address, "POST", PATH, &body).unwrap();
    let mut pending = Vec::new();
    stream.next_event(&mut pending).unwrap();
    server.engine.shutdown();
    let mut last = String::new();
    while let Some(event) = stream.next_event(&mut pending).unwrap() {
        last = event;
    }
    let error: serde_json::Value = serde_json::from_str(&last).unwrap();
    assert_eq!(error["error"].as_object().unwrap().len(), 4, "{error}");
    server.block_on(async {
        tokio::time::timeout(Duration::from_secs(5), server.state.drain().idle()).await.unwrap()
    });
}

#[test]
fn a_dead_engine_ends_every_stream_and_turns_health_red() {
    let server = test_server::start();
    server.knobs.slow(Duration::from_millis(10));
    let body = json!({"prompt": "a", "max_tokens": 400, "ignore_eos": true});
    let streamed = http::request_bytes("POST", PATH, &{
        let mut body = body.clone();
        body["stream"] = json!(true);
        body.to_string()
    });
    let whole = http::request_bytes("POST", PATH, &body.to_string());
    let clients: Vec<_> = [streamed, whole]
        .into_iter()
        .map(|bytes| {
            use std::io::Write;
            let mut stream = http::connect(server.address, Duration::from_secs(10)).unwrap();
            stream.write_all(&bytes).unwrap();
            stream
        })
        .collect();
    server.wait_until("both run", |server| server.engine.stats().running() == 2);
    std::thread::sleep(Duration::from_millis(50));
    server.knobs.fail();
    let mut answers = clients.into_iter().map(|stream| http::OpenResponse::read_head(stream).unwrap());
    let events = answers.next().unwrap().events().unwrap();
    let last: serde_json::Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error", "{last}");
    let whole = answers.next().unwrap().read_to_end().unwrap();
    assert_eq!((whole.status, whole.json()["error"]["type"].as_str()), (500, Some("server_error")));
    server.wait_until("red", |server| server.get("/health").status == 503);
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.post(PATH, &body.to_string()).status, 500);
    assert!(server.get("/metrics").text().contains("rill_engine_alive{model_name=\"org/tiny\"} 0\n"));
}

#[test]
fn a_failed_batch_fails_its_requests_alone() {
    let server = test_server::start();
    server.knobs.fail_batch();
    let body = json!({"prompt": "a", "max_tokens": 3});
    for stream in [false, true] {
        server.knobs.fail_batch();
        let mut body = body.clone();
        body["stream"] = json!(stream);
        let response = server.post(PATH, &body.to_string());
        // The first event is the failure: a stream has not begun and gets the status, too.
        assert_eq!(response.status, 500, "{}", response.text());
    }
    server.ok(PATH, body);
    assert_eq!(server.get("/health").status, 200);
    server.assert_idle_soon();
}
