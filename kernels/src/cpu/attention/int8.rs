//! Attention over an 8-bit cache, on `vpdpbusd`: queries are quantised like activations, and the softmax's weights,
//! times the values' scales, to 8 bits of the largest of a span.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::kv_cache::Geometry;
use super::super::rows::{Quantised, RowsOut, quantise};
use super::super::simd::{LANES, Simd};
use super::cached::{Cached, PARTS, Span};
use super::plan::SPAN;
use crate::memory::Shared;
use crate::packed::GROUP;
use half::bf16;

#[derive(Clone, Copy)]
pub(super) struct Int8 {
    pub keys: Shared<u8>,
    pub values: Shared<i8>,
    pub scales: Shared<u16>,
    /// One row a query.
    pub queries: RowsOut,
    pub geometry: Geometry,
}

impl Int8 {
    #[inline(always)]
    fn keys(&self, head: usize, parts: &[(usize, usize); PARTS]) -> [*const u8; PARTS] {
        std::array::from_fn(|p| self.keys.at(self.geometry.at(parts[p].0, head, parts[p].1)).cast_const())
    }

    #[inline(always)]
    fn values(&self, head: usize, parts: &[(usize, usize); PARTS]) -> [*const i8; PARTS] {
        std::array::from_fn(|p| self.values.at(self.geometry.at(parts[p].0, head, parts[p].1)).cast_const())
    }

    /// Sixteen scales of each part.
    #[inline(always)]
    fn scales(&self, span: &Span, of: (bool, usize)) -> [*const u16; PARTS] {
        std::array::from_fn(|p| {
            let (block, offset) = span.parts[p];
            self.scales.at(self.geometry.scales_at(block, span.head, offset, of)).cast_const()
        })
    }

    #[inline(always)]
    unsafe fn put_scale(&self, (slot, head): (usize, usize), of: (bool, usize), scale: f32) {
        let (block, offset) = (slot / self.geometry.block_size, slot % self.geometry.block_size);
        // SAFETY: by the trait's contract.
        unsafe {
            *self.scales.at(self.geometry.scales_at(block, head, offset, of)) = bf16::from_f32(scale).to_bits()
        }
    }
}

