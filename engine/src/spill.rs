//! Blocks beyond memory: what the prefix cache evicts may be kept in a second tier, and read back on a hit where that is
//! faster than computing it anew.
//!
//! A tier may lose anything at any time; it never gives back anything but what was put under a digest.

mod disk;

pub use disk::{DiskTier, SpillError};

use crate::kv::{BlockId, Digest};
use crate::runner::{Runner, RunnerError};
use crate::scheduler::Restore;

/// Where evicted blocks go.
pub trait SpillTier: Send {
    /// Appends the digests that have become readable (true) or are so no longer since the last call.
    fn changes(&mut self, out: &mut Vec<(Digest, bool)>);

    /// Takes a block's bytes, or not; never waits for a device.
    fn put(&mut self, digest: Digest, bytes: Vec<u8>);

    /// Fills `bytes` with what was put under `digest`. False: it cannot be had any more.
    fn get(&mut self, digest: &Digest, bytes: &mut Vec<u8>) -> bool;
}

/// Weight of the latest read in the estimate of what one costs.
const READ_WEIGHT: f64 = 0.1;
/// Blocks a step reads back at most while nobody decodes.
const RESTORES_MAX: usize = 64;

/// The tier, and what reading from it costs.
pub(crate) struct Spill {
    tier: Box<dyn SpillTier>,
    bytes: Vec<u8>,
    read_seconds: f64,
}

impl Spill {
    pub(crate) fn new(tier: Box<dyn SpillTier>) -> Spill {
        Spill { tier, bytes: Vec::new(), read_seconds: 0.0 }
    }

    pub(crate) fn changes(&mut self, out: &mut Vec<(Digest, bool)>) {
        self.tier.changes(out);
    }

    /// Blocks worth reading back in a step: none if computing one takes no longer (`compute_seconds`), and as many as
    /// fit `seconds`, which is what those who decode may have to wait; `None` if nobody does.
    pub(crate) fn restores(&self, compute_seconds: f64, seconds: Option<f64>) -> usize {
        // While nothing is known about either, one is tried.
        if self.read_seconds > compute_seconds && compute_seconds > 0.0 {
            return 0;
        }
        match seconds {
            None => RESTORES_MAX,
            Some(seconds) => ((seconds / self.read_seconds.max(1e-9)) as usize).clamp(1, RESTORES_MAX),
        }
    }

    pub(crate) fn keep(
        &mut self,
        runner: &mut dyn Runner,
        block: BlockId,
        digest: Digest,
    ) -> Result<(), RunnerError> {
        let mut bytes = Vec::with_capacity(runner.block_bytes());
        runner.read_block(block, &mut bytes)?;
        self.tier.put(digest, bytes);
        Ok(())
    }

    /// Whether the block now holds what it was to.
    pub(crate) fn restore(&mut self, runner: &mut dyn Runner, restore: &Restore) -> Result<bool, RunnerError> {
        let found = self.tier.get(&restore.digest, &mut self.bytes) && self.bytes.len() == runner.block_bytes();
        if found {
            runner.write_block(restore.block, &self.bytes)?;
        }
        Ok(found)
    }

    /// Reading a block took `seconds`.
    pub(crate) fn learn(&mut self, seconds: f64) {
        self.read_seconds += READ_WEIGHT * (seconds - self.read_seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nowhere;

    impl SpillTier for Nowhere {
        fn changes(&mut self, _: &mut Vec<(Digest, bool)>) {}

        fn put(&mut self, _: Digest, _: Vec<u8>) {}

        fn get(&mut self, _: &Digest, _: &mut Vec<u8>) -> bool {
            false
        }
    }

    #[test]
    fn blocks_are_read_back_where_that_is_faster_and_streams_do_not_notice() {
        let mut spill = Spill::new(Box::new(Nowhere));
        assert_eq!(spill.restores(0.0, None), RESTORES_MAX);
        for _ in 0..100 {
            spill.learn(1e-3);
        }
        assert_eq!(spill.restores(5e-3, None), RESTORES_MAX);
        assert_eq!(spill.restores(5e-3, Some(4.1e-3)), 4);
        assert_eq!(spill.restores(5e-3, Some(0.1e-3)), 1, "prompts must get through");
        assert_eq!(spill.restores(0.5e-3, None), 0);
    }
}
