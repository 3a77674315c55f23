//! Attention over a bf16 cache, on `vdpbf16ps`.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::kv_cache::Geometry;
use super::super::simd::{LANES, Simd};
use super::cached::{Cached, PARTS, Span};
use super::plan::SPAN;
use crate::backend::AttentionShape;
use crate::memory::Shared;

#[derive(Clone, Copy)]
pub(super) struct Brain {
    pub keys: Shared<u16>,
    pub values: Shared<u16>,
    /// `[query][head_dim]`.
    pub queries: Shared<u16>,
    pub geometry: Geometry,
}

impl Brain {
    #[inline(always)]
    fn keys(&self, head: usize, parts: &[(usize, usize); PARTS]) -> [*const u16; PARTS] {
        std::array::from_fn(|p| self.keys.at(self.geometry.at(parts[p].0, head, parts[p].1)).cast_const())
    }

    #[inline(always)]
    fn values(&self, head: usize, parts: &[(usize, usize); PARTS]) -> [*const u16; PARTS] {
        std::array::from_fn(|p| self.values.at(self.geometry.at(parts[p].0, head, parts[p].1)).cast_const())
    }

    /// Adds the values of dimensions `d..d + 16 V`.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const R: usize, const V: usize>(
        &self,
        (values, next_keys): (&[*const u16; PARTS], &[*const u16; PARTS]),
        (tokens, d): (usize, usize),
        weights: &[[u16; SPAN]; R],
        shrink: &[S::F; R],
        out: *mut f32,
    ) {
        let dim = self.geometry.head_dim;
        // SAFETY: by the trait's contract; `dim` is a multiple of 32, so `d + 16 V <= dim`.
        unsafe {
            let mut acc = [[S::zero(); V]; R];
            for r in 0..R {
                for v in 0..V {
                    acc[r][v] = S::mul(S::load(out.add(r * dim + d + v * LANES)), shrink[r]);
                }
            }
            let pairs = tokens.div_ceil(2);
            for p in 0..PARTS {
                let first = p * LANES / 2;
                for pair in first..pairs.min(first + LANES / 2) {
                    let offset = ((pair - first) * dim + d) * 2;
                    let mut x = [S::load_b(values[p].add(offset).cast()); V];
                    for v in 1..V {
                        x[v] = S::load_b(values[p].add(offset + v * 2 * LANES).cast());
                    }
                    for v in 0..V {
                        S::prefetch(next_keys[p].add(offset + v * 2 * LANES).cast());
                    }
                    for r in 0..R {
                        let w = S::splat_b(weights[r].as_ptr().add(2 * pair).cast());
                        for v in 0..V {
                            acc[r][v] = S::dot_bf16(acc[r][v], x[v], w);
                        }
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    S::store(out.add(r * dim + d + v * LANES), acc[r][v]);
                }
            }
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

impl Cached for Brain {
    #[inline(always)]
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[inline(always)]
    unsafe fn put_query<S: Simd>(&self, query: usize, x: *const f32) {
        let dim = self.geometry.head_dim;
        // SAFETY: by the trait's contract.
        unsafe { to_bf16::<S>(x, dim, self.queries.at(query * dim)) }
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(&self, (slot, head): (usize, usize), key: *const f32, value: *const f32, last: bool) {
        let dim = self.geometry.head_dim;
        let (block, offset) = (slot / self.geometry.block_size, slot % self.geometry.block_size);
        let part = self.geometry.at(block, head, offset / LANES * LANES) + 2 * (offset % LANES);
        let pair = self.geometry.at(block, head, offset / 2 * 2) + offset % 2;
        let mut bits = [0_u16; AttentionShape::HEAD_DIM_MAX];
        // SAFETY: all offsets are within the block and head of `slot`.
        unsafe {
            to_bf16::<S>(key, dim, bits.as_mut_ptr());
            for i in 0..dim / 2 {
                let two = [bits[2 * i], bits[2 * i + 1]];
                self.keys.at(part + i * 2 * LANES).cast::<[u16; 2]>().write_unaligned(two);
            }
            to_bf16::<S>(value, dim, bits.as_mut_ptr());
            if last && offset.is_multiple_of(2) {
                // The pair's other half is cleared: attention multiplies it by a zero weight, and what an earlier
                // owner of the block left there might not be finite.
                for d in 0..dim {
                    self.values.at(pair + 2 * d).cast::<[u16; 2]>().write_unaligned([bits[d], 0]);
                }
            } else {
                for d in 0..dim {
                    *self.values.at(pair + 2 * d) = bits[d];
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn scores<S: Simd, const R: usize, const P: usize>(
        &self,
        span: &Span,
        queries: [usize; R],
    ) -> [[S::F; P]; R] {
        let dim = self.geometry.head_dim;
        let (keys, values) = (self.keys(span.head, &span.parts), self.values(span.head, &span.parts));
        let q: [*const u8; R] = std::array::from_fn(|r| self.queries.at(queries[r] * dim).cast_const().cast());
        // SAFETY: by the trait's contract; parts hold `dim` × 16 numbers.
        unsafe {
            let mut scores = [[S::zero(); P]; R];
            for i in 0..dim / 2 {
                let at = i * 2 * LANES;
                let mut k = [S::load_b(keys[0].add(at).cast()); P];
                for p in 1..P {
                    k[p] = S::load_b(keys[p].add(at).cast());
                }
                for p in 0..P {
                    S::prefetch(values[p].add(at).cast());
                }
                for r in 0..R {
                    let q = S::splat_b(q[r].add(4 * i));
                    for p in 0..P {
                        scores[r][p] = S::dot_bf16(scores[r][p], k[p], q);
                    }
                }
            }
            scores
        }
    }

    #[inline(always)]
    unsafe fn add_values<S: Simd, const R: usize, const P: usize>(
        &self,
        (span, tokens): (&Span, usize),
        weights: &[[S::F; P]; R],
        shrink: &[S::F; R],
        out: *mut f32,
    ) {
        let parts = (&self.values(span.head, &span.parts), &self.keys(span.head, &span.next));
        let dim = self.geometry.head_dim;
        let mut bits = [[0_u16; SPAN]; R];
        // SAFETY: by the trait's contract.
        unsafe {
            for r in 0..R {
                for p in 0..P {
                    S::store_bf16(bits[r].as_mut_ptr().add(p * LANES), weights[r][p]);
                }
            }
            let mut d = 0;
            while d < dim {
                d += if dim - d >= 4 * LANES {
                    self.weigh::<S, R, 4>(parts, (tokens, d), &bits, shrink, out);
                    4 * LANES
                } else {
                    self.weigh::<S, R, 2>(parts, (tokens, d), &bits, shrink, out);
                    2 * LANES
                };
            }
        }
    }
}
