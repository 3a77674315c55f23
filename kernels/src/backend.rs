//! The operations a decoder is made of, over a backend's own memory. A model is written once against this trait.

use crate::cpu::Form;
use crate::low_rank::{LowRankMemory, LowRankUpdate};
use crate::packed::{PackError, Stored};
use std::ops::Range;

/// One step's ragged batch, as the attention operations see it. Row `r` is one token of the batch; sequence `s` owns
/// rows `query_starts[s]..query_starts[s + 1]`, the last of its `context_lens[s]` tokens.
#[derive(Clone, Copy)]
pub struct StepInput<'a> {
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// `block * block_size + offset` each row's key and value go to; no two rows share one.
    pub slot_mapping: &'a [u32],
    /// Prefix sums of rows, `sequences + 1` entries.
    pub query_starts: &'a [u32],
    /// Tokens attention may see, this step's included.
    pub context_lens: &'a [u32],
    /// All block tables, one after another. Blocks that a window has passed by ([`AttentionShape::reach`]) are not read,
    /// nor need they be in the cache.
    pub block_tables: &'a [u32],
    /// Prefix sums of block-table lengths, `sequences + 1` entries.
    pub block_table_starts: &'a [u32],
}

impl StepInput<'_> {
    /// The slot of a row whose keys and values are not kept.
    pub const NOWHERE: u32 = u32::MAX;

    /// # Panics
    /// If a slot that is written, or a block that may be read, is not in such a cache.
    pub(crate) fn check(&self, heads: AttentionShape, cache: CacheShape) {
        let slots = cache.blocks * cache.block_size;
        assert!(
            self.slot_mapping.iter().all(|&slot| (slot as usize) < slots || slot == StepInput::NOWHERE),
            "a slot beyond the cache"
        );
        for sequence in 0..self.context_lens.len() {
            let rows = self.query_starts[sequence] as usize..self.query_starts[sequence + 1] as usize;
            let table = self.block_table_starts[sequence] as usize..self.block_table_starts[sequence + 1] as usize;
            let held = table.len() * cache.block_size;
            assert!(self.context_lens[sequence] as usize <= held, "a block table shorter than its context");
            let Some(&first) = self.positions[rows].first() else { continue };
            let passed = heads.reach().map_or(0, |reach| (first as usize).saturating_sub(reach));
            let read = &self.block_tables[table][passed / cache.block_size..];
            assert!(read.iter().all(|&block| (block as usize) < cache.blocks), "a block beyond the cache");
        }
    }
}

/// Rotary position embedding: dimension pairs (i, i + n) of the first `2 n` of each head turn by
/// `position * inverse_frequencies[i]` (Su et al. 2021, arXiv:2104.09864), `n` being the number of frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub inverse_frequencies: Vec<f32>,
    /// Cosine and sine are multiplied by it (YaRN's attention factor; 1 elsewhere).
    pub factor: f32,
}

/// Where a backend begins to read a row's context is a multiple of a divisor of this, whatever the row's window.
pub(crate) const ATTENTION_SPAN: usize = 64;

/// Heads of an attention layer; each KV head serves `heads / kv_heads` consecutive query heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    /// Of queries and keys; at most 256.
    pub head_dim: usize,
    /// Of values, and of what comes out of a head; at most `head_dim`.
    pub value_dim: usize,
    /// Scores are multiplied by it before the softmax; usually 1 / √head_dim.
    pub scale: f32,
    /// A query sees at most this many tokens, itself included.
    pub window: Option<usize>,
    /// Scores become `cap · tanh(score / cap)`.
    pub softcap: Option<f32>,
}

/// The nonlinearity of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// With the error function (Hendrycks & Gimpel 2016, arXiv:1606.08415).
    Gelu,
    /// Its tanh approximation.
    GeluTanh,
    Relu,
    ReluSquared,
}

impl AttentionShape {
    /// Widest head there is.
    pub const HEAD_DIM_MAX: usize = 256;

    /// Every query sees all tokens before it, and no score is capped.
    pub fn full(heads: usize, kv_heads: usize, head_dim: usize, scale: f32) -> AttentionShape {
        AttentionShape { heads, kv_heads, head_dim, value_dim: head_dim, scale, window: None, softcap: None }
    }

