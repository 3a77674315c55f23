//! The CPU backend: every operation split over the pool, every kernel generic over the ISA.

mod attention;
mod kv_cache;
mod linear;
mod norm;
mod rows;
pub(crate) mod simd;

pub use kv_cache::KvCache;
pub use rows::{Form, Rows};
pub use simd::Isa;

use crate::backend::{AttentionShape, Backend, CacheShape, Rope, StepInput};
use crate::memory::{Buffer, Shared};
use crate::packed::{Layout, PackError, Packed, Stored};
use crate::pool::Pool;
use linear::Store;
use std::ops::Range;

/// Row operations on fewer rows than this are not worth waking anybody for.
const PARALLEL_ROWS: usize = 4;

/// Runs on the machine's own cores.
pub struct CpuBackend {
    isa: Isa,
    pool: Pool,
}

/// Matrices of one linear layer, side by side.
pub struct Linear {
    matrices: Vec<Packed>,
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
    rows: usize,
    /// Heads and head dimension it was prepared for.
    heads: Option<AttentionShape>,
    /// Cosines then sines of each row: `[row][2][n]`.
    rotations: Buffer<f32>,
    frequencies: usize,
    items: Vec<attention::Item>,
    /// Rotated queries, bf16: `[row][heads * head_dim]`.
    queries: Buffer<u16>,
}

impl CpuBackend {
    /// Starts `threads - 1` workers; `isa` must be available on this machine.
    ///
    /// # Panics
    /// If `isa` is not available.
    pub fn new(threads: usize, isa: Isa) -> CpuBackend {
        assert!(isa.available(), "this processor has no {}", isa.name());
        CpuBackend { isa, pool: Pool::new(threads) }
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
        let size = rows.div_ceil(self.pool.threads() * 8);
        self.pool.run(rows.div_ceil(size), &|chunk| f(chunk * size..((chunk + 1) * size).min(rows)));
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
            matrices.push(Packed::new(*part, &mut self.pool));
        }
        Ok(Linear { matrices })
    }

    fn load_vector(&mut self, values: &[f32]) -> Buffer<f32> {
        let mut vector = Buffer::zeroed(values.len());
        vector.copy_from_slice(values);
        vector
    }

    fn new_kv_cache(&mut self, shape: CacheShape, heads: AttentionShape) -> KvCache {
        KvCache::new(shape, heads)
    }

    fn form(&self, layer: &Linear) -> Form {
        layer.matrices.iter().fold(Form::default(), |form, m| {
            form.and(match m.layout {
                Layout::Four { .. } | Layout::Eight { .. } => Form { q8: true, f32: false },
                _ => Form { q8: false, f32: true },
            })
        })
    }

    fn prepare(&mut self, input: StepInput<'_>, rope: &Rope, heads: AttentionShape, step: &mut Step) {
        let n = rope.inverse_frequencies.len();
        assert!(2 * n <= heads.head_dim, "{n} frequencies turn more than {} dimensions", heads.head_dim);
        assert!(heads.kv_heads > 0 && heads.heads.is_multiple_of(heads.kv_heads), "heads in whole groups");
        (step.rows, step.heads, step.frequencies) = (input.positions.len(), Some(heads), n);
        step.rotations.reserve(input.positions.len() * 2 * n);
        step.queries.reserve(input.positions.len() * heads.heads * heads.head_dim);
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
        attention::list_items(input, heads, &mut step.items);
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
        (out, form): (&mut Rows, Form),
    ) {
        assert_eq!(weight.len(), x.width, "a norm's weight has the width of its input");
        let rows = select.map_or(x.rows, <[u32]>::len);
        let source = |row: usize| select.map_or(row, |s| s[row] as usize);
        assert!((0..rows).all(|row| source(row) < x.rows), "a selected row beyond the batch");
        let out = out.reset(rows, x.width, form);
        let isa = self.isa;
        self.for_rows(rows, &|rows| {
            for row in rows {
                let x = &x.data[source(row) * x.width..][..x.width];
                // SAFETY: the ISA is available, room was made for `rows`, and each row belongs to one chunk.
                unsafe { norm::rms_norm_row(isa, x, weight, eps, (row, out)) }
            }
        });
    }

    fn linear(&mut self, layer: &Linear, x: &Rows, out: &mut Matrix) {
        let width = layer.rows();
        out.reset(x.rows, width);
        linear::linear(self.isa, &mut self.pool, &layer.matrices, x, (&mut out.data, width, Store::Set));
    }

    fn linear_add(&mut self, layer: &Linear, x: &Rows, out: &mut Matrix) {
        let width = layer.rows();
        assert!(out.rows == x.rows && out.width == width, "the residual stream has another shape");
        linear::linear(self.isa, &mut self.pool, &layer.matrices, x, (&mut out.data, width, Store::Add));
    }

    fn logits(&mut self, layer: &Linear, x: &Rows, out: &mut Vec<f32>) {
        let width = layer.rows();
        // Every value is written below; only growth needs filling.
        out.resize(x.rows * width, 0.0);
        linear::linear(self.isa, &mut self.pool, &layer.matrices, x, (out, width, Store::Set));
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

    fn silu_mul(&mut self, gate_up: &Matrix, (out, form): (&mut Rows, Form)) {
        assert!(gate_up.width.is_multiple_of(2), "a gate and an up value for each output");
        let width = gate_up.width / 2;
        let out = out.reset(gate_up.rows, width, form);
        let isa = self.isa;
        self.for_rows(gate_up.rows, &|rows| {
            for row in rows {
                let (gate, up) = gate_up.data[row * 2 * width..][..2 * width].split_at(width);
                // SAFETY: the ISA is available, room was made for all rows, and each row belongs to one chunk.
                unsafe { norm::silu_mul_row(isa, gate, up, (row, out)) }
            }
        });
    }

    fn read(&self, x: &Matrix, range: Range<usize>) -> Vec<f32> {
        x.data[range.start * x.width..range.end * x.width].to_vec()
    }
}
