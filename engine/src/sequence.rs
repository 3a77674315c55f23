//! One sequence as the scheduler sees it: its tokens, how many of them are in the KV cache, and where.

use std::sync::Arc;

use crate::kv::{BlockPool, BlockTable, Digest, Salt, blocks_for};

/// On whose behalf a sequence runs; all that name nobody are one.
pub type Tenant = Option<Arc<str>>;

/// In place of a token that is not known yet; no vocabulary has it.
const ASSUMED: u32 = u32::MAX;

/// Order among sequences, smallest first: by priority, then by arrival. Unique.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceKey {
    /// Smaller runs earlier.
    pub priority: i32,
    /// Number of the request in order of arrival.
    pub arrival: u64,
}

/// Tokens and the part of them whose keys and values are cached. Invariants: `computed <= tokens.len()`, and
/// between steps the block table covers exactly the computed tokens, but for those that every window has passed by.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) key: SequenceKey,
    pub(crate) salt: Salt,
    pub(crate) tenant: Tenant,
    pub(crate) tokens: Vec<u32>,
    /// Tokens that may come next, to be checked in the coming step.
    pub(crate) draft: Vec<u32>,
    pub(crate) prompt_len: usize,
    /// Tokens it ends with at the latest.
    len_max: usize,
    pub(crate) computed: usize,
    /// How many of them are being computed, while the step after is planned.
    pub(crate) assumed: usize,
    pub(crate) table: BlockTable,
    /// What the whole blocks of the tokens are found by: all of the prompt's and of the computed ones. Tokens only grow
    /// and are hashed once, however often somebody looks. Empty where nothing is ever found.
    digests: Vec<Digest>,
    /// Whether a token is sampled once all tokens are computed.
    pub(crate) samples: bool,
    /// First prompt position whose logits have not been seen yet, if the caller wants them all.
    pub(crate) prompt_rows_from: Option<usize>,
    /// All of the prompt must be computed, whatever the prefix cache holds.
    pub(crate) reads_no_cache: bool,
    /// Prompt tokens that came from the prefix cache when the sequence first ran.
    pub(crate) cached_prompt_tokens: usize,
    /// Tokens the draft model has seen since the sequence has its blocks.
    pub(crate) drafter_seen: usize,
    /// Whether it has run before and lost its blocks.
    pub(crate) preempted: bool,
    /// Tokens it may compute in the step being planned.
    pub(crate) granted: usize,
    /// Drafted tokens it may check besides.
    pub(crate) granted_drafts: usize,
    /// No block was to be had and nobody ranks lower: it keeps what it holds and waits for the next step.
    pub(crate) stalled: bool,
}

impl Sequence {
    /// `max_tokens` 0 computes the prompt and samples nothing.
    pub fn new(
        key: SequenceKey,
        prompt: Vec<u32>,
        max_tokens: usize,
        wants_prompt_logits: bool,
        salt: Salt,
    ) -> Sequence {
        Sequence {
            key,
            salt,
            tenant: None,
            prompt_len: prompt.len(),
            len_max: prompt.len().saturating_add(max_tokens),
            tokens: prompt,
            draft: Vec::new(),
            computed: 0,
            assumed: 0,
            table: BlockTable::default(),
            digests: Vec::new(),
            samples: max_tokens > 0,
            prompt_rows_from: wants_prompt_logits.then_some(0),
            reads_no_cache: false,
            cached_prompt_tokens: 0,
            drafter_seen: 0,
            preempted: false,
            granted: 0,
            granted_drafts: 0,
            stalled: false,
        }
    }

    /// The same on behalf of `tenant`.
    pub fn of_tenant(self, tenant: Tenant) -> Sequence {
        Sequence { tenant, ..self }
    }

    pub fn key(&self) -> SequenceKey {
        self.key
    }

    /// Prompt and generated tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether what `other` computes of its prompt is what this one needs of its own.
    pub(crate) fn is_choice_of(&self, other: &Sequence) -> bool {
        self.samples
            && other.samples
            && other.prompt_rows_from.is_none()
            && self.tokens == other.tokens
            && (&self.salt, &self.tenant, self.key.priority) == (&other.salt, &other.tenant, other.key.priority)
    }

    /// The tokens proposed to follow.
    pub fn draft(&self) -> &[u32] {
        &self.draft
    }

    /// The token at `position`, proposed ones following those there are.
    pub(crate) fn token_at(&self, position: usize) -> u32 {
        match self.tokens.get(position) {
            Some(&token) => token,
            None => self.draft[position - self.tokens.len()],
        }
    }

    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Tokens whose keys and values are in the cache.
    pub fn computed(&self) -> usize {
        self.computed
    }

    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    /// Tokens still to compute; 1 while decoding, more while prefilling or catching up after a preemption.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Pending tokens not granted in the step being planned, if more may be.
    pub(crate) fn ungranted(&self) -> usize {
        if self.stalled { 0 } else { self.pending() - self.granted }
    }

