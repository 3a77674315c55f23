//! How much memory a model takes, by its files' headers alone: known before a weight is read.

use crate::source::{ModelFiles, ModelKind};
use crate::weights::{Quantize, Safetensors};
use crate::{GgufFile, ModelConfig, ModelError};
use rill_kernels::{AttentionShape, Dtype, KvCache, KvDtype, packed_bytes};

/// What a model takes on the CPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryNeeds {
    /// Bytes of weights with their matrices as the files keep them.
    pub as_stored: u64,
    /// The same with float matrices quantised.
    pub in_eight: u64,
    pub in_four: u64,
    pub kv_bytes_per_token: usize,
    pub context_len: usize,
    /// Bytes of activations for each token of a step.
    pub step_bytes_per_token: usize,
    /// Bytes of logits for each sequence.
    pub logits_bytes: usize,
}

/// A tensor by its header.
pub(crate) struct Header<'a> {
    /// As GGUF files call it, if they do.
    pub(crate) name: Option<&'a str>,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
}

impl MemoryNeeds {
    pub fn of(files: &ModelFiles, kv_dtype: KvDtype) -> Result<MemoryNeeds, ModelError> {
        let mut bytes = [0; 3];
        let mut count = |header: &Header<'_>| {
            for (sum, quantize) in bytes.iter_mut().zip([None, Some(Quantize::Q8), Some(Quantize::Q4)]) {
                *sum += weight_bytes(header, quantize);
            }
        };
        let config = match &files.kind {
            ModelKind::Gguf { path } => {
                let file = GgufFile::open(path)?;
                for tensor in file.tensors() {
                    // A type nobody reads is refused when it is, by name.
                    if let Some(dtype) = Dtype::from_name(tensor.dtype.name()) {
                        count(&Header { name: Some(&tensor.name), dtype, shape: &tensor.shape });
                    }
                }
                ModelConfig::from_gguf(&file)?
            }
            ModelKind::Safetensors { dir, shards } => {
                let config = ModelConfig::from_dir(dir)?;
                let files = Safetensors::open(dir, shards, &config.architecture)?;
                files.for_each_header(&mut count);
                config
            }
        };
        let [as_stored, in_eight, in_four] = bytes;
        let heads = AttentionShape::full(config.heads, config.kv_heads, config.head_dim, 1.0);
        // The stream and its copies, queries, keys and values, and a feed-forward's two halves and their product.
        let widths = 4 * config.hidden_size + 2 * heads.qkv_width() + 3 * config.intermediate_size;
        Ok(MemoryNeeds {
            as_stored,
            in_eight,
            in_four,
            kv_bytes_per_token: config.attention_layers * KvCache::bytes_per_token(heads, kv_dtype),
            context_len: config.context_len,
            step_bytes_per_token: widths * size_of::<f32>(),
            logits_bytes: config.vocab_size * size_of::<f32>(),
        })
    }

    /// What it takes together with a model that drafts for it: over the same tokens, each with a cache of its own.
    pub fn beside(&self, draft: &MemoryNeeds) -> MemoryNeeds {
        MemoryNeeds {
            as_stored: self.as_stored + draft.as_stored,
            in_eight: self.in_eight + draft.in_eight,
            in_four: self.in_four + draft.in_four,
            kv_bytes_per_token: self.kv_bytes_per_token + draft.kv_bytes_per_token,
            context_len: self.context_len,
            step_bytes_per_token: self.step_bytes_per_token + draft.step_bytes_per_token,
            logits_bytes: self.logits_bytes + draft.logits_bytes,
        }
    }

    /// Bytes of weights when float matrices are quantised so.
    pub fn weights(&self, quantize: Option<Quantize>) -> u64 {
        match quantize {
            None => self.as_stored,
            Some(Quantize::Q8) => self.in_eight,
            Some(Quantize::Q4) => self.in_four,
        }
    }
}

/// Bytes of a tensor once it is loaded: matrices packed, vectors as f32.
fn weight_bytes(header: &Header<'_>, quantize: Option<Quantize>) -> u64 {
    let [stack @ .., rows, cols] = header.shape else {
        return header.shape.iter().product::<usize>() as u64 * size_of::<f32>() as u64;
    };
    let float = header.dtype.block_len() == 1;
    let target = quantize.filter(|_| float).zip(header.name).and_then(|(q, name)| q.target(name, *cols));
    let each = packed_bytes(target.unwrap_or(header.dtype), *rows, *cols);
    each.saturating_mul(stack.iter().product::<usize>() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_counted_as_they_are_packed() {
        let check = |name, dtype, shape: &[usize], expected: [u64; 3]| {
            let header = Header { name: Some(name), dtype, shape };
            let all = [None, Some(Quantize::Q8), Some(Quantize::Q4)].map(|q| weight_bytes(&header, q));
            assert_eq!(all, expected, "{name}");
        };
        check("blk.0.attn_norm.weight", Dtype::F32, &[64], [256; 3]);
        // 5 bits a weight and 8 bytes a row in 4 bits.
        check("blk.0.attn_q.weight", Dtype::BF16, &[32, 64], [4096, 2176, 1280 + 256]);
        check("token_embd.weight", Dtype::BF16, &[32, 64], [4096, 2176, 2176]);
        check("blk.0.attn_q.weight", Dtype::Q4_K, &[16, 256], [2560 + 128; 3]);
        check("blk.0.ffn_up_exps.weight", Dtype::F16, &[3, 16, 64], [6144, 3264, 1920 + 3 * 128]);
    }
}
