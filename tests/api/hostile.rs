//! Clients that mean no good or know no better: each is answered clearly or cut off, and the server lives on unharmed.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rill_server::auth::ApiKeys;
use rill_tests::http::{self, OpenResponse};
use serde_json::{Value, json};

use crate::test_server::{self, Setup, TestServer};

const PATH: &str = "/v1/completions";
const BODY: &str = r#"{"prompt":"a","max_tokens":2,"temperature":0}"#;

fn server() -> TestServer {
    let mut setup = Setup::default();
    setup.listen.connections_max = 512;
    test_server::start_with(setup)
}

fn post(path: &str, headers: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn status(answer: &str) -> u16 {
    answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

#[test]
fn heads_that_make_no_sense_are_refused() {
    let server = server();
    for (request, expected) in [
        ("GET /health\r\n\r\n".to_owned(), 400),
        ("GET /health HTTP/3.0\r\n\r\n".to_owned(), 400),
        ("GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), 400),
        ("GET /health HTTP/1.1\r\nHost : x\r\n\r\n".to_owned(), 400),
        ("GET /health HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n".to_owned(), 400),
        (format!("GET /health HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(100_000)), 431),
        (format!("GET /health HTTP/1.1\r\n{}\r\n", "X: a\r\n".repeat(1000)), 431),
        (format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(100_000)), 431),
        (format!("POST {PATH} HTTP/1.1\r\nContent-Length: -5\r\n\r\n{BODY}"), 400),
        (format!("POST {PATH} HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n{BODY}"), 400),
        (format!("POST {PATH} HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 45\r\n\r\n{BODY}"), 400),
        (format!("POST {PATH} HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n"), 400),
    ] {
        let answer = server.raw(request.as_bytes());
        assert_eq!(status(&answer), expected, "{}: {answer}", &request[..request.len().min(60)]);
    }
    // Another protocol altogether: closed, with or without a word.
    let tls: &[u8] = &[0x16, 3, 1, 0, 0xa5, 1, 0, 0, 0xa1, 3, 3, 0, 0, 13, 10];
    for bytes in [tls, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let answer = server.raw(bytes);
        assert!(answer.is_empty() || status(&answer) == 400, "{answer}");
    }
    server.ok(PATH, serde_json::from_str(BODY).unwrap());
}

#[test]
fn paths_and_methods_are_refused_in_openais_shape() {
    let server = server();
    for (line, expected) in [
        ("GET /v1/models/%zz%ff", 400),
        ("GET /v1/responses/%ff", 400),
        ("GET /v1/models/../../etc/passwd", 404),
        ("TRACE /health", 405),
        ("FOO /health", 405),
        ("PUT /v1/completions", 405),
        ("PATCH /v1/models", 405),
        ("CONNECT x:443", 404),
    ] {
        let answer = server.raw(format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes());
        assert_eq!(status(&answer), expected, "{line}: {answer}");
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        let error: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{line}: {error}: {body}"));
        assert!(error["error"]["message"].is_string(), "{line}: {error}");
    }
}

#[test]
fn bodies_in_odd_clothes() {
    let server = server();
    let chunks: String = BODY.chars().map(|c| format!("1\r\n{c}\r\n")).collect();
    let chunked = |rest: &str| {
        let head =
            format!("POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n");
        server.raw(format!("{head}\r\n{rest}").as_bytes())
    };
    assert_eq!(status(&chunked(&format!("{chunks}0\r\nX-Trailer: a\r\n\r\n"))), 200);
    for broken in ["zz\r\nabc\r\n", "FFFFFFFFFFFFFFFFFF\r\nabc\r\n"] {
        assert_eq!(status(&chunked(broken)), 400, "{broken}");
    }
    // A streamed answer to HTTP/1.0 has no chunks and ends with the connection.
    let body = BODY.replace('}', r#","stream":true}"#);
    let answer = server.raw(post(PATH, "", &body).replace("HTTP/1.1", "HTTP/1.0").as_bytes());
    assert!(answer.starts_with("HTTP/1.0 200 ") && answer.ends_with("data: [DONE]\n\n"), "{answer}");
    let refused = server.raw(post(PATH, "Content-Encoding: gzip\r\n", "\u{1f}").as_bytes());
    assert!(status(&refused) == 415 && refused.contains("content encoding gzip"), "{refused}");
    assert_eq!(status(&server.raw(post(PATH, "Content-Encoding: identity\r\n", BODY).as_bytes())), 200);
    let deep = |open: &str, close: &str| format!("{}1{}", open.repeat(10_000), close.repeat(10_000));
    for (body, expected) in [
        (r#"{"prompt":"a","prompt":"b"}"#.to_owned(), 400),
        (format!(r#"{{"prompt":{}}}"#, deep("[", "]")), 400),
        (format!(r#"{{"prompt":"a","max_tokens":{}}}"#, "9".repeat(10_000)), 400),
        (format!(r#"{{"prompt":"a","max_tokens":1,"unknown":{}}}"#, deep("[", "]")), 200),
        (format!(r#"{{"prompt":[{}"a"],"max_tokens":1}}"#, r#""a","#.repeat(10_000)), 400),
        ("\u{feff}".to_owned() + BODY, 400),
    ] {
        let answer = server.raw(post(PATH, "", &body).as_bytes());
        assert_eq!(status(&answer), expected, "{}: {answer}", &body[..body.len().min(60)]);
    }
    server.assert_idle_soon();
}

/// All that a client reads that first sends all it has.
fn after_sending(server: &TestServer, request: &str) -> String {
    let mut stream = http::connect(server.address, Duration::from_secs(20)).unwrap();
    stream.write_all(request.as_bytes()).expect("the server reads on while it has answered");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer and no reset");
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn whoever_sends_a_large_body_in_vain_reads_why() {
    let mut setup = Setup::default();
    setup.options.keys = ApiKeys::open(&["sesame".to_owned()], None).unwrap();
    let server = test_server::start_with(setup);
    let body = "x".repeat(6 << 20);
    let key = "Authorization: Bearer sesame\r\n";
    let text = format!("{key}Content-Type: text/plain\r\n");
    for (path, headers, expected) in [
        (PATH, "", 401),
        ("/v1/messages", "", 401),
        ("/nothing", "", 404),
        ("/health", "", 405),
        (PATH, text.as_str(), 415),
        (PATH, key, 413),
    ] {
        assert_eq!(status(&after_sending(&server, &post(path, headers, &body))), expected, "{path} {headers}");
    }
    // Who asks first is told before it sends, and not told to go on.
    let mut stream = http::connect(server.address, Duration::from_secs(5)).unwrap();
    let head = post(PATH, &format!("{key}Expect: 100-continue\r\n"), &body);
    stream.write_all(&head.as_bytes()[..head.len() - body.len()]).unwrap();
    let response = OpenResponse::read_head(stream).unwrap();
    assert_eq!(response.status, 413);
    // Who announces much and sends nothing is answered at once and not waited for.
    let start = Instant::now();
    let answer = server.raw(post(PATH, key, &body)[..200].as_bytes());
    assert!(status(&answer) == 413 && start.elapsed() < Duration::from_secs(5), "{answer}");
}

/// One answer of a kept connection, byte by byte up to its announced end.
fn whole_answer(stream: &mut TcpStream) -> String {
    let (mut answer, mut byte, mut end) = (Vec::new(), [0], None);
    while end != Some(answer.len()) {
        stream.read_exact(&mut byte).expect("the connection is kept");
        answer.push(byte[0]);
        if end.is_none() && answer.ends_with(b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&answer);
            let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
            end = Some(answer.len() + length.and_then(|text| text.parse::<usize>().ok()).expect("a length"));
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_connection_lives_through_errors() {
    let server = server();
    let mut stream = http::connect(server.address, Duration::from_secs(10)).unwrap();
    let kept =
        |path: &str, headers: &str, body: &str| post(path, headers, body).replace("Connection: close\r\n", "");
    for (request, expected) in [
        (kept(PATH, "", "{x}"), 400),
        (kept("/nothing", "", "body"), 404),
        (kept("/health", "", &"x".repeat(200_000)), 405),
        (kept(PATH, "Content-Type: text/plain\r\n", BODY), 415),
        (kept(PATH, "", &"x".repeat(200_000)), 413),
        (kept(PATH, "", BODY), 200),
    ] {
        stream.write_all(request.as_bytes()).unwrap();
        assert_eq!(status(&whole_answer(&mut stream)), expected);
    }
    // Several at once are answered in order.
    stream.write_all(kept(PATH, "", BODY).repeat(5).as_bytes()).unwrap();
    for _ in 0..5 {
        assert_eq!(status(&whole_answer(&mut stream)), 200);
    }
}

#[test]
fn a_hundred_streams_cut_off_at_once() {
    let mut setup = Setup::default();
    setup.listen.connections_max = 512;
    setup.engine.max_waiting = 128;
    let server = test_server::start_with(setup);
    server.knobs.slow(Duration::from_millis(2));
    let body = json!({"prompt": "a", "max_tokens": 400, "stream": true, "ignore_eos": true}).to_string();
    let request = post(PATH, "", &body);
    let streams: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut stream = http::connect(server.address, Duration::from_secs(20)).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            stream
        })
        .collect();
    server.wait_until("running", |server| server.engine.stats().running() == 8);
    drop(streams);
    server.assert_idle_soon();
    server.ok(PATH, serde_json::from_str(BODY).unwrap());
}
