//! Content → block: finds the block that already holds given tokens after a given prefix.
//!
//! A full block's key is a 128-bit hash over its tokens and its parent's hash, so it names the block's tokens
//! and everything before them; the chain's root is the salt. The hash only finds a candidate: tokens and parent
//! are compared on every hit, so a collision costs a miss and can never cost a wrong token.

use std::collections::HashMap;
use std::sync::Arc;

use super::BlockId;

/// Sequences share cached blocks only with sequences of an equal salt; `None` is the common one.
pub type Salt = Option<Arc<str>>;

/// The salt of a sequence that runs with adapter number `adapter`, if any, and shares blocks with requests of the same
/// `cache_salt` alone.
pub fn salt(cache_salt: Option<&str>, adapter: Option<u64>) -> Salt {
    // The number ends at the first colon: no two pairs give the same text.
    match (cache_salt, adapter) {
        (None, None) => None,
        (Some(salt), None) => Some(format!(":{salt}").into()),
        (None, Some(adapter)) => Some(adapter.to_string().into()),
        (Some(salt), Some(adapter)) => Some(format!("{adapter}:{salt}").into()),
    }
}

/// What a block's content continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parent {
    /// Nothing: the block starts its sequence.
    Root(Salt),
    /// The cached block with this number. Numbers are never used twice, unlike block ids, so a parent that has
    /// been evicted and its block refilled can not be mistaken for the old one.
    Entry(u64),
}

#[derive(Debug)]
struct Entry {
    number: u64,
    hash: u128,
    parent: Parent,
    tokens: Box<[u32]>,
}

/// Bounded by the pool: at most one entry a block.
#[derive(Debug)]
pub struct PrefixCache {
    by_hash: HashMap<u128, BlockId>,
    /// Indexed by block id.
    entries: Vec<Option<Entry>>,
    /// Entry number → its hash, for chaining.
    hashes: HashMap<u64, u128>,
    next_number: u64,
}

impl PrefixCache {
    pub fn new(num_blocks: usize) -> PrefixCache {
        PrefixCache {
            by_hash: HashMap::new(),
            entries: (0..num_blocks).map(|_| None).collect(),
            hashes: HashMap::new(),
            next_number: 0,
        }
    }

    /// The block holding exactly `tokens` after exactly `parent`.
    pub fn find(&self, parent: &Parent, tokens: &[u32]) -> Option<BlockId> {
        let block = *self.by_hash.get(&self.hash(parent, tokens)?)?;
        let entry = self.entries[block as usize].as_ref()?;
        (entry.parent == *parent && *entry.tokens == *tokens).then_some(block)
    }

    /// Enters `block` as holding `tokens` after `parent`. False when that cannot be: the parent is gone, or
    /// another content has the same hash.
    pub fn insert(&mut self, block: BlockId, parent: Parent, tokens: &[u32]) -> bool {
        let Some(hash) = self.hash(&parent, tokens) else { return false };
        if self.by_hash.contains_key(&hash) {
            return false;
        }
        let number = self.next_number;
        self.next_number += 1;
        self.by_hash.insert(hash, block);
        self.hashes.insert(number, hash);
        let previous = self.entries[block as usize].replace(Entry { number, hash, parent, tokens: tokens.into() });
        debug_assert!(previous.is_none(), "block {block} was cached already");
        true
    }

    pub fn remove(&mut self, block: BlockId) {
        if let Some(entry) = self.entries[block as usize].take() {
            self.by_hash.remove(&entry.hash);
            self.hashes.remove(&entry.number);
        }
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.entries[block as usize].is_some()
    }

    /// What the block after `block` names as its parent; `None` if `block` is not cached.
    pub fn as_parent(&self, block: BlockId) -> Option<Parent> {
        self.entries[block as usize].as_ref().map(|entry| Parent::Entry(entry.number))
    }

    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// The tables agree with each other, and no entry has outlived its parent.
    pub fn check_invariants(&self) -> Result<(), String> {
        let cached = self.entries.iter().flatten().count();
        if cached != self.by_hash.len() || cached != self.hashes.len() {
            return Err(format!(
                "{cached} cached blocks but {} hashes and {} numbers",
                self.by_hash.len(),
                self.hashes.len()
            ));
        }
        for (block, entry) in self.entries.iter().enumerate() {
            let Some(entry) = entry else { continue };
            if self.by_hash.get(&entry.hash) != Some(&(block as BlockId)) {
                return Err(format!("block {block} is not found under its own hash"));
            }
            if let Parent::Entry(number) = entry.parent
                && !self.hashes.contains_key(&number)
            {
                return Err(format!("block {block} outlived its parent"));
            }
        }
        Ok(())
    }

