//! What an operator does with the very binary: makes keys, starts a server with them, and reads its metrics and log.

use rill_tests::http::{self, OpenResponse, Response};
use rill_tests::server_process::ServerProcess;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const RILL: &str = env!("CARGO_BIN_EXE_rill-under-test");

/// `rill keys new ARGUMENTS`, given `input`.
fn keys_new(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(RILL)
        .args(["keys", "new"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    // It need not read what it was not asked to.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    child.wait_with_output().expect("the binary ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn ask(address: SocketAddr, method: &str, path: &str, key: &str) -> Response {
    let body = r#"{"prompt":"The capital of France is","max_tokens":1}"#;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = http::connect(address, Duration::from_secs(30)).expect("connects");
    stream.write_all(request.as_bytes()).expect("sends");
    OpenResponse::read_head(stream).expect("answered").read_to_end().expect("whole")
}

#[test]
fn keys_are_made_once_and_let_their_owner_in() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.jsonl");
    let made = keys_new(&["anna", "--requests-per-minute", "60", "--priority", "-1"], "");
    assert!(made.status.success(), "{}", text(&made.stderr));
    let (line, told) = (text(&made.stdout), text(&made.stderr));
    let key = told.trim().rsplit(' ').next().expect("the key").to_owned();
    assert!(key.starts_with("rill-") && !line.contains(&key), "{line}{told}");
    let own = keys_new(&["bert", "--stdin"], "a key that bert has had for long".replace(' ', "-").as_str());
    assert_eq!(text(&own.stderr), "");
    std::fs::write(&file, line + &text(&own.stdout)).expect("writes");

    let file = file.display().to_string();
    let flags = ["--api-key-file", &file, "--metrics-port", "0", "--log", "debug", "--kv-cache-memory", "64MiB"];
    let server = ServerProcess::start(Path::new(RILL), &flags);
    let answer = ask(server.address, "POST", "/v1/completions", &key);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some("59"));
    let bert = ask(server.address, "POST", "/v1/completions", "a-key-that-bert-has-had-for-long");
    assert_eq!(bert.status, 200, "{}", bert.text());
    assert_eq!(ask(server.address, "POST", "/v1/completions", "rill-0").status, 401);

    // Metrics are where they were asked for, and nothing else is.
    let url = server.banner.split("metrics   http://").nth(1).expect("the banner says where");
    let metrics: SocketAddr = url.split('/').next().and_then(|text| text.parse().ok()).expect("an address");
    assert_eq!(server.get("/metrics").status, 404);
    let page = http::call(metrics, "GET", "/metrics", "").expect("answered").text();
    assert!(page.contains("rill_key_requests_total{key=\"anna\"} 1\n"), "{page}");
    for (path, expected) in [("/health", 200), ("/ready", 200), ("/v1/models", 404), ("/", 404)] {
        assert_eq!(http::call(metrics, "GET", path, "").expect("answered").status, expected, "{path}");
    }
    assert_eq!(server.get("/health").status, 200);

    // The log knows requests by name and no key.
    let log = server.log();
    let logged = log.lines().filter(|line| line.contains("answered") && line.contains("anna")).count();
    assert_eq!(logged, 1, "{log}");
    assert!(!log.contains(&key) && !log.contains("a-key-that-bert"), "{log}");
}

#[test]
fn keys_that_cannot_be_are_refused() {
    for (arguments, input, words) in [
        (&["a b"][..], "", "name must be 1 to 64 letters"),
        (&["anna", "--concurrency", "0"], "", "concurrency must be between 1 and"),
        (&["anna", "--stdin"], "short", "16 to 4096 characters long, not 5"),
    ] {
        let refused = keys_new(arguments, input);
        let message = text(&refused.stderr);
        assert!(!refused.status.success() && message.contains(words), "{arguments:?}: {message}");
        assert_eq!(text(&refused.stdout), "");
    }
}

#[test]
fn the_kv_caches_memory_is_taken_as_it_is_used_or_before() {
    let resident_mib = |flags: &[&str]| {
        let flags = [&["--kv-cache-memory", "128MiB", "--device", "cpu"], flags].concat();
        let server = ServerProcess::start(Path::new(RILL), &flags);
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux says so");
        line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") >> 10
    };
    let (used, all) = (resident_mib(&[]), resident_mib(&["--preallocate-kv-cache"]));
    assert!((120..160).contains(&(all - used)), "{used} MiB, and {all} with the KV cache");
}
