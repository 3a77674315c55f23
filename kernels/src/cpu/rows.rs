//! Activation rows in the form a linear layer reads them.
//!
//! The 8-bit form quantises each row in groups of 32 with its own scale (amax / 127) and lies in blocks of 16 rows,
//! so that a kernel's tile of rows is a run of constant offsets:
//!
//! ```text
//! q      [block][two groups][16 rows][64]     i8    column 4j + b of group h is byte
//!                                                   16 (j mod 4) + 8 ⌊j / 4⌋ + 4h + b; in pieces of two
//!                                                   (`Isa::piece`) 16 (j mod 4) + 8 ⌊j / 4⌋ + 4 ⌊b / 2⌋ + 2h + b mod 2
//! scale  [block][group][16 rows]              f32   x ≈ scale · q
//! sum    [block][group][16 rows]              f32   scale · Σ q, for weights with a minimum
//! bias   [block][two groups][16 rows][2]      i32   −8 · Σ q, for weight codes stored plus 8
//! ```
//!
//! Linear layers multiply scales as whole numbers, so those of [`SPAN`] groups are brought to one unit once all of them are
//! there:
//!
//! ```text
//! words  [block][two groups][2][16 rows][2]   i16   scale ≈ unit · word; and the same of sums
//! units  [block][span][2][16 rows]            f32   see `paired.rs`; those of sums are powers of two
//! ```
//!
//! The shifted form, for weights of 8 bits, spends all codes between the least and the largest value of a group: few groups
//! lie evenly about zero, those with an outlier least of all, and the error is a third. It lies the same way:
//!
//! ```text
//! q      [block][group][16 rows][32]          i8, or i16 of q + shift: `Simd::WIDE`
//! scale  [block][group][16 rows]              f32   x ≈ scale · (q + shift)
//! shift  [block][group][16 rows]              i32
//! bias   [block][group][16 rows]              i32   −128 · Σ (q + shift)
//! ```
//!
//! The bf16 form, rounded to nearest even, lies the same way; what its last group lacks in columns is zero. Where products
//! take f32, it is kept as f32 of the same values:
//!
//! ```text
//! brain  [block][group][16 rows][32]   bf16 or f32: `Simd::Rounded`
//! ```

use super::simd::{Isa, LANES, Simd, dispatch};
use crate::memory::{Buffer, Shared};
use crate::packed::GROUP;
use crate::paired::{SPAN, WORD_MAX, WORDS_MAX, order};
use crate::pool::Pool;
use half::bf16;
use std::mem::MaybeUninit;

/// Rows a block.
pub(crate) const BLOCK_ROWS: usize = 16;

/// Groups that are quantised at once, where there are as many.
pub(super) const SIXTEEN: usize = LANES;

/// Groups of smaller values are zeros: the reciprocal of their scale would not be finite.
const AMAX_MIN: f32 = 1e-30;

/// Below every scale and sum but zero, with a finite reciprocal.
const SMALLEST: f32 = 1e-33;

/// What a linear layer multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Form {
    /// 8-bit groups, for weights of 4 bits.
    pub q8: bool,
    /// 8-bit groups about a middle of their own, for weights of 8 bits.
    pub shifted: bool,
    /// f32, for f16, bf16 and f32 weights.
    pub f32: bool,
    /// bf16, for bf16 weights that are to meet rounded activations: they read it wherever it is there.
    pub bf16: bool,
}

impl Form {
    pub const Q8: Form = Form { q8: true, shifted: false, f32: false, bf16: false };
    pub const SHIFTED: Form = Form { q8: false, shifted: true, f32: false, bf16: false };
    pub const F32: Form = Form { q8: false, shifted: false, f32: true, bf16: false };
    pub const BF16: Form = Form { q8: false, shifted: false, f32: false, bf16: true };

