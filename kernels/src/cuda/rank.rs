//! The largest logits of each row, found on the device, so that rows need not be copied: kernels/cuda/sample.cu.

use super::backend::{CudaBackend, Linear, Rows};
use super::launch::Launch;
use super::memory::BytesMut;
use crate::backend::{Backend, BestLogits};

/// Logits a block ranks, and candidates of a row that one block merges.
const CHUNK: usize = 4096;
/// Most that are worth their time: each costs a reduction over a block.
const RANKED_MAX: usize = 64;
/// Bytes of shared memory.
pub(super) const RANK_SHARED: usize = 2 * 8 * 8;

/// How many logits of a row of `vocab` can be ranked.
pub(super) fn ranked_max(vocab: usize) -> usize {
    RANKED_MAX.min(CHUNK / vocab.div_ceil(CHUNK).max(1))
}

impl CudaBackend {
    /// See [`Backend::best_logits`].
    pub(super) fn rank(&mut self, layer: &Linear, x: &Rows, scale: f32, count: usize) -> Vec<BestLogits> {
        let vocab = layer.rows();
        assert!((1..=ranked_max(vocab)).contains(&count), "{count} logits of a row of {vocab}");
        let mut logits = std::mem::take(&mut self.logits);
        self.linear(layer, x, &mut logits);
        let (rows, chunks) = (x.rows, vocab.div_ceil(CHUNK));
        let words = count + 1;
        self.device.reserve(&mut self.candidates, rows * chunks * words * 8);
        self.device.reserve(&mut self.best, rows * words * 8);
        let (candidates, best) = (self.candidates.pointer(), self.best.pointer());
        let args = [logits.data.pointer().into(), vocab.into(), scale.into(), count.into(), candidates.into()];
        let launch = Launch {
            kernel: "rank_chunks",
            grid: [chunks as u32, rows as u32, 1],
            threads: 256,
            shared_bytes: RANK_SHARED,
        };
        // SAFETY: `logits` holds rows of `vocab`; there is room for `words` words a chunk.
        unsafe { self.device.launch(launch, &args) };
        let args = [candidates.into(), chunks.into(), count.into(), best.into()];
        let launch = Launch { kernel: "merge_chunks", grid: [rows as u32, 1, 1], ..launch };
        // SAFETY: candidates were just written, at most as many as a block merges; there is room for the best.
        unsafe { self.device.launch(launch, &args) };
        let mut ranks = vec![0_u64; rows * words];
        self.device.download(&self.best, 0, ranks.bytes_mut());
        self.logits = logits;
        let row = |ranks: &[u64]| BestLogits {
            finite: ranks[count] == 0,
            ranked: ranks[..count].iter().take_while(|&&rank| rank != 0).map(|&rank| id_and_value(rank)).collect(),
        };
        ranks.chunks_exact(words).map(row).collect()
    }
}

/// What a rank was made of.
fn id_and_value(rank: u64) -> (u32, f32) {
    let ordered = (rank >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    (!(rank as u32), f32::from_bits(bits))
}