    /// Width of a head in the cache: the next multiple of 32, filled up with zeros.
    pub fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(32)
    }

    /// How many tokens before a query's own may be read for it; `None`: all. A window is read from a whole span on.
    pub fn reach(&self) -> Option<usize> {
        self.window.map(|window| window.saturating_sub(1) + ATTENTION_SPAN - 1)
    }

    /// Width of a row of queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim
    }

    /// Width of a row of what comes out.
    pub fn out_width(&self) -> usize {
        self.heads * self.value_dim
    }
}

/// Size of a paged KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    pub blocks: usize,
    /// Tokens a block; a multiple of 16.
    pub block_size: usize,
}

/// Runs of columns to copy from one matrix to another: run `i` of `count` is `width` columns wide and goes from column
/// `from.0 + i * from.1` to column `to.0 + i * to.1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnRuns {
    pub count: usize,
    pub width: usize,
    /// First column and step; a step of 0 repeats one run.
    pub from: (usize, usize),
    /// First column and step; runs do not overlap.
    pub to: (usize, usize),
}

impl ColumnRuns {
    /// Whether all runs lie inside matrices of these widths, and none on another.
    pub(crate) fn fit(&self, from: usize, to: usize) -> bool {
        let end = |(first, step): (usize, usize)| first + step * self.count.saturating_sub(1) + self.width;
        let apart = self.count <= 1 || self.to.1 >= self.width;
        self.count == 0 || apart && end(self.from) <= from && end(self.to) <= to
    }
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    #[default]
    Bf16,
    /// Signed bytes, with a bf16 scale for every 32 dimensions of a token's head.
    Int8,
    /// On a GPU alone: three more bits of mantissa than bf16, at most 65504 in size.
    F16,
    /// On a GPU alone: 8-bit floats (e4m3), at most 448 in size, without scales.
    Fp8,
}

impl KvDtype {
    /// Whether [`CpuBackend`](crate::CpuBackend) has such a cache.
    pub fn on_cpu(self) -> bool {
        matches!(self, KvDtype::Bf16 | KvDtype::Int8)
    }
}

/// What activations that meet bf16 weights are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RowDtype {
    /// Not at all.
    #[default]
    F32,
    /// 8 bits of mantissa, for twice the products a second where the processor multiplies pairs of bf16.
    Bf16,
}

/// The largest of a row of logits.
#[derive(Debug, Clone, PartialEq)]
pub struct BestLogits {
    /// Ids and values: the larger logit first, then the lower id; minus infinity is left out.
    pub ranked: Vec<(u32, f32)>,
    /// No logit of the row is NaN or plus infinity.
    pub finite: bool,
    /// Sum of e^((logit - largest) · rate) over the row, where a rate was asked for; [`BestLogits::MASS_ERROR`] says how
    /// far off it may be.
    pub mass: f32,
}

impl BestLogits {
    /// Bound of the relative error of `mass`: exponents and sums of a row's logits in f32, several times over.
    pub const MASS_ERROR: f64 = 1.0 / 32_768.0;
}

/// How rows of logits are ranked where they were computed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ranking {
    /// How many of each row.
    pub count: usize,
    /// For each row 1 / temperature, at which its mass is wanted, or 0; empty if no row's is.
    pub rates: Vec<f32>,
}

/// What is done to a row of logits after the projection: plus `bias`, times `scale`, then `cap · tanh(value / cap)` where there
/// is a cap.
pub struct LogitFinish<'a, V> {
    pub bias: Option<&'a V>,
    pub scale: f32,
    pub softcap: Option<f32>,
}

impl<V> Clone for LogitFinish<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for LogitFinish<'_, V> {}

impl<V> Default for LogitFinish<'_, V> {
    /// Nothing.
    fn default() -> Self {
        LogitFinish { bias: None, scale: 1.0, softcap: None }
    }
}

/// A device failed: nothing computed since is to be used, and neither is the backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// The operations of a decoder. Implementations give every row the same bits whatever else is in the batch.
pub trait Backend: Send {
    /// Packed weights of one linear layer, possibly several matrices side by side.
    type Linear: Send + Sync;
    /// A vector of f32 parameters.
    type Vector: Send + Sync;
    /// `rows × width` f32 activations.
    type Matrix: Default + Send;
    /// Activation rows in the form linear layers read.
    type Rows: Default + Send;
    /// Keys and values of one layer.
    type KvCache: Send;
    /// What a step's attention operations need, prepared once for all layers.
    type Step: Default + Send;

