//! Products of quantised weights: groups of 32 columns against 8-bit rows.
//!
//! A few rows unpack a group's 4-bit codes into registers as they go. More rows than fit the registers would unpack them
//! again and again, so a tile's groups are unpacked once into the first-level cache and all rows pass over them there.
//! 8-bit codes stay where they are; rows that meet them are shifted, and a shift is multiplied with the sum of a group's codes.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::rows::BLOCK_ROWS;
use super::super::simd::{LANES, Simd};
use super::{Job, put};
use crate::memory::LINE;
use crate::packed::GROUP;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups of a tile that are unpacked together: with the rows they meet, and what is asked for meanwhile, they fit the first-level
/// cache.
const UNPACKED_GROUPS: usize = 12;
/// Rows that pass over them before others do.
pub(super) const UNPACKED_ROWS: usize = 8 * BLOCK_ROWS;
/// Tiles that meet rows together, where registers allow.
const PAIR: usize = 2;

/// How groups of a layout are read: eight quads, each a vector of four columns, then scale and minimum.
pub(super) trait Groups {
    const CODE_BYTES: usize;
    const SCALES: usize;
    /// Has a minimum term.
    const MIN: bool;
    /// Meets shifted rows.
    const SHIFTED: bool;
    /// Rows from which two tiles at a time are faster than one (Emerald Rapids).
    const PAIR_ROWS: usize = if Self::SHIFTED { 64 } else { 2 };
    /// Quads `j` and `j + 4`.
    unsafe fn quads<S: Simd>(codes: *const u8, j: usize) -> [S::B; 2];
    /// Scale and minimum.
    unsafe fn scales<S: Simd>(codes: *const u8, scales: *const u16) -> [S::F; 2];
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

impl Unpacked {
    /// # Safety
    /// `S`'s instructions are available, a whole group lies at `codes` and `scales`, and `out` may be written.
    #[inline(always)]
    unsafe fn store<S: Simd, G: Groups>(codes: *const u8, scales: *const u16, out: *mut Unpacked) {
        // SAFETY: by the contract above.
        unsafe {
            for j in 0..4 {
                let [low, high] = G::quads::<S>(codes, j);
                S::store_b((&raw mut (*out).quads[j]).cast(), low);
                S::store_b((&raw mut (*out).quads[j + 4]).cast(), high);
            }
            let [d, m] = G::scales::<S>(codes, scales);
            S::store((&raw mut (*out).d).cast(), d);
            S::store((&raw mut (*out).m).cast(), m);
        }
    }
}

impl Groups for Four {
    const CODE_BYTES: usize = 256;
    const SCALES: usize = 32;
    const MIN: bool = true;
    const SHIFTED: bool = false;