    /// Whether the logits of the token at `position` are wanted.
    pub fn wants_logits(&self, position: usize) -> bool {
        let for_prompt = self.prompt_rows_from.is_some_and(|from| {
            // The last prompt token's row says nothing about the prompt: it predicts the first new token.
            (from..self.prompt_len - 1).contains(&position)
        });
        for_prompt || (self.samples && position + 1 >= self.tokens.len())
    }

    /// How many tokens may be taken from the prefix cache: at least one is always left to compute, and none whose
    /// logits are still wanted.
    fn cacheable(&self) -> usize {
        if self.reads_no_cache {
            return 0;
        }
        let last = self.tokens.len() - 1;
        self.prompt_rows_from.filter(|&from| from < self.prompt_len - 1).map_or(last, |from| from.min(last))
    }

    /// Works out what the first `blocks` blocks of the tokens are found by.
    fn hash_blocks(&mut self, blocks: usize, pool: &BlockPool) {
        if !pool.is_caching() {
            return;
        }
        for block in self.tokens.chunks_exact(pool.block_size()).take(blocks).skip(self.digests.len()) {
            let before = self.digests.last().copied().unwrap_or_else(|| Digest::root(&self.salt));
            self.digests.push(before.then(block));
        }
    }

    /// Has the prompt's blocks hashed, before anybody looks for them.
    pub(crate) fn hash_prompt(&mut self, pool: &BlockPool) {
        self.hash_blocks(self.prompt_len / pool.block_size(), pool);
    }

    /// Cached blocks that would extend the computed tokens, in order.
    pub(crate) fn hits<'a>(&'a self, pool: &'a BlockPool) -> impl Iterator<Item = u32> + 'a {
        self.next_digests(pool.block_size()).iter().map_while(|digest| pool.find(digest))
    }

    /// Digests of the blocks that follow the computed tokens and may come from a cache.
    pub(crate) fn next_digests(&self, size: usize) -> &[Digest] {
        if !self.computed.is_multiple_of(size) {
            return &[];
        }
        let end = (self.cacheable() / size).min(self.digests.len());
        self.digests.get(self.computed / size..end).unwrap_or_default()
    }

    /// Takes over every cached block that continues the computed tokens. Returns how many prompt tokens that saves:
    /// none after a preemption, when it finds what it had computed itself.
    pub(crate) fn extend_from_cache(&mut self, pool: &mut BlockPool) -> usize {
        let hits: Vec<_> = self.hits(pool).collect();
        for &block in &hits {
            pool.acquire(block);
            self.table.push(block);
        }
        let saved = hits.len() * pool.block_size();
        self.computed += saved;
        self.note_cached(saved)
    }

    /// Notes that the next block has been filled from elsewhere. Returns as [`Sequence::extend_from_cache`].
    pub(crate) fn commit_restored(&mut self, pool: &mut BlockPool) -> usize {
        let size = pool.block_size();
        self.commit(size, pool);
        self.note_cached(size)
    }

    fn note_cached(&mut self, saved: usize) -> usize {
        if self.preempted {
            return 0;
        }
        self.cached_prompt_tokens += saved;
        saved
    }

    /// Notes that the granted `count` tokens are computed, and lets others find the blocks they filled.
    pub(crate) fn commit(&mut self, count: usize, pool: &mut BlockPool) {
        let size = pool.block_size();
        let full_before = self.computed / size;
        self.computed += count;
        debug_assert!(self.computed <= self.tokens.len());
        self.hash_blocks(self.computed / size, pool);
        for (index, &digest) in self.digests.iter().enumerate().take(self.computed / size).skip(full_before) {
            let kept = pool.publish(self.table.blocks()[index], digest);
            self.table.replace(index, kept);
        }
    }

    /// Until [`Sequence::forget_assumed`]: the `count` tokens being computed are, and the next one, if one is to come and more
    /// after it, is there.
    pub(crate) fn assume(&mut self, count: usize) {
        self.computed += count;
        self.assumed = count;
        if self.pending() == 0 && self.tokens.len() + 1 < self.len_max {
            self.tokens.push(ASSUMED);
        }
    }

    pub(crate) fn forget_assumed(&mut self) {
        if self.tokens.last() == Some(&ASSUMED) {
            self.tokens.pop();
        }
        self.computed -= std::mem::take(&mut self.assumed);
    }

    /// Gives back blocks beyond the computed tokens and those granted: those of drafts that were not what came.
    pub(crate) fn trim_blocks(&mut self, pool: &mut BlockPool) {
        while self.table.len() > blocks_for(self.computed + self.granted, pool.block_size()) {
            if let Some(block) = self.table.pop() {
                pool.release(block);
            }
        }
    }

