//! Multi-head attention with grouped keys and values, rotary positions, and norms over queries and keys.

use super::decoder::Run;
use super::dense::Dense;
use super::latent::Latent;
use super::loader::LayerLoader;
use crate::ModelError;
use crate::adapter::Projection;
use crate::config::{ModelConfig, RopeStyle};
use crate::weights::{Matrix, interleaved_row};
use rill_kernels::{AttentionShape, Backend, Form, Rope};
use std::ops::Range;

/// How a layer attends: layers of one kind share a step's preparation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AttentionKind {
    pub(crate) heads: AttentionShape,
    pub(crate) rope: Rope,
}

/// How queries, keys and values of a fused matrix follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QkvOrder {
    /// All queries, all keys, all values.
    Blocks,
    /// Query, key and value of the first head, then of the second.
    Heads,
}

/// Which norms queries and keys go through before they turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadNorm {
    None,
    /// Each head on its own.
    PerHead,
    /// All heads of a token together.
    Whole,
}

/// An attention layer's weights; its output projection is left to the caller, who knows where the result goes.
pub(crate) struct Attention<B: Backend> {
    inputs: Inputs<B>,
    pub(crate) output: Dense<B>,
    /// Index into the decoder's kinds.
    pub(crate) kind: usize,
    /// How the file's fused matrix goes, if it has one.
    order: QkvOrder,
}

/// Where queries, keys and values come from.
enum Inputs<B: Backend> {
    Heads {
        /// All three side by side.
        qkv: Dense<B>,
        /// Columns and weight of each.
        norms: Vec<(Range<usize>, B::Vector)>,
        norm_eps: f32,
    },
    Latent(Latent<B>),
}

impl<B: Backend> Attention<B> {
    /// Loads `attn_q`, `attn_k` and `attn_v`, or `attn_qkv` where the file has them fused in `order`.
    pub(crate) fn load(
        at: &mut LayerLoader<'_, '_, B>,
        order: QkvOrder,
        norm: HeadNorm,
    ) -> Result<Attention<B>, ModelError> {
        let config = at.config();
        let (dim, hidden) = (config.head_dim, config.hidden_size);
        if let Some(latent) = &config.latent {
            let inputs = Inputs::Latent(Latent::load(at, latent)?);
            let output = at.dense("attn_output", hidden, config.heads * latent.value_dim)?;
            return Ok(Attention { inputs, output, kind: 0, order });
        }
        let (queries, keys) = (config.heads * dim, config.kv_heads * dim);
        let qkv = if at.has("attn_qkv") {
            fused(at, order, (queries, keys))?
        } else {
            let parts = [("attn_q", queries), ("attn_k", keys), ("attn_v", keys)];
            let mut matrices = Vec::with_capacity(3);
            let mut biases = Vec::new();
            for (part, rows) in parts {
                let (matrix, bias) = (at.matrix(part, rows, hidden)?, at.bias(part, rows)?);
                if bias.is_none() && config.qkv_bias {
                    at.all.weights.vector(&format!("blk.{}.{part}.bias", at.number), rows)?;
                }
                let turns = part != "attn_v" && config.rope.style == RopeStyle::Interleaved;
                let source = |r: usize| {
                    if turns { interleaved_row(r, dim, config.rope.dimension_count) } else { r }
                };
                matrices.push(if turns { matrix.reordered(source) } else { matrix });
                biases.push(bias.map(|bias| (0..rows).map(|r| bias[source(r)]).collect::<Vec<f32>>()));
            }
            let bias = biases.iter().any(Option::is_some).then(|| {
                let rows = [queries, keys, keys];
                biases.into_iter().zip(rows).flat_map(|(bias, n)| bias.unwrap_or(vec![0.0; n])).collect()
            });
            at.pack(&matrices, bias)?
        };
        let (of_queries, of_keys) = (0..queries, queries..queries + keys);
        let norms = match norm {
            HeadNorm::None => Vec::new(),
            HeadNorm::PerHead => vec![
                (of_queries, at.norm_weight("attn_q_norm", dim)?),
                (of_keys, at.norm_weight("attn_k_norm", dim)?),
            ],
            HeadNorm::Whole => vec![
                (of_queries, at.norm_weight("attn_q_norm", queries)?),
                (of_keys, at.norm_weight("attn_k_norm", keys)?),
            ],
        };
        Ok(Attention {
            inputs: Inputs::Heads { qkv: qkv.updatable(Projection::Qkv), norms, norm_eps: config.norm_eps },
            output: at.dense("attn_output", hidden, queries)?.updatable(Projection::AttentionOutput),
            kind: 0,
            order,
        })
    }

