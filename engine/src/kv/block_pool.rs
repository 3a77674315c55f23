//! All blocks of the KV cache and the state of each: free, evictable (cached, held by nobody), or held.

use super::prefix_cache::{Digest, PrefixCache};

/// Index of a block in the KV cache.
pub type BlockId = u32;

const NONE: u32 = u32::MAX;

/// How many blocks are in which state. The sum is the size of the pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockUsage {
    pub free: usize,
    pub evictable: usize,
    pub held: usize,
}

#[derive(Debug, Clone)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    /// Links of the eviction list; `NONE` at its ends and off the list.
    older: u32,
    newer: u32,
}

/// A fixed set of blocks. Taking one prefers free blocks, then evicts the cached block unused for longest.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Ends of the eviction list.
    oldest: u32,
    newest: u32,
    evictable: usize,
    /// `None`: prefix caching is off.
    cache: Option<PrefixCache>,
    /// Blocks evicted since the last look, and what they held.
    evicted: Vec<(BlockId, Digest)>,
}

impl BlockPool {
    pub fn new(num_blocks: usize, block_size: usize, prefix_caching: bool) -> BlockPool {
        assert!(block_size > 0 && num_blocks < NONE as usize);
        BlockPool {
            block_size,
            blocks: vec![Block { holders: 0, older: NONE, newer: NONE }; num_blocks],
            // Lowest ids first: a lightly used cache stays in few pages.
            free: (0..num_blocks as BlockId).rev().collect(),
            oldest: NONE,
            newest: NONE,
            evictable: 0,
            cache: prefix_caching.then(|| PrefixCache::new(num_blocks)),
            evicted: Vec::new(),
        }
    }

    /// Tokens a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be allocated now.
    pub fn available(&self) -> usize {
        self.free.len() + self.evictable
    }

    pub fn usage(&self) -> BlockUsage {
        BlockUsage { free: self.free.len(), evictable: self.evictable, held: self.blocks.len() - self.available() }
    }