    /// What both layers need.
    pub const fn and(self, other: Form) -> Form {
        Form {
            q8: self.q8 || other.q8,
            shifted: self.shifted || other.shifted,
            f32: self.f32 || other.f32,
            bf16: self.bf16 || other.bf16,
        }
    }

    /// Whether columns come in groups of 32.
    pub(crate) const fn grouped(self) -> bool {
        self.q8 || self.shifted
    }
}

/// Rows ready for a linear layer; memory is kept from step to step.
#[derive(Default)]
pub struct Rows {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) form: Form,
    pub(crate) q: Buffer<i8>,
    pub(crate) scale: Buffer<f32>,
    pub(crate) sum: Buffer<f32>,
    pub(crate) bias: Buffer<i32>,
    pub(crate) words: Buffer<i16>,
    pub(crate) units: Buffer<f32>,
    pub(crate) shifted: Shifted,
    pub(crate) values: Buffer<f32>,
    pub(crate) brain: Buffer<f32>,
}

/// The shifted form.
#[derive(Default)]
pub(crate) struct Shifted {
    pub(crate) q: Buffer<i8>,
    pub(crate) scale: Buffer<f32>,
    pub(crate) shift: Buffer<i32>,
    pub(crate) bias: Buffer<i32>,
}

impl Rows {
    /// Makes room for `rows` × `cols` in `form`; contents are to be written with [`RowsOut::put`].
    pub(crate) fn reset(&mut self, rows: usize, cols: usize, form: Form) -> RowsOut {
        (self.rows, self.cols, self.form) = (rows, cols, form);
        assert!(!form.grouped() || cols.is_multiple_of(GROUP));
        let block_rows = rows.next_multiple_of(BLOCK_ROWS);
        let places = block_rows * (cols / GROUP);
        if form.q8 {
            let pairs = block_rows * (cols / GROUP).div_ceil(2);
            self.q.reserve(pairs * 2 * GROUP);
            self.scale.reserve(places);
            self.sum.reserve(places);
            self.bias.reserve(pairs * 2);
            self.words.reserve(pairs * 4);
            self.units.reserve(block_rows * (cols / GROUP).div_ceil(SPAN) * 2);
        }
        if form.shifted {
            self.shifted.q.reserve(places * 2 * GROUP);
            self.shifted.scale.reserve(places);
            self.shifted.shift.reserve(places);
            self.shifted.bias.reserve(places);
        }
        if form.f32 {
            self.values.reserve(rows * cols);
        }
        if form.bf16 {
            self.brain.reserve(block_rows * cols.div_ceil(GROUP) * GROUP);
        }
        RowsOut {
            cols,
            form,
            q: Shared::new(&mut self.q),
            scale: Shared::new(&mut self.scale),
            sum: Shared::new(&mut self.sum),
            bias: Shared::new(&mut self.bias),
            shifted: ShiftedOut {
                q: Shared::new(&mut self.shifted.q),
                scale: Shared::new(&mut self.shifted.scale),
                shift: Shared::new(&mut self.shifted.shift),
                bias: Shared::new(&mut self.shifted.bias),
            },
            values: Shared::new(&mut self.values),
            brain: Shared::new(&mut self.brain),
        }
    }

