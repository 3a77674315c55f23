//! Row-wise norms: into rows for a linear layer, fused with quantising, or in place.

use super::rows::{RowsOut, SIXTEEN};
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::packed::GROUP;
use std::mem::MaybeUninit;

/// A row of results, sixteen at a time. A trait and not a closure: closures are compiled without the ISA's features.
pub(super) trait Lanes<S: Simd> {
    /// Results `at..at + 16`; those beyond the row's end may be anything.
    unsafe fn lanes(&self, at: usize) -> S::F;
}

/// Values `at..at + 16` of `x`, which holds `len`; `fill` beyond its end.
#[inline(always)]
pub(super) unsafe fn load_part<S: Simd>(x: *const f32, at: usize, len: usize, fill: f32) -> S::F {
    // SAFETY: only values below `len` are read.
    unsafe {
        if at + LANES <= len {
            return S::load(x.add(at));
        }
        let mut part = [fill; LANES];
        std::ptr::copy_nonoverlapping(x.add(at), part.as_mut_ptr(), len - at);
        S::load(part.as_ptr())
    }
}

/// Writes values `at..at + 16` of a row of `len`, leaving out those beyond its end.
#[inline(always)]
pub(super) unsafe fn store_part<S: Simd>(x: *mut f32, at: usize, len: usize, v: S::F) {
    // SAFETY: only values below `len` are written.
    unsafe {
        if at + LANES <= len {
            return S::store(x.add(at), v);
        }
        let mut part = [0.0; LANES];
        S::store(part.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(part.as_ptr(), x.add(at), len - at);
    }
}

/// Where a row of results goes: its number, the first of its columns, all rows.
pub(super) type Place = (usize, usize, RowsOut);

/// Values of a row that are produced before they are handed on.
const PIECE: usize = SIXTEEN * GROUP;

/// Produces a row a piece at a time and hands each to `out` while it is hot.
#[inline(always)]
pub(super) unsafe fn put_pieces<S: Simd, L: Lanes<S>>(width: usize, (row, column, out): Place, values: L) {
    let mut piece = MaybeUninit::<[f32; PIECE]>::uninit();
    let piece: *mut f32 = piece.as_mut_ptr().cast();
    let mut first = 0;
    while first < width {
        let len = PIECE.min(width - first);
        // SAFETY: `values` may be asked for lanes that begin below `width`; the piece holds all of them.
        unsafe {
            for at in (0..len).step_by(LANES) {
                S::store(piece.add(at), values.lanes(first + at));
            }
            out.put::<S>(row, column + first, piece, len);
        }
        first += len;
    }
}

struct Scaled<S: Simd> {
    x: *const f32,
    weight: *const f32,
    len: usize,
    factor: S::F,
}

impl<S: Simd> Lanes<S> for Scaled<S> {
    #[inline(always)]
    unsafe fn lanes(&self, at: usize) -> S::F {
        // SAFETY: both rows hold `len` values.
        unsafe {
            let x = load_part::<S>(self.x, at, self.len, 0.0);
            S::mul(S::mul(x, self.factor), load_part::<S>(self.weight, at, self.len, 0.0))
        }
    }
}

/// Sums that do not wait for one another.
const SUMS: usize = 4;

/// The sum of squares, in lanes.
#[inline(always)]
unsafe fn sum_squares<S: Simd>(x: &[f32]) -> S::F {
    const PIECE: usize = SUMS * LANES;
    // SAFETY: the slice holds `x.len()` values.
    unsafe {
        let mut sums = [S::zero(); SUMS];
        let whole = x.len() / PIECE * PIECE;
        for first in (0..whole).step_by(PIECE) {
            for (i, sum) in sums.iter_mut().enumerate() {
                let v = S::load(x.as_ptr().add(first + i * LANES));
                *sum = S::fma(v, v, *sum);
            }
        }
        for (sum, at) in sums.iter_mut().zip((whole..x.len()).step_by(LANES)) {
            let v = load_part::<S>(x.as_ptr(), at, x.len(), 0.0);
            *sum = S::fma(v, v, *sum);
        }
        S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]))
    }
}

/// What root-mean-square normalising multiplies `x` with.
#[inline(always)]
unsafe fn rms_factor<S: Simd>(x: &[f32], eps: f32) -> S::F {
    // SAFETY: the slice holds `x.len()` values.
    unsafe {
        let mean = S::reduce_add(sum_squares::<S>(x)) / x.len() as f32;
        S::splat(1.0 / (mean + eps).sqrt())
    }
}

#[inline(always)]
unsafe fn rms_norm<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut)) {
    // SAFETY: both slices hold `x.len()` values.
    unsafe {
        let factor = rms_factor::<S>(x, eps);
        let values = Scaled::<S> { x: x.as_ptr(), weight: weight.as_ptr(), len: x.len(), factor };
        put_pieces::<S, _>(x.len(), (out.0, 0, out.1), values);
    }
}

