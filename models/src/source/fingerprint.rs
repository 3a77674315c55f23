//! What tells one model's files from another's without reading all of them.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{ModelFiles, ModelKind};
use crate::ModelError;

/// Read from a file's beginning, where formats keep their headers.
const HEAD_BYTES: u64 = 1 << 20;
/// Read at places spread over the rest: weights that were trained on differ nearly everywhere.
const SAMPLES: u64 = 256;
const SAMPLE_BYTES: u64 = 4096;

impl ModelFiles {
    /// SHA-256 over the size, the beginning and samples of each weight file. Equal for copies of a model wherever they
    /// lie; different once weights, vocabulary or configuration differ.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn fingerprint(&self) -> Result<[u8; 32], ModelError> {
        let mut hasher = Sha256::new();
        let paths: Vec<_> = match &self.kind {
            ModelKind::Gguf { path } => vec![path.clone()],
            ModelKind::Safetensors { dir, shards } => {
                shards.iter().cloned().chain([dir.join("config.json")]).collect()
            }
        };
        for path in paths {
            add_file(&mut hasher, &path).map_err(|error| ModelError::Format {
                path: path.display().to_string(),
                reason: format!("it cannot be read: {error}"),
            })?;
        }
        Ok(hasher.finalize().into())
    }
}

fn add_file(hasher: &mut Sha256, path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    hasher.update(len.to_le_bytes());
    let mut bytes = Vec::new();
    (&mut file).take(HEAD_BYTES).read_to_end(&mut bytes)?;
    hasher.update(&bytes);
    let rest = len.saturating_sub(HEAD_BYTES);
    if rest == 0 {
        return Ok(());
    }
    let step = (rest / SAMPLES).max(SAMPLE_BYTES);
    let mut place = HEAD_BYTES;
    while place < len {
        file.seek(SeekFrom::Start(place))?;
        bytes.clear();
        (&mut file).take(SAMPLE_BYTES).read_to_end(&mut bytes)?;
        hasher.update(&bytes);
        place += step;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_differ_anywhere_it_looks_differ() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let files = ModelFiles { name: "m".into(), kind: ModelKind::Gguf { path: path.clone() } };
        let fingerprint = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            files.fingerprint().unwrap()
        };
        let bytes = vec![1u8; 3 << 20];
        let first = fingerprint(&bytes);
        assert_eq!(first, fingerprint(&bytes));
        let mut other = bytes.clone();
        other[HEAD_BYTES as usize + 100] = 2;
        assert_ne!(first, fingerprint(&other));
        assert_ne!(first, fingerprint(&bytes[1..]));
        assert_ne!(fingerprint(b"a"), fingerprint(b"b"));
    }
}
