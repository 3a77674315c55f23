//! LoRA adapters (Hu et al. 2021, arXiv:2106.09685): low-rank updates of a model's linear layers, from files, checked against
//! the model they are for. They lie where the model is computed; whoever holds one keeps it alive.

mod gguf;
mod peft;

use std::path::Path;

use rill_kernels::{LowRank, LowRankError, LowRankMemory, Stored};
use sha2::{Digest, Sha256};

use crate::layers::QkvOrder;
use crate::weights::{Names, interleaved_row};
use crate::{ModelConfig, ModelError, registry};

/// A linear layer of a decoder's layer, as the forward pass has it: several matrices side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Projection {
    Qkv,
    AttentionOutput,
    /// Gate and up where the layer is gated.
    Up,
    Down,
}

/// What of one layer takes updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LayerSites {
    /// How the file lays out a fused matrix of queries, keys and values.
    pub(crate) attention: Option<QkvOrder>,
    /// Whether it is gated.
    pub(crate) feed_forward: Option<bool>,
}

/// Where a loaded model takes adapters, and how wide they must be.
#[derive(Debug, Clone)]
pub struct AdapterSites {
    architecture: String,
    from_hub: bool,
    hidden: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
    turning: usize,
    intermediate: usize,
    layers: Vec<LayerSites>,
    /// Where their weights go.
    memory: LowRankMemory,
}

/// Weights of one adapter.
pub struct Adapter {
    layers: Vec<LayerUpdates>,
    rank: usize,
    bytes: usize,
    digest: [u8; 32],
}

/// Updates of one layer, a list for each [`Projection`].
type LayerUpdates = [Vec<PlacedUpdate>; 4];

/// An update and the output column it starts at.
pub(crate) struct PlacedUpdate {
    pub(crate) weights: LowRank,
    pub(crate) first: usize,
}

/// Where in the decoder a matrix is, by its GGUF name, and the factors of its update.
struct Found<'a> {
    layer: usize,
    part: &'static str,
    /// As the file calls the matrix.
    module: String,
    a: Stored<'a>,
    b: Stored<'a>,
    scale: f32,
}

/// Matrices of a layer that updates may be of, by their GGUF names.
const PARTS: [&str; 8] =
    ["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// Which row of a matrix in the adapter's file is which of the forward pass's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileOrder {
    /// Queries and keys turn neighbours.
    interleaved: bool,
    /// `None`: not known.
    qkv: Option<QkvOrder>,
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("rank", &self.rank).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Adapter {
    /// The largest rank of its updates.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Differs from that of every other adapter of the model: what keys and values computed with it are known by.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Memory it takes where the model is computed.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn updates(&self, layer: usize, projection: Projection) -> &[PlacedUpdate] {
        &self.layers[layer][projection as usize]
    }
}

impl AdapterSites {
    pub(crate) fn new(
        config: &ModelConfig,
        from_hub: bool,
        layers: Vec<LayerSites>,
        memory: LowRankMemory,
    ) -> AdapterSites {
        AdapterSites {
            architecture: config.architecture.clone(),
            from_hub,
            hidden: config.hidden_size,
            queries: config.heads * config.head_dim,
            keys: config.kv_heads * config.head_dim,
            head_dim: config.head_dim,
            turning: config.rope.dimension_count,
            intermediate: config.intermediate_size,
            layers,
            memory,
        }
    }

    /// Reads an adapter: a directory as PEFT saves it (adapter_config.json and adapter_model.safetensors), or a GGUF file as
    /// llama.cpp converts it. One whose rank is above `rank_max` is refused, and so is one that changes what is not a linear
    /// layer of attention or feed-forward.
    pub fn load(&self, path: &Path, rank_max: usize) -> Result<Adapter, ModelError> {
        if path.extension().is_some_and(|end| end == "gguf") {
            gguf::load(self, path, rank_max)
        } else {
            peft::load(self, path, rank_max)
        }
    }

    /// Most memory that an adapter takes whose ranks are at most `rank`: every matrix has an update, in f32.
    pub fn bytes_max(&self, rank: usize) -> usize {
        let (hidden, queries, keys, width) = (self.hidden, self.queries, self.keys, self.intermediate);
        // Numbers of both factors for each rank, filled up to whole tiles or vectors of 16.
        let both = |inputs: usize, outputs: usize| inputs.next_multiple_of(16) + outputs.next_multiple_of(16);
        let of_layer = |sites: &LayerSites| {
            let attention = both(hidden, queries) + 2 * both(hidden, keys) + both(queries, hidden);
            let feed_forward = |gated: bool| (1 + usize::from(gated)) * both(hidden, width) + both(width, hidden);
            sites.attention.map_or(0, |_| attention) + sites.feed_forward.map_or(0, feed_forward)
        };
        let numbers: usize = self.layers.iter().map(of_layer).sum();
        size_of::<f32>() * rank.next_multiple_of(16) * numbers
    }

    /// The layer and GGUF name of each matrix that may have an update, by the names published files give them.
    fn published_names(&self) -> Vec<(String, usize, &'static str)> {
        let names = Names::of(registry::hub_name(&self.architecture));
        let mut out = Vec::new();
        for layer in 0..self.layers.len() {
            for part in PARTS {
                for root in names.roots {
                    let name = names.hub(root, &format!("blk.{layer}.{part}.weight"));
                    let module = name.as_deref().and_then(|name| name.strip_suffix(".weight"));
                    out.extend(module.map(|module| (module.to_owned(), layer, part)));
                }
            }
        }
        out
    }

