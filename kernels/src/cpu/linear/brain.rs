//! bf16 weights times rows: f32 ones as they are, or bf16 ones, two columns a product (`vdpbf16ps`).

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::{HOT_BYTES, Job, put};
use crate::cpu::rows::BLOCK_ROWS;
use crate::cpu::simd::{Apart, Simd};
use crate::packed::{GROUP, TILE_ROWS};
use std::ops::Range;

/// A pair of columns of a tile.
const PAIR: usize = 2 * TILE_ROWS;

/// `N` tiles from `tile` on, times `T` f32 rows.
#[inline(always)]
unsafe fn exact_tiles<S: Simd, const T: usize, const N: usize>(
    job: &Job<'_>,
    values: *const u16,
    (tile, fetch): (usize, bool),
    row: usize,
) {
    let cols = job.weights.cols;
    let pairs = cols.div_ceil(2);
    // SAFETY: weights hold `pairs` pairs of columns a tile, rows hold `cols` values; offsets stay inside both. What is
    // fetched ahead may lie beyond: nothing of it is read here.
    unsafe {
        let w = values.add(tile * pairs * PAIR);
        let x = job.x.values.as_ptr().add(row * cols);
        let mut acc = [[S::zero(); T]; N];
        for j in 0..pairs {
            if fetch {
                S::prefetch(w.wrapping_add((N * pairs + j) * PAIR).cast());
            }
            for n in 0..N {
                let (even, odd) = S::widen_bf16(S::load_b(w.add((n * pairs + j) * PAIR).cast()));
                for t in 0..T {
                    acc[n][t] = S::fma(even, S::splat(*x.add(t * cols + 2 * j)), acc[n][t]);
                }
                if 2 * j + 1 < cols {
                    for t in 0..T {
                        acc[n][t] = S::fma(odd, S::splat(*x.add(t * cols + 2 * j + 1)), acc[n][t]);
                    }
                }
            }
        }
        for n in 0..N {
            put::<S, T>(job, tile + n, row, acc[n]);
        }
    }
}

/// `N` tiles from `tile` on, times `T` bf16 rows of one block. Pairs of columns ascend, each adding its odd
/// product and then its even one.
#[inline(always)]
unsafe fn rounded_tiles<S: Simd, const T: usize, const N: usize>(
    job: &Job<'_>,
    values: *const u16,
    (tile, fetch): (usize, bool),
    row: usize,
) {
    let (pairs, groups) = (job.weights.cols.div_ceil(2), job.weights.cols.div_ceil(GROUP));
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    // SAFETY: weights hold `pairs` pairs of columns a tile, rows hold `groups` groups a block; offsets stay inside both.
    // What is fetched ahead may lie beyond: nothing of it is read here.
    unsafe {
        let mut w = values.add(tile * pairs * PAIR);
        let mut x = job.x.brain.as_ptr().cast::<S::Rounded>().add((block * groups * BLOCK_ROWS + lane) * GROUP);
        let mut acc = [[S::zero(); T]; N];
        for group in 0..groups {
            let here = (pairs - group * GROUP / 2).min(GROUP / 2);
            for j in 0..here {
                if fetch {
                    S::prefetch(w.wrapping_add((N * pairs + j) * PAIR).cast());
                }
                for n in 0..N {
                    let w = S::pairs(S::load_b(w.add((n * pairs + j) * PAIR).cast()));
                    for t in 0..T {
                        acc[n][t] = S::dot_pairs(acc[n][t], w, S::splat_pair(x.add(t * GROUP + 2 * j)));
                    }
                }
            }
            w = w.add(here * PAIR);
            x = x.add(BLOCK_ROWS * GROUP);
        }
        for n in 0..N {
            put::<S, T>(job, tile + n, row, acc[n]);
        }
    }
}

/// `N` tiles from `tile` on, times `T` rows from `row` on.
struct Tiles<'a, const ROUNDED: bool, const T: usize, const N: usize> {
    job: &'a Job<'a>,
    values: *const u16,
    tile: usize,
    fetch: bool,
    row: usize,
}

impl<const ROUNDED: bool, const T: usize, const N: usize> Apart for Tiles<'_, ROUNDED, T, N> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Tiles { job, values, tile, fetch, row } = self;
        // SAFETY: forwarded.
        unsafe {
            if ROUNDED {
                rounded_tiles::<S, T, N>(job, values, (tile, fetch), row);
            } else {
                exact_tiles::<S, T, N>(job, values, (tile, fetch), row);
            }
        }
    }
}

/// `T` rows, and up to `N` tiles at once, whose sums keep the processor busy: a sum waits for the one before it. The number
/// of rows.
#[inline(always)]
unsafe fn some_rows<S: Simd, const ROUNDED: bool, const T: usize, const N: usize>(
    job: &Job<'_>,
    values: *const u16,
    tiles: Range<usize>,
    row: usize,
) -> usize {
    let mut tile = tiles.start;
    while tile < tiles.end {
        // SAFETY: tiles are inside the job, and rows inside the block, by the caller.
        unsafe {
            if tile + N <= tiles.end {
                // As for quantised weights: asked for once, and only where there is time.
                let fetch = T >= 8 && row == 0;
                S::apart(Tiles::<ROUNDED, T, N> { job, values, tile, fetch, row });
                tile += N;
            } else {
                S::apart(Tiles::<ROUNDED, T, 1> { job, values, tile, fetch: false, row });
                tile += 1;
            }
        }
    }
    T
}

#[inline(always)]
unsafe fn all_rows<S: Simd, const ROUNDED: bool>(job: &Job<'_>, values: *const u16) {
    let hot_tiles = (HOT_BYTES / (job.weights.cols.div_ceil(2) * PAIR * size_of::<u16>())).max(4);
    let blocks = job.rows.clone().step_by(BLOCK_ROWS);
    let hot = job.tiles.clone().step_by(hot_tiles);
    for (first, block) in hot.flat_map(|t| blocks.clone().map(move |b| (t, b))) {
        let end = (block + BLOCK_ROWS).min(job.rows.end);
        let tiles = first..(first + hot_tiles).min(job.tiles.end);
        let mut row = block;
        while row < end {
            let left = end - row;
            // SAFETY: rows `row..row + T` are inside the block and the batch.
            unsafe {
                let wide = S::TILE_TOKENS >= 8;
                row += match left {
                    8.. if wide => some_rows::<S, ROUNDED, 8, 2>(job, values, tiles.clone(), row),
                    4.. if wide => some_rows::<S, ROUNDED, 4, 4>(job, values, tiles.clone(), row),
                    4.. => some_rows::<S, ROUNDED, 4, 1>(job, values, tiles.clone(), row),
                    2.. if wide => some_rows::<S, ROUNDED, 2, 4>(job, values, tiles.clone(), row),
                    2.. => some_rows::<S, ROUNDED, 2, 2>(job, values, tiles.clone(), row),
                    _ => some_rows::<S, ROUNDED, 1, 4>(job, values, tiles.clone(), row),
                };
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn exact<S: Simd>(job: &Job<'_>, values: *const u16) {
    // SAFETY: forwarded.
    unsafe { all_rows::<S, false>(job, values) }
}

#[inline(always)]
pub(super) unsafe fn rounded<S: Simd>(job: &Job<'_>, values: *const u16) {
    // SAFETY: forwarded.
    unsafe { all_rows::<S, true>(job, values) }
}