    /// How the matrices adapters may update go; `None` if they may not.
    pub(crate) fn sites(&self) -> Option<QkvOrder> {
        matches!(self.inputs, Inputs::Heads { .. }).then_some(self.order)
    }

    /// The form of rows it reads.
    pub(crate) fn form(&self, run: &Run<'_, B>) -> Form {
        match &self.inputs {
            Inputs::Heads { qkv, .. } => run.form(qkv),
            Inputs::Latent(latent) => latent.form(run.backend),
        }
    }

    /// Attends: `run.rows` in, and out in the form the output projection reads.
    pub(crate) fn run(&self, run: &mut Run<'_, B>) {
        let kind = &run.kinds[self.kind];
        let qkv = match &self.inputs {
            Inputs::Heads { qkv, norms, norm_eps } => {
                qkv.run(run.backend, run.rows, run.wide);
                run.update_wide(qkv);
                for (columns, weight) in norms {
                    run.backend.rms_norm_in_place(run.wide, columns.clone(), weight, *norm_eps);
                }
                &*run.wide
            }
            Inputs::Latent(latent) => {
                latent.run(run, kind.heads);
                &*run.mixed
            }
        };
        let form = run.form(&self.output);
        let step = &mut run.steps[self.kind];
        run.backend.attention(qkv, kind.heads, run.input, step, run.cache, (run.rows, form));
    }
}

fn fused<B: Backend>(
    at: &mut LayerLoader<'_, '_, B>,
    order: QkvOrder,
    (queries, keys): (usize, usize),
) -> Result<Dense<B>, ModelError> {
    let (rows, dim) = (queries + 2 * keys, at.config().head_dim);
    let (matrix, bias) = (at.matrix("attn_qkv", rows, at.config().hidden_size)?, at.bias("attn_qkv", rows)?);
    if order == QkvOrder::Blocks {
        return at.pack(&[matrix], bias);
    }
    // Row r of all queries, keys and values, in a matrix that goes head by head.
    let source = |r: usize| {
        let (part, r) = (r / queries, r % queries);
        (r / dim * 3 + part) * dim + r % dim
    };
    let matrix: Matrix<'_> = matrix.reordered(source);
    let bias = bias.map(|bias| (0..rows).map(|r| bias[source(r)]).collect());
    at.pack(&[matrix], bias)
}

/// How every layer of `config` attends, as a list of kinds and each layer's place in it.
pub(crate) fn kinds(config: &ModelConfig) -> Result<(Vec<AttentionKind>, Vec<usize>), ModelError> {
    let mut kinds: Vec<AttentionKind> = Vec::new();
    let mut of_layer = Vec::with_capacity(config.layers);
    for layer in 0..config.layers {
        let slides = config.slides(layer);
        let turns = config.rope_layers.as_ref().is_none_or(|layers| layers[layer]);
        let rope = match &config.sliding_rope {
            Some(rope) if slides => rope,
            _ => &config.rope,
        };
        let kind = AttentionKind {
            heads: AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                value_dim: config.latent.as_ref().map_or(config.head_dim, |latent| latent.value_dim),
                scale: config.attention_scale.unwrap_or(1.0 / (config.head_dim as f32).sqrt()),
                window: config.sliding_window.filter(|_| slides),
                softcap: config.attention_softcap,
            },
            rope: if turns {
                super::rope::rope(rope, config.context_len)
            } else {
                Rope { inverse_frequencies: Vec::new(), factor: 1.0 }
            },
        };
        let place = kinds.iter().position(|known| *known == kind).unwrap_or_else(|| {
            kinds.push(kind);
            kinds.len() - 1
        });
        of_layer.push(place);
    }
    if config.head_dim > AttentionShape::HEAD_DIM_MAX {
        return Err(ModelError::Unsupported(format!(
            "heads of {} dimensions are not supported; at most {} are",
            config.head_dim,
            AttentionShape::HEAD_DIM_MAX
        )));
    }
    Ok((kinds, of_layer))
}
