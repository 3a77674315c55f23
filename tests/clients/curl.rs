//! The README's curl lines, by the curl program: what a person at a terminal sees.

use rill_tests::environment;
use rill_tests::server_process::ServerProcess;
use std::path::Path;
use std::process::Command;

/// Standard output of `curl ARGUMENTS`, which must succeed.
fn curl(arguments: &[&str]) -> String {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "120", "--noproxy", "*"])
        .args(arguments)
        .output()
        .expect("curl runs");
    let text = String::from_utf8(output.stdout).expect("curl prints UTF-8");
    println!("$ curl {}\n{text}", arguments.join(" "));
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn curl_lines_work() {
    if Command::new("curl").arg("--version").output().is_err() {
        environment::skip("curl", "there is no curl on this machine");
        return;
    }
    let server = ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), &[]);
    println!("{}", server.banner);
    let url = server.url();

    // The very line the server prints at start.
    let line = server.banner.lines().find(|line| line.trim_start().starts_with("curl ")).expect("a curl line");
    let printed = Command::new("sh").args(["-c", line]).env("NO_PROXY", "*").output().expect("sh runs");
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    println!("$ {}\n{printed}", line.trim());
    assert!(json(&printed)["choices"][0]["message"]["content"].is_string(), "{printed}");

    let completions = format!("{url}/v1/completions");
    let body = r#"{"prompt":"The capital of France is","max_tokens":8,"temperature":0}"#;
    let whole = json(&curl(&[&completions, "-H", "Content-Type: application/json", "-d", body]));
    let text = whole["choices"][0]["text"].as_str().expect("text").to_owned();
    assert!(text.contains("Paris"), "{text:?}");

    let body = r#"{"prompt":"The capital of France is","max_tokens":8,"temperature":0,"stream":true}"#;
    let streamed = curl(&["--no-buffer", &completions, "-H", "Content-Type: application/json", "-d", body]);
    let frames: Vec<&str> = streamed.split("\n\n").filter(|frame| !frame.is_empty()).collect();
    assert_eq!(frames.last(), Some(&"data: [DONE]"));
    let joined: String = frames[..frames.len() - 1]
        .iter()
        .map(|frame| json(frame.strip_prefix("data: ").expect("data:")))
        .map(|frame| frame["choices"][0]["text"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(joined, text);

    let headers = curl(&["--head", "--request", "GET", &format!("{url}/health")]);
    assert!(headers.starts_with("HTTP/1.1 200"), "{headers}");
    let models = json(&curl(&[&format!("{url}/v1/models")]));
    assert_eq!(models["data"][0]["object"], "model");
    let metrics = curl(&[&format!("{url}/metrics")]);
    assert!(metrics.contains("\nvllm:generation_tokens_total{"), "{metrics}");
    let wrong = json(&curl(&[&completions, "-H", "Content-Type: application/json", "-d", "{\"prompt\": "]));
    for key in ["message", "type", "param", "code"] {
        assert!(wrong["error"].as_object().expect("an error").contains_key(key), "{wrong}");
    }
    server.assert_idle_soon();
}
