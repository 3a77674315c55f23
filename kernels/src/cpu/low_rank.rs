//! Low-rank updates: x · Aᵀ for the rows of each update, then times Bᵀ onto the output; two passes for all updates of a
//! linear layer, whoever's they are (the grouping of Punica, Chen et al. 2023, arXiv:2310.18547).
//!
//! The rows are read in f32, as they were before quantisation. A row's update is one sum over inputs in sixteen lanes, then
//! one over ranks, both ascending: neither tiles, threads nor other rows change anything in the bits.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::norm::{load_part, store_part};
use super::rows::Rows;
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::low_rank::{Factor, LowRankUpdate, RANK_TILE};
use crate::memory::{Buffer, Shared};
use crate::pool::Pool;
use std::ops::Range;

/// Rows of an update a chunk takes.
const CHUNK_ROWS: usize = 16;
/// Rows of A a chunk takes.
const CHUNK_RANKS: usize = 8;
/// Outputs a chunk takes.
const CHUNK_OUTPUTS: usize = 256;
/// Rows kept in registers at once.
const ROW_TILE: usize = 4;

/// How sixteen stored weights are read.
trait Weights {
    type Stored;
    unsafe fn load<S: Simd>(p: *const Self::Stored) -> S::F;
}

impl Weights for f32 {
    type Stored = f32;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::F {
        // SAFETY: forwarded.
        unsafe { S::load(p) }
    }
}

struct BrainBits;
impl Weights for BrainBits {
    type Stored = u16;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::F {
        // SAFETY: forwarded.
        unsafe { S::load_bf16(p) }
    }
}

/// Some rows of one update, and some of its ranks or outputs.
struct Part<'a> {
    update: LowRankUpdate<'a>,
    rows: Range<usize>,
    columns: Range<usize>,
    /// x · Aᵀ of all the update's rows, `padded_rank` values a row.
    inner: Shared<f32>,
}

/// The parts of all updates, each `size` columns wide.
fn parts<'a>(
    updates: &[LowRankUpdate<'a>],
    inner: Shared<f32>,
    size: usize,
    width: impl Fn(&LowRankUpdate<'_>) -> usize,
) -> Vec<Part<'a>> {
    let (mut parts, mut first) = (Vec::new(), 0);
    for &update in updates {
        let (count, width) = (update.rows.len(), width(&update));
        // Neighbours share weights: one after another they find them in the cache.
        for column in (0..width).step_by(size) {
            for row in (0..count).step_by(CHUNK_ROWS) {
                parts.push(Part {
                    update,
                    rows: row..count.min(row + CHUNK_ROWS),
                    columns: column..width.min(column + size),
                    inner: inner.from(first),
                });
            }
        }
        first += count * update.weights.padded_rank();
    }
    parts
}

/// Adds every update to its rows and columns of `out`, `width` wide.
pub(super) fn add(
    isa: Isa,
    pool: &mut Pool,
    x: &Rows,
    updates: &[LowRankUpdate<'_>],
    (out, width): (&mut [f32], usize),
    scratch: &mut Buffer<f32>,
) {
    assert!(x.form.f32, "low-rank updates read rows in f32");
    for update in updates {
        let weights = update.weights;
        assert_eq!(weights.inputs, x.cols, "an update has the layer's inputs");
        assert!(update.first + weights.outputs <= width, "an update's outputs are among the layer's");
        assert!(update.rows.iter().all(|&row| (row as usize) < x.rows), "a row beyond the batch");
        assert!(update.rows.is_sorted_by(|a, b| a < b), "an update names a row once");
    }
    scratch.reserve(updates.iter().map(|update| update.rows.len() * update.weights.padded_rank()).sum());
    let inner = Shared::new(scratch);
    let shrinking = parts(updates, inner, CHUNK_RANKS, |update| update.weights.padded_rank());
    pool.run(shrinking.len(), &|chunk| {
        let part = &shrinking[chunk];
        // SAFETY: the ISA is available; rows and inputs were checked; each place of `inner` belongs to one part.
        unsafe {
            match &part.update.weights.on_host()[0] {
                Factor::Single(a) => dispatch_shrink_single(isa, part, x, a.as_ptr()),
                Factor::Brain(a) => dispatch_shrink_brain(isa, part, x, a.as_ptr()),
            }
        }
    });
    let out = Shared::new(out);
    let growing = parts(updates, inner, CHUNK_OUTPUTS, |update| update.weights.outputs);
    pool.run(growing.len(), &|chunk| {
        let part = &growing[chunk];
        // SAFETY: the ISA is available; rows and outputs were checked; each place of `out` belongs to one part, unless two
        // updates share it, which callers rule out.
        unsafe {
            match &part.update.weights.on_host()[1] {
                Factor::Single(b) => dispatch_grow_single(isa, part, b.as_ptr(), (out, width)),
                Factor::Brain(b) => dispatch_grow_brain(isa, part, b.as_ptr(), (out, width)),
            }
        }
    });
}

unsafe fn dispatch_shrink_single(isa: Isa, part: &Part<'_>, x: &Rows, a: *const f32) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn shrink_single(part: &Part<'_>, x: &Rows, a: *const f32)) }
}

unsafe fn dispatch_shrink_brain(isa: Isa, part: &Part<'_>, x: &Rows, a: *const u16) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn shrink_brain(part: &Part<'_>, x: &Rows, a: *const u16)) }
}

unsafe fn dispatch_grow_single(isa: Isa, part: &Part<'_>, b: *const f32, out: (Shared<f32>, usize)) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn grow_single(part: &Part<'_>, b: *const f32, out: (Shared<f32>, usize))) }
}

