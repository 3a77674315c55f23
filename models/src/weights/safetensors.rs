//! Memory-mapped safetensors shards and an index over them.

use super::names::Names;
use crate::ModelError;
use crate::gguf::map_file;
use memmap2::Mmap;
use rill_kernels::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The tensors of a model directory, by their GGUF names.
pub(crate) struct Safetensors {
    pub(super) path: PathBuf,
    shards: Vec<Mmap>,
    tensors: BTreeMap<String, SafeTensor>,
    pub(super) names: &'static Names,
    /// What precedes every name in these files.
    pub(super) root: &'static str,
}

struct SafeTensor {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

impl Safetensors {
    /// Maps all shards and reads their headers; `architecture` decides what the tensors are called.
    pub(crate) fn open(dir: &Path, shards: &[PathBuf], architecture: &str) -> Result<Safetensors, ModelError> {
        let mut maps = Vec::with_capacity(shards.len());
        let mut tensors = BTreeMap::new();
        for (shard, path) in shards.iter().enumerate() {
            let map = map_file(path)?;
            let failed = |reason: String| ModelError::Format { path: path.display().to_string(), reason };
            let (header, metadata) = safetensors::SafeTensors::read_metadata(&map)
                .map_err(|error| failed(format!("is not a safetensors file: {error}")))?;
            // The header's length field, then the header, then the data.
            let base = 8 + header;
            for (name, info) in metadata.tensors() {
                let (start, end) = (base + info.data_offsets.0, base + info.data_offsets.1);
                if end > map.len() || start > end {
                    return Err(failed(format!("tensor {name} reaches beyond the end: the file is truncated")));
                }
                let tensor = SafeTensor { shard, dtype: info.dtype, shape: info.shape.clone(), start, end };
                tensors.insert(name, tensor);
            }
            maps.push(map);
        }
        let names = Names::of(architecture);
        let leads =
            |root: &&&str| names.hub(root, "token_embd.weight").is_some_and(|name| tensors.contains_key(&name));
        let root = names.roots.iter().find(leads).unwrap_or(&names.roots[0]);
        Ok(Safetensors { path: dir.to_owned(), shards: maps, tensors, names, root })
    }

    /// The name these files give GGUF tensor `name`.
    pub(super) fn hub_name(&self, name: &str) -> Option<String> {
        self.names.hub(self.root, name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.hub_name(name).is_some_and(|name| self.tensors.contains_key(&name))
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Name, shape and size in bytes of every tensor.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (&str, &[usize], usize)> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t.shape.as_slice(), t.end - t.start))
    }

    /// Type, shape and bytes of the tensor the files call `name`; an error's reason where there is none we read.
    pub(super) fn read(&self, name: &str) -> Result<(Dtype, &[usize], &[u8]), ModelError> {
        let path = self.path.display().to_string();
        let Some(tensor) = self.tensors.get(name) else {
            return Err(ModelError::Format { path, reason: format!("tensor {name} is missing") });
        };
        let dtype = match tensor.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::BF16,
            other => {
                return Err(ModelError::Unsupported(format!(
                    "{path}: tensor {name} is stored as {other:?}, which rill does not read; it reads F32, F16, BF16"
                )));
            }
        };
        Ok((dtype, &tensor.shape, &self.shards[tensor.shard][tensor.start..tensor.end]))
    }
}