    /// Brings scales and sums to their spans' units. Linear layers may read rows of 8 bits only then.
    pub(crate) fn level(&mut self, isa: Isa, pool: &mut Pool) {
        if !self.form.q8 {
            return;
        }
        let groups = self.cols / GROUP;
        let level = &Level {
            groups,
            scale: &self.scale,
            sum: &self.sum,
            words: Shared::new(&mut self.words),
            units: Shared::new(&mut self.units),
        };
        let blocks = self.rows.div_ceil(BLOCK_ROWS);
        // SAFETY: the ISA was detected, `reset` made room for all blocks, and each belongs to one chunk.
        let one = |block: usize| unsafe { dispatch!(isa, fn level_block(level: &Level<'_>, block: usize)) };
        if blocks * groups < LEVEL_APART { (0..blocks).for_each(one) } else { pool.run(blocks, &one) }
    }
}

/// Groups of blocks that one thread levels sooner than it calls others.
const LEVEL_APART: usize = 2048;

struct Level<'a> {
    groups: usize,
    scale: &'a [f32],
    sum: &'a [f32],
    words: Shared<i16>,
    units: Shared<f32>,
}

/// [`Rows::level`] for the 16 rows of a block, a lane each.
#[inline(always)]
unsafe fn level_block<S: Simd>(level: &Level<'_>, block: usize) {
    let groups = level.groups;
    // SAFETY: all groups of the block are inside the buffers, and nobody else writes them.
    unsafe {
        for span in 0..groups.div_ceil(SPAN) {
            let first = span * SPAN;
            let some = (groups - first).min(SPAN);
            // What an odd number of groups lacks is zero.
            let (mut scale, mut sum) = ([S::zero(); SPAN], [S::zero(); SPAN]);
            let (mut largest, mut total) = ([S::splat(SMALLEST); 2], [S::splat(SMALLEST); 2]);
            for g in 0..some {
                let at = (block * groups + first + g) * BLOCK_ROWS;
                scale[g] = S::load(level.scale.as_ptr().add(at));
                sum[g] = S::load(level.sum.as_ptr().add(at));
                for (i, value) in [scale[g], S::abs(sum[g])].into_iter().enumerate() {
                    largest[i] = S::max(largest[i], value);
                    total[i] = S::add(total[i], value);
                }
            }
            let (one, all) = (1.0 / WORD_MAX, 1.0 / WORDS_MAX);
            // Values end below twice their power of two; with what rounding adds to each word, all stay below their bound.
            let higher = S::mul(total[1], S::splat(1.0 + 1.0 / 4096.0));
            let units = [
                S::max(S::mul(largest[0], S::splat(one)), S::mul(total[0], S::splat(all))),
                S::max(
                    S::mul(S::power(largest[1]), S::splat(2.0 * one)),
                    S::mul(S::power(higher), S::splat(2.0 * all)),
                ),
            ];
            let mut inverse = [S::splat(1.0); 2];
            for i in 0..2 {
                inverse[i] = S::div(inverse[i], units[i]);
            }
            let at = (block * groups.div_ceil(SPAN) + span) * 2 * BLOCK_ROWS;
            S::store(level.units.at(at), units[0]);
            S::store(level.units.at(at + BLOCK_ROWS), units[1]);
            for pair in 0..some.div_ceil(2) {
                let at = (block * groups.div_ceil(2) + first / 2 + pair) * 4 * BLOCK_ROWS;
                for (i, values) in [&scale, &sum].into_iter().enumerate() {
                    let (even, odd) =
                        (S::mul(values[2 * pair], inverse[i]), S::mul(values[2 * pair + 1], inverse[i]));
                    S::store_words(level.words.at(at + i * 2 * BLOCK_ROWS), even, odd);
                }
            }
        }
    }
}

/// Thirty-two values as whole numbers from -127 to 127 and a scale.
pub(crate) struct Quantised<S: Simd> {
    pub codes: [S::F; 2],
    pub scale: f32,
}

impl<S: Simd> Quantised<S> {
    /// # Safety
    /// `S`'s instructions are available and `out` has room for 32 codes.
    #[inline(always)]
    pub(crate) unsafe fn store(&self, out: *mut i8) {
        // SAFETY: by the contract above.
        unsafe {
            S::store_i8(out, self.codes[0]);
            S::store_i8(out.add(LANES), self.codes[1]);
        }
    }
}

/// What a code stands for, and what values are multiplied with to become codes, where the largest of a group is `amax`.
#[inline(always)]
fn scale_and_inverse(amax: f32) -> (f32, f32) {
    let amax = if amax < AMAX_MIN { 0.0 } else { amax };
    (amax / 127.0, if amax == 0.0 { 0.0 } else { 127.0 / amax })
}

/// Quantises 32 values by the largest of them. A `BRAIN` scale is one that a bf16 holds, and finite whatever the values are.
///
/// # Safety
/// `S`'s instructions are available and `x` has 32 readable values.
#[inline(always)]
pub(crate) unsafe fn quantise<S: Simd, const BRAIN: bool>(x: *const f32) -> Quantised<S> {
    // SAFETY: by the contract above.
    unsafe {
        let (a, b) = (S::load(x), S::load(x.add(LANES)));
        let amax = S::reduce_max(S::max(S::abs(a), S::abs(b)));
        let (scale, inverse) = if BRAIN {
            let amax = if amax < AMAX_MIN { 0.0 } else { amax };
            let scale = bf16::from_f32(amax / 127.0);
            let scale = if scale.is_finite() { scale.to_f32() } else { bf16::MAX.to_f32() };
            (scale, if scale == 0.0 { 0.0 } else { 1.0 / scale })
        } else {
            scale_and_inverse(amax)
        };
        let inverse = S::splat(inverse);
        let mut codes = [S::round(S::mul(a, inverse)), S::round(S::mul(b, inverse))];
        if BRAIN {
            // The scale may have been rounded down.
            let (least, most) = (S::splat(-127.0), S::splat(127.0));
            codes = [S::min(S::max(codes[0], least), most), S::min(S::max(codes[1], least), most)];
        }
        Quantised { codes, scale }
    }
}

/// Thirty-two values as whole numbers from -127 to 127 plus `shift`, and a scale.
///
/// # Safety
/// As for [`quantise`].
#[inline(always)]
unsafe fn quantise_shifted<S: Simd>(x: *const f32) -> (Quantised<S>, f32) {
    // SAFETY: by the contract above.
    unsafe {
        let (a, b) = (S::load(x), S::load(x.add(LANES)));
        let most = S::reduce_max(S::max(S::zero(), S::max(a, b)));
        let least = S::reduce_max(S::max(S::zero(), S::max(S::sub(S::zero(), a), S::sub(S::zero(), b))));
        let range = most + least;
        let range = if range < AMAX_MIN { 0.0 } else { range };
        // Rounding the ends and the middle may add up to a whole code: 253 steps and not 254.
        let (scale, inverse) = (range / 253.0, if range == 0.0 { 0.0 } else { 253.0 / range });
        let shift = ((most - least) * 0.5 * inverse).round_ties_even();
        let (inverse, middle) = (S::splat(inverse), S::splat(shift));
        let codes = [S::round(S::mul(a, inverse)), S::round(S::mul(b, inverse))];
        (Quantised { codes: [S::sub(codes[0], middle), S::sub(codes[1], middle)], scale }, shift)
    }
}

/// Where the chunks of one job write rows, each its own.
#[derive(Clone, Copy)]
pub(crate) struct RowsOut {
    pub cols: usize,
    pub form: Form,
    q: Shared<i8>,
    scale: Shared<f32>,
    sum: Shared<f32>,
    bias: Shared<i32>,
    shifted: ShiftedOut,
    values: Shared<f32>,
    brain: Shared<f32>,
}

#[derive(Clone, Copy)]
struct ShiftedOut {
    q: Shared<i8>,
    scale: Shared<f32>,
    shift: Shared<i32>,
    bias: Shared<i32>,
}

/// Groups of any rows on their way to the 8-bit forms, in which sixteen are put at once.
pub(crate) struct Batch {
    values: MaybeUninit<[[f32; GROUP]; SIXTEEN]>,
    places: [Place; SIXTEEN],
    len: usize,
}

impl Batch {
    pub(crate) fn new() -> Batch {
        Batch { values: MaybeUninit::uninit(), places: [Place::default(); SIXTEEN], len: 0 }
    }

    #[inline(always)]
    fn at(&mut self, group: usize) -> *mut f32 {
        self.values.as_mut_ptr().cast::<f32>().wrapping_add(group * GROUP)
    }

    /// Takes columns `column..column + 32` of `row` from `x`; what is put there is written by the time of
    /// [`Batch::finish`].
    ///
    /// # Safety
    /// As for [`RowsOut::put`], until then.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(&mut self, out: &RowsOut, (row, column): (usize, usize), x: *const f32) {
        // SAFETY: by the contract above; there is room for a group after those there are.
        unsafe {
            let to = self.at(self.len);
            S::store(to, S::load(x));
            S::store(to.add(LANES), S::load(x.add(LANES)));
            self.places[self.len] = out.place(row, column / GROUP);
            self.len += 1;
            if self.len == SIXTEEN {
                out.put_sixteen::<S>(self.at(0), &self.places);
                self.len = 0;
            }
        }
    }

    /// Writes what is left.
    ///
    /// # Safety
    /// As for [`Batch::put`].
    #[inline(always)]
    pub(crate) unsafe fn finish<S: Simd>(&mut self, out: &RowsOut) {
        for group in 0..std::mem::take(&mut self.len) {
            // SAFETY: the group was put there; the rest by the contract above.
            unsafe { out.put_group::<S>(self.at(group), self.places[group]) }
        }
    }
}

/// Where a group of a row lies.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Among all groups.
    group: usize,
    /// Among all that lie two by two: even ones are the first of two.
    half: usize,
}