    /// Puts the updates found in `path` in their places.
    fn place(
        &self,
        path: &Path,
        found: Vec<Found<'_>>,
        order: FileOrder,
        rank_max: usize,
    ) -> Result<Adapter, ModelError> {
        let mut adapter = Adapter {
            layers: self.layers.iter().map(|_| LayerUpdates::default()).collect(),
            rank: 0,
            bytes: 0,
            digest: [0; 32],
        };
        let mut hasher = Sha256::new();
        for found in found {
            let wrong = |reason: String| ModelError::Format {
                path: path.display().to_string(),
                reason: format!("{}: {reason}", found.module),
            };
            let rank = found.a.rows;
            if rank == 0 || rank > rank_max {
                return Err(ModelError::Unsupported(format!(
                    "{}: {} has rank {rank}; ranks from 1 to {rank_max} are taken (--max-lora-rank)",
                    path.display(),
                    found.module
                )));
            }
            let Some((projection, first, inputs, outputs)) = self.site(&found) else {
                return Err(ModelError::Unsupported(format!(
                    "{}: {} takes no adapter in this model",
                    path.display(),
                    found.module
                )));
            };
            let shapes = [(found.a.rows, found.a.cols), (found.b.rows, found.b.cols)];
            let wanted = [(rank, inputs), (outputs, rank)];
            if shapes != wanted {
                return Err(wrong(format!("A and B are {shapes:?}; this model makes them {wanted:?}")));
            }
            let updates = &mut adapter.layers[found.layer][projection as usize];
            if updates
                .iter()
                .any(|other| first < other.first + other.weights.outputs() && other.first < first + outputs)
            {
                return Err(wrong("is updated twice".to_owned()));
            }
            let source = self.source(&found, order)?;
            hasher.update(format!("{} {projection:?} {first} {rank} {order:?}", found.layer));
            hasher.update(found.scale.to_le_bytes());
            for factor in [found.a, found.b] {
                hasher.update(factor.dtype.name());
                hasher.update((factor.data.len() as u64).to_le_bytes());
                hasher.update(factor.data);
            }
            let weights = LowRank::new(found.a, found.b, found.scale, source, &self.memory);
            let weights = weights.map_err(|error| match error {
                LowRankError::Stored(error) => wrong(error.to_string()),
                LowRankError::Device(reason) => ModelError::Device(format!("{}: {reason}", path.display())),
            })?;
            adapter.rank = adapter.rank.max(rank);
            adapter.bytes += weights.bytes();
            updates.push(PlacedUpdate { weights, first });
        }
        adapter.digest = hasher.finalize().into();
        Ok(adapter)
    }

    /// The linear layer a matrix is part of, its first output there, inputs and outputs.
    fn site(&self, found: &Found<'_>) -> Option<(Projection, usize, usize, usize)> {
        let sites = self.layers.get(found.layer)?;
        let (hidden, queries, keys, width) = (self.hidden, self.queries, self.keys, self.intermediate);
        if found.part.starts_with("attn") {
            sites.attention?;
        }
        let gated = || sites.feed_forward;
        Some(match found.part {
            "attn_q" => (Projection::Qkv, 0, hidden, queries),
            "attn_k" => (Projection::Qkv, queries, hidden, keys),
            "attn_v" => (Projection::Qkv, queries + keys, hidden, keys),
            "attn_qkv" => (Projection::Qkv, 0, hidden, queries + 2 * keys),
            "attn_output" => (Projection::AttentionOutput, 0, queries, hidden),
            "ffn_gate" if gated()? => (Projection::Up, 0, hidden, width),
            // Gate and up in one matrix.
            "ffn_up" if gated()? && found.b.rows == 2 * width => (Projection::Up, 0, hidden, 2 * width),
            "ffn_up" if gated()? => (Projection::Up, width, hidden, width),
            "ffn_up" => (Projection::Up, 0, hidden, width),
            "ffn_down" => (Projection::Down, 0, gated().map(|_| width)?, hidden),
            _ => return None,
        })
    }

    /// Where each output of a matrix lies in the file.
    fn source(&self, found: &Found<'_>, order: FileOrder) -> Result<impl Fn(usize) -> usize + use<>, ModelError> {
        let turns = order.interleaved && matches!(found.part, "attn_q" | "attn_k");
        let heads = match (found.part, order.qkv) {
            ("attn_qkv", None) => {
                return Err(ModelError::Unsupported(format!(
                    "{}: adapters of this matrix are not taken with a GGUF file of {}",
                    found.module, self.architecture
                )));
            }
            ("attn_qkv", Some(order)) => order == QkvOrder::Heads,
            _ => false,
        };
        let (dim, turning, queries) = (self.head_dim, self.turning, self.queries);
        Ok(move |row| {
            if turns {
                interleaved_row(row, dim, turning)
            } else if heads {
                // Query, key and value of the first head, then of the second.
                let (part, row) = (row / queries, row % queries);
                (row / dim * 3 + part) * dim + row % dim
            } else {
                row
            }
        })
    }
}
