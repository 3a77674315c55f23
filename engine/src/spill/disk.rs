//! A tier in one file of fixed-size slots, used in turn.
//!
//! ```text
//! page 0   magic | identity (32) | block bytes (8) | SHA-256 of all before
//! slot i   digest (32) | SHA-256 of digest and bytes (32) | bytes, padded to whole pages
//! ```
//! A slot's bytes are written before its head. Whatever a crash, a full disk or another program leaves behind, a slot
//! whose sum is wrong is a miss. The identity says which model, cache layout and version of rill the bytes belong to; a
//! file of another identity is started over.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use sha2::{Digest as _, Sha256};

use super::SpillTier;
use crate::kv::Digest;

const MAGIC: &[u8; 8] = b"rill-kv1";
const PAGE: u64 = 4096;
/// A slot's head.
const HEAD: usize = 64;
/// Blocks on their way to the file; more are not kept.
const QUEUE: usize = 64;
/// Notices of the writer that nobody has read yet.
const NOTICES: usize = 1024;

/// A tier's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    #[error("{path}: {bytes} bytes are too few: a block takes {slot}")]
    TooSmall { path: PathBuf, bytes: u64, slot: u64 },
}

/// What the file holds, and the thread that writes to it.
pub struct DiskTier {
    file: Arc<File>,
    slot_bytes: u64,
    block_bytes: usize,
    /// What each slot holds and where each digest is, as far as the writer has told.
    digests: HashMap<u64, Digest>,
    slots: HashMap<Digest, u64>,
    /// What was found when the file was opened, until it has been told.
    found: Vec<Digest>,
    jobs: Option<flume::Sender<(Digest, Vec<u8>)>>,
    notices: flume::Receiver<Notice>,
    writer: Option<JoinHandle<()>>,
    lost_before: u64,
}

/// The writer has put `digest` into `slot`, or could not; what was there before is gone.
struct Notice {
    slot: u64,
    digest: Option<Digest>,
}

impl DiskTier {
    /// Opens or makes `kv-blocks` in the directory `path`, of at most `bytes`, for blocks of `block_bytes`.
    pub fn open(path: &Path, bytes: u64, identity: [u8; 32], block_bytes: usize) -> Result<DiskTier, SpillError> {
        let io_error = |error| SpillError::Io { path: path.to_owned(), error };
        std::fs::create_dir_all(path).map_err(io_error)?;
        let slot_bytes = (HEAD as u64 + block_bytes as u64).next_multiple_of(PAGE);
        let slots = bytes.saturating_sub(PAGE) / slot_bytes;
        if slots == 0 || block_bytes == 0 {
            return Err(SpillError::TooSmall { path: path.to_owned(), bytes, slot: slot_bytes });
        }
        let name = path.join("kv-blocks");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&name);
        let mut file = file.map_err(io_error)?;
        if file.try_lock().is_err() {
            return Err(SpillError::InUse(name));
        }
        let head = file_head(identity, block_bytes);
        let mut there = vec![0; head.len()];
        if file.read_exact_at(&mut there, 0).is_err() || there != head {
            file.set_len(0).and_then(|()| file.write_all(&head)).map_err(io_error)?;
        }
        // A smaller bound than last time's holds, too.
        let length = file.metadata().map_err(io_error)?.len().min(PAGE + slots * slot_bytes);
        file.set_len(length).map_err(io_error)?;
        let by_digest = read_index(&file, length, slot_bytes);
        let file = Arc::new(file);
        let (jobs, inbox) = flume::bounded(QUEUE);
        let (notify, notices) = flume::bounded(NOTICES);
        let writer = Writer { file: Arc::clone(&file), slot_bytes, slots, next: by_digest.len() as u64 % slots };
        let thread = std::thread::Builder::new().name("rill-spill".into());
        let thread = thread.spawn(move || writer.run(&inbox, &notify)).map_err(io_error)?;
        Ok(DiskTier {
            file,
            slot_bytes,
            block_bytes,
            found: by_digest.keys().copied().collect(),
            digests: by_digest.iter().map(|(&digest, &slot)| (slot, digest)).collect(),
            slots: by_digest,
            jobs: Some(jobs),
            notices,
            writer: Some(thread),
            lost_before: 0,
        })
    }
}

