//! Row-wise operations that end in rows for a linear layer: norms and gated activations, fused with quantising.

use super::rows::RowsOut;
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::packed::GROUP;

/// A row of results, sixteen at a time. A trait and not a closure: closures are compiled without the ISA's features.
trait Lanes<S: Simd> {
    /// Results `at..at + 16`.
    unsafe fn lanes(&self, at: usize) -> S::F;
}

/// Produces a row 32 values at a time and hands each piece to `out` while it is hot.
#[inline(always)]
unsafe fn put_pieces<S: Simd, L: Lanes<S>>(width: usize, (row, out): (usize, RowsOut), values: L) {
    let mut piece = [0.0; GROUP];
    let mut first = 0;
    while first < width {
        let len = GROUP.min(width - first);
        // SAFETY: `values` may be asked for lanes up to `width`, a multiple of 16; the piece holds 32.
        unsafe {
            S::store(piece.as_mut_ptr(), values.lanes(first));
            if len > LANES {
                S::store(piece.as_mut_ptr().add(LANES), values.lanes(first + LANES));
            }
            out.put::<S>(row, first, piece.as_ptr(), len);
        }
        first += len;
    }
}

struct Scaled<S: Simd> {
    x: *const f32,
    weight: *const f32,
    factor: S::F,
}

impl<S: Simd> Lanes<S> for Scaled<S> {
    #[inline(always)]
    unsafe fn lanes(&self, at: usize) -> S::F {
        // SAFETY: the rows behind both pointers are wider than `at + 16`.
        unsafe { S::mul(S::mul(S::load(self.x.add(at)), self.factor), S::load(self.weight.add(at))) }
    }
}

#[inline(always)]
unsafe fn rms_norm<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut)) {
    // SAFETY: both slices hold `x.len()` values, a multiple of 16.
    unsafe {
        let p = x.as_ptr();
        let mut squares = S::zero();
        let mut i = 0;
        while i < x.len() {
            let v = S::load(p.add(i));
            squares = S::fma(v, v, squares);
            i += LANES;
        }
        let mean = S::reduce_add(squares) / x.len() as f32;
        let factor = S::splat(1.0 / (mean + eps).sqrt());
        put_pieces::<S, _>(x.len(), out, Scaled::<S> { x: p, weight: weight.as_ptr(), factor });
    }
}

/// # Safety
/// `isa` is available; the row may be written in `out` and nobody else writes it.
pub(super) unsafe fn rms_norm_row(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut)) {
    assert!(x.len() == weight.len() && x.len().is_multiple_of(LANES), "rows are a multiple of 16 wide");
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut))) }
}

struct Gated {
    gate: *const f32,
    up: *const f32,
}

impl<S: Simd> Lanes<S> for Gated {
    #[inline(always)]
    unsafe fn lanes(&self, at: usize) -> S::F {
        // SAFETY: the rows behind both pointers are wider than `at + 16`.
        unsafe {
            let x = S::load(self.gate.add(at));
            // Past 2^126 the quotient is zero to f32 anyway, and the exponent must not wrap.
            let power = S::min(S::mul(x, S::splat(-std::f32::consts::LOG2_E)), S::splat(126.0));
            let silu = S::div(x, S::add(S::splat(1.0), S::exp2(power)));
            S::mul(silu, S::load(self.up.add(at)))
        }
    }
}

#[inline(always)]
unsafe fn silu_mul<S: Simd>(gate: &[f32], up: &[f32], out: (usize, RowsOut)) {
    // SAFETY: both slices hold `gate.len()` values, a multiple of 16.
    unsafe { put_pieces::<S, _>(gate.len(), out, Gated { gate: gate.as_ptr(), up: up.as_ptr() }) }
}

/// # Safety
/// As for [`rms_norm_row`].
pub(super) unsafe fn silu_mul_row(isa: Isa, gate: &[f32], up: &[f32], out: (usize, RowsOut)) {
    assert!(gate.len() == up.len() && gate.len().is_multiple_of(LANES), "rows are a multiple of 16 wide");
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn silu_mul(gate: &[f32], up: &[f32], out: (usize, RowsOut))) }
}
