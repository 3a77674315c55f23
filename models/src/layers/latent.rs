//! Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434): keys and values of all heads come from one narrow
//! vector a token, and all heads share the part of the key that turns.
//!
//! Keys and values are kept as every head's own, not as the narrow vector. Inside a head the dimensions that turn come
//! first, where the rotation expects them: queries' rows are reordered for it at load.

use super::decoder::Run;
use super::dense::Dense;
use super::loader::LayerLoader;
use crate::ModelError;
use crate::config::{LatentConfig, RopeStyle};
use crate::weights::Matrix;
use rill_kernels::{AttentionShape, Backend, ColumnRuns, Form};

/// What makes queries, keys and values of the rows a layer reads.
pub(super) struct Latent<B: Backend> {
    queries: Queries<B>,
    /// The vector keys and values come from, and its norm.
    narrow: Dense<B>,
    norm: B::Vector,
    norm_eps: f32,
    /// All heads' resting parts of keys, then all heads' values.
    expand: Dense<B>,
    /// The turning part of the keys.
    turning: Dense<B>,
    turning_dim: usize,
}

enum Queries<B: Backend> {
    Direct(Dense<B>),
    /// Narrowed, normed and widened again.
    Narrowed {
        narrow: Dense<B>,
        norm: B::Vector,
        expand: Dense<B>,
    },
}

impl<B: Backend> Latent<B> {
    pub(super) fn load(at: &mut LayerLoader<'_, '_, B>, latent: &LatentConfig) -> Result<Latent<B>, ModelError> {
        let config = at.config();
        let (hidden, heads, dim) = (config.hidden_size, config.heads, config.head_dim);
        let LatentConfig { kv_rank, value_dim, .. } = *latent;
        let turning_dim = config.rope.dimension_count;
        let resting_dim = dim - turning_dim;
        // Where a turning dimension lies among those of a head.
        let turn = |i: usize| match config.rope.style {
            RopeStyle::Interleaved => 2 * (i % (turning_dim / 2)) + i / (turning_dim / 2),
            RopeStyle::Half => i,
        };
        let of_query = |r: usize| {
            let (head, i) = (r / dim, r % dim);
            head * dim + if i < turning_dim { resting_dim + turn(i) } else { i - turning_dim }
        };
        let queries = match latent.query_rank {
            None => Queries::Direct(at.reordered("attn_q", (heads * dim, hidden), &of_query)?),
            Some(rank) => Queries::Narrowed {
                narrow: at.dense("attn_q_a", rank, hidden)?,
                norm: at.norm_weight("attn_q_a_norm", rank)?,
                expand: at.reordered("attn_q_b", (heads * dim, rank), &of_query)?,
            },
        };
        let both = at.matrix("attn_kv_a_mqa", kv_rank + turning_dim, hidden)?;
        let bias = at.bias("attn_kv_a_mqa", kv_rank + turning_dim)?;
        let part = |rows: usize, source: &dyn Fn(usize) -> usize| {
            let bias = bias.as_ref().map(|bias| (0..rows).map(|r| bias[source(r)]).collect());
            (both.picked(rows, source), bias)
        };
        let (matrix, of_narrow) = part(kv_rank, &|r| r);
        let narrow = at.pack(&[matrix], of_narrow)?;
        let (matrix, of_turning) = part(turning_dim, &|r| kv_rank + turn(r));
        let turning = at.pack(&[matrix], of_turning)?;
        let parts = if at.has("attn_kv_b") {
            let wide = resting_dim + value_dim;
            let both = at.matrix("attn_kv_b", heads * wide, kv_rank)?;
            let keys = both.picked(heads * resting_dim, |r| r / resting_dim * wide + r % resting_dim);
            let values = both.picked(heads * value_dim, |r| r / value_dim * wide + resting_dim + r % value_dim);
            [keys, values]
        } else {
            // Files made for attention in the narrow space keep each head's keys input-major.
            let keys = at.stack("attn_k_b", (heads, kv_rank, resting_dim))?;
            let values = at.stack("attn_v_b", (heads, value_dim, kv_rank))?;
            [Matrix::stacked(keys.into_iter().map(|head| head.to_f32().transposed())), Matrix::stacked(values)]
        };
        Ok(Latent {
            queries,
            narrow,
            norm: at.norm_weight("attn_kv_a_norm", kv_rank)?,
            norm_eps: config.norm_eps,
            expand: at.pack(&parts, None)?,
            turning,
            turning_dim,
        })
    }

    /// The form of rows it reads.
    pub(super) fn form(&self, backend: &B) -> Form {
        let queries = match &self.queries {
            Queries::Direct(dense) | Queries::Narrowed { narrow: dense, .. } => dense,
        };
        queries.form(backend).and(self.narrow.form(backend)).and(self.turning.form(backend))
    }

    /// `run.mixed` = queries, keys and values of `run.rows`.
    pub(super) fn run(&self, run: &mut Run<'_, B>, shape: AttentionShape) {
        let AttentionShape { heads, head_dim, value_dim, .. } = shape;
        let (turning, resting) = (self.turning_dim, head_dim - self.turning_dim);
        let (keys, values) = (heads * head_dim, 2 * heads * head_dim);
        let place = |run: &mut Run<'_, B>, runs| run.backend.copy_columns(run.wide, runs, run.mixed);
        run.backend.clear(run.mixed, run.input.positions.len(), shape.qkv_width());

        self.turning.run(run.backend, run.rows, run.wide);
        place(run, ColumnRuns { count: heads, width: turning, from: (0, 0), to: (keys, head_dim) });

        self.narrow.run(run.backend, run.rows, run.wide);
        self.expand.run_normed(run, &self.norm, self.norm_eps);
        let to = (keys + turning, head_dim);
        place(run, ColumnRuns { count: heads, width: resting, from: (0, resting), to });
        let from = (heads * resting, value_dim);
        place(run, ColumnRuns { count: heads, width: value_dim, from, to: (values, value_dim) });

        match &self.queries {
            Queries::Direct(dense) => dense.run(run.backend, run.rows, run.wide),
            Queries::Narrowed { narrow, norm, expand } => {
                narrow.run(run.backend, run.rows, run.wide);
                expand.run_normed(run, norm, self.norm_eps);
            }
        }
        place(run, ColumnRuns { count: 1, width: keys, from: (0, 0), to: (0, 0) });
    }
}
