//! More than fits: full queues, too many connections, readers and clients that go away or stand still.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rill_engine::EngineConfig;
use rill_tests::http;
use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};

const PATH: &str = "/v1/completions";

fn small_queue() -> TestServer {
    let engine = EngineConfig {
        num_blocks: 64,
        context_len: 512,
        max_batch_tokens: 64,
        max_running: 2,
        max_waiting: 3,
        ..EngineConfig::default()
    };
    test_server::start_with(Setup { engine, ..Setup::default() })
}

fn send(server: &TestServer, body: &Value) -> TcpStream {
    let mut stream = http::connect(server.address, Duration::from_secs(20)).unwrap();
    stream.write_all(&http::request_bytes("POST", PATH, &body.to_string())).unwrap();
    stream
}

#[test]
fn a_full_queue_is_429_with_retry_after() {
    let server = small_queue();
    server.knobs.stall();
    let body = json!({"prompt": "a", "max_tokens": 4, "stream": true});
    let mut taken = Vec::new();
    let refused = loop {
        if server.engine.stats().waiting() >= 3 {
            break server.post(PATH, &body.to_string());
        }
        taken.push(send(&server, &body));
        assert!(taken.len() < 50, "never full");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.json()["error"]["code"], "queue_full");

    // Of several choices either all are taken or none.
    let several = json!({"prompt": "a", "n": 8, "max_tokens": 1});
    assert_eq!(server.post(PATH, &several.to_string()).status, 429);
    server.knobs.resume();
    for stream in taken {
        let response = http::OpenResponse::read_head(stream).unwrap();
        assert!(response.status == 200 || response.status == 429);
        if response.status == 200 {
            assert_eq!(response.events().unwrap().pop().as_deref(), Some("[DONE]"));
        }
    }
    server.assert_idle_soon();
}

#[test]
fn who_waits_too_long_is_503_with_retry_after_and_gives_up_the_place() {
    let mut setup = Setup::default();
    setup.engine.max_running = 1;
    setup.engine.max_queue_wait_ms = Some(100);
    let server = test_server::start_with(setup);
    server.knobs.slow(Duration::from_millis(5));
    let long = json!({"prompt": "a", "max_tokens": 200, "stream": true, "ignore_eos": true});
    let running = send(&server, &long);
    server.wait_until("running", |server| server.engine.stats().running() == 1);
    for stream in [true, false] {
        let refused = server.post(PATH, &json!({"prompt": "b", "max_tokens": 1, "stream": stream}).to_string());
        assert_eq!(refused.status, 503, "stream {stream}: {}", refused.text());
        assert_eq!(refused.header("retry-after"), Some("1"));
        assert_eq!(refused.json()["error"]["code"], "overloaded");
        assert!(refused.text().contains("100 ms"), "names the limit: {}", refused.text());
        assert_eq!(server.engine.stats().waiting(), 0);
    }
    let answer = http::OpenResponse::read_head(running).unwrap();
    assert_eq!(answer.events().unwrap().pop().as_deref(), Some("[DONE]"), "the one that ran is left alone");
    server.assert_idle_soon();
}

#[test]
fn of_several_choices_those_taken_before_a_refusal_are_cancelled() {
    let server = small_queue();
    let too_many = json!({"prompt": "a", "n": 64, "max_tokens": 400});
    assert_eq!(server.post(PATH, &too_many.to_string()).status, 429);
    server.assert_idle_soon();
}

#[test]
fn a_client_that_goes_away_frees_its_blocks_at_once() {
    let server = test_server::start();
    server.knobs.slow(Duration::from_millis(5));
    for stream in [true, false] {
        let body = json!({"prompt": "a", "max_tokens": 500, "n": 4, "stream": stream, "ignore_eos": true});
        let client = send(&server, &body);
        server.wait_until("running", |server| server.engine.stats().running() == 4);
        drop(client);
        let gone = Instant::now();
        server.assert_idle_soon();
        assert!(gone.elapsed() < Duration::from_millis(1500), "500 tokens take longer: stream {stream}");
    }
}

#[test]
fn readers_that_stand_still_are_cut_off() {
    let mut setup = Setup::default();
    setup.engine.max_waiting = 32;
    let server = test_server::start_with(setup);
    // Log-probabilities make a stream larger than the sockets' buffers.
    let body =
        json!({"prompt": "a", "max_tokens": 500, "n": 20, "stream": true, "logprobs": 20, "ignore_eos": true});
    let mut client = send(&server, &body);
    let mut head = [0; 12];
    client.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    server.assert_idle_soon();
    drop(client);
}

#[test]
fn idle_connections_hurt_nobody() {
    let mut setup = Setup::default();
    setup.listen.connections_max = 300;
    let server = test_server::start_with(setup);
    let idle: Vec<TcpStream> = (0..250).map(|_| TcpStream::connect(server.address).unwrap()).collect();
    server.ok(PATH, json!({"prompt": "a", "max_tokens": 1}));
    drop(idle);
}

#[test]
fn more_connections_than_allowed_wait_their_turn() {
    let mut setup = Setup::default();
    setup.listen.connections_max = 2;
    let server = test_server::start_with(setup);
    let idle: Vec<TcpStream> = (0..2).map(|_| TcpStream::connect(server.address).unwrap()).collect();
    let start = Instant::now();
    // Served once an idle one is closed for saying nothing.
    server.ok(PATH, json!({"prompt": "a", "max_tokens": 1}));
    assert!(start.elapsed() > Duration::from_millis(500), "both places were taken");
    drop(idle);
}

#[test]
fn kept_connections_serve_one_request_after_another() {
    let server = test_server::start();
    let mut stream = http::connect(server.address, Duration::from_secs(5)).unwrap();
    for _ in 0..3 {
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = [0; 512];
        let read = stream.read(&mut answer).unwrap();
        assert!(answer[..read].starts_with(b"HTTP/1.1 200 "));
    }
}
