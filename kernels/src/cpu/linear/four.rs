//! Products of 4-bit weights: pairs of groups against 8-bit rows (`paired.rs` has the layout, `rows.rs` the other side's).
//!
//! Both scales of a group are multiplied as words, to 2^-13 of the largest there may be or less, and with the group's sum added up as
//! whole numbers over a span of eight groups. So of what is not a dot product of codes there is 2.3 instructions a group and
//! vector, where scaling each group's sum in f32 takes four.
//!
//! Few rows unpack codes into registers as they go. More rows would unpack them again and again, so the first ones leave some
//! spans of a tile unpacked in the first-level cache, and all others pass over them there.

use super::super::rows::BLOCK_ROWS;
use super::super::simd::{LANES, Simd};
use super::next::{Ask, AtOnce, Evenly, Wanted};
use super::{Job, UNPACKED_ROWS, put};
use crate::packed::GROUP;
use crate::paired::{CODE_BYTES, Paired, SCALES, SPAN, UNITS};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Pairs of groups in a span.
const PAIRS: usize = SPAN / 2;
/// Spans of a tile that are unpacked together at most: with the rows they meet, and what is asked for meanwhile, they fit the
/// first-level cache.
const UNPACKED_SPANS: usize = 3;
/// Rows up to which spans are unpacked one by one: so many are through with one in the time in which memory brings the next.
const SINGLE_SPANS: usize = 32;
/// Passes of as many rows as registers hold in which each unpacks the codes for itself.
const NIBBLE_PASSES: usize = 2;
/// Tiles that meet rows together, where registers allow: a row's codes and scales are loaded once for both.
const TOGETHER: usize = 2;

/// How a pair's codes are read.
trait Codes {
    const BYTES: usize;
    /// Quad `j` of both groups: low nibbles and high ones.
    unsafe fn quads<S: Simd>(codes: *const u8, j: usize, unpacked: *mut u8) -> [S::B; 2];
}

/// As they lie in memory.
struct Nibbles;
/// The same, and kept unpacked for other rows.
struct Kept;
/// After unpacking.
struct Bytes;

/// Bytes of a pair's codes after unpacking.
const UNPACKED_BYTES: usize = 2 * CODE_BYTES;

impl Codes for Nibbles {
    const BYTES: usize = CODE_BYTES;

    #[inline(always)]
    unsafe fn quads<S: Simd>(codes: *const u8, j: usize, _: *mut u8) -> [S::B; 2] {
        // SAFETY: the caller points at a whole pair.
        unsafe {
            let both = S::load_b(codes.add(64 * j));
            [S::low_nibbles(both), S::high_nibbles(both)]
        }
    }
}

impl Codes for Kept {
    const BYTES: usize = CODE_BYTES;

    #[inline(always)]
    unsafe fn quads<S: Simd>(codes: *const u8, j: usize, unpacked: *mut u8) -> [S::B; 2] {
        // SAFETY: as above, and at room for the pair's bytes.
        unsafe {
            let [low, high] = Nibbles::quads::<S>(codes, j, unpacked);
            S::store_b(unpacked.add(128 * j), low);
            S::store_b(unpacked.add(128 * j + 64), high);
            [low, high]
        }
    }
}

impl Codes for Bytes {
    const BYTES: usize = 0;

    #[inline(always)]
    unsafe fn quads<S: Simd>(_: *const u8, j: usize, unpacked: *mut u8) -> [S::B; 2] {
        // SAFETY: the pair was kept there.
        unsafe { [S::load_b(unpacked.add(128 * j)), S::load_b(unpacked.add(128 * j + 64))] }
    }
}

/// Codes of some pairs of some tiles with a byte each.
#[repr(align(64))]
struct Unpacked([MaybeUninit<u8>; TOGETHER * UNPACKED_SPANS * PAIRS * UNPACKED_BYTES]);

/// Where sums of rows are kept between spans: [tile][UNPACKED_ROWS][16 outputs].
type Sums = *mut [f32; LANES];

/// Some consecutive spans of one tile, and the same ones of the tiles after it.
struct Strip {
    tile: usize,
    codes: *const u8,
    /// Room for codes with a byte each, and bytes from one tile's to the next's.
    unpacked: *mut u8,
    unpacked_apart: usize,
    scales: *const i16,
    units: *const f32,
    spans: Range<usize>,
}