    /// Gives back the blocks that no token to come reads, where each reads `window` tokens before its own.
    pub(crate) fn pass_blocks(&mut self, window: Option<usize>, pool: &mut BlockPool) {
        let passed = passed_blocks(self.computed, window, pool.block_size());
        while self.table.passed() < passed {
            let Some(block) = self.table.pass() else { return };
            pool.release(block);
        }
    }

    /// Starts where `leader` is at the end of their common prompt, holding the same blocks. The last one, if it is not
    /// full, is copied by whoever writes to it first.
    pub(crate) fn fork_from(&mut self, leader: &Sequence, pool: &mut BlockPool) {
        debug_assert!(self.table.is_empty() && leader.computed >= self.prompt_len);
        self.table = leader.table.first(blocks_for(self.prompt_len, pool.block_size()));
        for &block in self.table.held() {
            pool.acquire(block);
        }
        self.computed = self.prompt_len;
        self.cached_prompt_tokens = leader.cached_prompt_tokens;
    }

    /// Gives all blocks back, the last one first.
    pub(crate) fn release_blocks(&mut self, pool: &mut BlockPool) {
        while let Some(block) = self.table.pop() {
            pool.release(block);
        }
        self.table.clear();
        self.computed = 0;
        self.drafter_seen = 0;
    }
}

/// Whole blocks that lie before all that the tokens after `computed` read, where each reads `window` tokens before its own.
pub(crate) fn passed_blocks(computed: usize, window: Option<usize>, block_size: usize) -> usize {
    window.map_or(0, |window| computed.saturating_sub(window) / block_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(tokens: &[u32], wants_prompt_logits: bool) -> Sequence {
        Sequence::new(SequenceKey { priority: 0, arrival: 0 }, tokens.to_vec(), 1, wants_prompt_logits, None)
    }

    fn compute(sequence: &mut Sequence, pool: &mut BlockPool, count: usize) {
        while sequence.table.len() * pool.block_size() < sequence.computed + count {
            sequence.table.push(pool.allocate().unwrap());
        }
        sequence.commit(count, pool);
    }

    #[test]
    fn a_hit_leaves_at_least_one_token_to_compute() {
        let mut pool = BlockPool::new(8, 2, true);
        let mut first = sequence(&[1, 2, 3, 4], false);
        compute(&mut first, &mut pool, 4);
        for (tokens, saved) in [
            (&[1, 2, 3, 4][..], 2),
            (&[1, 2, 3, 4, 5], 4),
            (&[1, 2], 0),
            (&[1, 2, 3], 2),
            (&[1, 2, 9, 4, 5], 2),
            (&[9, 2, 3, 4, 5], 0),
        ] {
            let mut next = sequence(tokens, false);
            next.hash_prompt(&pool);
            assert_eq!(next.extend_from_cache(&mut pool), saved, "{tokens:?}");
            assert_eq!(next.pending(), tokens.len() - saved);
            next.release_blocks(&mut pool);
            pool.check_invariants().unwrap();
        }
    }

    #[test]
    fn prompt_logits_keep_the_cache_from_being_read_until_they_have_been_seen() {
        let mut pool = BlockPool::new(8, 2, true);
        let mut first = sequence(&[1, 2, 3, 4, 5, 6], false);
        compute(&mut first, &mut pool, 6);
        let mut scored = sequence(&[1, 2, 3, 4, 5, 6], true);
        scored.hash_prompt(&pool);
        assert_eq!(scored.extend_from_cache(&mut pool), 0);
        // Preempted after four rows had been seen: those may come from the cache now.
        scored.prompt_rows_from = Some(4);
        assert_eq!(scored.extend_from_cache(&mut pool), 4);
    }

    #[test]
    fn equal_prompts_computed_side_by_side_end_up_sharing() {
        let mut pool = BlockPool::new(8, 2, true);
        let (mut a, mut b) = (sequence(&[1, 2, 3], false), sequence(&[1, 2, 3], false));
        compute(&mut a, &mut pool, 3);
        compute(&mut b, &mut pool, 3);
        assert_eq!(a.table.blocks()[0], b.table.blocks()[0]);
        assert_ne!(a.table.blocks()[1], b.table.blocks()[1]);
        pool.check_invariants().unwrap();
    }

    #[test]
    fn rows_wanted() {
        let wanted = |s: &Sequence| (0..s.tokens.len()).filter(|&p| s.wants_logits(p)).collect::<Vec<_>>();
        let mut s = sequence(&[1, 2, 3], false);
        assert_eq!(wanted(&s), [2]);
        s.samples = false;
        assert_eq!(wanted(&s), Vec::<usize>::new());
        s.prompt_rows_from = Some(0);
        assert_eq!(wanted(&s), [0, 1]);
        s.prompt_rows_from = Some(1);
        s.samples = true;
        assert_eq!(wanted(&s), [1, 2]);
        s.tokens.push(4);
        assert_eq!(wanted(&s), [1, 3]);
    }
}
