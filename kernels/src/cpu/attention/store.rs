//! The first half of attention: queries and keys are rotated, keys and values written to their slots.

use super::super::Matrix;
use super::super::kv_cache::View;
use super::super::simd::{Isa, LANES, Simd, dispatch};
use crate::backend::{AttentionShape, StepInput};
use crate::memory::Shared;

/// Operands.
pub(super) struct Store<'a> {
    pub qkv: &'a Matrix,
    pub heads: AttentionShape,
    pub input: StepInput<'a>,
    pub frequencies: usize,
    pub rotations: &'a [f32],
    pub view: View,
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

#[inline(always)]
unsafe fn to_bf16<S: Simd>(x: *const f32, len: usize, out: *mut u16) {
    for i in (0..len).step_by(LANES) {
        // SAFETY: the caller gives `len` values in and out, a multiple of 16.
        unsafe { S::store_bf16(out.add(i), S::load(x.add(i))) }
    }
}

#[inline(always)]
unsafe fn store_one<S: Simd>(job: &Store<'_>, row: usize, queries: Shared<u16>) {
    let (dim, padded, n) = (job.heads.head_dim, job.heads.padded_dim(), job.frequencies);
    // What a narrow head is filled up with stays zero.
    let mut turned = [0.0_f32; AttentionShape::HEAD_DIM_MAX];
    let mut key = [0_u16; AttentionShape::HEAD_DIM_MAX];
    let mut value = [0_u16; AttentionShape::HEAD_DIM_MAX];
    // SAFETY: `attention` asserted the widths; rotations hold `2 n` values a row.
    unsafe {
        let x = job.qkv.data.as_ptr().add(row * job.qkv.width);
        let rotation = job.rotations.as_ptr().add(row * 2 * n);
        for head in 0..job.heads.heads {
            rotate::<S>(x.add(head * dim), dim, n, rotation, turned.as_mut_ptr());
            to_bf16::<S>(turned.as_ptr(), padded, queries.at((row * job.heads.heads + head) * padded));
        }
        let slot = job.input.slot_mapping[row] as usize;
        let last = job.input.query_starts.binary_search(&(row as u32 + 1)).is_ok();
        for head in 0..job.heads.kv_heads {
            let k = x.add((job.heads.heads + head) * dim);
            let v = x.add((job.heads.heads + job.heads.kv_heads + head) * dim);
            rotate::<S>(k, dim, n, rotation, turned.as_mut_ptr());
            to_bf16::<S>(turned.as_ptr(), padded, key.as_mut_ptr());
            std::ptr::copy_nonoverlapping(v, turned.as_mut_ptr(), dim);
            to_bf16::<S>(turned.as_ptr(), padded, value.as_mut_ptr());
            job.view.write(slot, head, &key[..padded], &value[..padded], last);
        }
    }
}

/// # Safety
/// `isa` is available, `row` is inside the batch, and no other thread writes it or its slot.
pub(super) unsafe fn store_row(isa: Isa, job: &Store<'_>, row: usize, queries: Shared<u16>) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn store_one(job: &Store<'_>, row: usize, queries: Shared<u16>)) }
}
