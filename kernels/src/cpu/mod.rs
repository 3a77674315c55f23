//! The CPU backend: every operation split over the pool, every kernel generic over the ISA.

mod activation;
mod attention;
mod kv_cache;
mod linear;
mod low_rank;
mod norm;
mod order;
mod ranking;
mod rows;
pub(crate) mod simd;

pub use kv_cache::KvCache;
pub use rows::{Form, Rows};
pub use simd::Isa;

use crate::backend::{
    Activation, AttentionShape, Backend, BestLogits, CacheShape, ColumnRuns, KvDtype, LogitFinish, Ranking, Rope,
    RowDtype, StepInput,
};
use crate::low_rank::{LowRankMemory, LowRankUpdate};
use crate::memory::{Buffer, Shared};
use crate::packed::{GROUP, Layout, PackError, Stored, TILE_ROWS};
use crate::paired::Paired;
use crate::pool::{Pool, share};
use linear::Store;
use order::Order;
use ranking::Ranked;
use rows::RowsOut;
use std::ops::Range;

/// Row operations on fewer rows than this are not worth waking anybody for.
const PARALLEL_ROWS: usize = 4;
/// Rounds in which a thread takes its share of them.
const ROW_ROUNDS: usize = 3;

/// Runs on the machine's own cores.
pub struct CpuBackend {
    isa: Isa,
    pool: Pool,
    kv_dtype: KvDtype,
    row_dtype: RowDtype,
    preallocate: bool,
    /// What low-rank updates hold between their two products.
    low_rank: Buffer<f32>,
    order: Order,
    ranked: Ranked,
}

/// A matrix as the CPU multiplies it.
type Packed = crate::packed::Packed<Paired>;

/// Matrices of one linear layer, side by side.
pub struct Linear {
    matrices: Vec<Packed>,
    /// In the backend's [`Order`].
    number: usize,
}

impl Linear {
    /// Outputs a row.
    pub fn rows(&self) -> usize {
        self.matrices.iter().map(|m| m.rows).sum()
    }

    /// Bytes of memory the weights take.
    pub fn bytes(&self) -> usize {
        self.matrices.iter().map(Packed::bytes).sum()
    }
}

/// `rows × width` f32, row after row; memory is kept from step to step.
#[derive(Default)]
pub struct Matrix {
    pub(crate) data: Buffer<f32>,
    pub(crate) rows: usize,
    pub(crate) width: usize,
}

impl Matrix {
    pub(crate) fn reset(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        self.data.reserve(rows * width);
    }
}

/// What one step's attention needs, for all layers.
#[derive(Default)]
pub struct Step {
    /// The batch it was prepared for.
    positions: Vec<u32>,
    query_starts: Vec<u32>,
    /// Heads and head dimension it was prepared for.
    heads: Option<AttentionShape>,
    /// Cosines then sines of each row: `[row][2][n]`.
    rotations: Buffer<f32>,
    frequencies: usize,
    plan: attention::Plan,
    /// Rotated queries, each as products take it: `[kv head][row][head of its group][padded head_dim]`.
    queries: Buffer<f32>,
    /// The same for an 8-bit cache, one row a query.
    query_rows: Rows,
    /// Attention's output where heads are no whole groups of the 8-bit form.
    compact: Rows,
}

impl CpuBackend {
    /// Starts `threads - 1` workers; `isa` must be available on this machine.
    ///
    /// # Panics
    /// If `isa` is not available.
    pub fn new(threads: usize, isa: Isa) -> CpuBackend {
        assert!(isa.available(), "this processor has no {}", isa.name());
        CpuBackend {
            isa,
            pool: Pool::new(threads),
            kv_dtype: KvDtype::default(),
            row_dtype: RowDtype::default(),
            preallocate: false,
            low_rank: Buffer::default(),
            order: Order::default(),
            ranked: Ranked::default(),
        }
    }

    /// The same with KV caches of `dtype`.
    ///
    /// # Panics
    /// If there are none on the CPU: [`KvDtype::on_cpu`].
    pub fn with_kv_dtype(mut self, dtype: KvDtype) -> CpuBackend {
        assert!(dtype.on_cpu(), "no {dtype:?} cache on the CPU");
        self.kv_dtype = dtype;
        self
    }

