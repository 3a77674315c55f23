//! Attention over a bf16 cache: `vdpbf16ps`, or multiply-adds of what it stands for.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::kv_cache::Geometry;
use super::super::simd::{LANES, Simd};
use super::cached::{Cached, PARTS, Span};
use super::plan::SPAN;
use crate::backend::AttentionShape;
use crate::memory::Shared;
use std::mem::MaybeUninit;

#[derive(Clone, Copy)]
pub(super) struct Brain {
    pub keys: Shared<u16>,
    pub values: Shared<u16>,
    /// `[query][head_dim]`, each as products take it: room for an f32.
    pub queries: Shared<f32>,
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

    /// Dot products with `V` parts of a span from `first` on.
    #[inline(always)]
    unsafe fn part_scores<S: Simd, const R: usize, const P: usize, const V: usize>(
        &self,
        (keys, values): (&[*const u16; PARTS], &[*const u16; PARTS]),
        queries: *const S::Rounded,
        first: usize,
        scores: &mut [[S::F; P]; R],
    ) {
        let dim = self.geometry.head_dim;
        // SAFETY: by the trait's contract; parts hold `dim` × 16 numbers.
        unsafe {
            let mut acc = [[S::zero(); V]; R];
            for i in 0..dim / 2 {
                let at = i * 2 * LANES;
                let mut k = [S::pairs(S::load_b(keys[first].add(at).cast())); V];
                for v in 1..V {
                    k[v] = S::pairs(S::load_b(keys[first + v].add(at).cast()));
                }
                for v in 0..V {
                    S::prefetch(values[first + v].add(at).cast());
                }
                for r in 0..R {
                    let q = S::splat_pair(queries.add(r * dim + 2 * i));
                    for v in 0..V {
                        acc[r][v] = S::dot_pairs(acc[r][v], k[v], q);
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    scores[r][first + v] = acc[r][v];
                }
            }
        }
    }

    /// Adds the values of dimensions `d..d + 16 V`.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const R: usize, const V: usize>(
        &self,
        (values, next_keys): (&[*const u16; PARTS], &[*const u16; PARTS]),
        (tokens, d): (usize, usize),
        weights: &[MaybeUninit<[S::Rounded; SPAN]>; R],
        shrink: &[S::F; R],
        out: *mut f32,
    ) {
        let dim = self.geometry.head_dim;
        // SAFETY: by the trait's contract; `d + 16 V <= dim`.
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
                    let mut x = [S::pairs(S::load_b(values[p].add(offset).cast())); V];
                    for v in 1..V {
                        x[v] = S::pairs(S::load_b(values[p].add(offset + v * 2 * LANES).cast()));
                    }
                    for v in 0..V {
                        S::prefetch(next_keys[p].add(offset + v * 2 * LANES).cast());
                    }
                    for r in 0..R {
                        let w = S::splat_pair(weights[r].as_ptr().cast::<S::Rounded>().add(2 * pair));
                        for v in 0..V {
                            acc[r][v] = S::dot_pairs(acc[r][v], x[v], w);
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

impl Cached for Brain {
    #[inline(always)]
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[inline(always)]
    unsafe fn put_query<S: Simd>(&self, query: usize, x: *const f32) {
        let dim = self.geometry.head_dim;
        // SAFETY: by the trait's contract; `Rounded` is no larger than f32.
        unsafe {
            let out = self.queries.at(0).cast::<S::Rounded>().add(query * dim);
            for i in (0..dim).step_by(LANES) {
                S::store_rounded(out.add(i), S::load(x.add(i)));
            }
        }
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(&self, (slot, head): (usize, usize), key: *const f32, value: *const f32, last: bool) {
        let dim = self.geometry.head_dim;
        let (block, offset) = (slot / self.geometry.block_size, slot % self.geometry.block_size);
        let part = self.geometry.at(block, head, offset / LANES * LANES) + 2 * (offset % LANES);
        let pair = self.geometry.at(block, head, offset / 2 * 2);
        let mut bits = [0_u16; AttentionShape::HEAD_DIM_MAX];
        // SAFETY: all offsets are within the block and head of `slot`.
        unsafe {
            for i in (0..dim).step_by(LANES) {
                S::store_bf16(bits.as_mut_ptr().add(i), S::load(key.add(i)));
            }
            for i in 0..dim / 2 {
                let two = [bits[2 * i], bits[2 * i + 1]];
                self.keys.at(part + i * 2 * LANES).cast::<[u16; 2]>().write_unaligned(two);
            }
            for d in (0..dim).step_by(LANES) {
                let pairs = self.values.at(pair + 2 * d);
                if last && offset.is_multiple_of(2) {
                    // The pair's other half is cleared: attention multiplies it by a zero weight, and what an earlier
                    // owner of the block left there might not be finite.
                    S::store(pairs.cast(), S::zero());
                }
                S::store_bf16_apart(pairs, S::load(value.add(d)), !offset.is_multiple_of(2));
            }
        }
    }

    #[inline(always)]
    fn tile_rows<S: Simd>() -> usize {
        S::PAIR_QUERIES
    }

    #[inline(always)]
    unsafe fn scores<S: Simd, const R: usize, const P: usize>(&self, span: &Span, query: usize) -> [[S::F; P]; R] {
        let parts = (&self.keys(span.head, &span.parts), &self.values(span.head, &span.parts));
        // SAFETY: by the trait's contract.
        unsafe {
            let queries = self.queries.at(0).cast::<S::Rounded>().add(query * self.geometry.head_dim).cast_const();
            let mut scores = [[S::zero(); P]; R];
            let mut first = 0;
            while first < P {
                first += match S::pair_vectors(R).min(P - first) {
                    4.. => {
                        self.part_scores::<S, R, P, 4>(parts, queries, first, &mut scores);
                        4
                    }
                    2.. => {
                        self.part_scores::<S, R, P, 2>(parts, queries, first, &mut scores);
                        2
                    }
                    _ => {
                        self.part_scores::<S, R, P, 1>(parts, queries, first, &mut scores);
                        1
                    }
                };
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
        let mut rounded = [const { MaybeUninit::<[S::Rounded; SPAN]>::uninit() }; R];
        // SAFETY: by the trait's contract, there are no tokens beyond `P` parts.
        unsafe {
            for r in 0..R {
                for p in 0..P {
                    S::store_rounded(rounded[r].as_mut_ptr().cast::<S::Rounded>().add(p * LANES), weights[r][p]);
                }
            }
            let mut d = 0;
            while d < dim {
                let vectors = match S::pair_vectors(R).min((dim - d) / LANES) {
                    4.. => {
                        self.weigh::<S, R, 4>(parts, (tokens, d), &rounded, shrink, out);
                        4
                    }
                    2.. => {
                        self.weigh::<S, R, 2>(parts, (tokens, d), &rounded, shrink, out);
                        2
                    }
                    _ => {
                        self.weigh::<S, R, 1>(parts, (tokens, d), &rounded, shrink, out);
                        1
                    }
                };
                d += vectors * LANES;
            }
        }
    }
}
