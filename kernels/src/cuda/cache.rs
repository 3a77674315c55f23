//! Keys and values of a layer in device memory, and whole blocks of them.

use super::kernels::cache_dim;
use super::memory::{Device, DeviceBuffer};
use crate::backend::{AttentionShape, CacheShape, KvDtype};
use crate::packed::GROUP;

/// Keys and values of one layer; kernels/cuda/kv.cuh draws them.
pub struct KvCache {
    pub(super) keys: DeviceBuffer,
    pub(super) values: DeviceBuffer,
    /// Of both, where bytes have scales.
    pub(super) scales: DeviceBuffer,
    pub(super) dtype: KvDtype,
    pub(super) shape: CacheShape,
}

/// Bytes of a number in a cache.
fn number_bytes(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::Bf16 | KvDtype::F16 => 2,
        KvDtype::Int8 | KvDtype::Fp8 => 1,
    }
}

/// Bytes of a group's scale; 0: there are none.
fn scale_bytes(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::Int8 => 2,
        KvDtype::Bf16 | KvDtype::F16 | KvDtype::Fp8 => 0,
    }
}

impl KvCache {
    pub(super) fn new(device: &Device, dtype: KvDtype, shape: CacheShape, heads: AttentionShape) -> KvCache {
        assert!(shape.block_size.is_multiple_of(16), "blocks hold a multiple of 16 tokens");
        let numbers = shape.blocks * shape.block_size * heads.kv_heads * cache_dim(heads.head_dim);
        let bytes = numbers * number_bytes(dtype);
        KvCache {
            keys: device.allocate(bytes),
            values: device.allocate(bytes),
            scales: device.allocate(2 * numbers * scale_bytes(dtype) / GROUP),
            dtype,
            shape,
        }
    }

    pub(super) fn bytes_per_token(dtype: KvDtype, heads: AttentionShape) -> usize {
        let numbers = 2 * heads.kv_heads * cache_dim(heads.head_dim);
        numbers * number_bytes(dtype) + numbers / GROUP * scale_bytes(dtype)
    }

    pub(super) fn copy_blocks(&mut self, device: &Device, pairs: &[(u32, u32)]) {
        for part in [&mut self.keys, &mut self.values, &mut self.scales] {
            let size = part.len() / self.shape.blocks;
            for &(from, to) in pairs {
                device.copy_within(part, from as usize * size, to as usize * size, size);
            }
        }
    }

    pub(super) fn block_bytes(&self) -> usize {
        [&self.keys, &self.values, &self.scales].map(|part| part.len() / self.shape.blocks).iter().sum()
    }

    pub(super) fn read_block(&self, device: &Device, block: u32, out: &mut Vec<u8>) {
        for part in [&self.keys, &self.values, &self.scales] {
            let (size, start) = (part.len() / self.shape.blocks, out.len());
            out.resize(start + size, 0);
            device.download(part, block as usize * size, &mut out[start..]);
        }
    }

    pub(super) fn write_block(&mut self, device: &Device, block: u32, bytes: &[u8]) {
        let mut rest = bytes;
        for part in [&mut self.keys, &mut self.values, &mut self.scales] {
            let (own, others) = rest.split_at(part.len() / self.shape.blocks);
            device.upload_at(part, block as usize * own.len(), own);
            rest = others;
        }
    }
}