/// Where two groups of some tiles and some rows are.
struct Pair {
    q: *const u8,
    bias: *const i32,
    words: *const u8,
    codes: *const u8,
    unpacked: *mut u8,
    unpacked_apart: usize,
    scales: *const i16,
    /// Pairs from one tile to the next.
    apart: usize,
}

impl Pair {
    /// `pairs` further on.
    #[inline(always)]
    fn after<C: Codes>(&self, pairs: usize) -> Pair {
        Pair {
            q: self.q.wrapping_add(pairs * BLOCK_ROWS * 2 * GROUP),
            bias: self.bias.wrapping_add(pairs * BLOCK_ROWS * 2),
            words: self.words.wrapping_add(pairs * BLOCK_ROWS * 8),
            codes: self.codes.wrapping_add(pairs * C::BYTES),
            unpacked: self.unpacked.wrapping_add(pairs * UNPACKED_BYTES),
            scales: self.scales.wrapping_add(pairs * SCALES),
            ..*self
        }
    }

    /// Adds sums of codes times scales to those there are.
    #[inline(always)]
    unsafe fn products<S: Simd, C: Codes, const N: usize, const T: usize>(
        &self,
        mut whole: [[S::I; T]; N],
    ) -> [[S::I; T]; N] {
        // SAFETY: `N` tiles and `T` rows are there.
        unsafe {
            let mut dots = [[S::dots(self.bias); T]; N];
            for t in 1..T {
                for n in 0..N {
                    dots[n][t] = S::dots(self.bias.add(2 * t));
                }
            }
            // Neighbouring dot products are independent: none waits for the one before. Written out, since the compiler leaves a loop
            // with assembler in it as it is.
            macro_rules! quad {
                ($($j:literal)*) => {$({
                    let mut w = [C::quads::<S>(self.codes, $j, self.unpacked); N];
                    for n in 1..N {
                        let unpacked = self.unpacked.wrapping_add(n * self.unpacked_apart);
                        w[n] = C::quads::<S>(self.codes.wrapping_add(n * self.apart * C::BYTES), $j, unpacked);
                    }
                    for t in 0..T {
                        let x = S::splat_quads(self.q.add(t * 2 * GROUP + 8 * $j));
                        for n in 0..N {
                            dots[n][t] = S::dot_codes(dots[n][t], w[n], x);
                        }
                    }
                })*};
            }
            quad!(0 1 2 3 4 5 6 7);
            let mut scale = [S::load_b(self.scales.cast()); N];
            for n in 1..N {
                scale[n] = S::load_b(self.scales.add(n * self.apart * SCALES).cast());
            }
            for t in 0..T {
                let words = S::splat_b(self.words.add(4 * t));
                for n in 0..N {
                    whole[n][t] =
                        S::dot_words(whole[n][t], S::group_words(dots[n][t]), S::mul_words(scale[n], words));
                }
            }
            whole
        }
    }

    /// Adds values of code 8 times the sums of columns to those there are.
    #[inline(always)]
    unsafe fn values<S: Simd, const N: usize, const T: usize>(&self, mut whole: [[S::I; T]; N]) -> [[S::I; T]; N] {
        // SAFETY: as above.
        unsafe {
            let mut value = [S::load_b(self.scales.add(SCALES / 2).cast()); N];
            for n in 1..N {
                value[n] = S::load_b(self.scales.add(n * self.apart * SCALES + SCALES / 2).cast());
            }
            for t in 0..T {
                let sum = S::splat_b(self.words.add((BLOCK_ROWS + t) * 4));
                for n in 0..N {
                    whole[n][t] = S::dot_words(whole[n][t], value[n], sum);
                }
            }
            whole
        }
    }
}

