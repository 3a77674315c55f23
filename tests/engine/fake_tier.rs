//! A tier in memory that forgets, delays and damages what it was given: as a disk may, but from a seed.

use std::collections::VecDeque;

use rill_engine::kv::Digest;
use rill_engine::spill::SpillTier;

use crate::workload::Random;

pub struct FakeTier {
    random: Random,
    /// The latest last.
    kept: VecDeque<(Digest, Vec<u8>)>,
    room: usize,
    told: Vec<(Digest, bool)>,
}

impl FakeTier {
    pub fn new(mut random: Random) -> FakeTier {
        let room = random.between(1, 60);
        FakeTier { random, kept: VecDeque::new(), room, told: Vec::new() }
    }
}

impl SpillTier for FakeTier {
    fn changes(&mut self, out: &mut Vec<(Digest, bool)>) {
        // Now and then the news come late: by then they may be wrong.
        if !self.random.one_in(3) {
            out.append(&mut self.told);
        }
    }

    fn put(&mut self, digest: Digest, bytes: Vec<u8>) {
        if self.random.one_in(10) {
            return;
        }
        self.told.push((digest, true));
        self.kept.push_back((digest, bytes));
        if self.kept.len() > self.room
            && let Some((old, _)) = self.kept.pop_front()
            && !self.kept.iter().any(|(digest, _)| *digest == old)
        {
            self.told.push((old, false));
        }
    }

    fn get(&mut self, digest: &Digest, bytes: &mut Vec<u8>) -> bool {
        let found = self.kept.iter().find(|(kept, _)| kept == digest);
        match found {
            Some((_, kept)) if !self.random.one_in(10) => {
                bytes.clone_from(kept);
                true
            }
            // Damaged, or gone.
            _ => false,
        }
    }
}
