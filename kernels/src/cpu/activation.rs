//! Nonlinearities: gated and plain feed-forward activations, fused with quantising, and the soft cap of logits.

use super::norm::{Lanes, Place, load_part, put_pieces, store_part};
use super::rows::BLOCK_ROWS;
use super::simd::{Apart, Isa, LANES, Simd, dispatch};
use crate::backend::Activation;
use crate::packed::GROUP;
use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// A function of one value.
trait Function {
    unsafe fn of<S: Simd>(x: S::F) -> S::F;
}

/// x / (1 + 2^power): the shape of silu and of GELU's tanh form.
#[inline(always)]
unsafe fn over_one_plus<S: Simd>(x: S::F, power: S::F) -> S::F {
    // SAFETY: no requirement. Past 2^126 the quotient is zero to f32 anyway, and the exponent must not wrap.
    unsafe { S::div(x, S::add(S::splat(1.0), S::exp2(S::min(power, S::splat(126.0))))) }
}

struct Silu;
impl Function for Silu {
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::F) -> S::F {
        // SAFETY: no requirement.
        unsafe { over_one_plus::<S>(x, S::mul(x, S::splat(-LOG2_E))) }
    }
}

struct GeluTanh;
impl Function for GeluTanh {
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::F) -> S::F {
        // x · (1 + tanh u) / 2 = x / (1 + e^(-2u)), u = √(2/π) (x + 0.044715 x³).
        // SAFETY: no requirement.
        unsafe {
            let inner = S::fma(S::mul(x, x), S::splat(0.044_715), S::splat(1.0));
            let twice = S::mul(S::mul(x, inner), S::splat(-2.0 * 0.797_884_6 * LOG2_E));
            over_one_plus::<S>(x, twice)
        }
    }
}

struct Gelu;
impl Function for Gelu {
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::F) -> S::F {
        // Abramowitz & Stegun 7.1.26: the complementary error function to 1.5e-7 absolute, of |x| / √2.
        const C: [f32; 5] = [0.254_829_6, -0.284_496_74, 1.421_413_7, -1.453_152, 1.061_405_4];
        // SAFETY: no requirement.
        unsafe {
            let z = S::mul(S::abs(x), S::splat(FRAC_1_SQRT_2));
            let t = S::div(S::splat(1.0), S::fma(z, S::splat(0.327_591_1), S::splat(1.0)));
            let mut p = S::splat(C[4]);
            for &c in C[..4].iter().rev() {
                p = S::fma(p, t, S::splat(c));
            }
            let tail = S::mul(S::mul(p, t), S::exp2(S::mul(S::mul(z, z), S::splat(-LOG2_E))));
            // x · Φ(x) is max(x, 0) less |x| · tail / 2, on either side of zero.
            let less = S::mul(S::mul(S::abs(x), S::splat(-0.5)), tail);
            S::add(S::max(S::zero(), x), less)
        }
    }
}

struct Relu;
impl Function for Relu {
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::F) -> S::F {
        // SAFETY: no requirement. The order keeps NaN.
        unsafe { S::max(S::zero(), x) }
    }
}

struct ReluSquared;
impl Function for ReluSquared {
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::F) -> S::F {
        // SAFETY: no requirement.
        unsafe {
            let x = S::max(S::zero(), x);
            S::mul(x, x)
        }
    }
}

/// Runs a part that is generic over the [`Function`] of an activation.
macro_rules! with_function {
    ($activation:expr, $part:ident($rows:expr, $out:expr)) => {
        match $activation {
            Activation::Silu => S::apart($part::<Silu>($rows, $out, PhantomData)),
            Activation::Gelu => S::apart($part::<Gelu>($rows, $out, PhantomData)),
            Activation::GeluTanh => S::apart($part::<GeluTanh>($rows, $out, PhantomData)),
            Activation::Relu => S::apart($part::<Relu>($rows, $out, PhantomData)),
            Activation::ReluSquared => S::apart($part::<ReluSquared>($rows, $out, PhantomData)),
        }
    };
}

/// `F` of a row, times another where there is one.
struct Applied<'a, F> {
    x: &'a [f32],
    up: Option<&'a [f32]>,
    function: PhantomData<F>,
}

impl<S: Simd, F: Function> Lanes<S> for Applied<'_, F> {
    #[inline(always)]
    unsafe fn lanes(&self, at: usize) -> S::F {
        let len = self.x.len();
        // SAFETY: both rows hold `len` values.
        unsafe {
            let y = F::of::<S>(load_part::<S>(self.x.as_ptr(), at, len, 0.0));
            match self.up {
                Some(up) => S::mul(y, load_part::<S>(up.as_ptr(), at, len, 0.0)),
                None => y,
            }
        }
    }
}

/// Operands of one row.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub activation: Activation,
    pub x: &'a [f32],
    /// What the result is multiplied with, in gated layers.
    pub up: Option<&'a [f32]>,
}

/// Rows of a gated layer as their products leave them: each has its `width` gates, then as many values they are for.
#[derive(Clone, Copy)]
pub(super) struct Gated<'a> {
    pub activation: Activation,
    pub values: &'a [f32],
    pub width: usize,
}