/// Adds the products of a strip's `N` tiles and `T` rows of one block, from `row` on, to `sums`, and writes what has become of
/// them where the strip is the tiles' last.
#[inline(always)]
unsafe fn rows<S: Simd, C: Codes, const N: usize, const T: usize>(
    job: &Job<'_>,
    strip: &Strip,
    next: &mut impl Ask<N>,
    row: usize,
    sums: Sums,
) -> usize {
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    let all = (job.weights.cols / GROUP).div_ceil(2);
    let spans = all.div_ceil(PAIRS);
    let place = block * all + strip.spans.start * PAIRS;
    let x = job.x;
    // SAFETY: a strip's pairs are inside the tiles and the row, `T` rows inside the block; `sums` has room for them.
    unsafe {
        let sum_at = |n: usize, t: usize| sums.add(n * UNPACKED_ROWS + t).cast::<f32>();
        let rows = place * BLOCK_ROWS + lane;
        let start = Pair {
            q: x.q.as_ptr().add(rows * 2 * GROUP).cast::<u8>(),
            bias: x.bias.as_ptr().add(rows * 2),
            words: x.words.as_ptr().add(place * 4 * BLOCK_ROWS + lane * 2).cast::<u8>(),
            codes: strip.codes,
            unpacked: strip.unpacked,
            unpacked_apart: strip.unpacked_apart,
            scales: strip.scales,
            apart: all,
        };
        let mut units = x.units.as_ptr().add((block * spans + strip.spans.start) * 2 * BLOCK_ROWS + lane);
        let mut first = 0;
        for span in strip.spans.clone() {
            let pairs = (all - span * PAIRS).min(PAIRS);
            let at = |p: usize| start.after::<C>(first + p);
            let mut whole = [[S::isplat(0); T]; N];
            for p in 0..pairs {
                next.step::<S>();
                whole = at(p).products::<S, C, N, T>(whole);
            }
            // The values of code 8, times the sums of columns.
            let mut values = [[S::isplat(0); T]; N];
            if pairs == PAIRS {
                // A number the compiler knows leaves no branch to be mistaken in.
                for p in 0..PAIRS {
                    values = at(p).values::<S, N, T>(values);
                }
            } else {
                for p in 0..pairs {
                    values = at(p).values::<S, N, T>(values);
                }
            }
            for n in 0..N {
                let value_unit = S::load(strip.units.add(n * UNITS + LANES));
                for t in 0..T {
                    let unit = [S::splat(*units.add(t)), S::mul(value_unit, S::splat(*units.add(BLOCK_ROWS + t)))];
                    let before = if span == 0 { S::zero() } else { S::load(sum_at(n, t)) };
                    let sum = S::fma(S::to_f(whole[n][t]), unit[0], before);
                    S::store(sum_at(n, t), S::fma(S::to_f(values[n][t]), unit[1], sum));
                }
            }
            first += PAIRS;
            units = units.add(2 * BLOCK_ROWS);
        }
        if strip.spans.end == spans {
            for n in 0..N {
                let mut acc = [S::load(strip.units.add(n * UNITS)); T];
                for t in 0..T {
                    acc[t] = S::mul(acc[t], S::load(sum_at(n, t)));
                }
                put::<S, T>(job, strip.tile + n, row, acc);
            }
        }
    }
    T
}

/// Rows that meet a pair of `N` tiles together: their sums fit the registers.
const fn tile_tokens<S: Simd, const N: usize>() -> usize {
    if N < TOGETHER { S::CODE_TOKENS } else { S::CODE_TOKENS / 2 }
}

/// A strip's `N` tiles times rows of the job from `range.start` on, as many at a time as registers hold, until `range` is done or
/// `passes` are. The first row not met. What lies at `next` is asked for meanwhile.
#[inline(always)]
unsafe fn some_rows<S: Simd, C: Codes, const N: usize>(
    job: &Job<'_>,
    strip: &Strip,
    next: &mut impl Ask<N>,
    (range, passes): (Range<usize>, usize),
    sums: Sums,
) -> usize {
    let mut row = range.start;
    for _ in 0..passes {
        if row >= range.end {
            break;
        }
        let left = (range.end - row).min(BLOCK_ROWS - row % BLOCK_ROWS);
        next.pass();
        let sums = sums.wrapping_add(row - range.start);
        // SAFETY: rows `row..row + T` are inside the block and the batch, and `sums` has room for all of `range`.
        unsafe {
            row += match left {
                8.. if tile_tokens::<S, N>() >= 8 => rows::<S, C, N, 8>(job, strip, next, row, sums),
                4.. if tile_tokens::<S, N>() >= 4 => rows::<S, C, N, 4>(job, strip, next, row, sums),
                2.. => rows::<S, C, N, 2>(job, strip, next, row, sums),
                _ => rows::<S, C, N, 1>(job, strip, next, row, sums),
            };
        }
    }
    row
}

