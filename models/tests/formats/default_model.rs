//! The default model's file, found as `rill serve` finds it, so that these tests run on a fresh machine.

use rill_models::{DEFAULT_MODEL, GgufFile, ModelKind, NoProgress, SourceOptions};

pub fn open() -> GgufFile {
    let files = rill_models::resolve(DEFAULT_MODEL, &SourceOptions::from_env(), &mut NoProgress)
        .unwrap_or_else(|e| panic!("these tests read the default model: {e}"));
    match files.kind {
        ModelKind::Gguf { path } => GgufFile::open(path).expect("the default model opens"),
        ModelKind::Safetensors { .. } => panic!("the default model is one GGUF file"),
    }
}
