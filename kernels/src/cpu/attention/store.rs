//! The first half of attention: queries and keys are rotated, keys and values written to their slots.

use super::super::Matrix;
use super::super::simd::{Isa, LANES, Simd, dispatch};
use super::brain::Brain;
use super::cached::Cached;
use super::int8::Int8;
use super::query;
use crate::backend::{AttentionShape, StepInput};
use std::ops::Range;

/// Operands.
pub(super) struct Store<'a, C> {
    pub cache: C,
    pub qkv: &'a Matrix,
    pub heads: AttentionShape,
    pub input: StepInput<'a>,
    pub frequencies: usize,
    pub rotations: &'a [f32],
}

/// Rotates one head: pairs (i, i + n).
#[inline(always)]
unsafe fn rotate<S: Simd>(x: *const f32, dim: usize, n: usize, rotation: *const f32, out: *mut f32) {
    // SAFETY: the caller gives `dim` values in and out and `2 n` of rotation, `2 n <= dim`.
    unsafe {
        let mut i = 0;
        while i + LANES <= n {
            let (a, b) = (S::load(x.add(i)), S::load(x.add(n + i)));
            let (cos, sin) = (S::load(rotation.add(i)), S::load(rotation.add(n + i)));
            S::store(out.add(i), S::sub(S::mul(a, cos), S::mul(b, sin)));
            S::store(out.add(n + i), S::fma(b, cos, S::mul(a, sin)));
            i += LANES;
        }
        while i < n {
            let (a, b, cos, sin) = (*x.add(i), *x.add(n + i), *rotation.add(i), *rotation.add(n + i));
            *out.add(i) = a * cos - b * sin;
            *out.add(n + i) = b.mul_add(cos, a * sin);
            i += 1;
        }
        if 2 * n < dim {
            std::ptr::copy_nonoverlapping(x.add(2 * n), out.add(2 * n), dim - 2 * n);
        }
    }
}

/// A row's keys and values of some KV heads, and the queries that meet them.
#[inline(always)]
pub(super) unsafe fn store<S: Simd, C: Cached>(job: &Store<'_, C>, row: usize, kv_heads: Range<usize>) {
    let group = job.heads.heads / job.heads.kv_heads;
    let (dim, value_dim, n) = (job.heads.head_dim, job.heads.value_dim, job.frequencies);
    // What a narrow head is filled up with stays zero.
    let mut turned = [0.0_f32; AttentionShape::HEAD_DIM_MAX];
    let mut value = [0.0_f32; AttentionShape::HEAD_DIM_MAX];
    // SAFETY: `attention` asserted the widths; rotations hold `2 n` values a row.
    unsafe {
        let x = job.qkv.data.as_ptr().add(row * job.qkv.width);
        let rotation = job.rotations.as_ptr().add(row * 2 * n);
        for head in kv_heads.start * group..kv_heads.end * group {
            rotate::<S>(x.add(head * dim), dim, n, rotation, turned.as_mut_ptr());
            job.cache.put_query::<S>(query(job.heads, job.input.positions.len(), row, head), turned.as_ptr());
        }
        let slot = job.input.slot_mapping[row] as usize;
        let last = job.input.query_starts.binary_search(&(row as u32 + 1)).is_ok();
        for head in kv_heads {
            let k = x.add((job.heads.heads + head) * dim);
            let mut v = x.add((job.heads.heads + job.heads.kv_heads) * dim + head * value_dim);
            rotate::<S>(k, dim, n, rotation, turned.as_mut_ptr());
            if value_dim < job.cache.geometry().head_dim {
                std::ptr::copy_nonoverlapping(v, value.as_mut_ptr(), value_dim);
                v = value.as_ptr();
            }
            job.cache.put::<S>((slot, head), turned.as_ptr(), v, last);
        }
    }
}

#[inline(always)]
unsafe fn store_brain<S: Simd>(job: &Store<'_, Brain>, row: usize) {
    // SAFETY: forwarded.
    unsafe { store::<S, Brain>(job, row, 0..job.heads.kv_heads) }
}

#[inline(always)]
unsafe fn store_int8<S: Simd>(job: &Store<'_, Int8>, row: usize) {
    // SAFETY: forwarded.
    unsafe { store::<S, Int8>(job, row, 0..job.heads.kv_heads) }
}

impl Store<'_, Brain> {
    /// # Safety
    /// `isa` is available, `row` is inside the batch, and no other thread writes it or its slot.
    pub(super) unsafe fn brain(&self, isa: Isa, row: usize) {
        let job = self;
        // SAFETY: forwarded.
        unsafe { dispatch!(isa, fn store_brain(job: &Store<'_, Brain>, row: usize)) }
    }
}

impl Store<'_, Int8> {
    /// # Safety
    /// As for the bf16 cache.
    pub(super) unsafe fn int8(&self, isa: Isa, row: usize) {
        let job = self;
        // SAFETY: forwarded.
        unsafe { dispatch!(isa, fn store_int8(job: &Store<'_, Int8>, row: usize)) }
    }
}