    #[inline(always)]
    unsafe fn quads<S: Simd>(codes: *const u8, j: usize) -> [S::B; 2] {
        // SAFETY: the caller points at a whole group.
        unsafe {
            let both = S::load_b(codes.add(64 * j));
            [S::low_nibbles(both), S::high_nibbles(both)]
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(_: *const u8, scales: *const u16) -> [S::F; 2] {
        // SAFETY: as above.
        unsafe { [S::load_f16(scales), S::load_f16(scales.add(LANES))] }
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
    unsafe fn quads<S: Simd>(codes: *const u8, j: usize) -> [S::B; 2] {
        // SAFETY: forwarded.
        unsafe { bytes::<S>(codes, j) }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(codes: *const u8, _: *const u16) -> [S::F; 2] {
        let group = codes.cast::<Unpacked>();
        // SAFETY: as above.
        unsafe { [S::load((&raw const (*group).d).cast()), S::load((&raw const (*group).m).cast())] }
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
    unsafe fn quads<S: Simd>(codes: *const u8, j: usize) -> [S::B; 2] {
        // SAFETY: forwarded.
        unsafe { bytes::<S>(codes, j) }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(_: *const u8, scales: *const u16) -> [S::F; 2] {
        // SAFETY: as above.
        unsafe { [S::load_f16(scales), S::zero()] }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(acc: S::I, u: S::B, s: S::B) -> S::I {
        // SAFETY: no further requirement.
        unsafe { S::dot(acc, u, s) }
    }
}

/// Quads `j` and `j + 4` of codes that have a byte each.
#[inline(always)]
unsafe fn bytes<S: Simd>(codes: *const u8, j: usize) -> [S::B; 2] {
    // SAFETY: the caller points at a whole group.
    unsafe { [S::load_b(codes.add(64 * j)), S::load_b(codes.add(64 * (j + 4)))] }
}

/// Of sixteen rows.
type Sums = [i32; LANES];

/// Some consecutive groups of one tile, and the same ones of the tiles after it: where they lie, and which of the row's groups
/// they meet.
struct Strip {
    codes: *const u8,
    scales: *const u16,
    /// Sums of each group's codes, where rows are shifted: [tile][UNPACKED_GROUPS].
    sums: *const Sums,
    groups: Range<usize>,
    /// Groups from one tile to the next.
    apart: usize,
    /// Packed weights to ask memory for meanwhile.
    next: Option<Next>,
}

/// Packed weights that are asked for a group at a time, evenly over all passes of rows: memory brings them no faster than it
/// can, and who asks for more at once waits.
#[derive(Clone, Copy)]
struct Next {
    codes: *const u8,
    scales: *const u16,
    /// Groups that rows pass over from one request to the next, and up to it.
    every: usize,
    left: usize,
    /// Groups to ask for.
    groups: usize,
}

impl Next {
    fn at((codes, scales): (*const u8, *const u16)) -> Next {
        Next { codes, scales, every: 1, left: 1, groups: 1 }
    }

    /// A pass has come to its next group: `N` tiles' `apart` from each other are asked for if it is time.
    #[inline(always)]
    unsafe fn step<S: Simd, P: Groups, const N: usize>(&mut self, apart: usize) {
        self.left -= 1;
        if self.left > 0 {
            return;
        }
        self.groups -= 1;
        self.left = if self.groups > 0 { self.every } else { usize::MAX };
        for n in 0..N {
            // SAFETY: what is asked for may be at any address.
            unsafe {
                for line in 0..P::CODE_BYTES / LINE {
                    S::prefetch(self.codes.wrapping_add(n * apart * P::CODE_BYTES + line * LINE));
                }
                S::prefetch(self.scales.wrapping_add(n * apart * P::SCALES).cast());
            }
        }
        self.codes = self.codes.wrapping_add(P::CODE_BYTES);
        self.scales = self.scales.wrapping_add(P::SCALES);
    }
}

/// Adds the products of a strip's `N` tiles and `T` rows of one block, from `row` on. A row's codes are loaded once for all
/// tiles: with one tile, loading would take as long as multiplying.
#[inline(always)]
unsafe fn products<S: Simd, G: Groups, P: Groups, const N: usize, const T: usize>(
    job: &Job<'_>,
    strip: &mut Strip,
    row: usize,
    mut acc: [[S::F; T]; N],
) -> [[S::F; T]; N] {
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    let row_groups = job.weights.cols / GROUP;
    // SAFETY: a strip's groups are inside the tiles and the row; offsets stay inside both. What is fetched ahead may lie
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
        let (code_step, scale_step) = (strip.apart * G::CODE_BYTES, strip.apart * G::SCALES);
        for _ in strip.groups.clone() {
            if let Some(next) = &mut next {
                next.step::<S, P, N>(row_groups);
            }
            let mut dot = [[S::isplat(0); T]; N];
            if G::SHIFTED {
                for n in 0..N {
                    let sums = S::load_i(sums.wrapping_add(n * UNPACKED_GROUPS).cast());
                    for t in 0..T {
                        dot[n][t] = S::mul_add_i16(sums, S::isplat(*shift.add(t)), S::isplat(*bias.add(t)));
                    }
                }
            }
            // Neighbouring dot products are independent: none waits for the one before.
            for j in 0..4 {
                let mut w = [G::quads::<S>(codes, j); N];
                for n in 1..N {
                    w[n] = G::quads::<S>(codes.add(n * code_step), j);
                }
                for half in 0..2 {
                    for t in 0..T {
                        let x = S::splat_b(q.add(t * GROUP + half * GROUP / 2 + 4 * j));
                        for n in 0..N {
                            dot[n][t] = G::dot::<S>(dot[n][t], w[n][half], x);
                        }
                    }
                }
            }
            let mut w = [G::scales::<S>(codes, scales); N];
            for n in 1..N {
                w[n] = G::scales::<S>(codes.add(n * code_step), scales.add(n * scale_step));
            }
            for t in 0..T {
                let scale = S::splat(*scale.add(t));
                for n in 0..N {
                    acc[n][t] = S::fma(S::to_f(dot[n][t]), S::mul(w[n][0], scale), acc[n][t]);
                    if G::MIN {
                        acc[n][t] = S::fma(w[n][1], S::splat(*sum.add(t)), acc[n][t]);
                    }
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
        strip.next = next;
        acc
    }
}

/// Where sums of tiles that are not done wait: [tile][UNPACKED_ROWS][16 outputs].
type Waiting = *mut [f32; LANES];

/// A strip's `N` tiles, the first of them `tile`, times `T` rows; sums begin and end in `waiting` where the strip is not all of
/// its tiles.
#[inline(always)]
unsafe fn rows<S: Simd, G: Groups, P: Groups, const N: usize, const T: usize>(
    job: &Job<'_>,
    (tile, strip): (usize, &mut Strip),
    row: usize,
    waiting: Waiting,
) -> usize {
    // SAFETY: forwarded; `waiting` has room for `T` rows where it is used.
    unsafe {
        let mut acc = [[S::zero(); T]; N];
        if strip.groups.start > 0 {
            for n in 0..N {
                for t in 0..T {
                    acc[n][t] = S::load(waiting.add(n * UNPACKED_ROWS + t).cast());
                }
            }
        }
        let acc = products::<S, G, P, N, T>(job, strip, row, acc);
        for n in 0..N {
            if strip.groups.end < job.weights.cols / GROUP {
                for t in 0..T {
                    S::store(waiting.add(n * UNPACKED_ROWS + t).cast(), acc[n][t]);
                }
            } else {
                put::<S, T>(job, tile + n, row, acc[n]);
            }
        }
    }
    T
}

/// A strip's `N` tiles times rows `range` of the job, as many at a time as registers hold.
#[inline(always)]
unsafe fn all_rows<S: Simd, G: Groups, P: Groups, const N: usize>(
    job: &Job<'_>,
    (tile, mut strip): (usize, Strip),
    range: Range<usize>,
    waiting: Waiting,
) {
    let mut row = range.start;
    // For one row asking ahead doubles what a core has under way (Emerald Rapids: 36 GMAC/s become 47).
    let passes = range.len().div_ceil(S::TILE_TOKENS);
    let groups = strip.groups.len();
    strip.next = strip.next.map(|next| Next { every: passes, left: passes, groups, ..next });
    while row < range.end {
        let left = (range.end - row).min(BLOCK_ROWS - row % BLOCK_ROWS);
        let strip = &mut strip;
        let waiting = waiting.wrapping_add(row - range.start);
        // SAFETY: rows `row..row + T` are inside the block and the batch.
        unsafe {
            row += match left {
                8.. if S::TILE_TOKENS >= 8 => rows::<S, G, P, N, 8>(job, (tile, strip), row, waiting),
                4.. => rows::<S, G, P, N, 4>(job, (tile, strip), row, waiting),
                2.. => rows::<S, G, P, N, 2>(job, (tile, strip), row, waiting),
                _ => rows::<S, G, P, N, 1>(job, (tile, strip), row, waiting),
            };
        }
    }
}

/// The job.
#[inline(always)]
pub(super) unsafe fn quantised<S: Simd, G: Groups>(job: &Job<'_>, weights: (*const u8, *const u16)) {
    let mut tile = job.tiles.start;
    while tile < job.tiles.end {
        let together = S::TILES >= PAIR && job.rows.len() >= G::PAIR_ROWS && tile + PAIR <= job.tiles.end;
        // SAFETY: forwarded.
        unsafe {
            tile += match together {
                true => some_tiles::<S, G, PAIR>(job, weights, tile),
                false => some_tiles::<S, G, 1>(job, weights, tile),
            }
        }
    }
}

/// The job's `N` tiles from `tile` on; their number.
#[inline(always)]
unsafe fn some_tiles<S: Simd, G: Groups, const N: usize>(
    job: &Job<'_>,
    weights: (*const u8, *const u16),
    tile: usize,
) -> usize {
    // SAFETY: forwarded.
    unsafe {
        if G::SHIFTED || job.rows.len() > S::TILES * S::TILE_TOKENS {
            prepared::<S, G, N>(job, weights, tile);
        } else {
            direct::<S, G, N>(job, weights, tile);
        }
    }
    N
}

/// Few rows, on groups as they lie in memory.
#[inline(always)]
unsafe fn direct<S: Simd, G: Groups, const N: usize>(
    job: &Job<'_>,
    (codes, scales): (*const u8, *const u16),
    tile: usize,
) {
    let groups = job.weights.cols / GROUP;
    let at = |tile: usize| {
        (codes.wrapping_add(tile * groups * G::CODE_BYTES), scales.wrapping_add(tile * groups * G::SCALES))
    };
    let ((codes, scales), next) = (at(tile), Some(Next::at(at(tile + N))));
    let strip = Strip { codes, scales, sums: std::ptr::null(), groups: 0..groups, apart: groups, next };
    // SAFETY: the strip is whole tiles, so no sum waits.
    unsafe { all_rows::<S, G, G, N>(job, (tile, strip), job.rows.clone(), std::ptr::null_mut()) }
}

/// Rows on groups of which something is worked out first: all of their codes in bytes, or the codes' sums.
#[inline(always)]
unsafe fn prepared<S: Simd, G: Groups, const N: usize>(
    job: &Job<'_>,
    (codes, scales): (*const u8, *const u16),
    tile: usize,
) {
    let groups = job.weights.cols / GROUP;
    let mut loose = [const { MaybeUninit::<Unpacked>::uninit() }; PAIR * UNPACKED_GROUPS];
    let mut sums = [const { MaybeUninit::<Sums>::uninit() }; PAIR * UNPACKED_GROUPS];
    let mut waiting = [const { MaybeUninit::<[f32; LANES]>::uninit() }; PAIR * UNPACKED_ROWS];
    let at = |group: usize| (codes.wrapping_add(group * G::CODE_BYTES), scales.wrapping_add(group * G::SCALES));
    // As many at a time as can be, but about as many each time.
    let strip = groups.div_ceil(groups.div_ceil(UNPACKED_GROUPS));
    for chunk in job.rows.clone().step_by(UNPACKED_ROWS) {
        for first in (0..groups).step_by(strip) {
            let some = first..(first + strip).min(groups);
            // SAFETY: the groups are inside the tiles, the room holds them, and they are read after they were written.
            unsafe {
                for n in 0..N {
                    for (i, group) in some.clone().enumerate() {
                        let ((codes, scales), i) = (at((tile + n) * groups + group), n * UNPACKED_GROUPS + i);
                        if G::SHIFTED {
                            let ones = S::splat_b([1; 4].as_ptr());
                            let mut sum = S::isplat(0);
                            for j in 0..4 {
                                let [low, high] = G::quads::<S>(codes, j);
                                sum = G::dot::<S>(G::dot::<S>(sum, low, ones), high, ones);
                            }
                            S::store_i(sums[i].as_mut_ptr().cast(), sum);
                        } else {
                            Unpacked::store::<S, G>(codes, scales, loose[i].as_mut_ptr());
                        }
                    }
                }
                let next = (chunk == job.rows.start).then(|| Next::at(at((tile + N) * groups + first)));
                let rows = chunk..(chunk + UNPACKED_ROWS).min(job.rows.end);
                let (waiting, sums) = (waiting.as_mut_ptr().cast(), sums.as_ptr().cast());
                if G::SHIFTED {
                    let (codes, scales) = at(tile * groups + first);
                    let strip = Strip { codes, scales, sums, groups: some, apart: groups, next };
                    all_rows::<S, G, G, N>(job, (tile, strip), rows, waiting);
                } else {
                    let (codes, apart) = (loose.as_ptr().cast(), UNPACKED_GROUPS);
                    let strip = Strip { codes, scales, sums, groups: some, apart, next };
                    all_rows::<S, Loose, G, N>(job, (tile, strip), rows, waiting);
                }
            }
        }
    }
}
