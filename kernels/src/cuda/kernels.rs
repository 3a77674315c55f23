//! Every kernel there is, and the most shared memory a launch of it asks for.

use super::logits::RANK_SHARED;
use crate::backend::KvDtype;

/// Bytes of a linear kernel's tile of sums.
const SMALL: usize = 512;
const LARGE: usize = 8 * SMALL;

/// Tiles of 16 outputs and rows of a block of kernels/cuda/linear_staged.cuh, and its stages.
pub(super) const STAGED_TILES: usize = 8;
pub(super) const STAGED_ROWS: usize = 64;
const STAGES: usize = 4;

/// kernels/cuda/low_rank.cu: sums of 8 warps; 8 rows of 64 ranks, and 4 places between them.
pub(super) const SHRINK_SHARED: usize = 8 * 128 * 4;
pub(super) const GROW_SHARED: usize = 8 * 68 * 4;

/// All stages, from the bytes of a tile's weights and of a row in one of them.
const fn staged(tile: usize, row: usize) -> usize {
    STAGES * (STAGED_TILES * tile + STAGED_ROWS * row)
}

/// Names as in kernels/cuda, and bytes of dynamic shared memory: all but attention over the cache.
const PLAIN: [(&str, usize); 36] = [
    ("embed", 0),
    ("rms_norm", 32),
    ("layer_norm", 32),
    ("rms_norm_in_place", 32),
    ("activate", 0),
    ("to_rows", 0),
    ("add_bias", 0),
    ("add_scaled", 0),
    ("copy_columns", 0),
    ("scatter_add", 0),
    ("linear_four_1x1", SMALL),
    ("linear_four_2x4", LARGE),
    ("linear_four_staged", staged(256 + 64, 48 + 8)),
    ("linear_eight_1x1", SMALL),
    ("linear_eight_2x4", LARGE),
    ("linear_eight_staged", staged(512 + 32, 48 + 8)),
    ("linear_brain_1x1", SMALL),
    ("linear_brain_2x4", LARGE),
    ("linear_brain_staged", staged(512, 96)),
    ("linear_half_1x1", SMALL),
    ("linear_half_2x4", LARGE),
    ("linear_half_staged", staged(512, 96)),
    ("linear_single_1x1", SMALL),
    ("linear_single_2x4", LARGE),
    ("linear_single_staged", staged(1024, 96)),
    ("low_rank_shrink", SHRINK_SHARED),
    ("low_rank_grow", GROW_SHARED),
    ("rope_table", 0),
    ("rope_write_bf16", 0),
    ("rope_write_f16", 0),
    ("rope_write_fp8", 0),
    ("rope_write_int8", 0),
    ("merge_partitions", 0),
    ("finish_logits", 0),
    ("rank_chunks", RANK_SHARED),
    ("merge_chunks", RANK_SHARED),
];

/// One instance of the attention kernels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attention {
    dtype: KvDtype,
    /// Width of a head in the cache.
    dim: usize,
    pub split: &'static str,
    /// Warps a block of it, and bytes of shared memory.
    pub split_warps: u32,
    pub split_shared: usize,
    pub shared: &'static str,
    pub shared_shared: usize,
}

/// Tokens a tile.
const TILE: usize = 16;

/// Keys and values of a tile, rows padded by 16 bytes, and scales where there are any: kernels/cuda/attention.cuh.
const fn stage_bytes(dtype: KvDtype, dim: usize) -> usize {
    match dtype {
        KvDtype::Bf16 | KvDtype::F16 => 2 * TILE * (2 * dim + 16),
        KvDtype::Fp8 => 2 * TILE * (dim + 16),
        KvDtype::Int8 => 2 * TILE * (dim + 16) + 2 * dim,
    }
}

macro_rules! attention {
    ($(($dtype:ident, $name:literal)),*) => {
        &[$(
            attention!(@ $dtype, $name, 32, "32", 4, 3),
            attention!(@ $dtype, $name, 64, "64", 4, 3),
            attention!(@ $dtype, $name, 96, "96", 4, 3),
            attention!(@ $dtype, $name, 128, "128", 2, 3),
            attention!(@ $dtype, $name, 256, "256", 2, 2),
        )*]
    };
    (@ $dtype:ident, $name:literal, $dim:literal, $digits:literal, $warps:literal, $stages:literal) => {
        Attention {
            dtype: KvDtype::$dtype,
            dim: $dim,
            split: concat!("attend_split_", $name, "_", $digits),
            split_warps: $warps,
            split_shared: $warps * 3 * stage_bytes(KvDtype::$dtype, $dim),
            shared: concat!("attend_shared_", $name, "_", $digits),
            // Four warps' totals beside the stages.
            shared_shared: $stages * stage_bytes(KvDtype::$dtype, $dim) + 4 * 4 * TILE * $dim,
        }
    };
}

const ATTENTION: &[Attention] = attention!((Bf16, "bf16"), (F16, "f16"), (Fp8, "fp8"), (Int8, "int8"));

/// Names as in kernels/cuda, and bytes of dynamic shared memory.
pub fn kernels() -> impl Iterator<Item = (&'static str, usize)> {
    let attention = ATTENTION.iter().flat_map(|a| [(a.split, a.split_shared), (a.shared, a.shared_shared)]);
    PLAIN.into_iter().chain(attention)
}

/// The width of head the kernels are made for that holds `head_dim`.
pub(super) fn cache_dim(head_dim: usize) -> usize {
    let widths = ATTENTION.iter().map(|a| a.dim);
    widths.filter(|&dim| dim >= head_dim).min().expect("heads of at most 256 dimensions")
}

/// The attention kernels for heads of `dim`, a width there is.
pub(super) fn attention(dtype: KvDtype, dim: usize) -> Attention {
    let found = ATTENTION.iter().find(|a| a.dtype == dtype && a.dim == dim);
    *found.expect("every kind of cache has kernels of every width")
}

/// Bytes of shared memory of the kernel of this name.
pub(super) fn shared_bytes(kernel: &str) -> usize {
    PLAIN.iter().find(|(name, _)| *name == kernel).map_or(0, |(_, bytes)| *bytes)
}

/// The kernel that writes a cache.
pub(super) fn rope_write(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::Bf16 => "rope_write_bf16",
        KvDtype::F16 => "rope_write_f16",
        KvDtype::Fp8 => "rope_write_fp8",
        KvDtype::Int8 => "rope_write_int8",
    }
}
