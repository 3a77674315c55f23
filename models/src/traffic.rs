//! What one token costs by the files alone: bytes of weights read and products computed. Speeds are shares of these.

use crate::source::{ModelFiles, ModelKind};
use crate::weights::Safetensors;
use crate::{GgufFile, ModelConfig, ModelError};

/// A part of the model, for one token.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// Bytes of weights, as stored in the file.
    pub bytes: f64,
    /// Multiply-accumulates with weights; attention's own are not counted.
    pub macs: f64,
}

/// What every token takes, and what those add whose successor is computed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct WeightTraffic {
    pub layers: Cost,
    /// The projection to logits; a prompt's tokens but the last do without.
    pub head: Cost,
    /// Bytes of all tensors in the files.
    pub file_bytes: f64,
}

impl WeightTraffic {
    /// Reads the headers of the model's files.
    pub fn of(files: &ModelFiles) -> Result<WeightTraffic, ModelError> {
        match &files.kind {
            ModelKind::Gguf { path } => {
                let file = GgufFile::open(path)?;
                let config = ModelConfig::from_gguf(&file)?;
                let tensors = file.tensors().iter().map(|t| {
                    let weights = if t.shape.len() >= 2 { t.elements() } else { 0 };
                    (t.name.as_str(), weights, t.nbytes)
                });
                Ok(count(tensors, share_of_experts(&config)))
            }
            ModelKind::Safetensors { dir, shards } => {
                let config = ModelConfig::from_dir(dir)?;
                let file = Safetensors::open(dir, shards, &config.architecture)?;
                Ok(count(file.sizes(), share_of_experts(&config)))
            }
        }
    }
}

/// Of a mixture's weights, what one token passes through.
fn share_of_experts(config: &ModelConfig) -> f64 {
    config.experts.as_ref().map_or(1.0, |experts| experts.per_token as f64 / experts.count.max(1) as f64)
}

/// Names tell an embedding, a head and experts apart in both formats.
fn count<'a>(tensors: impl Iterator<Item = (&'a str, usize, usize)>, share_of_experts: f64) -> WeightTraffic {
    let mut traffic = WeightTraffic::default();
    let mut embedding = Cost::default();
    for (name, weights, bytes) in tensors {
        let bytes = bytes as f64;
        traffic.file_bytes += bytes;
        let products = weights as f64;
        let is = |part: &str| name.split('.').any(|piece| piece == part);
        if is("token_embd") || is("embed_tokens") || is("wte") || is("embed_in") {
            embedding = Cost { bytes, macs: products };
        } else if is("position_embd") || is("wpe") {
            // One row a token.
        } else if name == "output.weight" || is("lm_head") || is("embed_out") {
            traffic.head.bytes += bytes;
            traffic.head.macs += products;
        } else {
            let expert = is("experts") || name.contains("_exps.");
            let share = if expert { share_of_experts } else { 1.0 };
            traffic.layers.bytes += bytes * share;
            traffic.layers.macs += products * share;
        }
    }
    if traffic.head == Cost::default() {
        traffic.head = embedding;
    }
    traffic
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(bytes: f64, macs: f64) -> Cost {
        Cost { bytes, macs }
    }

    #[test]
    fn a_tied_embedding_is_the_head_and_experts_count_in_part() {
        let tensors = [
            ("token_embd.weight", 100 * 32, 3400),
            ("blk.0.attn_q.weight", 32 * 32, 640),
            ("blk.0.attn_norm.weight", 0, 128),
            ("blk.0.ffn_up_exps.weight", 8 * 64 * 32, 16000),
        ];
        let found = count(tensors.into_iter(), 0.25);
        assert_eq!(found.head, cost(3400.0, 3200.0));
        assert_eq!(found.layers, cost(640.0 + 128.0 + 4000.0, 1024.0 + 4096.0));
        assert_eq!(found.file_bytes, 20168.0);
    }

    #[test]
    fn a_head_of_its_own_leaves_the_embedding_unread() {
        let tensors = [
            ("model.embed_tokens.weight", 100 * 32, 6400),
            ("lm_head.weight", 100 * 32, 6400),
            ("model.layers.0.self_attn.q_proj.weight", 32 * 32, 2048),
        ];
        let found = count(tensors.into_iter(), 1.0);
        assert_eq!((found.head, found.layers), (cost(6400.0, 3200.0), cost(2048.0, 1024.0)));
    }
}