    pub fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype
    }

    /// The same with activations of `dtype` where weights are bf16.
    pub fn with_row_dtype(mut self, dtype: RowDtype) -> CpuBackend {
        self.row_dtype = dtype;
        self
    }

    pub fn row_dtype(&self) -> RowDtype {
        self.row_dtype
    }

    /// The same with KV caches whose memory is there from the start: it is taken as it is used otherwise, which costs those
    /// who use it first, a virtual machine's guest most of all.
    pub fn with_preallocated_caches(mut self) -> CpuBackend {
        self.preallocate = true;
        self
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `f` with disjoint ranges that cover `0..rows`, on all threads where there are enough rows.
    fn for_rows(&mut self, rows: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
        if rows < PARALLEL_ROWS {
            f(0..rows);
            return;
        }
        let shares = (ROW_ROUNDS, self.pool.threads());
        self.pool.run(shares.0 * shares.1, &|chunk| f(share(rows, shares, chunk)));
    }
}

impl CpuBackend {
    /// See [`LogitFinish`].
    pub fn finish_logits(&mut self, logits: &mut [f32], finish: LogitFinish<'_, Buffer<f32>>) {
        const CHUNK: usize = 1 << 14;
        let LogitFinish { bias, scale, softcap } = finish;
        if let Some(bias) = bias {
            for row in logits.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias.iter()).for_each(|(x, b)| *x += b);
            }
        }
        if scale == 1.0 && softcap.is_none() {
            return;
        }
        let (len, isa) = (logits.len(), self.isa);
        let data = Shared::new(logits);
        self.pool.run(len.div_ceil(CHUNK), &|chunk| {
            let first = chunk * CHUNK;
            // SAFETY: chunks are disjoint parts of the slice; the ISA is available.
            unsafe {
                let part = std::slice::from_raw_parts_mut(data.at(first), CHUNK.min(len - first));
                match softcap {
                    Some(cap) => activation::soft_cap(isa, part, scale, cap),
                    None => part.iter_mut().for_each(|x| *x *= scale),
                }
            }
        });
    }

    /// Multiplies `x` with a layer: see [`linear::linear`].
    fn multiply(&mut self, layer: &Linear, x: &Rows, out: (&mut [f32], usize, Store)) {
        let threads = self.pool.threads();
        let begin = |thread| linear::begin(&layer.matrices, x.rows, (thread, threads));
        self.order.enter(layer.number, x.rows, &mut self.pool, begin);
        linear::linear(self.isa, &mut self.pool, &layer.matrices, x, out);
    }

    /// Applies `activation` to the first `width` values of each row, times those after them where there are any.
    fn apply(&mut self, activation: Activation, x: &Matrix, width: usize, (out, form): (&mut Rows, Form)) {
        let isa = self.isa;
        self.write_rows((out, form), (x.rows, width), &|row, out| {
            let (x, up) = x.data[row * x.width..][..x.width].split_at(width);
            let operands = activation::Row { activation, x, up: (!up.is_empty()).then_some(up) };
            // SAFETY: the ISA is available, room was made for all rows, and each row belongs to one chunk.
            unsafe { activation::apply_row(isa, operands, (row, 0, out)) }
        });
    }

    /// Puts `rows` rows of f32, `cols` wide, into another form; row `r` is row `source(r)` of `x`.
    fn copy_rows(
        &mut self,
        x: &[f32],
        source: &(dyn Fn(usize) -> usize + Sync),
        (rows, cols): (usize, usize),
        out: (&mut Rows, Form),
    ) {
        let isa = self.isa;
        self.write_rows(out, (rows, cols), &|row, out| {
            // SAFETY: the ISA is available, room was made for all rows, and each row belongs to one chunk.
            unsafe { norm::copy_row(isa, &x[source(row) * cols..][..cols], (row, out)) }
        });
    }

    /// Makes room for `rows` × `cols`, has `write` write every row, and makes the rows ready for linear layers.
    fn write_rows(
        &mut self,
        (out, form): (&mut Rows, Form),
        (rows, cols): (usize, usize),
        write: &(dyn Fn(usize, RowsOut) + Sync),
    ) {
        let target = out.reset(rows, cols, form);
        self.for_rows(rows, &|rows| rows.for_each(|row| write(row, target)));
        out.level(self.isa, &mut self.pool);
    }

    /// Calls `f` with the number and the values of every row.
    fn update_rows(&mut self, x: &mut Matrix, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let (rows, width, data) = (x.rows, x.width, Shared::new(&mut x.data));
        self.for_rows(rows, &|rows| {
            for row in rows {
                // SAFETY: rows are disjoint parts of the matrix, and each belongs to one chunk.
                f(row, unsafe { std::slice::from_raw_parts_mut(data.at(row * width), width) });
            }
        });
    }
}

impl Backend for CpuBackend {
    type Linear = Linear;
    type Vector = Buffer<f32>;
    type Matrix = Matrix;
    type Rows = Rows;
    type KvCache = KvCache;
    type Step = Step;

