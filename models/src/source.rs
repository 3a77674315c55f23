//! From what the user calls a model to files on this disk: a path, a hub repository, or the default model.

mod cached;
mod default_model;
mod disk;
mod fingerprint;
mod hub;
mod local;
mod options;
mod parallel;
mod pip;
mod select;
pub(crate) mod spec;
mod transfer;

use std::path::PathBuf;

pub use cached::{CachedModel, cached_models, remove_cached};
pub use options::SourceOptions;
use spec::ModelSpec;

use crate::ModelError;

/// What [`resolve`] takes for the model that runs when none is named.
pub const DEFAULT_MODEL: &str = default_model::NAME;

/// A model's files, all on this disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// What to serve the model as: the repository, or the file's or directory's own name.
    pub name: String,
    pub kind: ModelKind,
}

/// Which format the files are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelKind {
    /// One file, or the first of a split model; [`crate::GgufFile::open`] finds the others beside it.
    Gguf { path: PathBuf },
    /// A directory with config.json and tokenizer.json, and the weight files in it, in order.
    Safetensors { dir: PathBuf, shards: Vec<PathBuf> },
}

/// Is told how a download comes along; calls come from the thread that called [`resolve`].
pub trait Progress {
    /// A file begins; `total_bytes` where known.
    fn start(&mut self, what: &str, total_bytes: Option<u64>);
    /// This many bytes of it are here by now, what an earlier attempt left included.
    fn received(&mut self, bytes: u64);
    /// It is complete, or given up.
    fn finish(&mut self);
    /// Something the user may want to know while waiting: what is tried next, and why.
    fn note(&mut self, message: &str);
    /// Asked while bytes arrive: whether nobody wants the rest any more.
    fn given_up(&self) -> bool {
        false
    }
}

/// Tells nobody.
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&mut self, _what: &str, _total_bytes: Option<u64>) {}
    fn received(&mut self, _bytes: u64) {}
    fn finish(&mut self) {}
    fn note(&mut self, _message: &str) {}
}

/// Finds the files of the model called `spec`, fetching what is not on this disk yet. Blocks until they are here.
///
/// `spec` is [`DEFAULT_MODEL`]; the path of a `.gguf` file or of a directory; or `org/repo`, optionally with
/// `@revision` and with `:Q4_K_M` or `:file.gguf` to pick one of several files.
///
/// # Errors
/// [`ModelError::Source`] saying what was tried, what went wrong and what to do.
pub fn resolve(
    spec: &str,
    options: &SourceOptions,
    progress: &mut dyn Progress,
) -> Result<ModelFiles, ModelError> {
    let at_revision = |parsed: ModelSpec| match (parsed, &options.revision) {
        (parsed, None) => Ok(parsed),
        (ModelSpec::Hub(repo), Some(revision)) => repo.at(revision).map(ModelSpec::Hub),
        (_, Some(revision)) => Err(ModelError::Source(format!(
            "{spec}: has no revision {revision}: only hub repositories (org/repo) have revisions"
        ))),
    };
    match at_revision(ModelSpec::parse(spec)?)? {
        ModelSpec::Default => default_model::resolve(options, progress),
        ModelSpec::Local(path) => local::resolve(&path),
        ModelSpec::Hub(repo) => hub::resolve(&repo, options, progress),
    }
}
