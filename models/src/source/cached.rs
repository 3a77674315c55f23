//! What the caches hold: listed, and removed when asked to.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::spec::ModelSpec;
use super::{SourceOptions, default_model, disk};
use crate::ModelError;

const REPO_PREFIX: &str = "models--";

/// A model in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedModel {
    /// To be given as `--model`.
    pub name: String,
    /// Branches, tags and commits that are there.
    pub revisions: Vec<String>,
    /// Of all its files on the disk, what downloads have left included.
    pub bytes: u64,
    /// Of those, what belongs to downloads that were not finished.
    pub unfinished_bytes: u64,
    /// When a file of it was last written.
    pub modified: Option<SystemTime>,
    pub path: PathBuf,
}

/// All models in rill's cache and in the hub's, by name.
pub fn cached_models(options: &SourceOptions) -> Result<Vec<CachedModel>, ModelError> {
    let mut models = Vec::new();
    let own = default_model::cached_path(options);
    // A link leads into the hub's cache, which is listed itself.
    if std::fs::symlink_metadata(&own).is_ok_and(|file| file.is_file()) {
        let mut model = empty(super::DEFAULT_MODEL.to_owned(), own.clone());
        model.count(&own);
        models.push(model);
    }
    let entries = match std::fs::read_dir(&options.hub_cache_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(models),
        Err(error) => {
            return Err(ModelError::Source(format!("{}: {error}", options.hub_cache_dir.display())));
        }
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if let Some(id) = entry.file_name().to_str().and_then(repo_id)
            && path.is_dir()
        {
            let mut model = empty(id, path.clone());
            for file in files_in(&path.join("blobs")) {
                model.count(&file);
            }
            model.revisions = revisions(&path);
            models.push(model);
        }
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(models)
}

/// Removes the model called `name` from its cache, and says how many bytes that frees.
pub fn remove_cached(name: &str, options: &SourceOptions) -> Result<u64, ModelError> {
    let refused = |reason: String| Err(ModelError::Source(format!("{name}: {reason}")));
    if let Ok(ModelSpec::Hub(repo)) = ModelSpec::parse(name)
        && (repo.revision.is_some() || repo.pick.is_some())
    {
        return refused(format!("the cache forgets whole repositories only: say {}", repo.id));
    }
    let Some(model) = cached_models(options)?.into_iter().find(|model| model.name == name) else {
        return refused("no cache holds it; `rill models list` says what they hold".to_owned());
    };
    let removed = if model.path.is_dir() {
        // Whoever looks finds all of it or nothing.
        let gone = model.path.with_file_name(format!(".removed-{}", std::process::id()));
        std::fs::rename(&model.path, &gone).and_then(|()| std::fs::remove_dir_all(&gone))
    } else {
        std::fs::remove_file(&model.path)
    };
    removed.map_err(|error| disk::write_error(&model.path, &error))?;
    Ok(model.bytes)
}

fn empty(name: String, path: PathBuf) -> CachedModel {
    CachedModel { name, revisions: Vec::new(), bytes: 0, unfinished_bytes: 0, modified: None, path }
}

impl CachedModel {
    fn count(&mut self, file: &Path) {
        let Ok(facts) = std::fs::metadata(file) else { return };
        self.bytes += facts.len();
        if file.extension().is_some_and(|end| end == "incomplete") {
            self.unfinished_bytes += facts.len();
        }
        self.modified = self.modified.max(facts.modified().ok());
    }
}

/// `models--org--repo` → `org/repo`.
fn repo_id(folder: &str) -> Option<String> {
    let (org, repo) = folder.strip_prefix(REPO_PREFIX)?.split_once("--")?;
    Some(format!("{org}/{repo}"))
}

/// The files of a directory that has only files.
fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect()
}

/// Names of revisions, then commits that no name leads to.
fn revisions(repo: &Path) -> Vec<String> {
    let mut named = Vec::new();
    let mut commits = HashSet::new();
    let mut folders = vec![(repo.join("refs"), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                folders.push((entry.path(), format!("{name}/")));
            } else {
                commits.extend(std::fs::read_to_string(entry.path()).map(|commit| commit.trim().to_owned()));
                named.push(name);
            }
        }
    }
    named.sort();
    let snapshots = std::fs::read_dir(repo.join("snapshots")).into_iter().flatten().flatten();
    let mut others: Vec<String> =
        snapshots.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    others.retain(|commit| !commits.contains(commit));
    others.sort();
    named.extend(others);
    named
}
