//! Programs written for OpenAI's API that know nothing of rill, against the real server with the real model: each runs
//! the script beside this file that drives it.

use rill_server::auth::key_file::{KeyEntry, KeyLimits, hash};
use rill_tests::node::NodePackages;
use rill_tests::python::Packages;
use rill_tests::server_process::ServerProcess;
use std::path::{Path, PathBuf};

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn python(test: &str) -> Option<Packages> {
    Packages::install(test, &here().join("requirements.txt"), scratch())
}

/// Several run at once: each with as large a KV cache as it needs.
fn start(kv_cache: &str, flags: &[&str]) -> ServerProcess {
    let flags = [&["--kv-cache-memory", kv_cache][..], flags].concat();
    ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), &flags)
}

fn run(packages: &Packages, script: &str, server: &ServerProcess, arguments: &[&str]) {
    let url = server.url();
    let output = packages.run(&here().join(script), &[&[url.as_str()][..], arguments].concat());
    assert!(output.status.success(), "{script}: {}\n{}", output.status, server.log());
    server.assert_idle_soon();
}

#[test]
fn langchain() {
    let Some(packages) = python("langchain") else { return };
    run(&packages, "langchain_client.py", &start("256MiB", &[]), &[]);
}

#[test]
fn litellm() {
    let Some(packages) = python("litellm") else { return };
    run(&packages, "litellm_client.py", &start("256MiB", &[]), &[]);
}

#[test]
fn guidellm() {
    let Some(packages) = python("guidellm") else { return };
    run(&packages, "guidellm_client.py", &start("256MiB", &[]), &[]);
}

/// The default model's first two layers in bf16, with its vocabulary.
fn two_layers(packages: &Packages, folder: &Path) -> String {
    let made = folder.join("two-layers.gguf").display().to_string();
    let source = rill_tests::default_model::gguf_path().display().to_string();
    let output = packages.run(&here().join("float_gguf.py"), &[&source, &made, "2"]);
    assert!(output.status.success(), "{}", output.status);
    made
}

#[test]
fn lm_eval() {
    let Some(packages) = python("lm-eval") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let exact = two_layers(&packages, folder.path());
    let exact_server = start("256MiB", &["--model", &exact]);
    run(&packages, "lm_eval_client.py", &start("256MiB", &[]), &[&exact_server.url(), &exact]);
    exact_server.assert_idle_soon();
}

#[test]
fn schemathesis() {
    let Some(packages) = python("schemathesis") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    // A fast model of a short context: most requests generate until its end.
    let model = two_layers(&packages, folder.path());
    let server = start("96KiB", &["--model", &model]);
    run(&packages, "schemathesis_client.py", &server, &[]);
}

#[test]
fn openai_for_node() {
    let Some(packages) = NodePackages::install("openai for Node", &here().join("node/package.json"), scratch())
    else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let keys = folder.path().join("keys.jsonl");
    let line =
        |key: &str, limits| KeyEntry { name: key.to_owned(), hash: hash(key.as_bytes()), limits }.to_line() + "\n";
    let scarce = KeyLimits { requests_per_minute: Some(1), ..KeyLimits::default() };
    std::fs::write(&keys, line("sesame", KeyLimits::default()) + &line("scarce", scarce)).expect("writes");
    let server = start("256MiB", &["--api-key-file", &keys.display().to_string()]);
    let output = packages.run(&here().join("node/openai_client.cjs"), &[&server.url()]);
    assert!(output.status.success(), "{}\n{}", output.status, server.log());
    server.assert_idle_soon();
}