impl Cached for Int8 {
    #[inline(always)]
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[inline(always)]
    unsafe fn put_query<S: Simd>(&self, query: usize, x: *const f32) {
        // SAFETY: by the trait's contract.
        unsafe { self.queries.put::<S>(query, 0, x, self.geometry.head_dim) }
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(&self, (slot, head): (usize, usize), key: *const f32, value: *const f32, _: bool) {
        let dim = self.geometry.head_dim;
        let (block, offset) = (slot / self.geometry.block_size, slot % self.geometry.block_size);
        let part = self.geometry.at(block, head, offset / LANES * LANES) + 4 * (offset % LANES);
        let quad = self.geometry.at(block, head, offset / 4 * 4) + offset % 4;
        let mut codes = [0_i8; GROUP];
        // SAFETY: all offsets are within the block and head of `slot`. What an earlier owner left in the rest of a quad
        // is finite, and so are its scales: a zero weight makes zero of it.
        unsafe {
            for g in 0..dim / GROUP {
                let group: Quantised<S> = quantise::<S, true>(key.add(g * GROUP));
                group.store(codes.as_mut_ptr());
                self.put_scale((slot, head), (false, g), group.scale);
                for i in 0..GROUP / 4 {
                    let four = std::array::from_fn(|j| (codes[4 * i + j] as u8) ^ 0x80);
                    let at = part + (g * GROUP / 4 + i) * 4 * LANES;
                    self.keys.at(at).cast::<[u8; 4]>().write_unaligned(four);
                }
                let group: Quantised<S> = quantise::<S, true>(value.add(g * GROUP));
                group.store(codes.as_mut_ptr());
                self.put_scale((slot, head), (true, g), group.scale);
                for i in 0..GROUP {
                    *self.values.at(quad + 4 * (g * GROUP + i)) = codes[i];
                }
            }
        }
    }

    #[inline(always)]
    fn tile_rows<S: Simd>() -> usize {
        S::TILE_QUERIES
    }

    #[inline(always)]
    unsafe fn scores<S: Simd, const R: usize, const P: usize>(&self, span: &Span, query: usize) -> [[S::F; P]; R] {
        let (keys, values) = (self.keys(span.head, &span.parts), self.values(span.head, &span.parts));
        // SAFETY: by the trait's contract; parts hold `head_dim` × 16 numbers.
        unsafe {
            let mut scores = [[S::zero(); P]; R];
            for g in 0..self.geometry.head_dim / GROUP {
                let (codes, scale, sum) = self.queries.group(query, g);
                let (mut q, mut q_scale) = ([codes; R], [scale; R]);
                // Keys are stored plus 128.
                let mut dots = [[S::isplat(-128 * sum); P]; R];
                for r in 1..R {
                    let (codes, scale, sum) = self.queries.group(query + r, g);
                    (q[r], q_scale[r]) = (codes, scale);
                    dots[r] = [S::isplat(-128 * sum); P];
                }
                for i in 0..GROUP / 4 {
                    let at = (g * GROUP / 4 + i) * 4 * LANES;
                    let mut k = [S::load_b(keys[0].add(at)); P];
                    for p in 1..P {
                        k[p] = S::load_b(keys[p].add(at));
                    }
                    for p in 0..P {
                        S::prefetch(values[p].add(at).cast());
                    }
                    for r in 0..R {
                        let q = RowsOut::quad::<S>(q[r], i);
                        for p in 0..P {
                            dots[r][p] = S::dot(dots[r][p], k[p], q);
                        }
                    }
                }
                let scales = self.scales(span, (false, g));
                for p in 0..P {
                    let scale = S::load_bf16(scales[p]);
                    for r in 0..R {
                        let both = S::mul(scale, S::splat(q_scale[r]));
                        scores[r][p] = S::fma(S::to_f(dots[r][p]), both, scores[r][p]);
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
        const V: usize = GROUP / LANES;
        let dim = self.geometry.head_dim;
        let (values, next_keys) = (self.values(span.head, &span.parts), self.keys(span.head, &span.next));
        // SAFETY: by the trait's contract.
        unsafe {
            for g in 0..dim / GROUP {
                let scales = self.scales(span, (true, g));
                let mut codes = [[0_u8; SPAN]; R];
                let mut unit = [0.0; R];
                for r in 0..R {
                    let mut scaled = [S::zero(); P];
                    let mut highest = S::zero();
                    for p in 0..P {
                        scaled[p] = S::mul(weights[r][p], S::load_bf16(scales[p]));
                        highest = S::max(highest, scaled[p]);
                    }
                    let max = S::reduce_max(highest);
                    let inverse = S::splat(if max > 1e-30 { 255.0 / max } else { 0.0 });
                    unit[r] = max / 255.0;
                    for p in 0..P {
                        S::store_u8(codes[r].as_mut_ptr().add(p * LANES), S::mul(scaled[p], inverse));
                    }
                }
                let mut dots = [[S::isplat(0); V]; R];
                for quad in 0..tokens.div_ceil(4) {
                    let (p, quad) = (quad / 4, quad % 4);
                    let offset = (quad * dim + g * GROUP) * 4;
                    let mut x = [S::load_b(values[p].add(offset).cast()); V];
                    for v in 1..V {
                        x[v] = S::load_b(values[p].add(offset + v * 4 * LANES).cast());
                    }
                    for v in 0..V {
                        S::prefetch(next_keys[p].add(offset + v * 4 * LANES));
                    }
                    for r in 0..R {
                        let w = S::splat_b(codes[r].as_ptr().add(p * LANES + 4 * quad));
                        for v in 0..V {
                            dots[r][v] = S::dot(dots[r][v], w, x[v]);
                        }
                    }
                }
                for r in 0..R {
                    for v in 0..V {
                        let out = out.add(r * dim + g * GROUP + v * LANES);
                        let before = S::mul(S::load(out), shrink[r]);
                        S::store(out, S::fma(S::to_f(dots[r][v]), S::splat(unit[r]), before));
                    }
                }
            }
        }
    }
}
