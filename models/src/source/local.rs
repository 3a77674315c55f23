//! Models that are on this disk already.

use std::path::{Path, PathBuf};

use super::select::{self, Selection};
use super::{ModelFiles, ModelKind};
use crate::ModelError;

/// A `.gguf` file, or a directory with a model in either format.
pub(super) fn resolve(path: &Path) -> Result<ModelFiles, ModelError> {
    // The real path: "." and links have no name to serve under.
    let real = path.canonicalize().map_err(|e| failed(path, &e.to_string()))?;
    if real.is_dir() {
        let name = real.file_name().unwrap_or(real.as_os_str()).to_string_lossy();
        return in_dir(&real, name.into_owned(), None);
    }
    // The name the user gave: in the hub's cache a real file is named by its hash.
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    Ok(ModelFiles { name: select::model_name(&name), kind: ModelKind::Gguf { path: path.to_owned() } })
}

/// The model in a directory whose files are all there.
pub(super) fn in_dir(dir: &Path, name: String, pick: Option<&str>) -> Result<ModelFiles, ModelError> {
    let listing = list(dir, "").map_err(|e| failed(dir, &e.to_string()))?;
    let kind = match select::select(&listing, pick).map_err(|reason| failed(dir, &reason))? {
        Selection::Gguf { files } => ModelKind::Gguf { path: dir.join(&files[0]) },
        Selection::Safetensors { .. } => {
            ModelKind::Safetensors { dir: dir.to_owned(), shards: weight_files(dir, &listing)? }
        }
    };
    Ok(ModelFiles { name, kind })
}

/// The weight files of a directory: those its index names, else all.
pub(super) fn weight_files(dir: &Path, listing: &[String]) -> Result<Vec<PathBuf>, ModelError> {
    let index = dir.join(select::INDEX);
    let names = if index.is_file() {
        let json = std::fs::read(&index).map_err(|e| failed(&index, &e.to_string()))?;
        select::indexed(&json)
            .map_err(|reason| ModelError::Format { path: index.display().to_string(), reason })?
    } else {
        select::safetensors(listing)
    };
    let missing: Vec<&str> = names.iter().filter(|name| !dir.join(name).is_file()).map(String::as_str).collect();
    if !missing.is_empty() {
        return Err(failed(dir, &format!("{} is missing", missing.join(", "))));
    }
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// Files of a directory and the directories in it, as paths from it.
pub(super) fn list(dir: &Path, prefix: &str) -> std::io::Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = entry.path();
        if path.is_file() {
            files.push(format!("{prefix}{name}"));
        } else if prefix.is_empty() && path.is_dir() && !name.starts_with('.') {
            files.extend(list(&path, &format!("{name}/"))?);
        }
    }
    files.sort();
    Ok(files)
}

fn failed(path: &Path, reason: &str) -> ModelError {
    ModelError::Source(format!("{}: {reason}", path.display()))
}
