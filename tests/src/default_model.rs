//! The default model, found as `rill serve` finds it: the local cache, the hub, or the PyPI package.

use rill_kernels::Backend;
use rill_models::{Isa, LoadOptions, LoadedModel, ModelFiles, ModelKind, NoProgress, SourceOptions};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

fn files() -> &'static ModelFiles {
    static FILES: OnceLock<ModelFiles> = OnceLock::new();
    FILES.get_or_init(|| {
        rill_models::resolve(rill_models::DEFAULT_MODEL, &SourceOptions::from_env(), &mut NoProgress)
            .unwrap_or_else(|error| panic!("the tests run the default model and it cannot be had: {error}"))
    })
}

/// Where its file lies on this machine; fetched first, if need be.
pub fn gguf_path() -> PathBuf {
    match &files().kind {
        ModelKind::Gguf { path } => path.clone(),
        ModelKind::Safetensors { dir, .. } => panic!("the default model is one GGUF file, not {}", dir.display()),
    }
}

/// Two threads of the CPU.
pub const CPU: LoadOptions = LoadOptions::on_cpu(2);

/// Loaded onto another backend.
pub fn load_on<B: Backend + 'static>(backend: B) -> LoadedModel {
    rill_models::load_on(files(), backend, "a test's backend")
        .unwrap_or_else(|error| panic!("the default model does not load: {error}"))
}

/// Loaded on two threads, whatever the machine has: what the numbers must not depend on is not left to chance.
pub fn load() -> LoadedModel {
    load_with(None)
}

/// The same on the instructions given, or on the processor's best.
pub fn load_with(isa: Option<Isa>) -> LoadedModel {
    let options = LoadOptions { isa, ..CPU };
    rill_models::load(files(), &options).unwrap_or_else(|error| panic!("the default model does not load: {error}"))
}

/// The fixtures speak of one very file.
pub fn check_sha256(path: &Path, expected: &str) {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(found, expected, "{} is not the file that the fixtures were made with", path.display());
}