    fn hash(&self, parent: &Parent, tokens: &[u32]) -> Option<u128> {
        let mut hash = match parent {
            Parent::Root(None) => ChainHash::new(0),
            Parent::Root(Some(salt)) => {
                let mut hash = ChainHash::new(1);
                hash.write(salt.len() as u64);
                for chunk in salt.as_bytes().chunks(8) {
                    let mut word = [0; 8];
                    word[..chunk.len()].copy_from_slice(chunk);
                    hash.write(u64::from_le_bytes(word));
                }
                hash
            }
            Parent::Entry(number) => {
                let parent_hash = *self.hashes.get(number)?;
                let mut hash = ChainHash::new(2);
                hash.write(parent_hash as u64);
                hash.write((parent_hash >> 64) as u64);
                hash
            }
        };
        for &token in tokens {
            hash.write(u64::from(token));
        }
        Some(hash.finish())
    }
}

/// Two 64-bit lanes, each a multiply-xorshift round a word (the finaliser of splitmix64, Steele et al. 2014).
/// Not cryptographic: hits are verified.
struct ChainHash {
    low: u64,
    high: u64,
}

impl ChainHash {
    fn new(domain: u64) -> ChainHash {
        ChainHash { low: 0x9e37_79b9_7f4a_7c15 ^ domain, high: 0xd1b5_4a32_d192_ed03 ^ domain }
    }

    fn write(&mut self, word: u64) {
        self.low = mix(self.low ^ word, 0xbf58_476d_1ce4_e5b9);
        self.high = mix(self.high.rotate_left(23) ^ word, 0x94d0_49bb_1331_11eb);
    }

    fn finish(self) -> u128 {
        u128::from(mix(self.low, 0x94d0_49bb_1331_11eb)) | u128::from(mix(self.high, 0xbf58_476d_1ce4_e5b9)) << 64
    }
}

fn mix(word: u64, multiplier: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(multiplier);
    word ^ (word >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_only_the_same_tokens_after_the_same_prefix() {
        let mut cache = PrefixCache::new(8);
        let root = || Parent::Root(None);
        assert!(cache.insert(0, root(), &[1, 2]));
        let first = cache.as_parent(0).unwrap();
        assert!(cache.insert(1, first.clone(), &[3, 4]));
        assert_eq!(cache.find(&root(), &[1, 2]), Some(0));
        assert_eq!(cache.find(&first, &[3, 4]), Some(1));
        assert_eq!(cache.find(&root(), &[3, 4]), None);
        assert_eq!(cache.find(&first, &[1, 2]), None);
        assert_eq!(cache.find(&Parent::Root(Some("tenant".into())), &[1, 2]), None);
        cache.check_invariants().unwrap();
    }

    #[test]
    fn salts_tell_adapters_and_tenants_apart() {
        let pairs = [None, Some(""), Some("1"), Some("1:"), Some(":1")]
            .into_iter()
            .flat_map(|salt| [None, Some(1), Some(11)].map(|adapter| (salt, adapter)));
        let salts: std::collections::HashSet<Salt> = pairs.map(|(text, adapter)| salt(text, adapter)).collect();
        assert_eq!(salts.len(), 15);
        assert_eq!(salt(None, None), None);
    }

    #[test]
    fn an_evicted_parent_is_not_mistaken_for_its_successor_in_the_same_block() {
        let mut cache = PrefixCache::new(2);
        assert!(cache.insert(0, Parent::Root(None), &[1]));
        let old = cache.as_parent(0).unwrap();
        assert!(cache.insert(1, old.clone(), &[2]));
        cache.remove(0);
        assert!(cache.check_invariants().is_err(), "block 1 outlived its parent");
        assert!(cache.insert(0, Parent::Root(None), &[9]));
        let new = cache.as_parent(0).unwrap();
        assert_ne!(old, new);
        assert_eq!(cache.find(&new, &[2]), None);
        assert_eq!(cache.find(&old, &[2]), None);
    }

    #[test]
    fn a_second_block_of_the_same_content_is_not_entered() {
        let mut cache = PrefixCache::new(2);
        assert!(cache.insert(0, Parent::Root(None), &[1]));
        assert!(!cache.insert(1, Parent::Root(None), &[1]));
        assert_eq!(cache.len(), 1);
    }

    #[test]
    fn a_hash_collision_is_a_miss() {
        let mut cache = PrefixCache::new(2);
        let hash = cache.hash(&Parent::Root(None), &[5]).unwrap();
        assert!(cache.insert(0, Parent::Root(None), &[1]));
        cache.by_hash.insert(hash, 0);
        assert_eq!(cache.find(&Parent::Root(None), &[5]), None);
        assert!(!cache.insert(1, Parent::Root(None), &[5]));
    }

    #[test]
    fn hashes_spread() {
        let cache = PrefixCache::new(0);
        let mut seen = std::collections::HashSet::new();
        for a in 0..200u32 {
            for b in 0..200u32 {
                let hash = cache.hash(&Parent::Root(None), &[a, b]).unwrap();
                assert!(seen.insert(hash as u64) && seen.insert((hash >> 64) as u64), "[{a}, {b}]");
            }
        }
    }
}
