//! `rill models`: fetch, list and remove what the caches hold.

use std::io::Write;
use std::time::UNIX_EPOCH;

use rill_models::{CachedModel, ModelError, ModelKind, SourceOptions, cached_models, remove_cached};
use serde_json::json;

use crate::cli::models::{ModelsCommand, ModelsFlags};
use crate::fetch_progress::TerminalProgress;

/// Why a command on models failed.
#[derive(Debug, thiserror::Error)]
pub enum ModelsError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("cannot write: {0}")]
    Output(#[from] std::io::Error),
}

/// Does what the flags say; answers go to stdout.
pub fn run(flags: &ModelsFlags) -> Result<(), ModelsError> {
    let mut out = std::io::stdout().lock();
    match &flags.command {
        ModelsCommand::Pull { model, source } => {
            let files = rill_models::resolve(model, &source.options(), &mut TerminalProgress::default())?;
            let path = match &files.kind {
                ModelKind::Gguf { path } => path,
                ModelKind::Safetensors { dir, .. } => dir,
            };
            writeln!(out, "{}", path.display())?;
        }
        ModelsCommand::List { json } => {
            let models = cached_models(&SourceOptions::from_env())?;
            let text = if *json { as_json(&models) } else { as_table(&models) };
            out.write_all(text.as_bytes())?;
        }
        ModelsCommand::Rm { models } => {
            for model in models {
                let bytes = remove_cached(model, &SourceOptions::from_env())?;
                writeln!(out, "{model}: {} freed", size(bytes))?;
            }
        }
    }
    Ok(())
}

fn as_json(models: &[CachedModel]) -> String {
    let model = |model: &CachedModel| {
        let seconds = model.modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        json!({
            "id": model.name, "revisions": model.revisions, "bytes": model.bytes,
            "unfinished_bytes": model.unfinished_bytes, "modified": seconds.map(|seconds| seconds.as_secs()),
            "path": model.path.display().to_string(),
        })
    };
    format!("{:#}\n", json!(models.iter().map(model).collect::<Vec<_>>()))
}

fn as_table(models: &[CachedModel]) -> String {
    if models.is_empty() {
        return "no models; `rill models pull org/repo` fetches one\n".to_owned();
    }
    let width = models.iter().map(|model| model.name.len()).max().unwrap_or(0);
    let row = |model: &CachedModel| {
        let unfinished = match model.unfinished_bytes {
            0 => String::new(),
            bytes => format!("  {} of an unfinished download", size(bytes)),
        };
        let revisions = model.revisions.join(", ");
        format!("{:width$}  {:>9}  {revisions}{unfinished}", model.name, size(model.bytes)).trim_end().to_owned()
            + "\n"
    };
    models.iter().map(row).collect()
}

/// `1.2 GB`, `98.4 MB`.
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        0.0..1e6 => format!("{:.1} kB", bytes / 1e3),
        1e6..1e9 => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} GB", bytes / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, bytes: u64, unfinished_bytes: u64) -> CachedModel {
        CachedModel {
            name: name.to_owned(),
            revisions: vec!["main".to_owned(), "v1".to_owned()],
            bytes,
            unfinished_bytes,
            modified: Some(UNIX_EPOCH + std::time::Duration::from_secs(7)),
            path: "/cache/x".into(),
        }
    }

    #[test]
    fn models_are_listed_for_people_and_programs() {
        let models = [model("org/long-name", 98_432_100, 0), model("a/b", 2_500_000_000, 1_000_000)];
        assert_eq!(
            as_table(&models),
            "org/long-name    98.4 MB  main, v1\n\
             a/b               2.5 GB  main, v1  1.0 MB of an unfinished download\n"
        );
        assert!(as_table(&[]).contains("rill models pull"));
        let parsed: serde_json::Value = serde_json::from_str(&as_json(&models)).unwrap();
        assert_eq!(parsed[1]["id"], "a/b");
        assert_eq!(parsed[1]["unfinished_bytes"], 1_000_000);
        assert_eq!((&parsed[0]["modified"], &parsed[0]["revisions"][1]), (&7.into(), &"v1".into()));
    }
}
