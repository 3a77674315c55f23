//! Row-wise operations that end in rows for a linear layer: norms and gated activations, fused with quantising.

use super::rows::RowsOut;
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::packed::GROUP;

/// Produces a row 32 values at a time and hands each piece to `out` while it is hot.
#[inline(always)]
unsafe fn put_pieces<S: Simd>(width: usize, (row, out): (usize, RowsOut), value: impl Fn(usize) -> S::F) {
    let mut piece = [0.0; GROUP];
    let mut first = 0;
    while first < width {
        let len = GROUP.min(width - first);
        // SAFETY: `value` may be asked for lanes up to `width`, a multiple of 16; the piece holds 32.
        unsafe {
            S::store(piece.as_mut_ptr(), value(first));
            if len > LANES {
                S::store(piece.as_mut_ptr().add(LANES), value(first + LANES));
            }
            out.put::<S>(row, first, piece.as_ptr(), len);
        }
        first += len;
    }
}

#[inline(always)]
unsafe fn rms_norm<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut)) {
    // SAFETY: both slices hold `x.len()` values, a multiple of 16.
    unsafe {
        let (p, w) = (x.as_ptr(), weight.as_ptr());
        let mut squares = S::zero();
        for i in (0..x.len()).step_by(LANES) {
            let v = S::load(p.add(i));
            squares = S::fma(v, v, squares);
        }
        let mean = S::reduce_add(squares) / x.len() as f32;
        let inverse = S::splat(1.0 / (mean + eps).sqrt());
        put_pieces::<S>(x.len(), out, |i| S::mul(S::mul(S::load(p.add(i)), inverse), S::load(w.add(i))));
    }
}

/// # Safety
/// `isa` is available; the row may be written in `out` and nobody else writes it.
pub(super) unsafe fn rms_norm_row(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut)) {
    assert!(x.len() == weight.len() && x.len().is_multiple_of(LANES), "rows are a multiple of 16 wide");
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: (usize, RowsOut))) }
}

#[inline(always)]
unsafe fn silu_mul<S: Simd>(gate: &[f32], up: &[f32], out: (usize, RowsOut)) {
    // SAFETY: both slices hold `gate.len()` values, a multiple of 16.
    unsafe {
        let (g, u) = (gate.as_ptr(), up.as_ptr());
        put_pieces::<S>(gate.len(), out, |i| {
            let x = S::load(g.add(i));
            // Past 2^126 the quotient is zero to f32 anyway, and the exponent must not wrap.
            let power = S::min(S::mul(x, S::splat(-std::f32::consts::LOG2_E)), S::splat(126.0));
            let silu = S::div(x, S::add(S::splat(1.0), S::exp2(power)));
            S::mul(silu, S::load(u.add(i)))
        });
    }
}

/// # Safety
/// As for [`rms_norm_row`].
pub(super) unsafe fn silu_mul_row(isa: Isa, gate: &[f32], up: &[f32], out: (usize, RowsOut)) {
    assert!(gate.len() == up.len() && gate.len().is_multiple_of(LANES), "rows are a multiple of 16 wide");
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn silu_mul(gate: &[f32], up: &[f32], out: (usize, RowsOut))) }
}
