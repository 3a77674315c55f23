//! Adapters as llama.cpp's `convert_lora_to_gguf.py` writes them: `general.type` is `adapter`, and matrix
//! `blk.0.attn_q.weight` has its factors in `blk.0.attn_q.weight.lora_a` and `….lora_b`, rearranged as the matrix is.

use std::collections::BTreeMap;
use std::path::Path;

use rill_kernels::{Dtype, Stored};

use super::{Adapter, AdapterSites, FileOrder, Found, PARTS};
use crate::config::turns_neighbours_in_gguf;
use crate::layers::QkvOrder;
use crate::{GgufFile, ModelError, TensorInfo, registry};

pub(super) fn load(sites: &AdapterSites, path: &Path, rank_max: usize) -> Result<Adapter, ModelError> {
    let file = GgufFile::open(path)?;
    let metadata = file.metadata();
    let wrong = |reason: String| ModelError::Format { path: path.display().to_string(), reason };
    for (key, wanted) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let given = metadata.require_str(key)?;
        if given != wanted {
            return Err(wrong(format!("{key} is {given}; that of a LoRA adapter is {wanted}")));
        }
    }
    let architecture = file.architecture()?;
    let families = [architecture, sites.architecture.as_str()].map(registry::family);
    if families[0].is_none() || families[0] != families[1] {
        return Err(wrong(format!("is an adapter of {architecture}; the model is {}", sites.architecture)));
    }
    if metadata.get("adapter.alora.invocation_tokens").is_some() {
        return Err(ModelError::Unsupported(format!(
            "{}: adapters that start at invocation tokens (aLoRA) are not supported",
            path.display()
        )));
    }
    let alpha = metadata.require_f32("adapter.lora.alpha")?;

    let mut factors: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for info in file.tensors() {
        let (module, factor) = match (info.name.strip_suffix(".lora_a"), info.name.strip_suffix(".lora_b")) {
            (Some(module), _) => (module, 0),
            (_, Some(module)) => (module, 1),
            _ => return Err(wrong(format!("tensor {} is neither a lora_a nor a lora_b", info.name))),
        };
        factors.entry(module).or_default()[factor] = Some(info);
    }
    let stored = |info: &TensorInfo| match (Dtype::from_name(info.dtype.name()), &info.shape[..]) {
        (Some(dtype), &[rows, cols]) => Ok(Stored { dtype, rows, cols, data: file.tensor_data(info) }),
        _ => Err(wrong(format!(
            "tensor {} is stored as {} of shape {:?}, which is not read",
            info.name,
            info.dtype.name(),
            info.shape
        ))),
    };
    let mut found = Vec::with_capacity(factors.len());
    for (module, factors) in factors {
        let [Some(a), Some(b)] = factors else {
            return Err(wrong(format!("{module} has only one of lora_a and lora_b")));
        };
        let Some((layer, part)) = place(module) else {
            return Err(ModelError::Unsupported(format!(
                "{}: adapters of {module} are not supported; those of {} are",
                path.display(),
                PARTS.join(", ")
            )));
        };
        let (a, b) = (stored(a)?, stored(b)?);
        let scale = alpha / a.rows.max(1) as f32;
        found.push(Found { layer, part, module: module.to_owned(), a, b, scale });
    }
    let order = FileOrder { interleaved: turns_neighbours_in_gguf(architecture), qkv: Some(QkvOrder::Blocks) };
    sites.place(path, found, order, rank_max)
}

/// Layer and name of `blk.0.attn_q.weight`.
fn place(module: &str) -> Option<(usize, &'static str)> {
    let (layer, part) = module.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
    Some((layer.parse().ok()?, PARTS.into_iter().find(|known| *known == part)?))
}
