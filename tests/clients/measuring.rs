//! `rill bench` and `rill perplexity` as a person runs them: the very binary, the default model, figures that make sense.

use rill_tests::server_process::ServerProcess;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

const RILL: &str = env!("CARGO_BIN_EXE_rill-under-test");

fn rill(arguments: &[&str]) -> Output {
    Command::new(RILL).args(arguments).output().expect("the binary runs")
}

fn stdout(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}");
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn bench_measures_its_own_server_a_peer_and_the_machine() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let (json, plot) = (scratch.path().join("figures.json"), scratch.path().join("roofline.svg"));
    let peer = ServerProcess::start(Path::new(RILL), &["--threads", "1", "--kv-cache-memory", "64MiB"]);
    let peer_url = format!("one-thread={}/v1", peer.url());
    let output = rill(&[
        "bench",
        "--peer",
        &peer_url,
        "--streams",
        "1",
        "--prompt-words",
        "8",
        "--max-tokens",
        "6",
        "--prefill",
        "30",
        "--structured",
        "--rounds",
        "1",
        "--neighbour",
        "spin",
        "--json",
        &json.display().to_string(),
        "--plot",
        &plot.display().to_string(),
        "--",
        "--kv-cache-memory=64MiB",
    ]);
    let table = stdout(&output);
    assert!(table.contains("| 1 stream | rill |") && table.contains("GMAC/s int8"), "{table}");

    let report: Value = serde_json::from_slice(&std::fs::read(&json).expect("written")).expect("JSON");
    let lines = report["lines"].as_array().expect("lines");
    // Three works, two servers, with and without the neighbour.
    assert_eq!(lines.len(), 12);
    for line in lines {
        let number = |key: &str| line[key]["median"].as_f64();
        assert!(number("tokens_per_s").is_some_and(|rate| rate > 1.0), "{line}");
        assert_eq!(line["failed_requests"], 0, "{line}");
        let json = line["work"] == "1 stream of JSON";
        assert_eq!(number("share_of_free").is_some(), json, "{line}");
        let grammar = line["grammar_share"].as_f64().zip(line["grammar_us"].as_f64());
        assert_eq!(grammar.is_some_and(|(share, us)| share > 0.0 && share < 1.0 && us > 0.0), json, "{line}");
        let ours = line["server"] == "rill";
        assert_eq!(number("ratio").is_some(), !ours, "{line}");
        assert_eq!(number("share_of_quiet").is_some(), line["beside_neighbour"] == true, "{line}");
        let share = line["share_of_limit"].as_f64();
        assert_eq!(share.is_some_and(|share| share > 0.0 && share < 1.5), ours, "{line}");
    }
    // 66 MB of Q4_1 and 30 MB of Q8_0; 106 M and 28 M products.
    let weights = |key: &str| report["weights"][key].as_f64().expect("a number").round();
    assert_eq!((weights("token_mb"), weights("prompt_token_mmac"), weights("token_mmac")), (97.0, 106.0, 134.0));
    assert!(report["start"]["first_token_s"].as_f64().is_some_and(|s| s > 0.0 && s < 60.0));
    let drawn = std::fs::read_to_string(&plot).expect("written");
    assert!(drawn.starts_with("<svg") && drawn.contains("prefill:") && drawn.trim_end().ends_with("</svg>"));
    peer.assert_idle_soon();
}

#[test]
fn bench_says_who_does_not_answer() {
    let output = rill(&["bench", "--url", "http://127.0.0.1:9/v1"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("rill answers no request: cannot connect"), "{error}");
}

#[test]
fn perplexity_is_that_of_the_parity_tests() {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/english.txt");
    let text = text.display().to_string();
    let found = stdout(&rill(&["perplexity", "--file", &text, "--window", "256", "--unscored", "1"]));
    let value: f64 = found.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a figure");
    assert!(found.contains("over 765 tokens") && (5.0..40.0).contains(&value), "{found}");
    let output = rill(&["perplexity", "--file", &text, "--window", "4096"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("less than one window of 4096"), "{error}");
}