impl SpillTier for DiskTier {
    fn changes(&mut self, out: &mut Vec<(Digest, bool)>) {
        out.extend(self.found.drain(..).map(|digest| (digest, true)));
        while let Ok(Notice { slot, digest }) = self.notices.try_recv() {
            // What was there may have been put into another slot since.
            if let Some(old) = self.digests.remove(&slot)
                && self.slots.get(&old) == Some(&slot)
            {
                self.slots.remove(&old);
                out.push((old, false));
            }
            if let Some(digest) = digest {
                self.digests.insert(slot, digest);
                self.slots.insert(digest, slot);
                out.push((digest, true));
            }
        }
    }

    fn put(&mut self, digest: Digest, bytes: Vec<u8>) {
        debug_assert_eq!(bytes.len(), self.block_bytes);
        let Some(jobs) = &self.jobs else { return };
        if jobs.try_send((digest, bytes)).is_err() {
            self.lost_before += 1;
            if self.lost_before.is_power_of_two() {
                tracing::debug!(blocks = self.lost_before, "the disk is behind: evicted blocks were not kept");
            }
        }
    }

    fn get(&mut self, digest: &Digest, bytes: &mut Vec<u8>) -> bool {
        let Some(&slot) = self.slots.get(digest) else { return false };
        bytes.resize(self.block_bytes, 0);
        let mut head = [0; HEAD];
        let start = PAGE + slot * self.slot_bytes;
        let read = self.file.read_exact_at(&mut head, start);
        let read = read.and_then(|()| self.file.read_exact_at(bytes, start + HEAD as u64));
        let good = read.is_ok() && head == slot_head(digest, bytes);
        if !good {
            self.slots.remove(digest);
        }
        good
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        self.jobs = None;
        // A writer that waits for its notices to be read finds nobody there.
        let (_, nobody) = flume::bounded(0);
        self.notices = nobody;
        if let Some(writer) = self.writer.take() {
            // What it may have panicked with has been reported by the panic hook.
            let _ = writer.join();
        }
    }
}

/// Writes blocks to slots in turn.
struct Writer {
    file: Arc<File>,
    slot_bytes: u64,
    slots: u64,
    next: u64,
}

impl Writer {
    fn run(mut self, inbox: &flume::Receiver<(Digest, Vec<u8>)>, notify: &flume::Sender<Notice>) {
        let mut failed = false;
        for (digest, bytes) in inbox {
            let slot = self.next;
            self.next = (slot + 1) % self.slots;
            let written = self.write(slot, &digest, &bytes);
            if let (Err(error), false) = (&written, failed) {
                tracing::warn!(%error, "a block could not be kept on disk; later failures are not reported");
                failed = true;
            }
            // The engine is gone: what is still in the queue is written all the same.
            let _ = notify.send(Notice { slot, digest: written.is_ok().then_some(digest) });
        }
    }

    fn write(&self, slot: u64, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let start = PAGE + slot * self.slot_bytes;
        self.file.write_all_at(bytes, start + HEAD as u64)?;
        self.file.write_all_at(&slot_head(digest, bytes), start)
    }
}

fn file_head(identity: [u8; 32], block_bytes: usize) -> Vec<u8> {
    let mut head = [&MAGIC[..], &identity, &(block_bytes as u64).to_le_bytes()].concat();
    let sum: [u8; 32] = Sha256::digest(&head).into();
    head.extend(sum);
    head
}

fn slot_head(digest: &Digest, bytes: &[u8]) -> [u8; HEAD] {
    let mut hasher = Sha256::new();
    hasher.update(digest.0);
    hasher.update(bytes);
    let mut head = [0; HEAD];
    head[..32].copy_from_slice(&digest.0);
    head[32..].copy_from_slice(&hasher.finalize());
    head
}

