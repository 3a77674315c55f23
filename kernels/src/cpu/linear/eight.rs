//! Products of 8-bit weights: groups of 32 columns against shifted 8-bit rows.
//!
//! A shift is multiplied with the sum of a group's codes, which are added up once for all rows that pass over them.

use super::super::rows::BLOCK_ROWS;
use super::super::simd::{LANES, Simd};
use super::next::{Ask, AtOnce, Evenly, Wanted};
use super::{Job, UNPACKED_ROWS, put};
use crate::packed::GROUP;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups of a tile that rows pass over together: with the rows, and what is asked for meanwhile, they fit the first-level cache.
const HOT_GROUPS: usize = 12;
/// Tiles that meet rows together, where registers allow.
const PAIR: usize = 2;
/// Rows from which two tiles at a time are faster than one (Emerald Rapids).
const PAIR_ROWS: usize = 64;
/// Bytes of a group's codes.
const CODE_BYTES: usize = 512;
/// Scales of a group.
const SCALES: usize = LANES;
/// Quads of columns in a group.
const QUADS: usize = GROUP / 4;

/// Of a group's codes, sixteen rows.
type CodeSums = [i32; LANES];

/// Some consecutive groups of one tile, and the same ones of the tiles after it.
struct Strip {
    tile: usize,
    codes: *const u8,
    scales: *const u16,
    /// [tile][HOT_GROUPS]
    code_sums: *const CodeSums,
    groups: Range<usize>,
}

/// Where sums of tiles that are not done wait: [tile][UNPACKED_ROWS][16 outputs].
type Waiting = *mut [f32; LANES];

/// Adds the products of a strip's `N` tiles and `T` rows of one block, from `row` on. A row's codes are loaded once for all
/// tiles: with one tile, loading would take as long as multiplying.
#[inline(always)]
unsafe fn products<S: Simd, const N: usize, const T: usize>(
    job: &Job<'_>,
    strip: &Strip,
    next: &mut impl Ask<N>,
    row: usize,
    mut acc: [[S::F; T]; N],
) -> [[S::F; T]; N] {
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    let row_groups = job.weights.cols / GROUP;
    let place = (block * row_groups + strip.groups.start) * BLOCK_ROWS + lane;
    let x = &job.x.shifted;
    // SAFETY: a strip's groups are inside the tiles and the row; offsets stay inside both.
    unsafe {
        let mut q = x.q.as_ptr().add(place * S::SHIFTED_BYTES);
        let mut scale = x.scale.as_ptr().add(place);
        let mut shift = x.shift.as_ptr().add(place);
        let mut bias = x.bias.as_ptr().add(place);
        let (mut codes, mut scales, mut code_sums) = (strip.codes, strip.scales, strip.code_sums);
        for _ in strip.groups.clone() {
            next.step::<S>();
            let mut dot = [[S::isplat(0); T]; N];
            for n in 0..N {
                let sums = code_sums.wrapping_add(n * HOT_GROUPS).cast();
                for t in 0..T {
                    dot[n][t] = S::start_shifted(sums, *shift.add(t), *bias.add(t));
                }
            }
            // Neighbouring dot products are independent: none waits for the one before.
            for j in 0..QUADS {
                let mut w = [S::load_b(codes.add(64 * j)); N];
                for n in 1..N {
                    w[n] = S::load_b(codes.add(n * row_groups * CODE_BYTES + 64 * j));
                }
                for t in 0..T {
                    let x = S::splat_shifted(q.add(t * S::SHIFTED_BYTES), j);
                    for n in 0..N {
                        dot[n][t] = S::dot_shifted(dot[n][t], w[n], x);
                    }
                }
            }
            let mut w = [S::load_f16(scales); N];
            for n in 1..N {
                w[n] = S::load_f16(scales.add(n * row_groups * SCALES));
            }
            for t in 0..T {
                let scale = S::splat(*scale.add(t));
                for n in 0..N {
                    acc[n][t] = S::fma(S::to_f(dot[n][t]), S::mul(w[n], scale), acc[n][t]);
                }
            }
            q = q.add(BLOCK_ROWS * S::SHIFTED_BYTES);
            scale = scale.add(BLOCK_ROWS);
            shift = shift.add(BLOCK_ROWS);
            bias = bias.add(BLOCK_ROWS);
            code_sums = code_sums.wrapping_add(1);
            codes = codes.add(CODE_BYTES);
            scales = scales.add(SCALES);
        }
        acc
    }
}

/// A strip's `N` tiles times `T` rows; sums begin and end in `waiting` where the strip is not all of its tiles.
#[inline(always)]
unsafe fn rows<S: Simd, const N: usize, const T: usize>(
    job: &Job<'_>,
    strip: &Strip,
    next: &mut impl Ask<N>,
    row: usize,
    waiting: Waiting,
) -> usize {
    // SAFETY: forwarded; `waiting` has room for `T` rows.
    unsafe {
        let mut acc = [[S::zero(); T]; N];
        if strip.groups.start > 0 {
            for n in 0..N {
                for t in 0..T {
                    acc[n][t] = S::load(waiting.add(n * UNPACKED_ROWS + t).cast());
                }
            }
        }
        let acc = products::<S, N, T>(job, strip, next, row, acc);
        for n in 0..N {
            if strip.groups.end < job.weights.cols / GROUP {
                for t in 0..T {
                    S::store(waiting.add(n * UNPACKED_ROWS + t).cast(), acc[n][t]);
                }
            } else {
                put::<S, T>(job, strip.tile + n, row, acc[n]);
            }
        }
    }
    T
}