    fn load_linear(&mut self, parts: &[Stored<'_>]) -> Result<Linear, PackError> {
        let mut matrices = Vec::with_capacity(parts.len());
        for part in parts {
            part.check()?;
            if part.cols != parts[0].cols {
                return Err(PackError::Mixed { first: parts[0].cols, other: part.cols });
            }
            let piece = self.isa.piece();
            matrices.push(Packed::new(*part, &mut self.pool, |part, pool| Paired::new(part, piece, pool)));
        }
        Ok(Linear { matrices, number: self.order.add() })
    }

    fn load_vector(&mut self, values: &[f32]) -> Buffer<f32> {
        let mut vector = Buffer::zeroed(values.len());
        vector.copy_from_slice(values);
        vector
    }

    fn new_kv_cache(&mut self, shape: CacheShape, heads: AttentionShape) -> KvCache {
        let mut cache = KvCache::new(shape, heads, self.kv_dtype);
        if self.preallocate {
            cache.touch(&mut self.pool);
        }
        cache
    }

    fn kv_bytes_per_token(&self, heads: AttentionShape) -> usize {
        KvCache::bytes_per_token(heads, self.kv_dtype)
    }

    fn copy_blocks(&mut self, cache: &mut KvCache, pairs: &[(u32, u32)]) {
        cache.copy_blocks(pairs);
    }

    fn block_bytes(&self, cache: &KvCache) -> usize {
        cache.block_bytes()
    }

    fn read_block(&mut self, cache: &KvCache, block: u32, out: &mut Vec<u8>) {
        cache.read_block(block, out);
    }

    fn write_block(&mut self, cache: &mut KvCache, block: u32, bytes: &[u8]) {
        cache.write_block(block, bytes);
    }

    fn form(&self, layer: &Linear) -> Form {
        layer.matrices.iter().fold(Form::default(), |form, m| {
            form.and(match m.layout {
                Layout::Four(_) => Form::Q8,
                Layout::Eight { .. } => Form::SHIFTED,
                Layout::Brain(_) if self.row_dtype == RowDtype::Bf16 => Form::BF16,
                Layout::Brain(_) | Layout::Half(_) | Layout::Single(_) => Form::F32,
            })
        })
    }

    fn prepare(&mut self, input: StepInput<'_>, rope: &Rope, heads: AttentionShape, step: &mut Step) {
        let n = rope.inverse_frequencies.len();
        assert!(2 * n <= heads.head_dim, "{n} frequencies turn more than {} dimensions", heads.head_dim);
        assert!(heads.kv_heads > 0 && heads.heads.is_multiple_of(heads.kv_heads), "heads in whole groups");
        (step.heads, step.frequencies) = (Some(heads), n);
        for (kept, given) in [(&mut step.positions, input.positions), (&mut step.query_starts, input.query_starts)]
        {
            kept.clear();
            kept.extend_from_slice(given);
        }
        step.rotations.reserve(input.positions.len() * 2 * n);
        step.queries.reserve(input.positions.len() * heads.heads * heads.padded_dim());
        let rotations = Shared::new(&mut step.rotations);
        self.for_rows(input.positions.len(), &|rows| {
            for row in rows {
                for (i, &frequency) in rope.inverse_frequencies.iter().enumerate() {
                    let (sin, cos) = (input.positions[row] as f32 * frequency).sin_cos();
                    // SAFETY: room for every row was reserved, and each row belongs to one chunk.
                    unsafe {
                        *rotations.at(row * 2 * n + i) = cos * rope.factor;
                        *rotations.at(row * 2 * n + n + i) = sin * rope.factor;
                    }
                }
            }
        });
        step.plan.make(input, heads, self.pool.threads());
    }

    fn embed(&mut self, table: &Linear, ids: &[u32], scale: f32, out: &mut Matrix) {
        let table = &table.matrices[0];
        assert!(ids.iter().all(|&id| (id as usize) < table.rows), "a token id beyond the embedding table");
        let width = table.cols;
        out.reset(ids.len(), width);
        let data = Shared::new(&mut out.data);
        self.for_rows(ids.len(), &|rows| {
            for row in rows {
                // SAFETY: room for every row was made, and each row belongs to one chunk.
                let out = unsafe { std::slice::from_raw_parts_mut(data.at(row * width), width) };
                table.read_row(ids[row] as usize, out);
                if scale != 1.0 {
                    out.iter_mut().for_each(|x| *x *= scale);
                }
            }
        });
    }

    fn rms_norm(
        &mut self,
        x: &Matrix,
        select: Option<&[u32]>,
        weight: &Buffer<f32>,
        eps: f32,
        out: (&mut Rows, Form),
    ) {
        assert_eq!(weight.len(), x.width, "a norm's weight has the width of its input");
        let rows = select.map_or(x.rows, <[u32]>::len);
        let source = |row: usize| select.map_or(row, |s| s[row] as usize);
        assert!((0..rows).all(|row| source(row) < x.rows), "a selected row beyond the batch");
        let isa = self.isa;
        self.write_rows(out, (rows, x.width), &|row, out| {
            let x = &x.data[source(row) * x.width..][..x.width];
            // SAFETY: the ISA is available, room was made for `rows`, and each row belongs to one chunk.
            unsafe { norm::rms_norm_row(isa, x, weight, eps, (row, out)) }
        });
    }

    fn linear(&mut self, layer: &Linear, x: &Rows, out: &mut Matrix) {
        let width = layer.rows();
        out.reset(x.rows, width);
        self.multiply(layer, x, (&mut out.data, width, Store::Set));
    }

    fn linear_add(&mut self, layer: &Linear, x: &Rows, out: &mut Matrix) {
        let width = layer.rows();
        assert!(out.rows == x.rows && out.width == width, "the residual stream has another shape");
        self.multiply(layer, x, (&mut out.data, width, Store::Add));
    }

    fn low_rank_memory(&self) -> LowRankMemory {
        LowRankMemory::Host
    }

    fn add_low_rank(&mut self, x: &Rows, updates: &[LowRankUpdate<'_>], out: &mut Matrix) {
        assert_eq!(out.rows, x.rows, "an output row for each row");
        let out = (&mut out.data[..], out.width);
        low_rank::add(self.isa, &mut self.pool, x, updates, out, &mut self.low_rank);
    }

    fn logits(&mut self, layer: &Linear, x: &Rows, finish: LogitFinish<'_, Buffer<f32>>, out: &mut Vec<f32>) {
        let width = layer.rows();
        // Every value is written below; only growth needs filling.
        out.resize(x.rows * width, 0.0);
        self.multiply(layer, x, (out, width, Store::Set));
        self.finish_logits(out, finish);
    }

    /// For whoever wants the largest of each row: one thread would take as long to find it as all do for a layer.
    fn best_logits_max(&self, _: &Linear) -> usize {
        1
    }

    fn start_logits(
        &mut self,
        layer: &Linear,
        x: &Rows,
        finish: LogitFinish<'_, Buffer<f32>>,
        ranking: Option<&Ranking>,
    ) {
        let mut logits = std::mem::take(&mut self.ranked.logits);
        self.logits(layer, x, finish, &mut logits);
        self.ranked.logits = logits;
        if let Some(Ranking { count, rates }) = ranking {
            assert!(
                *count == 1 && rates.is_empty(),
                "the largest of a row alone is ranked here, and no row's mass"
            );
            self.ranked.rank(self.isa, &mut self.pool, layer.rows());
        }
    }

    fn wait_best(&mut self) -> Vec<BestLogits> {
        self.ranked.best()
    }

    fn ranked_row(&self, row: usize) -> Vec<f32> {
        self.ranked.row(row)
    }

    fn attention(
        &mut self,
        qkv: &Matrix,
        heads: AttentionShape,
        input: StepInput<'_>,
        step: &mut Step,
        cache: &mut KvCache,
        (out, form): (&mut Rows, Form),
    ) {
        attention::attention(self, qkv, heads, input, step, cache, (out, form));
    }

    fn gated(&mut self, activation: Activation, gate_up: &Matrix, out: (&mut Rows, Form)) {
        assert!(gate_up.width.is_multiple_of(2), "a gate and an up value for each output");
        let width = gate_up.width / 2;
        self.apply(activation, gate_up, width, out);
    }

    fn linear_gated(
        &mut self,
        layer: &Linear,
        activation: Activation,
        x: &Rows,
        scratch: &mut Matrix,
        (out, form): (&mut Rows, Form),
    ) {
        let width = layer.rows() / 2;
        let halves = match &layer.matrices[..] {
            [gate, up] if gate.rows == up.rows => Some([(gate, 0), (up, 0)]),
            [both] => Some([(both, 0), (both, width / TILE_ROWS)]),
            _ => None,
        };
        match halves {
            Some(halves) if width.is_multiple_of(GROUP) => {
                let target = out.reset(x.rows, width, form);
                let threads = self.pool.threads();
                let begin = |thread| linear::gated_begin(halves, width, (thread, threads));
                self.order.enter(layer.number, x.rows, &mut self.pool, begin);
                linear::gated(self.isa, &mut self.pool, halves, activation, x, target);
                out.level(self.isa, &mut self.pool);
            }
            _ => {
                self.linear(layer, x, scratch);
                self.gated(activation, scratch, (out, form));
            }
        }
    }

    fn activate(&mut self, activation: Activation, x: &Matrix, out: (&mut Rows, Form)) {
        self.apply(activation, x, x.width, out);
    }

    fn to_rows(&mut self, x: &Matrix, select: Option<&[u32]>, out: (&mut Rows, Form)) {
        let rows = select.map_or(x.rows, <[u32]>::len);
        let source = |row: usize| select.map_or(row, |s| s[row] as usize);
        assert!((0..rows).all(|row| source(row) < x.rows), "a selected row beyond the batch");
        self.copy_rows(&x.data, &source, (rows, x.width), out);
    }

    fn rms_norm_in_place(&mut self, x: &mut Matrix, columns: Range<usize>, weight: &Buffer<f32>, eps: f32) {
        let (width, len) = (x.width, columns.len());
        assert!(columns.end <= width && len.is_multiple_of(weight.len()), "a norm's weight fits the columns");
        let (rows, data) = (x.rows, Shared::new(&mut x.data));
        let isa = self.isa;
        self.for_rows(rows, &|rows| {
            for row in rows {
                // SAFETY: the columns are inside the row, and each row belongs to one chunk; the ISA is available.
                unsafe {
                    let x = std::slice::from_raw_parts_mut(data.at(row * width + columns.start), len);
                    norm::rms_norm_in_place(isa, x, weight, eps);
                }
            }
        });
    }

    fn layer_norm(
        &mut self,
        x: &Matrix,
        select: Option<&[u32]>,
        (weight, bias): (&Buffer<f32>, Option<&Buffer<f32>>),
        eps: f32,
        out: (&mut Rows, Form),
    ) {
        let rows = select.map_or(x.rows, <[u32]>::len);
        let source = |row: usize| select.map_or(row, |s| s[row] as usize);
        assert!((0..rows).all(|row| source(row) < x.rows), "a selected row beyond the batch");
        let isa = self.isa;
        self.write_rows(out, (rows, x.width), &|row, out| {
            let x = &x.data[source(row) * x.width..][..x.width];
            // SAFETY: the ISA is available, room was made for `rows`, and each row belongs to one chunk.
            unsafe { norm::layer_norm_row(isa, x, (weight, bias.map(|b| &b[..])), eps, (row, out)) }
        });
    }

    fn add_bias(&mut self, x: &mut Matrix, bias: &Buffer<f32>) {
        assert_eq!(bias.len(), x.width, "a bias has the width of its rows");
        self.update_rows(x, &|_, row| row.iter_mut().zip(bias.iter()).for_each(|(x, b)| *x += b));
    }

    fn add_scaled(&mut self, x: &Matrix, scale: f32, out: &mut Matrix) {
        assert!(out.rows == x.rows && out.width == x.width, "the residual stream has another shape");
        self.update_rows(out, &|row, out| {
            let x = &x.data[row * x.width..][..x.width];
            out.iter_mut().zip(x).for_each(|(out, x)| *out += scale * x);
        });
    }

    fn copy_columns(&mut self, x: &Matrix, runs: ColumnRuns, out: &mut Matrix) {
        assert!(out.rows == x.rows && runs.fit(x.width, out.width), "columns beyond a matrix: {runs:?}");
        self.update_rows(out, &|row, out| {
            let x = &x.data[row * x.width..][..x.width];
            for run in 0..runs.count {
                let (from, to) = (runs.from.0 + run * runs.from.1, runs.to.0 + run * runs.to.1);
                out[to..to + runs.width].copy_from_slice(&x[from..from + runs.width]);
            }
        });
    }

    fn clear(&mut self, x: &mut Matrix, rows: usize, width: usize) {
        x.reset(rows, width);
        self.update_rows(x, &|_, row| row.fill(0.0));
    }

    fn scatter_add(&mut self, x: &Matrix, rows: &[u32], scales: &[f32], out: &mut Matrix) {
        assert!(rows.len() == x.rows && scales.len() == x.rows && x.width == out.width, "a row for each row");
        for (source, (&row, scale)) in rows.iter().zip(scales).enumerate() {
            let out = &mut out.data[row as usize * x.width..][..x.width];
            let x = &x.data[source * x.width..][..x.width];
            out.iter_mut().zip(x).for_each(|(out, x)| *out += scale * x);
        }
    }

    fn read(&self, x: &Matrix, range: Range<usize>) -> Vec<f32> {
        x.data[range.start * x.width..range.end * x.width].to_vec()
    }
}