impl Gated<'_> {
    #[inline(always)]
    fn row(&self, row: usize) -> Row<'_> {
        let (x, up) = self.values[row * 2 * self.width..][..2 * self.width].split_at(self.width);
        Row { activation: self.activation, x, up: Some(up) }
    }
}

#[inline(always)]
unsafe fn apply_gated<S: Simd>(rows: Gated<'_>, out: Place) {
    // SAFETY: forwarded.
    unsafe { with_function!(rows.activation, All(rows, out)) }
}

/// `F` of all rows.
struct All<'a, F>(Gated<'a>, Place, PhantomData<F>);

impl<F: Function> Apart for All<'_, F> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let All(rows, (first, column, out), _) = self;
        let count = rows.values.len() / (2 * rows.width);
        let mut row = 0;
        while row < count {
            // SAFETY: forwarded.
            unsafe {
                if count - row >= BLOCK_ROWS && (first + row).is_multiple_of(BLOCK_ROWS) {
                    apply_block::<S, F>(rows, row, (first, column, out));
                    row += BLOCK_ROWS;
                } else {
                    apply_one::<S, F>(rows.row(row), (first + row, column, out));
                    row += 1;
                }
            }
        }
    }
}

/// `F` of one row.
struct One<'a, F>(Row<'a>, Place, PhantomData<F>);

impl<F: Function> Apart for One<'_, F> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: forwarded.
        unsafe { apply_one::<S, F>(self.0, self.1) }
    }
}

/// A block of rows from `row` on, a group of columns at a time.
#[inline(always)]
unsafe fn apply_block<S: Simd, F: Function>(rows: Gated<'_>, row: usize, (first, column, out): Place) {
    let mut block = MaybeUninit::<[[f32; GROUP]; BLOCK_ROWS]>::uninit();
    let block: *mut f32 = block.as_mut_ptr().cast();
    for at in (0..rows.width).step_by(GROUP) {
        // SAFETY: the block holds a group of each row; the rest is forwarded.
        unsafe {
            for r in 0..BLOCK_ROWS {
                let Row { x, up, .. } = rows.row(row + r);
                let values = Applied::<F> { x, up, function: PhantomData };
                S::store(block.add(r * GROUP), Lanes::<S>::lanes(&values, at));
                S::store(block.add(r * GROUP + LANES), Lanes::<S>::lanes(&values, at + LANES));
            }
            out.put_column::<S>(first + row, column + at, block);
        }
    }
}

#[inline(always)]
unsafe fn apply<S: Simd>(row: Row<'_>, out: Place) {
    // SAFETY: forwarded.
    unsafe { with_function!(row.activation, One(row, out)) }
}

#[inline(always)]
unsafe fn apply_one<S: Simd, F: Function>(row: Row<'_>, out: Place) {
    let values = Applied::<F> { x: row.x, up: row.up, function: PhantomData };
    // SAFETY: forwarded.
    unsafe { put_pieces::<S, _>(row.x.len(), out, values) }
}

/// # Safety
/// `isa` is available; the row may be written in `out` and nobody else writes it.
pub(super) unsafe fn apply_row(isa: Isa, row: Row<'_>, out: Place) {
    assert!(row.up.is_none_or(|up| up.len() == row.x.len()), "a gate and an up value for each output");
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn apply(row: Row<'_>, out: Place)) }
}

/// # Safety
/// As for [`apply_row`], for each of the rows from the place on.
pub(super) unsafe fn apply_rows(isa: Isa, rows: Gated<'_>, out: Place) {
    assert!(rows.width.is_multiple_of(GROUP), "a gated layer's outputs come in groups");
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn apply_gated(rows: Gated<'_>, out: Place)) }
}

/// `cap · tanh(x · inner)`, where `doubled` is 2 · log2 e · inner.
#[inline(always)]
pub(super) unsafe fn cap_lanes<S: Simd>(x: S::F, doubled: f32, cap: f32) -> S::F {
    // tanh y = 1 - 2 / (e^2y + 1). Past 2^126 the quotient is zero, and the exponent must not wrap.
    // SAFETY: no requirement.
    unsafe {
        let power = S::min(S::mul(x, S::splat(doubled)), S::splat(126.0));
        let quotient = S::div(S::splat(2.0 * cap), S::add(S::exp2(power), S::splat(1.0)));
        S::sub(S::splat(cap), quotient)
    }
}

#[inline(always)]
unsafe fn cap_all<S: Simd>(x: &mut [f32], scale: f32, cap: f32) {
    let (p, len) = (x.as_mut_ptr(), x.len());
    for i in (0..len).step_by(LANES) {
        // SAFETY: the slice holds `len` values.
        unsafe {
            let v = load_part::<S>(p, i, len, 0.0);
            store_part::<S>(p, i, len, cap_lanes::<S>(v, 2.0 * LOG2_E * scale / cap, cap));
        }
    }
}

/// x = cap · tanh(scale · x / cap).
///
/// # Safety
/// `isa` is available.
pub(super) unsafe fn soft_cap(isa: Isa, x: &mut [f32], scale: f32, cap: f32) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn cap_all(x: &mut [f32], scale: f32, cap: f32)) }
}