    /// Packs matrices with the same number of columns; their outputs lie side by side in the order given.
    fn load_linear(&mut self, parts: &[Stored<'_>]) -> Result<Self::Linear, PackError>;
    fn load_vector(&mut self, values: &[f32]) -> Self::Vector;
    fn new_kv_cache(&mut self, shape: CacheShape, heads: AttentionShape) -> Self::KvCache;
    /// Bytes of cache one token takes in one layer.
    fn kv_bytes_per_token(&self, heads: AttentionShape) -> usize;
    /// Copies whole blocks of a cache, one pair (from, to) after the other.
    fn copy_blocks(&mut self, cache: &mut Self::KvCache, pairs: &[(u32, u32)]);
    /// Bytes [`Backend::read_block`] gives.
    fn block_bytes(&self, cache: &Self::KvCache) -> usize;
    /// Appends the keys and values of `block` to `out`, in a form only a cache of the same shape understands.
    fn read_block(&mut self, cache: &Self::KvCache, block: u32, out: &mut Vec<u8>);
    /// Puts back what [`Backend::read_block`] gave, [`Backend::block_bytes`] long.
    fn write_block(&mut self, cache: &mut Self::KvCache, block: u32, bytes: &[u8]);
    /// Bytes left of a memory of its own; `None` if it uses the host's.
    fn memory_free(&self) -> Option<usize> {
        None
    }
    /// Whether everything so far succeeded. Devices fail late: ask before using what a step computed.
    fn check(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// The form of rows `layer` reads.
    fn form(&self, layer: &Self::Linear) -> Form;

    /// Prepares a step: rotations of every row, attention's work list.
    fn prepare(&mut self, input: StepInput<'_>, rope: &Rope, heads: AttentionShape, step: &mut Self::Step);

    /// `out[r]` = row `ids[r]` of `table`, times `scale`.
    ///
    /// # Panics
    /// If an id is beyond the table.
    fn embed(&mut self, table: &Self::Linear, ids: &[u32], scale: f32, out: &mut Self::Matrix);

    /// Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467) of all rows, or of those `select` names.
    fn rms_norm(
        &mut self,
        x: &Self::Matrix,
        select: Option<&[u32]>,
        weight: &Self::Vector,
        eps: f32,
        out: (&mut Self::Rows, Form),
    );

    /// `out` = x · layerᵀ.
    fn linear(&mut self, layer: &Self::Linear, x: &Self::Rows, out: &mut Self::Matrix);
    /// `out` += x · layerᵀ: the residual stream.
    fn linear_add(&mut self, layer: &Self::Linear, x: &Self::Rows, out: &mut Self::Matrix);
    /// Where low-rank updates lie that [`Backend::add_low_rank`] takes.
    fn low_rank_memory(&self) -> LowRankMemory;
    /// Adds low-rank updates to what a linear layer made of `x`, whose form has f32 too; no two of them share a row and an
    /// output.
    ///
    /// # Panics
    /// If they lie elsewhere than [`Backend::low_rank_memory`] says.
    fn add_low_rank(&mut self, x: &Self::Rows, updates: &[LowRankUpdate<'_>], out: &mut Self::Matrix);
    /// `out` = x · layerᵀ, finished, in host memory, rows one after another.
    fn logits(
        &mut self,
        layer: &Self::Linear,
        x: &Self::Rows,
        finish: LogitFinish<'_, Self::Vector>,
        out: &mut Vec<f32>,
    );

    /// Rows to which a step of `rows`, one for each sequence, is filled up so that steps resemble each other. The rows beyond
    /// come after all sequences' and have [`StepInput::NOWHERE`] for a slot.
    fn bucket(&self, rows: usize) -> usize {
        rows
    }

    /// Whether operations are computed by a device while the host does something else. Only then are the four below there; all
    /// but [`Backend::wait_logits`] are, too, where logits are ranked.
    fn runs_aside(&self) -> bool {
        false
    }
    /// Has x · layerᵀ computed, finished and, where `ranking` says so, ranked; does not wait for it.
    ///
    /// # Panics
    /// If the backend does neither, or more is to be ranked than [`Backend::best_logits_max`].
    fn start_logits(
        &mut self,
        _layer: &Self::Linear,
        _x: &Self::Rows,
        _finish: LogitFinish<'_, Self::Vector>,
        _ranking: Option<&Ranking>,
    ) {
        panic!("this backend computes when it is asked");
    }
    /// All logits of the last start, rows one after another.
    fn wait_logits(&mut self, _out: &mut Vec<f32>) {
        panic!("this backend computes when it is asked");
    }
    /// The largest logits of each row of the last start, which ranked them.
    fn wait_best(&mut self) -> Vec<BestLogits> {
        panic!("this backend computes when it is asked");
    }
    /// A whole row of the last start.
    ///
    /// # Panics
    /// If there was no such row.
    fn ranked_row(&self, _row: usize) -> Vec<f32> {
        panic!("this backend computes when it is asked");
    }
    /// How many logits of a row can be ranked; 0: none, and [`Backend::logits`] is there for all of them.
    fn best_logits_max(&self, _layer: &Self::Linear) -> usize {
        0
    }

    /// Rotates queries and keys of `qkv`, writes keys and values to the cache's slots, and attends: every query to its
    /// own sequence's tokens up to itself, through the block table.
    fn attention(
        &mut self,
        qkv: &Self::Matrix,
        heads: AttentionShape,
        input: StepInput<'_>,
        step: &mut Self::Step,
        cache: &mut Self::KvCache,
        out: (&mut Self::Rows, Form),
    );

    /// `out` = activation(gate) · up, where a row of `gate_up` is the gate's values followed by up's.
    fn gated(&mut self, activation: Activation, gate_up: &Self::Matrix, out: (&mut Self::Rows, Form));
    /// [`Backend::gated`] with silu.
    fn silu_mul(&mut self, gate_up: &Self::Matrix, out: (&mut Self::Rows, Form)) {
        self.gated(Activation::Silu, gate_up, out);
    }
    /// `out` = activation(gate) · up, where the layer's outputs are the gate's values followed by up's: a linear layer and
    /// [`Backend::gated`] in one. What is in `scratch` afterwards is up to the backend.
    fn linear_gated(
        &mut self,
        layer: &Self::Linear,
        activation: Activation,
        x: &Self::Rows,
        scratch: &mut Self::Matrix,
        out: (&mut Self::Rows, Form),
    ) {
        self.linear(layer, x, scratch);
        self.gated(activation, scratch, out);
    }
    /// `out` = activation(x).
    fn activate(&mut self, activation: Activation, x: &Self::Matrix, out: (&mut Self::Rows, Form));
    /// All rows of x, or those `select` names, as they are, in the form a linear layer reads.
    fn to_rows(&mut self, x: &Self::Matrix, select: Option<&[u32]>, out: (&mut Self::Rows, Form));

    /// Columns `columns` of `x`, each `weight`-wide part on its own, root-mean-square normed in place.
    fn rms_norm_in_place(&mut self, x: &mut Self::Matrix, columns: Range<usize>, weight: &Self::Vector, eps: f32);
    /// Layer norm (Ba et al. 2016, arXiv:1607.06450) of all rows, or of those `select` names.
    fn layer_norm(
        &mut self,
        x: &Self::Matrix,
        select: Option<&[u32]>,
        affine: (&Self::Vector, Option<&Self::Vector>),
        eps: f32,
        out: (&mut Self::Rows, Form),
    );

    /// Every row of `x` plus `bias`.
    fn add_bias(&mut self, x: &mut Self::Matrix, bias: &Self::Vector);
    /// `out` += `scale` · x.
    fn add_scaled(&mut self, x: &Self::Matrix, scale: f32, out: &mut Self::Matrix);
    /// Copies columns of all rows of `x` into `out`, which has as many rows.
    ///
    /// # Panics
    /// If a run reaches beyond either matrix.
    fn copy_columns(&mut self, x: &Self::Matrix, runs: ColumnRuns, out: &mut Self::Matrix);
    /// `rows × width` zeros.
    fn clear(&mut self, x: &mut Self::Matrix, rows: usize, width: usize);
    /// Row `rows[i]` of `out` += `scales[i]` · row `i` of x; no two of `rows` are the same.
    fn scatter_add(&mut self, x: &Self::Matrix, rows: &[u32], scales: &[f32], out: &mut Self::Matrix);

    /// Copies rows `range` to host memory, for tests and embeddings.
    fn read(&self, x: &Self::Matrix, range: Range<usize>) -> Vec<f32>;
}
