//! The paged KV cache of one layer, bf16, laid out for `vdpbf16ps`.
//!
//! ```text
//! keys    [block][kv head][16-token part][head_dim / 2][16 tokens][2]   one register: 16 tokens × 2 dimensions
//! values  [block][kv head][token / 2][head_dim][2]                      one register: 16 dimensions × 2 tokens
//! ```

use super::simd::LANES;
use crate::backend::{AttentionShape, CacheShape};
use crate::memory::{Buffer, Shared};

/// Keys and values of one layer.
pub struct KvCache {
    keys: Buffer<u16>,
    values: Buffer<u16>,
    pub(super) shape: CacheShape,
    pub(super) kv_heads: usize,
    /// As it lies here: a multiple of 32.
    pub(super) head_dim: usize,
}

impl KvCache {
    /// Bytes one token takes in one layer.
    pub fn bytes_per_token(heads: AttentionShape) -> usize {
        2 * size_of::<u16>() * heads.kv_heads * heads.padded_dim()
    }

    pub(super) fn new(shape: CacheShape, heads: AttentionShape) -> KvCache {
        assert!(shape.block_size.is_multiple_of(LANES), "blocks hold a multiple of 16 tokens");
        let head_dim = heads.padded_dim();
        let len = shape.blocks * shape.block_size * heads.kv_heads * head_dim;
        KvCache {
            keys: Buffer::zeroed(len),
            values: Buffer::zeroed(len),
            shape,
            kv_heads: heads.kv_heads,
            head_dim,
        }
    }

    pub(super) fn view(&mut self) -> View {
        View {
            keys: Shared::new(&mut self.keys),
            values: Shared::new(&mut self.values),
            block_size: self.shape.block_size,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }
}

/// The cache as chunks of a parallel job see it.
#[derive(Clone, Copy)]
pub(super) struct View {
    keys: Shared<u16>,
    values: Shared<u16>,
    pub block_size: usize,
    kv_heads: usize,
    pub head_dim: usize,
}

impl View {
    /// Writes one token's key and value (bf16, `head_dim` each) of one head. `last`: no later token of the sequence is
    /// written in this step.
    ///
    /// # Safety
    /// `slot` is inside the cache, the slices hold `head_dim` values, no other thread writes the slot, and if `last`,
    /// no other thread writes the slot after it.
    pub(super) unsafe fn write(&self, slot: usize, head: usize, key: &[u16], value: &[u16], last: bool) {
        let dim = self.head_dim;
        let (block, offset) = (slot / self.block_size, slot % self.block_size);
        let base = (block * self.kv_heads + head) * self.block_size * dim;
        let part = base + offset / LANES * LANES * dim + 2 * (offset % LANES);
        let pair = base + offset / 2 * 2 * dim + offset % 2;
        // SAFETY: all offsets are within the block and head of `slot`.
        unsafe {
            for (i, two) in key.chunks_exact(2).enumerate() {
                self.keys.at(part + i * 2 * LANES).cast::<[u16; 2]>().write_unaligned([two[0], two[1]]);
            }
            if last && offset % 2 == 0 {
                // The pair's other half is cleared: attention multiplies it by a zero weight, and what an earlier owner
                // of the block left there might not be finite.
                for (d, &v) in value.iter().enumerate() {
                    self.values.at(pair + 2 * d).cast::<[u16; 2]>().write_unaligned([v, 0]);
                }
            } else {
                for (d, &v) in value.iter().enumerate() {
                    *self.values.at(pair + 2 * d) = v;
                }
            }
        }
    }

    /// Keys of the 16 tokens from `offset` (a multiple of 16) in `block`: `[head_dim / 2][16][2]`.
    #[inline(always)]
    pub(super) fn keys(&self, block: usize, head: usize, offset: usize) -> *const u16 {
        self.keys.at(((block * self.kv_heads + head) * self.block_size + offset) * self.head_dim)
    }

    /// Values of the tokens from `offset` (even) in `block`: `[token / 2][head_dim][2]`.
    #[inline(always)]
    pub(super) fn values(&self, block: usize, head: usize, offset: usize) -> *const u16 {
        self.values.at(((block * self.kv_heads + head) * self.block_size + offset) * self.head_dim)
    }
}
