//! Products of quantised weights: groups of 32 columns against 8-bit rows.
//!
//! A few rows unpack a group's 4-bit codes into registers as they go. More rows than fit the registers would unpack them
//! again and again, so a tile's groups are unpacked once into the first-level cache and all rows pass over them there.
//! 8-bit codes stay where they are; rows that meet them are shifted, and a shift is multiplied with the sum of a group's codes.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::rows::BLOCK_ROWS;
use super::super::simd::{LANES, Simd};
use super::{Job, put};
use crate::packed::GROUP;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups of a tile that are unpacked together: with the rows they meet they fit the first-level cache.
const UNPACKED_GROUPS: usize = 48;
/// Rows that pass over them before others do.
pub(super) const UNPACKED_ROWS: usize = 8 * BLOCK_ROWS;
/// A cache line.
const LINE: usize = 64;

/// A weight group in registers: eight vectors of four columns each, scale and minimum.
pub(super) struct Registers<S: Simd> {
    quads: [S::B; 8],
    d: S::F,
    m: S::F,
}

/// How groups of a layout are read.
pub(super) trait Groups {
    const CODE_BYTES: usize;
    const SCALES: usize;
    /// Has a minimum term.
    const MIN: bool;
    /// Meets shifted rows.
    const SHIFTED: bool;
    unsafe fn unpack<S: Simd>(codes: *const u8, scales: *const u16) -> Registers<S>;
    unsafe fn dot<S: Simd>(acc: S::I, u: S::B, s: S::B) -> S::I;
}

pub(super) struct Four;
pub(super) struct Eight;
/// [`Four`] after unpacking: see [`Unpacked`].
struct Loose;

/// A group of sixteen rows with a byte a code and f32 scales.
#[repr(C, align(64))]
struct Unpacked {
    quads: [[u8; 64]; 8],
    d: [f32; LANES],
    m: [f32; LANES],
}

impl<S: Simd> Registers<S> {
    /// # Safety
    /// `S`'s instructions are available and `out` may be written.
    #[inline(always)]
    unsafe fn store(self, out: *mut Unpacked) {
        // SAFETY: by the contract above.
        unsafe {
            for (quad, v) in self.quads.into_iter().enumerate() {
                S::store_b((&raw mut (*out).quads[quad]).cast(), v);
            }
            S::store((&raw mut (*out).d).cast(), self.d);
            S::store((&raw mut (*out).m).cast(), self.m);
        }
    }
}

