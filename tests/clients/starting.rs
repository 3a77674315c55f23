//! What `rill` does with a model before it answers, by the very binary: a plan of memory, weights in fewer bits, the
//! model's own sampling parameters, and the caches looked after.

use rill_tests::server_process::ServerProcess;
use rill_tests::tiny_models;
use std::path::Path;
use std::process::{Command, Output};

const RILL: &str = env!("CARGO_BIN_EXE_rill-under-test");

fn rill(arguments: &[&str], caches: &Path) -> Output {
    let mut command = Command::new(RILL);
    command.args(arguments).env("RILL_CACHE", caches.join("rill")).env("HF_HUB_CACHE", caches.join("hub"));
    command.output().expect("the binary runs")
}

/// A directory with a tiny llama and, if given, what its makers say of sampling.
fn tiny(generation_config: Option<&str>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    tiny_models::all()["llama"].write_directory(dir.path(), false);
    if let Some(text) = generation_config {
        std::fs::write(dir.path().join("generation_config.json"), text).expect("written");
    }
    dir
}

/// Why `rill serve` with this model and these flags does not start.
fn refusal(model: &Path, flags: &[&str]) -> String {
    let model = model.display().to_string();
    let arguments = [&["serve", "--port", "0", "--device", "cpu", "--model", &model][..], flags].concat();
    let output = rill(&arguments, Path::new(&model));
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn serve(model: &Path, flags: &[&str]) -> ServerProcess {
    let model = model.display().to_string();
    ServerProcess::start(Path::new(RILL), &[&["--device", "cpu", "--model", &model][..], flags].concat())
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_it_is_read() {
    let dir = tiny(None);
    let message = refusal(dir.path(), &["--memory", "64MiB"]);
    for part in ["does not fit", "KV cache", "64 MiB are available", "--memory"] {
        assert!(message.contains(part), "{message}");
    }
    let message = refusal(dir.path(), &["--memory", "512MiB", "--kv-cache-memory", "1GiB"]);
    assert!(message.contains("what would fit: --kv-cache-memory"), "{message}");
}

#[test]
fn weights_in_fewer_bits_are_said_and_served() {
    let dir = tiny(None);
    let server = serve(dir.path(), &["--quantize", "q4"]);
    assert!(server.banner.contains("14 matrices quantised to 4 bits"), "{}", server.banner);
    let answer = server.post("/v1/completions", r#"{"prompt":[1,5,3],"max_tokens":3,"temperature":0}"#);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn what_only_candle_has_is_said_and_served() {
    let model = &tiny_models::long_tail()["mamba"];
    let dir = tempfile::tempdir().expect("a temporary directory");
    model.write_directory(dir.path(), true);
    let server = serve(dir.path(), &[]);
    for part in ["MambaForCausalLM", "CPU through candle", "one sequence at a time"] {
        assert!(server.banner.contains(part), "{}", server.banner);
    }
    let (prompt, row) = (&model.tokens[..20], model.logits()[19 * 64..20 * 64].to_vec());
    let likeliest = (0..64).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("a vocabulary");
    let body = format!(r#"{{"prompt":{prompt:?},"max_tokens":60,"temperature":0}}"#);
    // Twice: the second begins with what the cache knows, which the state does not.
    let texts: Vec<String> = (0..2)
        .map(|_| {
            let answer = server.post("/v1/completions", &body);
            let json: serde_json::Value = serde_json::from_str(&answer.text()).expect("JSON");
            json["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
        })
        .collect();
    assert!(texts[0].starts_with(&format!("t{likeliest}")) && texts[0] == texts[1], "{texts:?} after {likeliest}");
    // Drafts would only be computed twice.
    let metrics = server.get("/metrics").text();
    let drafted = metrics.lines().find(|line| line.starts_with("rill_spec_decode_num_draft_tokens_total"));
    assert_eq!(drafted.and_then(|line| line.split_whitespace().last()), Some("0"), "{drafted:?}");
}

#[test]
fn the_models_sampling_parameters_hold_unless_told_otherwise() {
    // A body whose only say on sampling is what is added to it.
    let first_text = |server: &ServerProcess, more: &str| {
        let body = format!(r#"{{"prompt":[5,25,59,43],"max_tokens":1{more}}}"#);
        let answer = server.post("/v1/completions", &body);
        let json: serde_json::Value = serde_json::from_str(&answer.text()).expect("JSON");
        json["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
    };
    let greedy = r#"{"temperature": 0.0, "eos_token_id": [2, 9]}"#;
    let dir = tiny(Some(greedy));
    let server = serve(dir.path(), &[]);
    // What transformers' logits make the likeliest, and the one after it.
    assert!((0..8).all(|_| first_text(&server, "") == "t27"), "temperature 0 is the model's own");
    let warm: std::collections::HashSet<String> =
        (0..12).map(|seed| first_text(&server, &format!(r#","temperature":1.5,"seed":{seed}"#))).collect();
    assert!(warm.len() > 1, "a request's own temperature wins: {warm:?}");
    drop(server);

    let dir = tiny(Some(r#"{"temperature": 0.0, "suppress_tokens": [27]}"#));
    let server = serve(dir.path(), &[]);
    assert_eq!(first_text(&server, ""), "t23");
    drop(server);
    let server = serve(dir.path(), &["--generation-config", "vllm"]);
    assert_eq!(first_text(&server, r#","temperature":0"#), "t27", "the API's own defaults suppress nothing");
}

#[test]
fn sampling_that_is_not_supported_is_refused_by_name() {
    let dir = tiny(Some(r#"{"forced_bos_token_id": 7}"#));
    let message = refusal(dir.path(), &[]);
    assert!(message.contains("forced_bos_token_id") && message.contains("--generation-config vllm"), "{message}");
}

/// A GPU that is not there is one line and exit code 1, what is no device is the command line's 2, and `auto` falls back and
/// says to what.
#[test]
fn a_device_that_is_not_there_is_said_in_one_line() {
    let dir = tiny(None);
    let model = dir.path().display().to_string();
    let run = |device: &str| {
        let output = rill(&["serve", "--port", "0", "--device", device, "--model", &model], dir.path());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // No machine has so many.
    let (code, text) = run("cuda:99");
    assert_eq!(code, Some(1), "{text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("rill: ") && last.contains("CUDA"), "{text}");
    assert_eq!(text.lines().filter(|line| line.contains("CUDA")).count(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for nonsense in ["gpu", "cuda:x", "cuda:"] {
        let (code, text) = run(nonsense);
        assert_eq!(code, Some(2), "{nonsense}: {text}");
        assert!(text.contains("--device"), "{text}");
    }
    // Where a GPU works, it is taken, and said as well.
    let server = ServerProcess::start(Path::new(RILL), &["--device", "auto", "--model", &model]);
    assert!(["CPU", "compute capability"].iter().any(|words| server.banner.contains(words)), "{}", server.banner);
}

#[test]
fn caches_are_listed_and_emptied() {
    let caches = tempfile::tempdir().expect("a temporary directory");
    let blobs = caches.path().join("hub/models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).expect("made");
    std::fs::write(blobs.join("0123"), [0; 1500]).expect("written");
    let text = |arguments: &[&str]| {
        let output = rill(arguments, caches.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(text(&["models", "list"]).contains("org/tiny"));
    let json: serde_json::Value = serde_json::from_str(&text(&["models", "list", "--json"])).expect("JSON");
    assert_eq!((&json[0]["id"], &json[0]["bytes"]), (&"org/tiny".into(), &1500.into()));
    assert!(text(&["models", "rm", "org/tiny"]).contains("1.5 kB freed"));
    assert!(text(&["models", "list"]).contains("no models"));
    let output = rill(&["models", "pull", "org/tiny", "--offline"], caches.path());
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not hold it"));
}
