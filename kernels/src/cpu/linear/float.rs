//! f16 and f32 weights times f32 rows.

use super::{Job, put};
use crate::cpu::simd::Simd;
use crate::packed::TILE_ROWS;

/// How sixteen stored floats are read.
trait Floats {
    type Stored;
    unsafe fn load<S: Simd>(p: *const Self::Stored) -> S::F;
}

impl Floats for f32 {
    type Stored = f32;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::F {
        // SAFETY: forwarded.
        unsafe { S::load(p) }
    }
}

struct HalfBits;
impl Floats for HalfBits {
    type Stored = u16;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::F {
        // SAFETY: forwarded.
        unsafe { S::load_f16(p) }
    }
}

#[inline(always)]
unsafe fn float_tile<S: Simd, W: Floats, const T: usize>(
    job: &Job<'_>,
    values: *const W::Stored,
    tile: usize,
    row: usize,
) {
    let cols = job.weights.cols;
    // SAFETY: weights hold `cols` vectors a tile, rows `cols` values each.
    unsafe {
        let x = job.x.values.as_ptr().add(row * cols);
        let w = values.add(tile * cols * TILE_ROWS);
        let mut acc = [S::zero(); T];
        for k in 0..cols {
            let w = W::load::<S>(w.add(k * TILE_ROWS));
            for (t, acc) in acc.iter_mut().enumerate() {
                *acc = S::fma(w, S::splat(*x.add(t * cols + k)), *acc);
            }
        }
        put::<S, T>(job, tile, row, acc);
    }
}

#[inline(always)]
unsafe fn floats<S: Simd, W: Floats>(job: &Job<'_>, values: *const W::Stored) {
    for t in job.tiles.clone() {
        let mut row = job.rows.start;
        while row < job.rows.end {
            let left = job.rows.end - row;
            // SAFETY: rows `row..row + T` are inside the batch.
            unsafe {
                row += if S::TILE_TOKENS >= 8 && left >= 8 {
                    float_tile::<S, W, 8>(job, values, t, row);
                    8
                } else if left >= 4 {
                    float_tile::<S, W, 4>(job, values, t, row);
                    4
                } else {
                    float_tile::<S, W, 1>(job, values, t, row);
                    1
                }
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn half<S: Simd>(job: &Job<'_>, values: *const u16) {
    // SAFETY: forwarded.
    unsafe { floats::<S, HalfBits>(job, values) }
}

#[inline(always)]
pub(super) unsafe fn single<S: Simd>(job: &Job<'_>, values: *const f32) {
    // SAFETY: forwarded.
    unsafe { floats::<S, f32>(job, values) }
}