/// The digests of all slots. Their bytes are checked when they are read.
fn read_index(file: &File, length: u64, slot_bytes: u64) -> HashMap<Digest, u64> {
    let mut index = HashMap::new();
    for slot in 0..length.saturating_sub(PAGE).div_ceil(slot_bytes) {
        let mut digest = [0; 32];
        let read = file.read_exact_at(&mut digest, PAGE + slot * slot_bytes);
        if read.is_ok() && digest != [0; 32] {
            index.insert(Digest(digest), slot);
        }
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: usize = 5000;

    fn digest(i: u32) -> Digest {
        Digest::root(&None).then(&[i])
    }

    fn bytes(i: u32) -> Vec<u8> {
        (0..BLOCK as u32).map(|at| (at.wrapping_mul(31) ^ i.wrapping_mul(97)) as u8).collect()
    }

    fn open(path: &Path, slots: u64) -> DiskTier {
        DiskTier::open(path, PAGE + slots * 8192, [7; 32], BLOCK).unwrap()
    }

    /// Waits until as many changes have been told as there must be.
    fn changes(tier: &mut DiskTier, count: usize) -> Vec<(Digest, bool)> {
        let mut seen = Vec::new();
        while seen.len() < count {
            tier.changes(&mut seen);
            std::thread::yield_now();
        }
        seen
    }

    fn get(tier: &mut DiskTier, i: u32) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        tier.get(&digest(i), &mut out).then_some(out)
    }

    #[test]
    fn what_was_put_comes_back_also_after_a_restart_and_the_oldest_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut tier = open(dir.path(), 3);
        for i in 0..4 {
            tier.put(digest(i), bytes(i));
        }
        let told = changes(&mut tier, 5);
        assert_eq!(told[3..], [(digest(0), false), (digest(3), true)]);
        assert_eq!(get(&mut tier, 0), None);
        for i in 1..4 {
            assert_eq!(get(&mut tier, i), Some(bytes(i)));
        }
        assert!(matches!(DiskTier::open(dir.path(), 1 << 20, [7; 32], BLOCK), Err(SpillError::InUse(_))));
        drop(tier);
        let mut tier = open(dir.path(), 3);
        assert_eq!(changes(&mut tier, 3).len(), 3);
        for i in 1..4 {
            assert_eq!(get(&mut tier, i), Some(bytes(i)));
        }
        drop(tier);
        // Another model's blocks are none of ours.
        let mut other = DiskTier::open(dir.path(), 1 << 20, [8; 32], BLOCK).unwrap();
        assert_eq!(get(&mut other, 1), None);
    }

    #[test]
    fn a_bound_that_holds_no_block_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = DiskTier::open(dir.path(), 5000, [0; 32], BLOCK).err().unwrap();
        assert!(error.to_string().contains("5000 bytes are too few: a block takes 8192"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Whatever happens to the file, what comes back is right or nothing does.
        #[test]
        fn damage_is_a_miss(
            at in prop::collection::vec((0usize..4096 + 3 * 8192, any::<u8>()), 1..20),
            cut in prop::option::of(0u64..4096 + 3 * 8192),
            while_open: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut tier = open(dir.path(), 3);
            for i in 0..3 {
                tier.put(digest(i), bytes(i));
            }
            changes(&mut tier, 3);
            let file = OpenOptions::new().write(true).open(dir.path().join("kv-blocks")).unwrap();
            for &(at, byte) in &at {
                file.write_all_at(&[byte], at as u64).unwrap();
            }
            if let Some(length) = cut {
                file.set_len(length).unwrap();
            }
            drop(file);
            if !while_open {
                drop(tier);
                tier = open(dir.path(), 3);
            }
            for i in 0..3 {
                let found = get(&mut tier, i);
                prop_assert!(found.is_none() || found == Some(bytes(i)));
            }
        }
    }
}
