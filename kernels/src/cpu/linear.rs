//! Linear layers: packed weights times activation rows, from one row (decode) to thousands (prefill).
//!
//! Every output is the sum over groups of 32 columns, ascending, of an exact integer dot product times both scales,
//! accumulated in f32 with fused multiply-add (8-bit weights); or the same over spans of eight groups, in which sums times both
//! scales, as words, are added up exactly (4-bit weights); or the sum over columns of products of bf16
//! (both sides) or f32, in f32. The order is fixed by the output alone: tile shapes, threads, batch and ISA change nothing
//! in the bits.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

mod brain;
mod eight;
mod float;
mod four;
mod next;

use self::brain::{exact, rounded};
use self::eight::eight;
use self::float::{half, single};
use self::four::four;
use super::Packed;
use super::activation;
use super::rows::{BLOCK_ROWS, Rows, RowsOut};
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::backend::Activation;
use crate::memory::Shared;
use crate::packed::{Layout, TILE_ROWS};
use crate::pool::{Ahead, Pool, RUNS, share};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Weights that all blocks of rows pass over before the next ones are touched: a share of the second-level cache.
const HOT_BYTES: usize = 128 << 10;

/// Weights that a thread which waits asks memory for: a share of the second-level cache, and what comes in some microseconds.
const AHEAD_BYTES: usize = 96 << 10;

/// Rows that pass over what was unpacked or added up of a tile before others do.
const UNPACKED_ROWS: usize = 8 * BLOCK_ROWS;

/// Outputs that are computed together: two tiles, which rows meet at once, and a group of the 8-bit form.
const UNIT: usize = 2 * TILE_ROWS;

/// What happens to a result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Set,
    /// Added to what is there (the residual stream).
    Add,
}

/// Where results go: rows `stride` apart, the job's first row and output at `first`.
#[derive(Clone, Copy)]
struct Output {
    data: Shared<f32>,
    stride: usize,
    first: usize,
    store: Store,
}

/// One call's operands: some tiles of a matrix against some rows, from the start of a block on.
struct Job<'a> {
    weights: &'a Packed,
    tiles: Range<usize>,
    x: &'a Rows,
    rows: Range<usize>,
    /// Whether the thread goes on with the tiles after these.
    goes_on: bool,
    out: Output,
}

/// Writes the results of one tile for the `T` rows from `row` on.
#[inline(always)]
unsafe fn put<S: Simd, const T: usize>(job: &Job<'_>, tile: usize, row: usize, acc: [S::F; T]) {
    let left = job.weights.rows - tile * TILE_ROWS;
    let (row, tile) = (row - job.rows.start, tile - job.tiles.start);
    // SAFETY: rows and outputs are inside the matrix the job was given, and tiles belong to one chunk each.
    unsafe {
        let out = job.out.data.at(row * job.out.stride + job.out.first + tile * TILE_ROWS);
        if left < TILE_ROWS {
            let mut values = [[0.0; LANES]; T];
            for t in 0..T {
                S::store(values[t].as_mut_ptr(), acc[t]);
            }
            put_part(job, out, &values, left);
        } else if job.out.store == Store::Add {
            for t in 0..T {
                let out = out.add(t * job.out.stride);
                S::store(out, S::add(S::load(out), acc[t]));
            }
        } else {
            for t in 0..T {
                S::store(out.add(t * job.out.stride), acc[t]);
            }
        }
    }
}

/// The same for a tile of which only the first `len` outputs are real.
#[cold]
unsafe fn put_part(job: &Job<'_>, out: *mut f32, values: &[[f32; LANES]], len: usize) {
    for (t, values) in values.iter().enumerate() {
        for (i, value) in values[..len].iter().enumerate() {
            // SAFETY: as in `put`.
            unsafe {
                let at = out.add(t * job.out.stride + i);
                *at = if job.out.store == Store::Add { *at + value } else { *value };
            }
        }
    }
}

