//! The paged KV cache of one layer: its memory, and where a token's keys and values lie in it.
//!
//! ```text
//! bf16  keys    [block][kv head][16-token part][head_dim / 2][16 tokens][2]   one register: 16 tokens × 2 dimensions
//!       values  [block][kv head][token / 2][head_dim][2]                      one register: 16 dimensions × 2 tokens
//! int8  keys    [block][kv head][16-token part][head_dim / 4][16 tokens][4]   codes plus 128
//!       values  [block][kv head][token / 4][head_dim][4]                      codes
//!       scales  [block][kv head][keys, values][head_dim / 32][token]          bf16; a key or value is scale · code
//! ```

use super::simd::LANES;
use crate::backend::{AttentionShape, CacheShape, KvDtype};
use crate::memory::Buffer;
use crate::packed::GROUP;

/// Keys and values of one layer.
pub struct KvCache {
    pub(super) storage: Storage,
    pub(super) shape: CacheShape,
    pub(super) kv_heads: usize,
    /// As it lies here: a multiple of 32.
    pub(super) head_dim: usize,
}

pub(super) enum Storage {
    Brain { keys: Buffer<u16>, values: Buffer<u16> },
    Int8 { keys: Buffer<u8>, values: Buffer<i8>, scales: Buffer<u16> },
}

impl KvCache {
    /// Bytes one token takes in one layer.
    pub fn bytes_per_token(heads: AttentionShape, dtype: KvDtype) -> usize {
        let numbers = 2 * heads.kv_heads * heads.padded_dim();
        match dtype {
            KvDtype::Bf16 | KvDtype::F16 => numbers * size_of::<u16>(),
            KvDtype::Fp8 => numbers,
            KvDtype::Int8 => numbers + numbers / GROUP * size_of::<u16>(),
        }
    }

    pub(super) fn new(shape: CacheShape, heads: AttentionShape, dtype: KvDtype) -> KvCache {
        assert!(shape.block_size.is_multiple_of(LANES), "blocks hold a multiple of 16 tokens");
        let head_dim = heads.padded_dim();
        let len = shape.blocks * shape.block_size * heads.kv_heads * head_dim;
        let storage = match dtype {
            KvDtype::Bf16 => Storage::Brain { keys: Buffer::zeroed(len), values: Buffer::zeroed(len) },
            KvDtype::Int8 => Storage::Int8 {
                keys: Buffer::zeroed(len),
                values: Buffer::zeroed(len),
                scales: Buffer::zeroed(2 * len / GROUP),
            },
            KvDtype::F16 | KvDtype::Fp8 => unreachable!("`CpuBackend::with_kv_dtype` refuses it"),
        };
        KvCache { storage, shape, kv_heads: heads.kv_heads, head_dim }
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry { block_size: self.shape.block_size, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }
}

/// Offsets into a cache.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub block_size: usize,
    kv_heads: usize,
    pub head_dim: usize,
}

impl Geometry {
    /// Of the keys or values of the tokens from `offset` (a whole pair, quad or part) in `block`.
    #[inline(always)]
    pub(super) fn at(self, block: usize, head: usize, offset: usize) -> usize {
        ((block * self.kv_heads + head) * self.block_size + offset) * self.head_dim
    }

    /// Of the scales of keys, or of values, from `offset` on in `block`, for one group of dimensions.
    #[inline(always)]
    pub(super) fn scales_at(
        self,
        block: usize,
        head: usize,
        offset: usize,
        (values, group): (bool, usize),
    ) -> usize {
        let head = (block * self.kv_heads + head) * 2 + usize::from(values);
        (head * (self.head_dim / GROUP) + group) * self.block_size + offset
    }
}