/// The job.
#[inline(always)]
pub(super) unsafe fn four<S: Simd>(job: &Job<'_>, weights: &Paired) {
    assert_eq!(weights.piece, S::PIECE, "packed for another ISA");
    let mut tile = job.tiles.start;
    while tile < job.tiles.end {
        // Rows of one tile are as many as half of them of two, and unpack its codes once.
        let single = matches!(job.rows.len(), 0..=1 | 5..=8);
        let together = S::TILES >= TOGETHER && !single && tile + TOGETHER <= job.tiles.end;
        // SAFETY: forwarded.
        unsafe {
            tile += match together {
                true => some_tiles::<S, TOGETHER>(job, weights, tile),
                false => some_tiles::<S, 1>(job, weights, tile),
            }
        }
    }
}

/// The job's `N` tiles from `tile` on; their number.
#[inline(always)]
unsafe fn some_tiles<S: Simd, const N: usize>(job: &Job<'_>, weights: &Paired, tile: usize) -> usize {
    let all = (job.weights.cols / GROUP).div_ceil(2);
    let spans = all.div_ceil(PAIRS);
    let mut sums = [const { MaybeUninit::<[f32; LANES]>::uninit() }; TOGETHER * UNPACKED_ROWS];
    let sums: Sums = sums.as_mut_ptr().cast();
    let at = |pair: usize| {
        (
            weights.codes.as_ptr().wrapping_add(pair * CODE_BYTES),
            weights.scales.as_ptr().wrapping_add(pair * SCALES),
        )
    };
    // The same pairs of the tiles after these.
    let wanted = |start: usize, steps: usize| {
        let (codes, scales) = at((tile + N) * all + start);
        Wanted { codes, scales: scales.cast(), steps, apart: all }
    };
    let units = weights.units.as_ptr().wrapping_add(tile * UNITS);
    // What nobody reads next takes others' share of what memory brings.
    let follows = job.goes_on || tile + N < job.tiles.end;
    if job.rows.len() <= NIBBLE_PASSES * S::CODE_TOKENS / S::TILES {
        let (codes, scales) = at(tile * all);
        let (unpacked, unpacked_apart) = (std::ptr::null_mut(), 0);
        let strip = Strip { tile, codes, unpacked, unpacked_apart, scales, units, spans: 0..spans };
        // For one row asking ahead doubles what a core has under way (Emerald Rapids: 36 GMAC/s become 47).
        let next = &mut AtOnce::<CODE_BYTES, { 2 * SCALES }>::new(follows.then(|| wanted(0, all)));
        // SAFETY: forwarded; the strip is the tiles.
        unsafe { some_rows::<S, Nibbles, N>(job, &strip, next, (job.rows.clone(), usize::MAX), sums) };
        return N;
    }
    let mut unpacked = Unpacked([const { MaybeUninit::uninit() }; _]);
    // As many at a time as can be, but about as many each time.
    let most = if job.rows.len() <= SINGLE_SPANS { 1 } else { UNPACKED_SPANS };
    let step = spans.div_ceil(spans.div_ceil(most));
    let (unpacked, unpacked_apart) = (unpacked.0.as_mut_ptr().cast(), step * PAIRS * UNPACKED_BYTES);
    for chunk in job.rows.clone().step_by(UNPACKED_ROWS) {
        let rows = chunk..(chunk + UNPACKED_ROWS).min(job.rows.end);
        for first in (0..spans).step_by(step) {
            let spans = first..(first + step).min(spans);
            let (start, end) = (first * PAIRS, (spans.end * PAIRS).min(all));
            let next = (follows && chunk == job.rows.start).then(|| wanted(start, end - start));
            let passes = rows.len().div_ceil(tile_tokens::<S, N>());
            let next = &mut Evenly::<CODE_BYTES, { 2 * SCALES }>::new(next, N, passes);
            let (codes, scales) = at(tile * all + start);
            let strip = Strip { tile, codes, unpacked, unpacked_apart, scales, units, spans };
            // SAFETY: the pairs are inside the tiles, there is room for their bytes, and they are read after the first rows wrote
            // them.
            unsafe {
                let met = some_rows::<S, Kept, N>(job, &strip, next, (rows.clone(), 1), sums);
                let sums = sums.wrapping_add(met - rows.start);
                some_rows::<S, Bytes, N>(job, &strip, next, (met..rows.end, usize::MAX), sums);
            }
        }
    }
    N
}