impl Place {
    /// Where group `group` of the row lies whose first one is here.
    #[inline(always)]
    fn after(self, group: usize) -> Place {
        let half = self.half + group / 2 * 2 * BLOCK_ROWS + group % 2;
        Place { group: self.group + group * BLOCK_ROWS, half }
    }

    #[inline(always)]
    fn codes(self) -> usize {
        self.half / 2 * 2 * GROUP
    }
}

/// Where a group's codes are: which half of which two groups'.
#[derive(Clone, Copy)]
pub(crate) struct Codes {
    pair: *const i8,
    half: usize,
}

impl RowsOut {
    #[inline(always)]
    fn place(&self, row: usize, group: usize) -> Place {
        let (block, lane, groups) = (row / BLOCK_ROWS, row % BLOCK_ROWS, self.cols / GROUP);
        let pairs = block * groups.div_ceil(2) * BLOCK_ROWS + lane;
        Place { group: block * groups * BLOCK_ROWS + lane, half: 2 * pairs }.after(group)
    }

    /// Scale and sum of codes of a group that was put, and where [`RowsOut::quad`] finds its codes.
    ///
    /// # Safety
    /// The group was written, and nobody writes it.
    #[inline(always)]
    pub(crate) unsafe fn group(&self, row: usize, group: usize) -> (Codes, f32, i32) {
        let place = self.place(row, group);
        // SAFETY: by the contract above.
        unsafe {
            let codes = Codes { pair: self.q.at(place.codes()), half: place.half % 2 };
            (codes, *self.scale.at(place.group), *self.bias.at(place.half) / -8)
        }
    }

