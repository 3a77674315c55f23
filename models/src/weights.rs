//! Weights by name, whichever format they lie in: checked against the shape the model expects.

use crate::ModelError;
use crate::gguf::{GgufFile, map_file};
use memmap2::Mmap;
use rill_kernels::{Dtype, Stored, dequantize};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A model's tensors. Names are GGUF's (`blk.0.attn_q.weight`); safetensors files answer to them too.
pub(crate) enum Weights {
    Gguf(GgufFile),
    Safetensors(Safetensors),
}

/// Memory-mapped safetensors shards and an index over them.
pub(crate) struct Safetensors {
    path: PathBuf,
    shards: Vec<Mmap>,
    tensors: HashMap<String, SafeTensor>,
}

struct SafeTensor {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// Where a tensor is, as the file says.
struct Found<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: &'a [u8],
}

impl Safetensors {
    /// Maps all shards and reads their headers.
    pub(crate) fn open(dir: &Path, shards: &[PathBuf]) -> Result<Safetensors, ModelError> {
        let mut maps = Vec::with_capacity(shards.len());
        let mut tensors = HashMap::new();
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
        Ok(Safetensors { path: dir.to_owned(), shards: maps, tensors })
    }
}

/// The Hugging Face name of a GGUF tensor of the llama family.
fn hugging_face_name(name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    let top = match stem {
        "token_embd" => Some("model.embed_tokens"),
        "output_norm" => Some("model.norm"),
        "output" => Some("lm_head"),
        _ => None,
    };
    if let Some(top) = top {
        return Some(format!("{top}.{suffix}"));
    }
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{suffix}"))
}

impl Weights {
    fn path(&self) -> String {
        match self {
            Weights::Gguf(file) => file.path().display().to_string(),
            Weights::Safetensors(files) => files.path.display().to_string(),
        }
    }

    fn wrong(&self, reason: String) -> ModelError {
        ModelError::Format { path: self.path(), reason }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Weights::Gguf(file) => file.tensor(name).is_some(),
            Weights::Safetensors(files) => {
                hugging_face_name(name).is_some_and(|name| files.tensors.contains_key(&name))
            }
        }
    }

    fn find(&self, name: &str) -> Result<Found<'_>, ModelError> {
        match self {
            Weights::Gguf(file) => {
                let info = file.require_tensor(name)?;
                let stored = info.dtype.name();
                let dtype = Dtype::from_name(stored).ok_or_else(|| {
                    ModelError::Unsupported(format!(
                        "{}: tensor {name} is stored as {stored}, which rill does not read; it reads {}",
                        self.path(),
                        rill_kernels::DTYPES.map(Dtype::name).join(", ")
                    ))
                })?;
                Ok(Found { dtype, shape: info.shape.clone(), data: file.tensor_data(info) })
            }
            Weights::Safetensors(files) => {
                let full = hugging_face_name(name)
                    .ok_or_else(|| self.wrong(format!("tensor {name} has no name in this format")))?;
                let tensor =
                    files.tensors.get(&full).ok_or_else(|| self.wrong(format!("tensor {full} is missing")))?;
                let dtype = match tensor.dtype {
                    safetensors::Dtype::F32 => Dtype::F32,
                    safetensors::Dtype::F16 => Dtype::F16,
                    safetensors::Dtype::BF16 => Dtype::BF16,
                    other => {
                        return Err(ModelError::Unsupported(format!(
                            "{}: tensor {full} is stored as {other:?}, which rill does not read; it reads F32, F16, BF16",
                            self.path()
                        )));
                    }
                };
                let data = &files.shards[tensor.shard][tensor.start..tensor.end];
                Ok(Found { dtype, shape: tensor.shape.clone(), data })
            }
        }
    }

    /// A `rows × cols` matrix.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Stored<'_>, ModelError> {
        let found = self.find(name)?;
        if found.shape != [rows, cols] {
            return Err(self.wrong(format!(
                "tensor {name} is {:?}; the model's configuration makes it [{rows}, {cols}]",
                found.shape
            )));
        }
        Ok(Stored { dtype: found.dtype, rows, cols, data: found.data })
    }

    /// A vector of `len` values.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let found = self.find(name)?;
        let stored = Stored { dtype: found.dtype, rows: 1, cols: len, data: found.data };
        if found.shape.iter().product::<usize>() != len || stored.check().is_err() {
            return Err(self.wrong(format!(
                "tensor {name} is {:?}; the model's configuration makes it [{len}]",
                found.shape
            )));
        }
        let mut values = vec![0.0; len];
        dequantize(found.dtype, found.data, &mut values);
        Ok(values)
    }
}

/// Undoes the row order GGUF converters give the q and k matrices of the llama family (each head's two halves
/// interleaved, for a rotation of neighbours), so that one rotation, of halves, serves every file.
pub(crate) fn halves_from_interleaved<'a>(stored: Stored<'a>, heads: usize, turning: usize) -> Cow<'a, [u8]> {
    let row = stored.data.len() / stored.rows;
    let head_dim = stored.rows / heads;
    let mut data = stored.data.to_vec();
    for head in 0..heads {
        let base = head * head_dim;
        for i in 0..turning / 2 {
            for half in 0..2 {
                let (from, to) = (base + 2 * i + half, base + half * (turning / 2) + i);
                data[to * row..(to + 1) * row].copy_from_slice(&stored.data[from * row..(from + 1) * row]);
            }
        }
    }
    Cow::Owned(data)
}

#[cfg(test)]
mod tests {
    use super::{halves_from_interleaved, hugging_face_name};
    use rill_kernels::{Dtype, Stored};

    #[test]
    fn names_translate() {
        let name = |s| hugging_face_name(s).unwrap_or_default();
        assert_eq!(name("blk.11.ffn_gate.weight"), "model.layers.11.mlp.gate_proj.weight");
        assert_eq!(name("token_embd.weight"), "model.embed_tokens.weight");
        assert_eq!(name("output.weight"), "lm_head.weight");
        assert_eq!(name("blk.0.unheard_of.weight"), "");
    }

    #[test]
    fn neighbours_become_halves() {
        // Two heads of four rows, one column: pairs (0, 1) and (2, 3) of each head are what turns together.
        let values: Vec<u8> = (0..8).flat_map(|x| (x as f32).to_le_bytes()).collect();
        let stored = Stored { dtype: Dtype::F32, rows: 8, cols: 1, data: &values };
        let data = halves_from_interleaved(stored, 2, 4);
        let order: Vec<f32> =
            data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        assert_eq!(order, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}
