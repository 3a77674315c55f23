//! Content → block: finds the block that already holds given tokens after a given prefix.

use std::collections::HashMap;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::BlockId;

/// Requests share cached blocks only with requests of an equal salt; `None` is the common one.
pub type Salt = Option<Arc<str>>;

/// What a block holds and everything before it: SHA-256 over its tokens and its predecessor's digest, back to the salt.
/// Blocks of equal digests hold equal keys and values: nobody can make two contents with one digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Before the first token of sequences of this salt.
    pub fn root(salt: &Salt) -> Digest {
        let mut hasher = Sha256::new();
        match salt {
            None => hasher.update([0]),
            Some(salt) => {
                hasher.update([1]);
                hasher.update(salt.as_bytes());
            }
        }
        Digest(hasher.finalize().into())
    }

    /// After one block of tokens more.
    pub fn then(&self, tokens: &[u32]) -> Digest {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        Digest(hasher.finalize().into())
    }
}

/// Bounded by the pool: at most one entry a block.
#[derive(Debug)]
pub struct PrefixCache {
    blocks: HashMap<Digest, BlockId>,
    /// Indexed by block id.
    digests: Vec<Option<Digest>>,
}

impl PrefixCache {
    pub fn new(num_blocks: usize) -> PrefixCache {
        PrefixCache { blocks: HashMap::new(), digests: vec![None; num_blocks] }
    }

    /// The block of this digest.
    pub fn find(&self, digest: &Digest) -> Option<BlockId> {
        self.blocks.get(digest).copied()
    }

    /// Enters `block`, which is not entered, under a digest that no other has.
    pub fn insert(&mut self, block: BlockId, digest: Digest) {
        let other = self.blocks.insert(digest, block);
        let previous = self.digests[block as usize].replace(digest);
        debug_assert!(other.is_none() && previous.is_none(), "block {block} or its digest was cached already");
    }

    /// Forgets `block`; returns the digest it had.
    pub fn remove(&mut self, block: BlockId) -> Option<Digest> {
        let digest = self.digests[block as usize].take()?;
        self.blocks.remove(&digest);
        Some(digest)
    }

    /// The digest `block` is entered under.
    pub fn digest(&self, block: BlockId) -> Option<Digest> {
        self.digests[block as usize]
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The two tables agree with each other.
    pub fn check_invariants(&self) -> Result<(), String> {
        let cached = self.digests.iter().flatten().count();
        if cached != self.blocks.len() {
            return Err(format!("{cached} cached blocks but {} digests", self.blocks.len()));
        }
        for (block, digest) in self.digests.iter().enumerate() {
            if let Some(digest) = digest
                && self.find(digest) != Some(block as BlockId)
            {
                return Err(format!("block {block} is not found under its own digest"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Digest {
        Digest::root(&None)
    }

    #[test]
    fn finds_only_the_same_tokens_after_the_same_prefix() {
        let mut cache = PrefixCache::new(8);
        let first = root().then(&[1, 2]);
        cache.insert(0, first);
        cache.insert(1, first.then(&[3, 4]));
        assert_eq!(cache.find(&root().then(&[1, 2])), Some(0));
        assert_eq!(cache.find(&root().then(&[1, 2]).then(&[3, 4])), Some(1));
        assert_eq!(cache.find(&root().then(&[3, 4])), None);
        assert_eq!(cache.find(&first.then(&[1, 2])), None);
        assert_eq!(cache.find(&Digest::root(&Some("tenant".into())).then(&[1, 2])), None);
        cache.check_invariants().unwrap();
    }

    #[test]
    fn what_is_removed_is_not_found() {
        let mut cache = PrefixCache::new(2);
        let digest = root().then(&[1]);
        cache.insert(0, digest);
        assert_eq!((cache.remove(0), cache.remove(0)), (Some(digest), None));
        assert_eq!(cache.find(&digest), None);
        cache.insert(1, digest);
        assert_eq!((cache.find(&digest), cache.len()), (Some(1), 1));
    }

    #[test]
    fn digests_tell_salts_and_lengths_apart() {
        let digests = [
            root(),
            Digest::root(&Some("".into())),
            Digest::root(&Some("a".into())),
            root().then(&[]),
            root().then(&[0]),
            root().then(&[0, 0]),
            root().then(&[0]).then(&[0]),
        ];
        for (i, a) in digests.iter().enumerate() {
            assert!(digests[i + 1..].iter().all(|b| a != b), "digest {i}");
        }
    }
}