    /// Codes `4 * quad..` of a group, in every lane.
    ///
    /// # Safety
    /// The group was put with the same `S`, and nobody writes it.
    #[inline(always)]
    pub(crate) unsafe fn quad<S: Simd>(codes: Codes, quad: usize) -> S::B {
        // SAFETY: two groups' quads are 8 bytes each.
        unsafe { S::splat_quad(codes.pair.add(8 * order(quad)).cast(), codes.half) }
    }

    /// Writes columns `first..first + len` of `row` from `x`; with an 8-bit form both are multiples of 32.
    ///
    /// # Safety
    /// `S`'s instructions are available, `x` has `len` readable values, the place is inside what `reset` made room
    /// for, and no other thread writes the same columns of the row.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(&self, row: usize, first: usize, x: *const f32, len: usize) {
        // SAFETY: by the contract above, every place written is ours and inside the buffers.
        unsafe {
            self.put_floats::<S>(row, first, x, len);
            if !self.form.grouped() {
                return;
            }
            let (mut g, all) = (0, len / GROUP);
            let row = self.place(row, 0);
            let at = |g: usize| row.after(first / GROUP + g);
            while g + SIXTEEN <= all {
                self.put_sixteen::<S>(x.add(g * GROUP), &std::array::from_fn(|i| at(g + i)));
                g += SIXTEEN;
            }
            for g in g..all {
                self.put_group::<S>(x.add(g * GROUP), at(g));
            }
        }
    }

    /// The 8-bit forms of one group.
    ///
    /// # Safety
    /// As for [`RowsOut::put`].
    #[inline(always)]
    unsafe fn put_group<S: Simd>(&self, x: *const f32, place: Place) {
        // SAFETY: by the contract above, every place written is ours and inside the buffers.
        unsafe {
            if self.form.shifted {
                self.put_shifted::<S>(place.group, x);
            }
            if !self.form.q8 {
                return;
            }
            let group: Quantised<S> = quantise::<S, false>(x);
            S::store_half(self.q.at(place.codes()), group.codes, place.half % 2);
            // Whole numbers below 2^12: the sum is exact in any order.
            let sum = S::reduce_add(S::add(group.codes[0], group.codes[1]));
            self.put_scale(place, group.scale, sum);
        }
    }

    /// The f32 and bf16 forms of [`RowsOut::put`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn put_floats<S: Simd>(&self, row: usize, first: usize, x: *const f32, len: usize) {
        // SAFETY: by the contract of `put`.
        unsafe {
            if self.form.f32 {
                std::ptr::copy_nonoverlapping(x, self.values.at(row * self.cols + first), len);
            }
            if self.form.bf16 {
                self.put_brain::<S>(row, first, std::slice::from_raw_parts(x, len));
            }
        }
    }

    /// Writes columns `first..first + 32` of a block of rows from `row` on, from `x`: 32 values of each.
    ///
    /// # Safety
    /// As for [`RowsOut::put`].
    #[inline(always)]
    pub(crate) unsafe fn put_column<S: Simd>(&self, row: usize, first: usize, x: *const f32) {
        assert!(row.is_multiple_of(BLOCK_ROWS) && first.is_multiple_of(GROUP));
        // SAFETY: by the contract above, every place written is ours and inside the buffers.
        unsafe {
            for i in 0..BLOCK_ROWS {
                self.put_floats::<S>(row + i, first, x.add(i * GROUP), GROUP);
            }
            let place = self.place(row, first / GROUP);
            let at = |i: usize| Place { group: place.group + i, half: place.half + 2 * i };
            self.put_sixteen::<S>(x, &std::array::from_fn(at));
        }
    }

    /// The 8-bit forms of 16 groups: as those of one, with fewer instructions, since what concerns a whole group is worked
    /// out for all of them at once.
    ///
    /// # Safety
    /// As for [`RowsOut::put`].
    #[inline(always)]
    unsafe fn put_sixteen<S: Simd>(&self, x: *const f32, places: &[Place; SIXTEEN]) {
        // SAFETY: by the contract above, every place written is ours and inside the buffers.
        unsafe {
            if self.form.shifted {
                for (g, &place) in places.iter().enumerate() {
                    self.put_shifted::<S>(place.group, x.add(g * GROUP));
                }
            }
            if !self.form.q8 {
                return;
            }
            let mut largest = [S::zero(); SIXTEEN];
            for (g, largest) in largest.iter_mut().enumerate() {
                let x = x.add(g * GROUP);
                *largest = S::max(S::abs(S::load(x)), S::abs(S::load(x.add(LANES))));
            }
            let (mut scales, mut inverses) = ([0.0_f32; SIXTEEN], [0.0_f32; SIXTEEN]);
            S::store(scales.as_mut_ptr(), S::maxima(largest));
            for (scale, inverse) in scales.iter_mut().zip(&mut inverses) {
                (*scale, *inverse) = scale_and_inverse(*scale);
            }
            let mut sums = [S::zero(); SIXTEEN];
            for g in (0..SIXTEEN).step_by(2) {
                let mut codes = [[S::zero(); 2]; 2];
                for (half, codes) in codes.iter_mut().enumerate() {
                    let (x, inverse) = (x.add((g + half) * GROUP), S::splat(inverses[g + half]));
                    let code = [S::mul(S::load(x), inverse), S::mul(S::load(x.add(LANES)), inverse)];
                    *codes = [S::round(code[0]), S::round(code[1])];
                    sums[g + half] = S::add(codes[0], codes[1]);
                }
                let (first, second) = (places[g], places[g + 1]);
                if first.half.is_multiple_of(2) && second.half == first.half + 1 {
                    S::store_pair(self.q.at(first.codes()), codes[0], codes[1]);
                } else {
                    S::store_half(self.q.at(first.codes()), codes[0], first.half % 2);
                    S::store_half(self.q.at(second.codes()), codes[1], second.half % 2);
                }
            }
            // Whole numbers below 2^12: the sums are exact in any order.
            let mut totals = [0.0_f32; SIXTEEN];
            S::store(totals.as_mut_ptr(), S::totals(sums));
            for g in 0..SIXTEEN {
                self.put_scale(places[g], scales[g], totals[g]);
            }
        }
    }

    /// What goes with a group's codes, whose sum is `sum`.
    ///
    /// # Safety
    /// The place is inside what `reset` made room for, and no other thread writes it.
    #[inline(always)]
    unsafe fn put_scale(&self, place: Place, scale: f32, sum: f32) {
        // SAFETY: by the contract above.
        unsafe {
            *self.scale.at(place.group) = scale;
            *self.sum.at(place.group) = scale * sum;
            *self.bias.at(place.half) = -8 * sum as i32;
        }
    }

    /// The shifted form of one group.
    ///
    /// # Safety
    /// As for [`RowsOut::put`].
    #[inline(always)]
    unsafe fn put_shifted<S: Simd>(&self, place: usize, x: *const f32) {
        let out = &self.shifted;
        // SAFETY: by the contract above.
        unsafe {
            let (group, shift) = quantise_shifted::<S>(x);
            S::store_shifted(out.q.at(place * S::SHIFTED_BYTES), group.codes, S::splat(shift));
            *out.scale.at(place) = group.scale;
            *out.shift.at(place) = shift as i32;
            // Whole numbers below 2^14: the sum is exact in any order.
            let sum = S::reduce_add(S::add(group.codes[0], group.codes[1])) + GROUP as f32 * shift;
            *out.bias.at(place) = -128 * sum as i32;
        }
    }

    /// The bf16 form of [`RowsOut::put`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn put_brain<S: Simd>(&self, row: usize, first: usize, x: &[f32]) {
        let groups = self.cols.div_ceil(GROUP);
        let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
        // Where a column is, in values.
        let at = |col: usize| ((block * groups + col / GROUP) * BLOCK_ROWS + lane) * GROUP + col % GROUP;
        let whole = if first.is_multiple_of(LANES) { x.len() / LANES } else { 0 };
        let out: *mut S::Rounded = self.brain.at(0).cast();
        // SAFETY: by the contract of `put`, every place written is ours and inside the buffer, which has room for f32.
        unsafe {
            for i in 0..whole {
                S::store_rounded(out.add(at(first + i * LANES)), S::load(x.as_ptr().add(i * LANES)));
            }
            for (i, &x) in x.iter().enumerate().skip(whole * LANES) {
                *out.add(at(first + i)) = S::rounded(bf16::from_f32(x).to_bits());
            }
            if first + x.len() == self.cols {
                for col in self.cols..groups * GROUP {
                    *out.add(at(col)) = S::Rounded::default();
                }
            }
        }
    }
}