/// # Safety
/// `isa` is available, `x` is in the form the layout reads, and the output has room for all rows.
unsafe fn run(isa: Isa, job: &Job<'_>) {
    // SAFETY: forwarded.
    unsafe {
        match &job.weights.layout {
            Layout::Four(weights) => dispatch!(isa, fn four(job: &Job<'_>, weights: &crate::paired::Paired)),
            Layout::Eight { codes, scales } => {
                let (codes, scales) = (codes.as_ptr(), scales.as_ptr());
                dispatch!(isa, fn eight(job: &Job<'_>, codes: *const u8, scales: *const u16))
            }
            Layout::Half(values) => {
                let values = values.as_ptr();
                dispatch!(isa, fn half(job: &Job<'_>, values: *const u16))
            }
            Layout::Brain(values) => {
                let values = values.as_ptr();
                if job.x.form.bf16 {
                    dispatch!(isa, fn rounded(job: &Job<'_>, values: *const u16))
                } else {
                    dispatch!(isa, fn exact(job: &Job<'_>, values: *const u16))
                }
            }
            Layout::Single(values) => {
                let values = values.as_ptr();
                dispatch!(isa, fn single(job: &Job<'_>, values: *const f32))
            }
        }
    }
}

/// Rounds in which a thread takes its share of a product with `rows` rows. At the end all wait for the last chunk, which
/// counts most where that takes long.
fn rounds(rows: usize) -> usize {
    match rows {
        0..4 => 3,
        4..64 => 5,
        _ => 7,
    }
}

/// Whether a thread's next chunk follows this one in memory.
fn goes_on((rounds, threads): (usize, usize), chunk: usize) -> bool {
    chunk / threads + 1 < rounds
}

/// Cuts units, which are parts of the rows of a tile or two, tile by tile, into runs of whole tiles and parts of one. A part is as
/// many rows as tiles are unpacked for anyway.
fn runs(units: Range<usize>, parts: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let mut at = units.start;
    std::iter::from_fn(move || {
        if at >= units.end {
            return None;
        }
        let (tile, part) = (at / parts, at % parts);
        let whole = units.end / parts;
        if part == 0 && tile < whole {
            at = whole * parts;
            return Some((tile..whole, 0..parts));
        }
        let until = (part + units.end - at).min(parts);
        at += until - part;
        Some((tile..tile + 1, part..until))
    })
}

/// Tiles that a thread reads together from the start of its share.
fn together(rows: usize) -> usize {
    // Rows meet two tiles at a time; one row alone is shared out as evenly as can be.
    if rows == 1 { 1 } else { UNIT / TILE_ROWS }
}

/// Where thread `thread` of `threads` begins to read the weights when they meet `rows` rows.
pub(crate) fn begin(matrices: &[Packed], rows: usize, (thread, threads): (usize, usize)) -> Ahead {
    let tiles: usize = matrices.iter().map(Packed::tiles).sum();
    let together = together(rows);
    let mut tile = share(tiles.div_ceil(together), (1, threads), thread).start * together;
    let mut runs = [(0, 0); RUNS];
    for matrix in matrices {
        if tile < matrix.tiles() {
            runs[..2].copy_from_slice(&matrix.runs(tile));
            break;
        }
        tile -= matrix.tiles();
    }
    ahead(runs)
}

/// The same for [`gated`].
pub(crate) fn gated_begin(halves: [Half<'_>; 2], outputs: usize, (thread, threads): (usize, usize)) -> Ahead {
    let tile = share(outputs / UNIT, (1, threads), thread).start * (UNIT / TILE_ROWS);
    let [gate, up] = halves.map(|(matrix, first_tile)| matrix.runs(first_tile + tile));
    ahead([gate[0], gate[1], up[0], up[1]])
}

fn ahead(runs: [(usize, usize); RUNS]) -> Ahead {
    let bytes: usize = runs.iter().map(|(_, bytes)| bytes).sum();
    Ahead { runs, steps: AHEAD_BYTES.checked_div(bytes).unwrap_or(0) }
}

/// Panics where rows are not in the form that `matrix` reads.
fn check_form(matrix: &Packed, x: &Rows) {
    let there = match matrix.layout {
        Layout::Four(_) => x.form.q8,
        Layout::Eight { .. } => x.form.shifted,
        Layout::Brain(_) => x.form.bf16 || x.form.f32,
        Layout::Half(_) | Layout::Single(_) => x.form.f32,
    };
    assert!(matrix.cols == x.cols && there, "rows in the wrong form");
}

/// Multiplies `x` with the matrices of one layer, whose outputs lie side by side in `out` in order.
///
/// # Panics
/// If `out` is smaller than `x.rows` rows of `stride`, `stride` smaller than all outputs, or a form is missing.
pub(crate) fn linear(
    isa: Isa,
    pool: &mut Pool,
    matrices: &[Packed],
    x: &Rows,
    (out, stride, store): (&mut [f32], usize, Store),
) {
    let width: usize = matrices.iter().map(|m| m.rows).sum();
    assert!(width <= stride && x.rows * stride <= out.len(), "a linear layer's output does not fit");
    matrices.iter().for_each(|matrix| check_form(matrix, x));
    let tiles: usize = matrices.iter().map(Packed::tiles).sum();
    let (parts, shares) = (x.rows.div_ceil(UNPACKED_ROWS).max(1), (rounds(x.rows), pool.threads()));
    let together = together(x.rows);
    let units = tiles.div_ceil(together) * parts;
    let data = Shared::new(out);
    pool.run(shares.0 * shares.1, &|chunk| {
        let goes_on = goes_on(shares, chunk);
        for (units, parts) in runs(share(units, shares, chunk), parts) {
            let tiles = units.start * together..tiles.min(units.end * together);
            let rows = parts.start * UNPACKED_ROWS..x.rows.min(parts.end * UNPACKED_ROWS);
            let (mut mine, mut first_tile, mut first) = (tiles, 0, rows.start * stride);
            for weights in matrices {
                let last = first_tile + weights.tiles();
                if mine.start < mine.end && mine.start < last {
                    let until = mine.end.min(last);
                    let tiles = mine.start - first_tile..until - first_tile;
                    let out = Output { data, stride, first: first + tiles.start * TILE_ROWS, store };
                    // SAFETY: the ISA was detected, forms and sizes are asserted above, and chunks are disjoint tiles or rows.
                    unsafe { run(isa, &Job { weights, tiles, x, rows: rows.clone(), goes_on, out }) }
                    mine.start = until;
                }
                (first_tile, first) = (last, first + weights.rows);
            }
        }
    });
}

/// Gate and up values a thread keeps between the products and the activation.
const WIDE: usize = 8 << 10;

/// A thread's gate and up values.
#[repr(align(64))]
struct Wide([MaybeUninit<f32>; WIDE]);

/// Where gated layers find a matrix: from which tile on.
pub(crate) type Half<'a> = (&'a Packed, usize);

/// `out` = activation(gate · x) · (up · x), a few groups of outputs at a time while they are hot. The bits are those of
/// [`linear`] followed by the activation.
///
/// # Panics
/// If `out` is no whole number of groups wide, or a form is missing.
pub(crate) fn gated(
    isa: Isa,
    pool: &mut Pool,
    halves: [Half<'_>; 2],
    activation: Activation,
    x: &Rows,
    out: RowsOut,
) {
    assert!(out.cols.is_multiple_of(UNIT), "a gated layer's outputs come in groups of {UNIT}");
    for (matrix, first_tile) in halves {
        check_form(matrix, x);
        assert!(
            first_tile * TILE_ROWS + out.cols <= matrix.rows,
            "a gated layer has a gate and an up value for each"
        );
    }
    let block_rows = x.rows.clamp(1, WIDE / (2 * UNIT));
    let (blocks, hot) = (x.rows.div_ceil(block_rows), WIDE / (2 * UNIT * block_rows));
    assert!(blocks == 1 || hot == 1);
    let (all, shares) = (out.cols / UNIT * blocks, (rounds(x.rows), pool.threads()));
    pool.run(shares.0 * shares.1, &|chunk| {
        let (mine, goes_on) = (share(all, shares, chunk), goes_on(shares, chunk));
        let mut wide = Wide([const { MaybeUninit::uninit() }; WIDE]);
        let data = Shared::uninit(&mut wide.0);
        for at in mine.clone().step_by(hot) {
            let (first, block) = (at / blocks, at % blocks * block_rows);
            let width = UNIT * hot.min(mine.end - at);
            let rows = block..(block + block_rows).min(x.rows);
            for (half, (weights, first_tile)) in halves.into_iter().enumerate() {
                let tile = first_tile + first * UNIT / TILE_ROWS;
                let tiles = tile..tile + width / TILE_ROWS;
                let out = Output { data, stride: 2 * width, first: half * width, store: Store::Set };
                // SAFETY: the ISA was detected, forms and sizes are asserted above, and `wide` is this chunk's.
                unsafe { run(isa, &Job { weights, tiles, x, rows: rows.clone(), goes_on, out }) }
            }
            // SAFETY: the values were just written and nobody else has them; columns of units and rows of blocks belong to
            // one chunk each, inside `out`, and the ISA was detected.
            unsafe {
                let values = std::slice::from_raw_parts(data.at(0).cast_const(), rows.len() * 2 * width);
                let gated = activation::Gated { activation, values, width };
                activation::apply_rows(isa, gated, (rows.start, first * UNIT, out));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_cover_every_part_once() {
        for (parts, start, end) in (1..5).flat_map(|p| (0..15).flat_map(move |s| (s..15).map(move |e| (p, s, e))))
        {
            let mut next = start;
            for (tiles, some) in runs(start..end, parts) {
                assert_eq!(tiles.start * parts + some.start, next, "{parts} parts, {start}..{end}");
                assert!(!tiles.is_empty() && !some.is_empty() && some.end <= parts);
                assert!(tiles.len() == 1 || some == (0..parts), "several tiles come whole");
                next = (tiles.end - 1) * parts + some.end;
            }
            assert_eq!(next, end);
        }
    }
}
