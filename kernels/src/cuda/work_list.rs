//! Attention's work list: which rows meet which tokens in which launch. kernels/cuda/attention.cuh says why any list
//! gives a row the same bits.

use crate::backend::{ATTENTION_SPAN, AttentionShape, StepInput};

/// As in attention.cuh.
const PARTITION: usize = 256;
const TILE: usize = 16;
const _: () = assert!(ATTENTION_SPAN.is_multiple_of(TILE), "tiles begin within a row's reach");
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
    /// Fills up both lists of a decode step with jobs that do nothing, to powers of two: a batch of one size has few
    /// lengths of lists, and so few graphs.
    pub(super) fn pad(&mut self) {
        let pad = |list: &mut Vec<u32>, words: usize| {
            let count = list.len() / words;
            if count > 0 {
                list.resize(count.next_power_of_two() * words, 0);
            }
        };
        pad(&mut self.split, JOB_WORDS);
        pad(&mut self.merges, MERGE_WORDS);
    }

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
