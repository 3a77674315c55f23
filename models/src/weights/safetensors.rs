//! Memory-mapped safetensors shards and an index over them.

use super::names::Names;
use super::quantization::Quantization;
use crate::ModelError;
use crate::gguf::map_file;
use crate::needs::Header;
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
    /// How matrices are kept that are not kept as floats.
    pub(super) quantization: Option<Quantization>,
}

/// A tensor as it lies in its file.
#[derive(Clone, Copy)]
pub(super) struct Raw<'a> {
    pub dtype: safetensors::Dtype,
    pub shape: &'a [usize],
    pub data: &'a [u8],
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
        let quantization = Quantization::from_dir(dir)?;
        Ok(Safetensors { path: dir.to_owned(), shards: maps, tensors, names, root, quantization })
    }

    /// The name these files give GGUF tensor `name`.
    pub(super) fn hub_name(&self, name: &str) -> Option<String> {
        self.names.hub(self.root, name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.hub_name(name).is_some_and(|name| self.tensors.contains_key(&name) || self.has_codes(&name))
    }

    /// The tensor the files call `name`, whatever its type.
    pub(super) fn raw(&self, name: &str) -> Option<Raw<'_>> {
        let tensor = self.tensors.get(name)?;
        let data = &self.shards[tensor.shard][tensor.start..tensor.end];
        Some(Raw { dtype: tensor.dtype, shape: &tensor.shape, data })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Name, weights and size in bytes of every tensor; scales and the like count as none.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (&str, usize, usize)> {
        self.tensors.iter().map(|(name, t)| {
            let bytes = t.end - t.start;
            let is = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
            let bits = self.quantization.as_ref().map_or(4, |quantization| quantization.word_bits);
            let weights = match t.shape.len() {
                _ if is(&[".qweight", ".weight_packed"]) => bytes * 8 / bits,
                0 | 1 => 0,
                _ if is(&[".qzeros", ".scales", "_scale", "_scale_inv", "_zero_point"]) => 0,
                _ => t.shape.iter().product(),
            };
            (name.as_str(), weights, bytes)
        })
    }

    /// Every tensor that takes memory once it is loaded, as it will be run.
    pub(crate) fn for_each_header(&self, put: &mut dyn FnMut(&Header<'_>)) {
        let quantization = self.quantization.as_ref();
        for (name, weights, _) in self.sizes() {
            let tensor = &self.tensors[name];
            let is = |part: &str| name.split('.').any(|piece| piece == part);
            // As far as sizes need it told apart.
            let gguf = if ["embed_tokens", "wte", "embed_in"].into_iter().any(is) {
                Some("token_embd.weight")
            } else if is("lm_head") || is("embed_out") {
                Some("output.weight")
            } else if is("wpe") || name.ends_with("mlp.gate.weight") || name.contains(".router.") {
                None
            } else {
                Some("blk.0.linear.weight")
            };
            let words = name.ends_with(".qweight") || name.ends_with(".weight_packed");
            let dtype = match tensor.dtype {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::F16 => Dtype::F16,
                safetensors::Dtype::BF16 => Dtype::BF16,
                _ if words && quantization.is_some_and(|q| q.word_bits == 4 && !q.reordered) => Dtype::Q4_1,
                _ => Dtype::Q8_0,
            };
            match tensor.shape.as_slice() {
                // Scales and zero points go into the blocks of their matrix.
                shape if shape.len() > 1 && weights == 0 => {}
                shape if words => {
                    let long = shape.iter().copied().max().unwrap_or(1).max(1);
                    put(&Header { name: gguf, dtype, shape: &[weights / long, long] });
                }
                shape => put(&Header { name: gguf, dtype, shape }),
            }
        }
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