    /// A block for its caller alone, content undefined; `None` when every block is held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.evict()?,
        };
        self.blocks[block as usize].holders = 1;
        Some(block)
    }

    /// One more holder for a cached block.
    pub fn acquire(&mut self, block: BlockId) {
        if self.blocks[block as usize].holders == 0 {
            self.unlink(block);
        }
        self.blocks[block as usize].holders += 1;
    }

    /// One holder fewer. The last one leaves a cached block evictable, any other free. Release a sequence's
    /// blocks last one first, so that the ends of prefixes are evicted before their beginnings.
    pub fn release(&mut self, block: BlockId) {
        let holders = &mut self.blocks[block as usize].holders;
        debug_assert!(*holders > 0, "block {block} released more often than taken");
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        if self.is_cached(block) {
            self.link_newest(block);
        } else {
            self.free.push(block);
        }
    }

    /// Holders of `block`.
    pub fn holders(&self, block: BlockId) -> u32 {
        self.blocks[block as usize].holders
    }

    pub fn is_cached(&self, block: BlockId) -> bool {
        self.digest(block).is_some()
    }

    pub fn is_evictable(&self, block: BlockId) -> bool {
        self.blocks[block as usize].holders == 0 && self.is_cached(block)
    }

    /// Whether blocks are ever found by their content.
    pub fn is_caching(&self) -> bool {
        self.cache.is_some()
    }

    /// The cached block of this digest.
    pub fn find(&self, digest: &Digest) -> Option<BlockId> {
        self.cache.as_ref()?.find(digest)
    }

    /// What `block` holds, if it is cached.
    pub fn digest(&self, block: BlockId) -> Option<Digest> {
        self.cache.as_ref()?.digest(block)
    }

    /// The blocks evicted since the last call, the first one first, and what they held: until something is written to
    /// them, they still do.
    pub fn take_evicted(&mut self) -> impl Iterator<Item = (BlockId, Digest)> + '_ {
        self.evicted.drain(..)
    }

    /// Makes the full block `block`, held by the caller, findable by its content. If another block already holds
    /// the same content the caller's block is released and the caller holds that one instead, which is returned:
    /// equal prefixes have bit-equal keys and values, so which of the two is kept cannot be told apart.
    pub fn publish(&mut self, block: BlockId, digest: Digest) -> BlockId {
        debug_assert!(self.holders(block) > 0);
        let Some(cache) = &mut self.cache else { return block };
        match cache.find(&digest) {
            Some(other) if other != block => {
                self.acquire(other);
                self.release(block);
                other
            }
            Some(_) => block,
            None => {
                cache.insert(block, digest);
                block
            }
        }
    }

    /// Every block is in exactly one state and every list agrees. `Err` says what is wrong.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut seen = vec![0u8; self.blocks.len()];
        for &block in &self.free {
            seen[block as usize] += 1;
            if self.holders(block) > 0 || self.is_cached(block) {
                return Err(format!("free block {block} is held or cached"));
            }
        }
        let mut listed = 0;
        let (mut block, mut previous) = (self.oldest, NONE);
        while block != NONE {
            listed += 1;
            if listed > self.evictable {
                return Err(format!("the eviction list is longer than its count, {}", self.evictable));
            }
            seen[block as usize] += 1;
            if self.blocks[block as usize].older != previous || !self.is_evictable(block) {
                return Err(format!("block {block} does not belong where it is on the eviction list"));
            }
            (previous, block) = (block, self.blocks[block as usize].newer);
        }
        if listed != self.evictable || previous != self.newest {
            return Err(format!("{listed} blocks on the eviction list, {} counted", self.evictable));
        }
        for (block, &times) in seen.iter().enumerate() {
            let held = self.blocks[block].holders > 0;
            if usize::from(times) + usize::from(held) != 1 {
                return Err(format!("block {block}: listed {times} times, held: {held}"));
            }
        }
        self.cache.as_ref().map_or(Ok(()), PrefixCache::check_invariants)
    }

    fn evict(&mut self) -> Option<BlockId> {
        let block = self.oldest;
        if block == NONE {
            return None;
        }
        self.unlink(block);
        let digest = self.cache.as_mut()?.remove(block)?;
        self.evicted.push((block, digest));
        Some(block)
    }

    fn link_newest(&mut self, block: BlockId) {
        let older = self.newest;
        self.blocks[block as usize].older = older;
        self.blocks[block as usize].newer = NONE;
        match older {
            NONE => self.oldest = block,
            older => self.blocks[older as usize].newer = block,
        }
        self.newest = block;
        self.evictable += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.blocks[block as usize].older = NONE;
        self.blocks[block as usize].newer = NONE;
        self.evictable -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn root() -> Digest {
        Digest::root(&None)
    }

    #[test]
    fn hands_out_every_block_once() {
        let mut pool = BlockPool::new(3, 2, true);
        let mut taken: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(pool.allocate(), None);
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2]);
        assert_eq!(pool.usage(), BlockUsage { free: 0, evictable: 0, held: 3 });
        pool.check_invariants().unwrap();
    }

    #[test]
    fn evicts_the_block_released_first() {
        let mut pool = BlockPool::new(2, 1, true);
        let a = pool.allocate().unwrap();
        assert_eq!(pool.publish(a, root().then(&[1])), a);
        let b = pool.allocate().unwrap();
        let ends = pool.digest(a).unwrap().then(&[2]);
        assert_eq!(pool.publish(b, ends), b);
        // Tail first: b is older on the list than a.
        pool.release(b);
        pool.release(a);
        assert_eq!(pool.usage(), BlockUsage { free: 0, evictable: 2, held: 0 });
        assert_eq!(pool.allocate(), Some(b));
        assert_eq!(pool.take_evicted().collect::<Vec<_>>(), [(b, ends)]);
        assert_eq!(pool.find(&root().then(&[1])), Some(a));
        pool.check_invariants().unwrap();
    }

    #[test]
    fn equal_content_is_held_once() {
        let mut pool = BlockPool::new(3, 1, true);
        let a = pool.allocate().unwrap();
        let b = pool.allocate().unwrap();
        assert_eq!(pool.publish(a, root().then(&[1])), a);
        assert_eq!(pool.publish(b, root().then(&[1])), a);
        assert_eq!(pool.holders(a), 2);
        assert_eq!(pool.usage(), BlockUsage { free: 2, evictable: 0, held: 1 });
        pool.check_invariants().unwrap();
    }

    #[test]
    fn nothing_is_cached_when_caching_is_off() {
        let mut pool = BlockPool::new(1, 1, false);
        let a = pool.allocate().unwrap();
        assert_eq!(pool.publish(a, root().then(&[1])), a);
        assert_eq!(pool.find(&root().then(&[1])), None);
        pool.release(a);
        assert_eq!(pool.usage(), BlockUsage { free: 1, evictable: 0, held: 0 });
    }

    proptest! {
        /// Random tables grow over shared content and are released tail first; the states always add up.
        #[test]
        fn states_stay_exclusive(actions in prop::collection::vec((0u8..4, 0usize..4, 0u32..3), 1..300)) {
            let mut pool = BlockPool::new(6, 1, true);
            let mut tables: Vec<Vec<BlockId>> = vec![Vec::new(); 4];
            for (action, table, token) in actions {
                let parent = tables[table].last().map_or(Some(root()), |&b| pool.digest(b));
                let digest = parent.map(|parent| parent.then(&[token]));
                match action {
                    0 | 1 => if let (Some(digest), Some(block)) = (digest, pool.allocate()) {
                        tables[table].push(pool.publish(block, digest));
                    },
                    2 => if let Some(hit) = digest.and_then(|digest| pool.find(&digest)) {
                        pool.acquire(hit);
                        tables[table].push(hit);
                    },
                    _ => for block in tables[table].drain(..).rev() {
                        pool.release(block);
                    },
                }
                pool.check_invariants().map_err(TestCaseError::fail)?;
                let usage = pool.usage();
                prop_assert_eq!(usage.free + usage.evictable + usage.held, 6);
                for block in 0..6 {
                    let held = tables.iter().flatten().filter(|&&b| b == block).count();
                    prop_assert_eq!(pool.holders(block) as usize, held);
                }
            }
        }
    }
}