/// # Safety
/// `isa` is available; the row may be written in `out` and nobody else writes it.
pub(super) unsafe fn rms_norm_row(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut)) {
    assert!(x.len() == weight.len(), "a norm's weight has the width of its rows");
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut))) }
}

#[inline(always)]
unsafe fn rms_norm_within<S: Simd>(x: &mut [f32], weight: &[f32], eps: f32) {
    // SAFETY: both slices hold `x.len()` values.
    unsafe {
        let factor = rms_factor::<S>(x, eps);
        let (p, len) = (x.as_mut_ptr(), x.len());
        let values = Scaled::<S> { x: p, weight: weight.as_ptr(), len, factor };
        for i in (0..len).step_by(LANES) {
            store_part::<S>(p, i, len, values.lanes(i));
        }
    }
}

/// Normalises each `weight.len()` consecutive values of `x` on their own.
///
/// # Safety
/// `isa` is available.
pub(super) unsafe fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    for x in x.chunks_exact_mut(weight.len()) {
        // SAFETY: forwarded.
        unsafe { dispatch!(isa, fn rms_norm_within(x: &mut [f32], weight: &[f32], eps: f32)) }
    }
}

struct Affine<'a, S: Simd> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    mean: S::F,
    factor: S::F,
}

impl<S: Simd> Lanes<S> for Affine<'_, S> {
    #[inline(always)]
    unsafe fn lanes(&self, at: usize) -> S::F {
        let len = self.x.len();
        // SAFETY: all rows hold `len` values.
        unsafe {
            let centred = S::sub(load_part::<S>(self.x.as_ptr(), at, len, 0.0), self.mean);
            let scaled = S::mul(S::mul(centred, self.factor), load_part::<S>(self.weight.as_ptr(), at, len, 0.0));
            match self.bias {
                Some(bias) => S::add(scaled, load_part::<S>(bias.as_ptr(), at, len, 0.0)),
                None => scaled,
            }
        }
    }
}

#[inline(always)]
unsafe fn layer_norm<S: Simd>(
    x: &[f32],
    (weight, bias): (&[f32], Option<&[f32]>),
    eps: f32,
    out: (usize, RowsOut),
) {
    // SAFETY: all slices hold `x.len()` values.
    unsafe {
        let len = x.len();
        let mut sum = S::zero();
        for i in (0..len).step_by(LANES) {
            sum = S::add(sum, load_part::<S>(x.as_ptr(), i, len, 0.0));
        }
        let mean = S::reduce_add(sum) / len as f32;
        let mut squares = S::zero();
        for i in (0..len).step_by(LANES) {
            let v = S::sub(load_part::<S>(x.as_ptr(), i, len, mean), S::splat(mean));
            squares = S::fma(v, v, squares);
        }
        let factor = S::splat(1.0 / (S::reduce_add(squares) / len as f32 + eps).sqrt());
        put_pieces::<S, _>(len, (out.0, 0, out.1), Affine::<S> { x, weight, bias, mean: S::splat(mean), factor });
    }
}

/// # Safety
/// As for [`rms_norm_row`].
pub(super) unsafe fn layer_norm_row(
    isa: Isa,
    x: &[f32],
    affine: (&[f32], Option<&[f32]>),
    eps: f32,
    out: (usize, RowsOut),
) {
    let fits = |v: &[f32]| v.len() == x.len();
    assert!(fits(affine.0) && affine.1.is_none_or(fits), "a norm's weight and bias have the width of its rows");
    // SAFETY: forwarded.
    unsafe {
        dispatch!(isa, fn layer_norm(x: &[f32], affine: (&[f32], Option<&[f32]>), eps: f32, out: (usize, RowsOut)))
    }
}

struct Plain<'a>(&'a [f32]);

impl<S: Simd> Lanes<S> for Plain<'_> {
    #[inline(always)]
    unsafe fn lanes(&self, at: usize) -> S::F {
        // SAFETY: the slice holds its length.
        unsafe { load_part::<S>(self.0.as_ptr(), at, self.0.len(), 0.0) }
    }
}

#[inline(always)]
unsafe fn copy<S: Simd>(x: &[f32], out: (usize, RowsOut)) {
    // SAFETY: forwarded.
    unsafe { put_pieces::<S, _>(x.len(), (out.0, 0, out.1), Plain(x)) }
}

/// The row as it is.
///
/// # Safety
/// As for [`rms_norm_row`].
pub(super) unsafe fn copy_row(isa: Isa, x: &[f32], out: (usize, RowsOut)) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn copy(x: &[f32], out: (usize, RowsOut))) }
}
