//! The running softmax of an item's rows over one partition, or over several merged in order.

use super::super::simd::{LANES, Simd};
use super::plan::{ROWS_MAX, STATE_MAX};
use std::mem::MaybeUninit;

/// Smaller than any score: the maximum of no scores at all, finite so that differences are.
const NOTHING: f32 = -1e30;

/// Where a state lies: maxima, for sixteen rows from any one on, then 16 partial sums a row, then the weighted values.
///
/// ```text
/// [max: 48][sums: ROWS_MAX × 16][values: rows × dim]
/// ```
#[derive(Clone, Copy)]
pub(super) struct State(*mut f32);

const SUMS: usize = (ROWS_MAX + LANES).next_multiple_of(LANES);
const VALUES: usize = SUMS + ROWS_MAX * LANES;

/// Room for one state, not initialised.
#[repr(align(64))]
pub(super) struct Memory(MaybeUninit<[f32; VALUES + STATE_MAX]>);

impl Memory {
    pub(super) fn new() -> Memory {
        Memory(MaybeUninit::uninit())
    }

    pub(super) fn state(&mut self) -> State {
        State(self.0.as_mut_ptr().cast())
    }
}

impl State {
    /// Values a state of `rows` rows takes.
    pub(super) fn len(rows: usize, dim: usize) -> usize {
        VALUES + rows * dim
    }

    /// # Safety
    /// `at` has room for [`State::len`] values that nobody else uses while this state is.
    pub(super) unsafe fn at(at: *mut f32) -> State {
        State(at)
    }

    #[inline(always)]
    pub(super) fn max(self, row: usize) -> *mut f32 {
        self.0.wrapping_add(row)
    }

    /// Sixteen partial sums.
    #[inline(always)]
    pub(super) fn sum(self, row: usize) -> *mut f32 {
        self.0.wrapping_add(SUMS + row * LANES)
    }

    #[inline(always)]
    pub(super) fn values(self, row: usize, dim: usize) -> *mut f32 {
        self.0.wrapping_add(VALUES + row * dim)
    }

    /// The state before any token.
    ///
    /// # Safety
    /// `S` is available, and the state has room for `rows` rows of `dim`, a multiple of 16.
    #[inline(always)]
    pub(super) unsafe fn clear<S: Simd>(self, rows: usize, dim: usize) {
        // SAFETY: by the contract above.
        unsafe {
            for first in (0..SUMS).step_by(LANES) {
                S::store(self.max(first), S::splat(NOTHING));
            }
            for row in 0..rows {
                S::store(self.sum(row), S::zero());
                for d in (0..dim).step_by(LANES) {
                    S::store(self.values(row, dim).add(d), S::zero());
                }
            }
        }
    }

    /// Takes in the state of the next partition.
    ///
    /// # Safety
    /// As for [`State::clear`]; both states hold values.
    #[inline(always)]
    pub(super) unsafe fn merge<S: Simd>(self, next: State, rows: usize, dim: usize) {
        // SAFETY: by the contract above.
        unsafe {
            for row in 0..rows {
                let (ours, theirs) = (*self.max(row), *next.max(row));
                let max = if ours > theirs { ours } else { theirs };
                *self.max(row) = max;
                let (ours, theirs) = (S::exp2(S::splat(ours - max)), S::exp2(S::splat(theirs - max)));
                let sum = self.sum(row);
                S::store(sum, S::fma(S::load(next.sum(row)), theirs, S::mul(S::load(sum), ours)));
                for d in (0..dim).step_by(LANES) {
                    let values = self.values(row, dim).add(d);
                    let next = S::load(next.values(row, dim).add(d));
                    S::store(values, S::fma(next, theirs, S::mul(S::load(values), ours)));
                }
            }
        }
    }
}