/// A strip's `N` tiles times rows `range` of the job, as many at a time as registers hold. What lies at `next` is asked for
/// meanwhile.
#[inline(always)]
unsafe fn all_rows<S: Simd, const N: usize>(
    job: &Job<'_>,
    strip: &Strip,
    mut next: impl Ask<N>,
    range: Range<usize>,
    waiting: Waiting,
) {
    let mut row = range.start;
    while row < range.end {
        let left = (range.end - row).min(BLOCK_ROWS - row % BLOCK_ROWS);
        next.pass();
        let (next, waiting) = (&mut next, waiting.wrapping_add(row - range.start));
        // SAFETY: rows `row..row + T` are inside the block and the batch.
        unsafe {
            row += match left {
                8.. if S::TILE_TOKENS >= 8 => rows::<S, N, 8>(job, strip, next, row, waiting),
                4.. => rows::<S, N, 4>(job, strip, next, row, waiting),
                2.. => rows::<S, N, 2>(job, strip, next, row, waiting),
                _ => rows::<S, N, 1>(job, strip, next, row, waiting),
            };
        }
    }
}

/// The job.
#[inline(always)]
pub(super) unsafe fn eight<S: Simd>(job: &Job<'_>, codes: *const u8, scales: *const u16) {
    let mut tile = job.tiles.start;
    while tile < job.tiles.end {
        let together = S::TILES >= PAIR && job.rows.len() >= PAIR_ROWS && tile + PAIR <= job.tiles.end;
        // SAFETY: forwarded.
        unsafe {
            tile += match together {
                true => some_tiles::<S, PAIR>(job, (codes, scales), tile),
                false => some_tiles::<S, 1>(job, (codes, scales), tile),
            }
        }
    }
}

/// The job's `N` tiles from `tile` on; their number.
#[inline(always)]
unsafe fn some_tiles<S: Simd, const N: usize>(
    job: &Job<'_>,
    (codes, scales): (*const u8, *const u16),
    tile: usize,
) -> usize {
    let groups = job.weights.cols / GROUP;
    let mut code_sums = [const { MaybeUninit::<CodeSums>::uninit() }; PAIR * HOT_GROUPS];
    let mut waiting = [const { MaybeUninit::<[f32; LANES]>::uninit() }; PAIR * UNPACKED_ROWS];
    let follows = job.goes_on || tile + N < job.tiles.end;
    let at = |group: usize| (codes.wrapping_add(group * CODE_BYTES), scales.wrapping_add(group * SCALES));
    // As many at a time as can be, but about as many each time.
    let step = groups.div_ceil(groups.div_ceil(HOT_GROUPS));
    for chunk in job.rows.clone().step_by(UNPACKED_ROWS) {
        let rows = chunk..(chunk + UNPACKED_ROWS).min(job.rows.end);
        for first in (0..groups).step_by(step) {
            let some = first..(first + step).min(groups);
            // SAFETY: the groups are inside the tiles, the room holds their sums, and they are read after they were written.
            unsafe {
                let ones = S::splat_b([1; 4].as_ptr());
                for n in 0..if S::WIDE { 0 } else { N } {
                    for (i, group) in some.clone().enumerate() {
                        let codes = at((tile + n) * groups + group).0;
                        let mut sum = S::isplat(0);
                        for j in 0..QUADS {
                            sum = S::dot(sum, S::load_b(codes.add(64 * j)), ones);
                        }
                        S::store_i(code_sums[n * HOT_GROUPS + i].as_mut_ptr().cast(), sum);
                    }
                }
                // The same groups of the tiles after these.
                let next = (follows && chunk == job.rows.start).then(|| {
                    let (codes, scales) = at((tile + N) * groups + first);
                    Wanted { codes, scales: scales.cast(), steps: some.len(), apart: groups }
                });
                let (codes, scales) = at(tile * groups + first);
                let strip = Strip { tile, codes, scales, code_sums: code_sums.as_ptr().cast(), groups: some };
                let waiting = waiting.as_mut_ptr().cast();
                if rows.len() <= S::TILE_TOKENS {
                    let next = AtOnce::<CODE_BYTES, { 2 * SCALES }>::new(next);
                    all_rows::<S, N>(job, &strip, next, rows.clone(), waiting);
                } else {
                    let passes = rows.len().div_ceil(S::TILE_TOKENS);
                    let next = Evenly::<CODE_BYTES, { 2 * SCALES }>::new(next, N, passes);
                    all_rows::<S, N>(job, &strip, next, rows.clone(), waiting);
                }
            }
        }
    }
    N
}
