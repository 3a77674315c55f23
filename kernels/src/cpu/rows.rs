//! Activation rows in the form a linear layer reads them.
//!
//! The 8-bit form quantises each row in groups of 32 with its own scale (amax / 127) and lies in blocks of 16 rows,
//! so that a kernel's tile of rows is a run of constant offsets:
//!
//! ```text
//! q      [block][group][16 rows][32]   i8
//! scale  [block][group][16 rows]       f32   x ≈ scale · q
//! sum    [block][group][16 rows]       f32   scale · Σ q, for weights with a minimum
//! bias   [block][group][16 rows]       i32   −128 · Σ q, for weight codes stored plus 128
//! ```
//!
//! The shifted form, for weights of 8 bits, spends all codes between the least and the largest value of a group: few groups
//! lie evenly about zero, those with an outlier least of all, and the error is a third. It lies the same way:
//!
//! ```text
//! q      [block][group][16 rows][32]   i8
//! scale  [block][group][16 rows]       f32   x ≈ scale · (q + shift)
//! shift  [block][group][16 rows]       i32
//! bias   [block][group][16 rows]       i32   −128 · Σ (q + shift)
//! ```
//!
//! The bf16 form, rounded to nearest even, lies the same way; what its last group lacks in columns is zero. Where products
//! take f32, it is kept as f32 of the same values:
//!
//! ```text
//! brain  [block][group][16 rows][32]   bf16 or f32: `Simd::Rounded`
//! ```

use super::simd::{LANES, Simd};
use crate::memory::{Buffer, Shared};
use crate::packed::GROUP;
use half::bf16;
use std::mem::MaybeUninit;

/// Rows a block.
pub(crate) const BLOCK_ROWS: usize = 16;

/// Groups that are quantised at once, where there are as many.
pub(super) const SIXTEEN: usize = LANES;

/// Groups of smaller values are zeros: the reciprocal of their scale would not be finite.
const AMAX_MIN: f32 = 1e-30;

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
        debug_assert!(!form.grouped() || cols.is_multiple_of(GROUP));
        let places = rows.div_ceil(BLOCK_ROWS) * BLOCK_ROWS * (cols / GROUP);
        if form.q8 {
            self.q.reserve(places * GROUP);
            self.scale.reserve(places);
            self.sum.reserve(places);
            self.bias.reserve(places);
        }
        if form.shifted {
            self.shifted.q.reserve(places * GROUP);
            self.shifted.scale.reserve(places);
            self.shifted.shift.reserve(places);
            self.shifted.bias.reserve(places);
        }
        if form.f32 {
            self.values.reserve(rows * cols);
        }
        if form.bf16 {
            self.brain.reserve(rows.div_ceil(BLOCK_ROWS) * BLOCK_ROWS * cols.div_ceil(GROUP) * GROUP);
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
        let code = |v| S::sub(S::round(S::mul(v, inverse)), middle);
        (Quantised { codes: [code(a), code(b)], scale }, shift)
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
    places: [usize; SIXTEEN],
    len: usize,
}

impl Batch {
    pub(crate) fn new() -> Batch {
        Batch { values: MaybeUninit::uninit(), places: [0; SIXTEEN], len: 0 }
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

impl RowsOut {
    /// Where a group of a row lies among all groups; the next one of the row is [`BLOCK_ROWS`] further on.
    #[inline(always)]
    fn place(&self, row: usize, group: usize) -> usize {
        (row / BLOCK_ROWS * (self.cols / GROUP) + group) * BLOCK_ROWS + row % BLOCK_ROWS
    }

    /// Codes, scale and bias of a group that was put.
    ///
    /// # Safety
    /// The group was written, and nobody writes it.
    #[inline(always)]
    pub(crate) unsafe fn group(&self, row: usize, group: usize) -> (*const i8, f32, i32) {
        let place = self.place(row, group);
        // SAFETY: by the contract above.
        unsafe { (self.q.at(place * GROUP), *self.scale.at(place), *self.bias.at(place)) }
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
            let (mut g, all, place) = (0, len / GROUP, self.place(row, first / GROUP));
            let at = |g: usize| place + g * BLOCK_ROWS;
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
    unsafe fn put_group<S: Simd>(&self, x: *const f32, place: usize) {
        // SAFETY: by the contract above, every place written is ours and inside the buffers.
        unsafe {
            if self.form.shifted {
                self.put_shifted::<S>(place, x);
            }
            if !self.form.q8 {
                return;
            }
            let group: Quantised<S> = quantise::<S, false>(x);
            group.store(self.q.at(place * GROUP));
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
        debug_assert!(row.is_multiple_of(BLOCK_ROWS) && first.is_multiple_of(GROUP));
        // SAFETY: by the contract above, every place written is ours and inside the buffers.
        unsafe {
            for i in 0..BLOCK_ROWS {
                self.put_floats::<S>(row + i, first, x.add(i * GROUP), GROUP);
            }
            let place = self.place(row, first / GROUP);
            self.put_sixteen::<S>(x, &std::array::from_fn(|i| place + i));
        }
    }

    /// The 8-bit forms of 16 groups: as those of one, with fewer instructions, since what concerns a whole group is worked
    /// out for all of them at once.
    ///
    /// # Safety
    /// As for [`RowsOut::put`].
    #[inline(always)]
    unsafe fn put_sixteen<S: Simd>(&self, x: *const f32, places: &[usize; SIXTEEN]) {
        // SAFETY: by the contract above, every place written is ours and inside the buffers.
        unsafe {
            if self.form.shifted {
                for (g, &place) in places.iter().enumerate() {
                    self.put_shifted::<S>(place, x.add(g * GROUP));
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
            for g in 0..SIXTEEN {
                let (x, inverse) = (x.add(g * GROUP), S::splat(inverses[g]));
                let code = [S::mul(S::load(x), inverse), S::mul(S::load(x.add(LANES)), inverse)];
                let codes = [S::round(code[0]), S::round(code[1])];
                Quantised::<S> { codes, scale: scales[g] }.store(self.q.at(places[g] * GROUP));
                sums[g] = S::add(codes[0], codes[1]);
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
    unsafe fn put_scale(&self, place: usize, scale: f32, sum: f32) {
        // SAFETY: by the contract above.
        unsafe {
            *self.scale.at(place) = scale;
            *self.sum.at(place) = scale * sum;
            *self.bias.at(place) = -128 * sum as i32;
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
            group.store(out.q.at(place * GROUP));
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
