//! Attention's work list: which rows meet which tokens in which launch. kernels/cuda/attention.cu says why any list
//! gives a row the same bits.

use crate::backend::{AttentionShape, StepInput};

/// As in attention.cu.
const PARTITION: usize = 256;
const TILE: usize = 16;
/// Rows a block of the shared kernel takes.
const SHARED_ROWS: usize = 64;
/// Sequences with at most this many rows (tokens × query heads of a KV head) go to the split kernel.
const SPLIT_ROWS_MAX: usize = 64;
const WHOLE: u32 = u32::MAX;
/// Words a job.
pub(super) const JOB_WORDS: usize = 8;
/// Words a row to merge.
pub(super) const MERGE_WORDS: usize = 4;

/// One step's work.
#[derive(Debug, Default)]
pub(super) struct WorkList {
    /// Jobs of the split kernel.
    pub split: Vec<u32>,
    /// Jobs of the shared kernel.
    pub shared: Vec<u32>,
    /// Rows with more than one partial state.
    pub merges: Vec<u32>,
    /// Partial states, for each KV head.
    pub partial_rows: usize,
}

impl WorkList {
    /// Lists the work of `input`.
    pub(super) fn fill(&mut self, input: StepInput<'_>, heads: AttentionShape) {
        self.split.clear();
        self.shared.clear();
        self.merges.clear();
        self.partial_rows = 0;
        let group = heads.heads / heads.kv_heads;
        let window = heads.window.unwrap_or(usize::MAX);
        for sequence in 0..input.context_lens.len() {
            let first_row = input.query_starts[sequence] as usize;
            let tokens = input.query_starts[sequence + 1] as usize - first_row;
            let table = input.block_table_starts[sequence] as usize;
            let all = tokens * group;
            let size = if all <= SPLIT_ROWS_MAX { TILE } else { SHARED_ROWS };
            for base in (0..all).step_by(size) {
                let rows = size.min(all - base);
                let position = |row: usize| input.positions[first_row + (base + row) / group] as usize;
                let (first, end) = (position(0) + 1, position(rows - 1) + 1);
                let tile =
                    Tile { table, first_row, base, rows, begin: first.saturating_sub(window) / TILE * TILE, end };
                if all <= SPLIT_ROWS_MAX {
                    self.push_split(tile, group);
                } else {
                    self.shared.extend(tile.job(tile.begin, tile.end, WHOLE));
                }
            }
        }
    }

    fn push_split(&mut self, tile: Tile, group: usize) {
        let partitions = tile.begin / PARTITION..tile.end.div_ceil(PARTITION);
        let count = partitions.len();
        for (number, partition) in partitions.enumerate() {
            let begin = tile.begin.max(partition * PARTITION);
            let end = tile.end.min((partition + 1) * PARTITION);
            let partial = if count == 1 { WHOLE } else { (self.partial_rows + number * tile.rows) as u32 };
            self.split.extend(tile.job(begin, end, partial));
        }
        if count > 1 {
            for r in 0..tile.rows {
                let place = tile.first_row * group + tile.base + r;
                let row = [self.partial_rows + r, tile.rows, count, place];
                self.merges.extend(row.map(|n| n as u32));
            }
            self.partial_rows += count * tile.rows;
        }
    }
}

/// Rows that are computed together: `rows` packed rows of a sequence from `base`, which see tokens `begin..end`.
#[derive(Clone, Copy)]
struct Tile {
    table: usize,
    first_row: usize,
    base: usize,
    rows: usize,
    begin: usize,
    end: usize,
}

impl Tile {
    fn job(&self, begin: usize, end: usize, partial: u32) -> [u32; JOB_WORDS] {
        let [table, first_row, base, rows, begin, end] =
            [self.table, self.first_row, self.base, self.rows, begin, end].map(|n| n as u32);
        [table, first_row, base, rows, begin, end, partial, 0]
    }
}

/// The width of head the kernels are made for that holds `head_dim`.
pub(super) fn cache_dim(head_dim: usize) -> usize {
    [32, 64, 96, 128, 256].into_iter().find(|dim| *dim >= head_dim).unwrap_or(AttentionShape::HEAD_DIM_MAX)
}

/// Name, warps a block and bytes of shared memory of the kernels for heads of `dim`.
pub(super) fn split_kernel(dim: usize) -> (&'static str, u32, usize) {
    let (name, warps) = match dim {
        32 => ("attend_split_32", 4),
        64 => ("attend_split_64", 4),
        96 => ("attend_split_96", 4),
        128 => ("attend_split_128", 2),
        _ => ("attend_split_256", 2),
    };
    (name, warps, warps as usize * 3 * stage_bytes(dim))
}

/// The same for prefill: always four warps.
pub(super) fn shared_kernel(dim: usize) -> (&'static str, usize) {
    let (name, stages) = match dim {
        32 => ("attend_shared_32", 3),
        64 => ("attend_shared_64", 3),
        96 => ("attend_shared_96", 3),
        128 => ("attend_shared_128", 3),
        _ => ("attend_shared_256", 2),
    };
    (name, stages * stage_bytes(dim) + 4 * 4 * TILE * dim)
}

/// Keys and values of a tile, bf16, rows padded by 8.
fn stage_bytes(dim: usize) -> usize {
    2 * TILE * (dim + 8) * 2
}