impl Groups for Four {
    const CODE_BYTES: usize = 256;
    const SCALES: usize = 32;
    const MIN: bool = true;
    const SHIFTED: bool = false;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(codes: *const u8, scales: *const u16) -> Registers<S> {
        // SAFETY: the caller points at a whole group.
        unsafe {
            let v0 = S::load_b(codes);
            let v1 = S::load_b(codes.add(64));
            let v2 = S::load_b(codes.add(128));
            let v3 = S::load_b(codes.add(192));
            Registers {
                quads: [
                    S::low_nibbles(v0),
                    S::low_nibbles(v1),
                    S::low_nibbles(v2),
                    S::low_nibbles(v3),
                    S::high_nibbles(v0),
                    S::high_nibbles(v1),
                    S::high_nibbles(v2),
                    S::high_nibbles(v3),
                ],
                d: S::load_f16(scales),
                m: S::load_f16(scales.add(LANES)),
            }
        }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(acc: S::I, u: S::B, s: S::B) -> S::I {
        // SAFETY: codes are below 16.
        unsafe { S::dot_low(acc, u, s) }
    }
}

impl Groups for Loose {
    const CODE_BYTES: usize = size_of::<Unpacked>();
    const SCALES: usize = 0;
    const MIN: bool = true;
    const SHIFTED: bool = false;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(codes: *const u8, _: *const u16) -> Registers<S> {
        let group = codes.cast::<Unpacked>();
        // SAFETY: the caller points at a whole group.
        unsafe {
            Registers {
                quads: eight_vectors::<S>(codes),
                d: S::load((&raw const (*group).d).cast()),
                m: S::load((&raw const (*group).m).cast()),
            }
        }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(acc: S::I, u: S::B, s: S::B) -> S::I {
        // SAFETY: codes are below 16.
        unsafe { S::dot_low(acc, u, s) }
    }
}

impl Groups for Eight {
    const CODE_BYTES: usize = 512;
    const SCALES: usize = 16;
    const MIN: bool = false;
    const SHIFTED: bool = true;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(codes: *const u8, scales: *const u16) -> Registers<S> {
        // SAFETY: the caller points at a whole group.
        unsafe { Registers { quads: eight_vectors::<S>(codes), d: S::load_f16(scales), m: S::zero() } }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(acc: S::I, u: S::B, s: S::B) -> S::I {
        // SAFETY: no further requirement.
        unsafe { S::dot(acc, u, s) }
    }
}

#[inline(always)]
unsafe fn eight_vectors<S: Simd>(codes: *const u8) -> [S::B; 8] {
    // SAFETY: the caller points at 512 bytes.
    unsafe {
        [
            S::load_b(codes),
            S::load_b(codes.add(64)),
            S::load_b(codes.add(128)),
            S::load_b(codes.add(192)),
            S::load_b(codes.add(256)),
            S::load_b(codes.add(320)),
            S::load_b(codes.add(384)),
            S::load_b(codes.add(448)),
        ]
    }
}

/// Of sixteen rows.
type Sums = [i32; LANES];

/// Some consecutive groups of one tile: where they lie, and which of the row's groups they meet.
#[derive(Clone)]
struct Strip {
    codes: *const u8,
    scales: *const u16,
    /// Sums of each group's codes, where rows are shifted.
    sums: *const Sums,
    groups: Range<usize>,
    /// Packed weights to ask memory for meanwhile, group by group: codes and scales.
    next: Option<(*const u8, *const u16)>,
}

/// Adds the products of a strip and `T` rows of one block, from `row` on.
#[inline(always)]
unsafe fn products<S: Simd, G: Groups, P: Groups, const T: usize>(
    job: &Job<'_>,
    strip: &Strip,
    row: usize,
    mut acc: [S::F; T],
) -> [S::F; T] {
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    let row_groups = job.weights.cols / GROUP;
    // SAFETY: a strip's groups are inside the tile and the row; offsets stay inside both. What is fetched ahead may lie
    // beyond: nothing of it is read here.
    unsafe {
        let place = (block * row_groups + strip.groups.start) * BLOCK_ROWS + lane;
        let (q, scale) = if G::SHIFTED {
            (job.x.shifted.q.as_ptr(), job.x.shifted.scale.as_ptr())
        } else {
            (job.x.q.as_ptr(), job.x.scale.as_ptr())
        };
        let (mut q, mut scale) = (q.wrapping_add(place * GROUP).cast::<u8>(), scale.wrapping_add(place));
        let mut sum = job.x.sum.as_ptr().wrapping_add(place);
        let mut shift = job.x.shifted.shift.as_ptr().wrapping_add(place);
        let mut bias = job.x.shifted.bias.as_ptr().wrapping_add(place);
        let mut sums = strip.sums;
        let (mut codes, mut scales) = (strip.codes, strip.scales);
        let mut next = strip.next;
        for _ in strip.groups.clone() {
            let w = G::unpack::<S>(codes, scales);
            if let Some((codes, scales)) = &mut next {
                for line in 0..P::CODE_BYTES / LINE {
                    S::prefetch(codes.wrapping_add(line * LINE));
                }
                S::prefetch(scales.cast());
                *codes = codes.wrapping_add(P::CODE_BYTES);
                *scales = scales.wrapping_add(P::SCALES);
            }
            let mut dot = [S::isplat(0); T];
            if G::SHIFTED {
                let sums = S::load_i(sums.cast());
                for t in 0..T {
                    dot[t] = S::mul_add_i16(sums, S::isplat(*shift.add(t)), S::isplat(*bias.add(t)));
                }
            }
            // Neighbouring dot products are independent: none waits for the one before.
            for j in 0..8 {
                for t in 0..T {
                    dot[t] = G::dot::<S>(dot[t], w.quads[j], S::splat_b(q.add(t * GROUP + 4 * j)));
                }
            }
            for t in 0..T {
                acc[t] = S::fma(S::to_f(dot[t]), S::mul(w.d, S::splat(*scale.add(t))), acc[t]);
                if G::MIN {
                    acc[t] = S::fma(w.m, S::splat(*sum.add(t)), acc[t]);
                }
            }
            q = q.add(BLOCK_ROWS * GROUP);
            scale = scale.add(BLOCK_ROWS);
            sum = sum.wrapping_add(BLOCK_ROWS);
            shift = shift.wrapping_add(BLOCK_ROWS);
            bias = bias.wrapping_add(BLOCK_ROWS);
            sums = sums.wrapping_add(1);
            codes = codes.add(G::CODE_BYTES);
            scales = scales.add(G::SCALES);
        }
        acc
    }
}

/// Where sums of a tile that is not done wait: [row][16 outputs].
type Waiting = *mut [f32; LANES];

/// A strip times `T` rows; sums begin and end in `waiting` where the strip is not all of its tile.
#[inline(always)]
unsafe fn rows<S: Simd, G: Groups, P: Groups, const T: usize>(
    job: &Job<'_>,
    (tile, strip): (usize, &Strip),
    row: usize,
    waiting: Waiting,
) {
    // SAFETY: forwarded; `waiting` has room for `T` rows where it is used.
    unsafe {
        let mut acc = [S::zero(); T];
        if strip.groups.start > 0 {
            for t in 0..T {
                acc[t] = S::load(waiting.add(t).cast());
            }
        }
        let acc = products::<S, G, P, T>(job, strip, row, acc);
        if strip.groups.end < job.weights.cols / GROUP {
            for t in 0..T {
                S::store(waiting.add(t).cast(), acc[t]);
            }
        } else {
            put::<S, T>(job, tile, row, acc);
        }
    }
}

/// A strip times rows `range` of the job, as many at a time as registers hold.
#[inline(always)]
unsafe fn all_rows<S: Simd, G: Groups, P: Groups>(
    job: &Job<'_>,
    (tile, strip): (usize, Strip),
    range: Range<usize>,
    waiting: Waiting,
) {
    let mut row = range.start;
    while row < range.end {
        let left = (range.end - row).min(BLOCK_ROWS - row % BLOCK_ROWS);
        // The next tile is asked for once, beside the first rows. Many keep the multipliers busy for longer than memory takes
        // to bring it; for one row it doubles what a core has under way (Emerald Rapids: 36 GMAC/s become 47).
        let ahead = row == range.start;
        let strip = Strip { next: if ahead { strip.next } else { None }, ..strip.clone() };
        let waiting = waiting.wrapping_add(row - range.start);
        // SAFETY: rows `row..row + T` are inside the block and the batch.
        unsafe {
            row += if S::TILE_TOKENS >= 8 && left >= 8 {
                rows::<S, G, P, 8>(job, (tile, &strip), row, waiting);
                8
            } else if left >= 4 {
                rows::<S, G, P, 4>(job, (tile, &strip), row, waiting);
                4
            } else if left >= 2 {
                rows::<S, G, P, 2>(job, (tile, &strip), row, waiting);
                2
            } else {
                rows::<S, G, P, 1>(job, (tile, &strip), row, waiting);
                1
            }
        }
    }
}

/// The job.
#[inline(always)]
pub(super) unsafe fn quantised<S: Simd, G: Groups>(job: &Job<'_>, weights: (*const u8, *const u16)) {
    // SAFETY: forwarded.
    unsafe {
        if G::SHIFTED || job.rows.len() > S::TILE_TOKENS {
            prepared::<S, G>(job, weights);
        } else {
            direct::<S, G>(job, weights);
        }
    }
}

/// Few rows, on groups as they lie in memory.
#[inline(always)]
unsafe fn direct<S: Simd, G: Groups>(job: &Job<'_>, (codes, scales): (*const u8, *const u16)) {
    let groups = job.weights.cols / GROUP;
    let at = |tile: usize| {
        (codes.wrapping_add(tile * groups * G::CODE_BYTES), scales.wrapping_add(tile * groups * G::SCALES))
    };
    for tile in job.tiles.clone() {
        let (codes, scales) = at(tile);
        let strip = Strip { codes, scales, sums: std::ptr::null(), groups: 0..groups, next: Some(at(tile + 1)) };
        // SAFETY: the strip is the whole tile, so no sum waits.
        unsafe { all_rows::<S, G, G>(job, (tile, strip), job.rows.clone(), std::ptr::null_mut()) }
    }
}

/// Rows on groups of which something is worked out first: all of their codes in bytes, or the codes' sums.
#[inline(always)]
unsafe fn prepared<S: Simd, G: Groups>(job: &Job<'_>, (codes, scales): (*const u8, *const u16)) {
    let groups = job.weights.cols / GROUP;
    let mut loose = [const { MaybeUninit::<Unpacked>::uninit() }; UNPACKED_GROUPS];
    let mut sums = [const { MaybeUninit::<Sums>::uninit() }; UNPACKED_GROUPS];
    let mut waiting = [const { MaybeUninit::<[f32; LANES]>::uninit() }; UNPACKED_ROWS];
    let strips = (0..groups).step_by(UNPACKED_GROUPS);
    let row_chunks = job.rows.clone().step_by(UNPACKED_ROWS);
    for tile in job.tiles.clone() {
        for (chunk, first) in row_chunks.clone().flat_map(|c| strips.clone().map(move |g| (c, g))) {
            let some = first..(first + UNPACKED_GROUPS).min(groups);
            let at =
                |group: usize| (codes.wrapping_add(group * G::CODE_BYTES), scales.wrapping_add(group * G::SCALES));
            // SAFETY: the groups are inside the tile, the room holds them, and they are read after they were written.
            unsafe {
                for (i, group) in some.clone().enumerate() {
                    let (codes, scales) = at(tile * groups + group);
                    let w = G::unpack::<S>(codes, scales);
                    if G::SHIFTED {
                        let ones = S::splat_b([1; 4].as_ptr());
                        let add = |sum, quad| G::dot::<S>(sum, quad, ones);
                        S::store_i(sums[i].as_mut_ptr().cast(), w.quads.into_iter().fold(S::isplat(0), add));
                    } else {
                        w.store(loose[i].as_mut_ptr());
                    }
                }
                let next = (chunk == job.rows.start).then(|| at((tile + 1) * groups + first));
                let rows = chunk..(chunk + UNPACKED_ROWS).min(job.rows.end);
                let (waiting, sums) = (waiting.as_mut_ptr().cast(), sums.as_ptr().cast());
                if G::SHIFTED {
                    let (codes, scales) = at(tile * groups + first);
                    let strip = Strip { codes, scales, sums, groups: some, next };
                    all_rows::<S, G, G>(job, (tile, strip), rows, waiting);
                } else {
                    let strip = Strip { codes: loose.as_ptr().cast(), scales, sums, groups: some, next };
                    all_rows::<S, Loose, G>(job, (tile, strip), rows, waiting);
                }
            }
        }
    }
}