unsafe fn dispatch_grow_brain(isa: Isa, part: &Part<'_>, b: *const u16, out: (Shared<f32>, usize)) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn grow_brain(part: &Part<'_>, b: *const u16, out: (Shared<f32>, usize))) }
}

#[inline(always)]
unsafe fn shrink_single<S: Simd>(part: &Part<'_>, x: &Rows, a: *const f32) {
    // SAFETY: forwarded.
    unsafe { shrink::<S, f32>(part, x, a) }
}

#[inline(always)]
unsafe fn shrink_brain<S: Simd>(part: &Part<'_>, x: &Rows, a: *const u16) {
    // SAFETY: forwarded.
    unsafe { shrink::<S, BrainBits>(part, x, a) }
}

#[inline(always)]
unsafe fn grow_single<S: Simd>(part: &Part<'_>, b: *const f32, out: (Shared<f32>, usize)) {
    // SAFETY: forwarded.
    unsafe { grow::<S, f32>(part, b, out) }
}

#[inline(always)]
unsafe fn grow_brain<S: Simd>(part: &Part<'_>, b: *const u16, out: (Shared<f32>, usize)) {
    // SAFETY: forwarded.
    unsafe { grow::<S, BrainBits>(part, b, out) }
}

/// `inner` = x · Aᵀ for the part's rows and ranks.
#[inline(always)]
unsafe fn shrink<S: Simd, W: Weights>(part: &Part<'_>, x: &Rows, a: *const W::Stored) {
    for rank in part.columns.clone().step_by(RANK_TILE) {
        let mut row = part.rows.start;
        while row < part.rows.end {
            // SAFETY: rows `row..row + T` belong to the part; A has rows in whole tiles.
            unsafe {
                row += if part.rows.end - row >= ROW_TILE {
                    shrink_tile::<S, W, ROW_TILE>(part, x, a, (row, rank));
                    ROW_TILE
                } else {
                    shrink_tile::<S, W, 1>(part, x, a, (row, rank));
                    1
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn shrink_tile<S: Simd, W: Weights, const T: usize>(
    part: &Part<'_>,
    x: &Rows,
    a: *const W::Stored,
    (row, rank): (usize, usize),
) {
    let weights = part.update.weights;
    let (inputs, stride) = (weights.inputs, weights.inputs.next_multiple_of(LANES));
    let whole = inputs / LANES * LANES;
    // SAFETY: the rows named hold `inputs` values each; A's rows hold `stride`.
    unsafe {
        let rows: [*const f32; T] =
            std::array::from_fn(|t| x.values.as_ptr().add(part.update.rows[row + t] as usize * inputs));
        let a = a.add(rank * stride);
        let mut acc = [[S::zero(); RANK_TILE]; T];
        for at in (0..whole).step_by(LANES) {
            let mut x = [S::zero(); T];
            for t in 0..T {
                x[t] = S::load(rows[t].add(at));
            }
            for k in 0..RANK_TILE {
                let a = W::load::<S>(a.add(k * stride + at));
                for t in 0..T {
                    acc[t][k] = S::fma(x[t], a, acc[t][k]);
                }
            }
        }
        if whole < inputs {
            let mut x = [S::zero(); T];
            for t in 0..T {
                x[t] = load_part::<S>(rows[t], whole, inputs, 0.0);
            }
            for k in 0..RANK_TILE {
                let a = W::load::<S>(a.add(k * stride + whole));
                for t in 0..T {
                    acc[t][k] = S::fma(x[t], a, acc[t][k]);
                }
            }
        }
        for t in 0..T {
            for k in 0..RANK_TILE {
                *part.inner.at((row + t) * weights.padded_rank() + rank + k) =
                    weights.scale * S::reduce_add(acc[t][k]);
            }
        }
    }
}

/// `out` += `inner` · Bᵀ for the part's rows and outputs.
#[inline(always)]
unsafe fn grow<S: Simd, W: Weights>(part: &Part<'_>, b: *const W::Stored, out: (Shared<f32>, usize)) {
    for column in part.columns.clone().step_by(LANES) {
        let mut row = part.rows.start;
        while row < part.rows.end {
            // SAFETY: rows `row..row + T` belong to the part.
            unsafe {
                row += if part.rows.end - row >= ROW_TILE {
                    grow_tile::<S, W, ROW_TILE>(part, b, out, (row, column));
                    ROW_TILE
                } else {
                    grow_tile::<S, W, 1>(part, b, out, (row, column));
                    1
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn grow_tile<S: Simd, W: Weights, const T: usize>(
    part: &Part<'_>,
    b: *const W::Stored,
    (out, width): (Shared<f32>, usize),
    (row, column): (usize, usize),
) {
    let weights = part.update.weights;
    let stride = weights.outputs.next_multiple_of(LANES);
    // SAFETY: B's rows hold `stride` values; the rows named are `width` values each, the update's outputs among them.
    unsafe {
        let inner: [*mut f32; T] = std::array::from_fn(|t| part.inner.at((row + t) * weights.padded_rank()));
        let mut acc = [S::zero(); T];
        for k in 0..weights.rank {
            let b = W::load::<S>(b.add(k * stride + column));
            for t in 0..T {
                acc[t] = S::fma(S::splat(*inner[t].add(k)), b, acc[t]);
            }
        }
        for t in 0..T {
            let out = out.at(part.update.rows[row + t] as usize * width + part.update.first);
            let sum = S::add(load_part::<S>(out, column, weights.outputs, 0.0), acc[t]);
            store_part::<S>(out, column, weights.outputs, sum);
        }
    }
}
