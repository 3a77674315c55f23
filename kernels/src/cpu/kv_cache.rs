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
use crate::memory::{Buffer, Shared};
use crate::packed::GROUP;
use crate::pool::Pool;

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

/// Bytes that a thread touches at a time: a few huge pages.
const TOUCHED: usize = 8 << 20;
/// The smallest page there is.
const PAGE: usize = 4096;

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

    /// Has the operating system give all of a new cache's memory.
    pub(super) fn touch(&mut self, pool: &mut Pool) {
        for bytes in self.storage.bytes_mut() {
            let (data, len) = (Shared::new(bytes), bytes.len());
            pool.run(len.div_ceil(TOUCHED), &|chunk| {
                for at in (chunk * TOUCHED..len.min((chunk + 1) * TOUCHED)).step_by(PAGE) {
                    // SAFETY: inside the buffer, whose parts belong to one chunk each; a new cache is all zeros. Volatile,
                    // since writing what is there already is the point.
                    unsafe { data.at(at).write_volatile(0) }
                }
            });
        }
    }

    /// Copies whole blocks, one pair (from, to) after the other.
    pub(super) fn copy_blocks(&mut self, pairs: &[(u32, u32)]) {
        let blocks = self.shape.blocks;
        for bytes in self.storage.bytes_mut() {
            let size = bytes.len() / blocks;
            for &(from, to) in pairs {
                let from = from as usize * size;
                bytes.copy_within(from..from + size, to as usize * size);
            }
        }
    }

    /// Bytes of one block.
    pub(super) fn block_bytes(&self) -> usize {
        self.storage.bytes().iter().map(|bytes| bytes.len()).sum::<usize>() / self.shape.blocks
    }

    /// Appends the bytes of `block`.
    pub(super) fn read_block(&self, block: u32, out: &mut Vec<u8>) {
        for bytes in self.storage.bytes() {
            let size = bytes.len() / self.shape.blocks;
            out.extend_from_slice(&bytes[block as usize * size..][..size]);
        }
    }

    /// Puts back what [`KvCache::read_block`] gave.
    pub(super) fn write_block(&mut self, block: u32, mut from: &[u8]) {
        let blocks = self.shape.blocks;
        for bytes in self.storage.bytes_mut() {
            let size = bytes.len() / blocks;
            let (part, rest) = from.split_at(size);
            bytes[block as usize * size..][..size].copy_from_slice(part);
            from = rest;
        }
        assert!(from.is_empty(), "a block of another size");
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry { block_size: self.shape.block_size, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }
}

impl Storage {
    /// Each buffer holds an equal share of every block, block after block.
    fn bytes(&self) -> [&[u8]; 3] {
        match self {
            Storage::Brain { keys, values } => [keys.bytes(), values.bytes(), &[]],
            Storage::Int8 { keys, values, scales } => [keys.bytes(), values.bytes(), scales.bytes()],
        }
    }

    fn bytes_mut(&mut self) -> [&mut [u8]; 3] {
        match self {
            Storage::Brain { keys, values } => [keys.bytes_mut(), values.bytes_mut(), &mut []],
            Storage::Int8 { keys, values, scales } => [keys.bytes_mut(), values.bytes_mut(), scales.bytes_mut()],
        }
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
