//! Logits in device memory: finished, ranked, and as much of them as is wanted copied: kernels/cuda/sample.cu.

use super::launch::{DevicePointer, Launch};
use super::matrix::{Matrix, Vector};
use super::memory::{Bytes, BytesMut, Device, DeviceBuffer};
use crate::backend::{BestLogits, LogitFinish, Ranking};

/// Logits a block takes, and candidates of a row that one block merges.
const CHUNK: usize = 4096;
/// Most that are worth their time: each costs a reduction over a block.
const RANKED_MAX: usize = 64;
/// Bytes of shared memory.
pub(super) const RANK_SHARED: usize = 2 * 8 * 8;

/// Rows of the last projection, and what was made of them.
#[derive(Default)]
pub(super) struct Logits {
    pub(super) rows: Matrix,
    /// How many of each row were ranked.
    count: usize,
    /// Ranks of chunks of rows, and of rows.
    candidates: DeviceBuffer,
    best: DeviceBuffer,
    rates: DeviceBuffer,
}

impl Logits {
    /// How many logits of a row of `vocab` can be ranked.
    pub(super) fn ranked_max(vocab: usize) -> usize {
        RANKED_MAX.min(CHUNK / vocab.div_ceil(CHUNK).max(1))
    }

    fn launch(&self, kernel: &'static str) -> Launch {
        let grid = [self.rows.width.div_ceil(CHUNK) as u32, self.rows.rows as u32, 1];
        Launch { kernel, grid, threads: 256, shared_bytes: 0 }
    }

    /// See [`LogitFinish`].
    pub(super) fn finish(&mut self, device: &Device, finish: LogitFinish<'_, Vector>) {
        let LogitFinish { bias, scale, softcap } = finish;
        if bias.is_none() && scale == 1.0 && softcap.is_none() {
            return;
        }
        assert!(bias.is_none_or(|bias| bias.len == self.rows.width), "a bias has the width of its rows");
        let args = [
            self.rows.data.pointer().into(),
            bias.map_or(DevicePointer::default(), |bias| bias.data.pointer()).into(),
            self.rows.width.into(),
            scale.into(),
            softcap.unwrap_or(0.0).into(),
        ];
        // SAFETY: rows and bias are as wide as they say.
        unsafe { device.launch(self.launch("finish_logits"), &args) };
    }

    /// Ranks the best of each row.
    pub(super) fn rank(&mut self, device: &Device, ranking: &Ranking) {
        let (rows, vocab, count) = (self.rows.rows, self.rows.width, ranking.count);
        assert!((1..=Logits::ranked_max(vocab)).contains(&count), "{count} logits of a row of {vocab}");
        assert!(ranking.rates.is_empty() || ranking.rates.len() == rows, "a rate for each row");
        self.count = count;
        let (chunks, words) = (vocab.div_ceil(CHUNK), count + 1);
        device.reserve(&mut self.candidates, rows * chunks * words * 8);
        device.reserve(&mut self.best, rows * words * 8);
        let rates = if ranking.rates.is_empty() {
            DevicePointer::default()
        } else {
            device.upload(&mut self.rates, ranking.rates.bytes());
            self.rates.pointer()
        };
        let (candidates, best) = (self.candidates.pointer(), self.best.pointer());
        let args = [self.rows.data.pointer().into(), vocab.into(), rates.into(), count.into(), candidates.into()];
        let launch = Launch { shared_bytes: RANK_SHARED, ..self.launch("rank_chunks") };
        // SAFETY: rows are as wide as they say; there is a rate for each, and room for `words` words a chunk.
        unsafe { device.launch(launch, &args) };
        let args = [candidates.into(), chunks.into(), rates.into(), count.into(), best.into()];
        let launch = Launch { kernel: "merge_chunks", grid: [rows as u32, 1, 1], ..launch };
        // SAFETY: candidates were just written, at most as many as a block merges; there is room for the best.
        unsafe { device.launch(launch, &args) };
    }

    /// What was ranked last.
    pub(super) fn best(&self, device: &Device) -> Vec<BestLogits> {
        let count = self.count;
        let mut ranks = vec![0_u64; self.rows.rows * (count + 1)];
        device.download(&self.best, 0, ranks.bytes_mut());
        let row = |ranks: &[u64]| BestLogits {
            finite: ranks[count] as u32 == 0,
            mass: f32::from_bits((ranks[count] >> 32) as u32),
            ranked: ranks[..count].iter().take_while(|&&rank| rank != 0).map(|&rank| id_and_value(rank)).collect(),
        };
        ranks.chunks_exact(count + 1).map(row).collect()
    }
}

/// What a rank was made of.
fn id_and_value(rank: u64) -> (u32, f32) {
    let ordered = (rank >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    (!(rank as u32), f32::from_bits(bits))
}
