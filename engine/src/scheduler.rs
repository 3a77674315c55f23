//! Which sequences compute how many tokens in the next step. Pure policy: no tensors, clock, threads, randomness.
//!
//! There is no prefill phase and no decode phase. Every running sequence has tokens that are not computed yet (one
//! while it decodes, many while it prefills), and a step grants each of them some, under one token budget:
//!
//! 1. **Decode rows first.** Every running sequence with one pending token gets its row, so no prompt, however
//!    long, stalls a stream. The budget is at least the number of running sequences, so there is a row for each.
//! 2. **Admission**, strictly in order, while there is a place and the blocks for the whole sequence are there beyond
//!    what those already running will need. The order is priority, then who was preempted, then the tenant served
//!    least so far ([`crate::fair_share`]), then arrival.
//! 3. **Prefill** shares what is left of the budget, `L`, among the best priority present: half goes to the
//!    *shortest* remaining prompts, shortest first, the rest to the *oldest*, oldest first; what they cannot use
//!    goes to the next priority. So at equal priority an admitted prompt is through after at most
//!    `ceil(T / floor(L / 2))` steps, where `T` is the smaller of two sums, each with its own tokens: the pending
//!    tokens of all prompts before it in order, and those of all prompts that are shorter. A long prompt does not
//!    hold up short ones, and short ones do not starve a long one. While others decode, `L` is bounded by the caller
//!    too, who knows how long a step takes.
//! 4. **Drafts** take what is left: tokens proposed to follow a decoding sequence, checked in the same step, in blocks
//!    that nobody else needs.
//!
//! Where every layer slides a window, a sequence gives back the blocks that all windows have passed by, and is admitted by
//! what it holds at once rather than by its length.
//!
//! Sequences submitted as choices of one prompt wait for the first of them, their leader, to compute it, and then start
//! from its blocks. The last block, if it is not full, is shared until one of them is about to write to it: that one gets a copy.
//!
//! When no block is left, the sequence ranking last (lowest priority, then latest) is preempted: its blocks are
//! released last one first, it waits in its old place in the order, and recomputes from whatever is still cached.
//! Nobody is preempted for one that ranks lower (that one stalls until the next step) or that waits. The first in order
//! can always take every block there is, so if each request fits the pool alone, each step makes progress.

mod ahead;
mod invariants;

use std::collections::{BTreeMap, HashSet};

use crate::fair_share::{FairShare, GENERATED_TOKEN_PRICE};
use crate::kv::{BlockId, BlockPool, Digest, blocks_for};
use crate::sequence::{Sequence, SequenceKey};

/// Bounds of one step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Tokens a step computes at most; at least `max_running`.
    pub max_batch_tokens: usize,
    /// Sequences that hold blocks at the same time.
    pub max_running: usize,
}

/// A running sequence's share of the step: tokens `start .. start + count`, the last `drafts` of them proposed only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanEntry {
    /// Place in [`Scheduler::running`] until the next call to [`Scheduler::schedule`] or [`Scheduler::remove`].
    pub index: usize,
    pub key: SequenceKey,
    pub start: usize,
    pub count: usize,
    pub drafts: usize,
}

impl PlanEntry {
    /// The first position after the tokens that are sure.
    pub fn end(&self) -> usize {
        self.start + self.count - self.drafts
    }
}

/// What the caller, who knows how long things take, lets a step do besides generating.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepBudget {
    /// Tokens of prompts beside sequences that decode. Prompts get through as long as it is not 0 step after step.
    pub prefill_rows: usize,
    /// Blocks to be read back.
    pub restores: usize,
}

impl StepBudget {
    /// Nobody's patience is at stake.
    pub const UNLIMITED: StepBudget = StepBudget { prefill_rows: usize::MAX, restores: usize::MAX };
}

/// A block of a running sequence whose content is kept elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restore {
    pub key: SequenceKey,
    pub block: BlockId,
    pub digest: Digest,
}

/// What the next step does: spills, copies, restores, then computes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// Single rows first, then longer runs.
    pub entries: Vec<PlanEntry>,
    /// Sum of all counts.
    pub tokens: usize,
    /// Sequences that have just left the queue for the first time.
    pub admitted: Vec<SequenceKey>,
    /// Evicted blocks, and what they hold until something is written to them.
    pub spills: Vec<(BlockId, Digest)>,
    /// Blocks to be filled from elsewhere; their sequences compute nothing in this step.
    pub restores: Vec<Restore>,
    /// Blocks to be copied before anything is restored or computed, in this order: from, to.
    pub copies: Vec<(BlockId, BlockId)>,
}

/// Totals since the start.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub cache_queries: u64,
    /// Prompt tokens found there.
    pub cache_hits: u64,
    /// Choices that started from their leader's blocks.
    pub forks: u64,
    /// Blocks copied because one of several holders was about to write.
    pub copies: u64,
    /// Blocks read back.
    pub restores: u64,
    /// Steps planned while the one before them ran.
    pub planned_ahead: u64,
}

/// The queues, the blocks, and the plan of the current step.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    prefix_caching: bool,
    /// How many tokens before its own a token reads; `None`: all of them.
    window: Option<usize>,
    waiting: BTreeMap<SequenceKey, Sequence>,
    /// Sequences that wait for another's prompt, by its key.
    followers: BTreeMap<SequenceKey, Vec<Sequence>>,
    /// In order: preempting takes the last.
    running: Vec<Sequence>,
    shares: FairShare,
    plan: StepPlan,
    /// What of the step after it is planned already, but for entries and drafts: those grants are the sequences'.
    next: StepPlan,
    /// Whether there is such a plan.
    ahead: bool,
    /// Whether one is being made: nobody loses blocks that are being computed.
    planning_ahead: bool,
    /// Somebody would have been preempted; the next plan is made when the step is over.
    short: bool,
    /// What can be read back.
    spilled: HashSet<Digest>,
    /// Tokens of the budget not granted yet.
    left: usize,
    restores_left: usize,
    totals: Totals,
}

impl Scheduler {
    pub fn new(limits: Limits, num_blocks: usize, block_size: usize, prefix_caching: bool) -> Scheduler {
        assert!(limits.max_running > 0 && limits.max_batch_tokens >= limits.max_running);
        Scheduler {
            limits,
            pool: BlockPool::new(num_blocks, block_size, prefix_caching),
            prefix_caching,
            window: None,
            waiting: BTreeMap::new(),
            followers: BTreeMap::new(),
            running: Vec::new(),
            shares: FairShare::default(),
            plan: StepPlan::default(),
            next: StepPlan::default(),
            ahead: false,
            planning_ahead: false,
            short: false,
            spilled: HashSet::new(),
            left: 0,
            restores_left: 0,
            totals: Totals::default(),
        }
    }

    /// How many tokens before its own a token reads at most; blocks further back are given back. `None` until it is set:
    /// all are kept.
    pub fn set_window(&mut self, tokens: Option<usize>) {
        debug_assert!(self.is_idle());
        self.window = tokens;
    }

    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// Queues a sequence. Its blocks, grown to its full length, must fit the pool.
    pub fn add(&mut self, mut sequence: Sequence) {
        debug_assert!(sequence.pending() > 0 && sequence.table.is_empty());
        sequence.hash_prompt(&self.pool);
        self.shares.enter(&sequence.tenant);
        self.waiting.insert(sequence.key, sequence);
    }

    /// Queues a sequence with the prompt, priority, salt and tenant of `leader`, which was added before and has not
    /// computed it. It starts from the leader's blocks, or on its own if the leader is removed before.
    pub fn add_follower(&mut self, leader: SequenceKey, mut sequence: Sequence) {
        debug_assert!(sequence.samples && sequence.prompt_rows_from.is_none());
        sequence.hash_prompt(&self.pool);
        self.shares.enter(&sequence.tenant);
        self.followers.entry(leader).or_default().push(sequence);
    }

    /// Takes a sequence out, wherever it is, and releases its blocks.
    pub fn remove(&mut self, key: SequenceKey) -> Option<Sequence> {
        let mut sequence = self.take_out(key)?;
        sequence.release_blocks(&mut self.pool);
        self.shares.leave(&sequence.tenant);
        if let Some(mut followers) = self.followers.remove(&key) {
            let leader = followers.remove(0);
            if !followers.is_empty() {
                self.followers.insert(leader.key, followers);
            }
            self.waiting.insert(leader.key, leader);
        }
        Some(sequence)
    }

    fn take_out(&mut self, key: SequenceKey) -> Option<Sequence> {
        if let Some(sequence) = self.waiting.remove(&key) {
            return Some(sequence);
        }
        if let Ok(index) = self.running_index(key) {
            return Some(self.running.remove(index));
        }
        let mut groups = self.followers.iter_mut();
        let (leader, place) = groups.find_map(|(&leader, group)| {
            group.iter().position(|sequence| sequence.key == key).map(|place| (leader, place))
        })?;
        let group = self.followers.get_mut(&leader)?;
        let sequence = group.remove(place);
        if group.is_empty() {
            self.followers.remove(&leader);
        }
        Some(sequence)
    }

    fn running_index(&self, key: SequenceKey) -> Result<usize, usize> {
        self.running.binary_search_by_key(&key, |sequence| sequence.key)
    }

    /// Whether drafts of the running sequence `index` can be checked: it decodes, and nobody waits for its prompt. Those who
    /// do start from its last row, and from blocks that hold nothing beyond it.
    pub fn may_draft(&self, index: usize) -> bool {
        let sequence = &self.running[index];
        sequence.pending() == 1 && sequence.samples && !self.has_followers(sequence.key)
    }

    /// Proposes what may follow the running sequence `index`, which may draft, for the next call to
    /// [`Scheduler::schedule`] alone. The step may have room for fewer.
    pub fn propose(&mut self, index: usize, draft: &[u32]) {
        assert!(self.may_draft(index), "drafts for a sequence that cannot have any");
        let sequence = &mut self.running[index];
        // What the last step had no room for is out of date.
        sequence.draft.clear();
        sequence.draft.extend_from_slice(draft);
    }

    /// Whether the content of this digest can be read back.
    pub fn set_spilled(&mut self, digest: Digest, there: bool) {
        if there {
            self.spilled.insert(digest);
        } else {
            self.spilled.remove(&digest);
        }
    }

    /// Contents that can be read back.
    pub fn spilled(&self) -> usize {
        self.spilled.len()
    }

    /// Tenants with sequences.
    pub fn tenants(&self) -> usize {
        self.shares.present()
    }

    pub fn is_spilled(&self, digest: &Digest) -> bool {
        self.spilled.contains(digest)
    }

    /// Plans the next step: nothing is computed before [`Scheduler::settle`] says so, nor restored before
    /// [`Scheduler::settle_restores`] does.
    pub fn schedule(&mut self, budget: StepBudget) -> &StepPlan {
        debug_assert!(!self.ahead, "the plan made ahead comes first");
        self.short = false;
        self.grant_all(budget);
        self.finish_plan();
        &self.plan
    }

    /// Grants everything but drafts.
    fn grant_all(&mut self, budget: StepBudget) {
        self.left = self.limits.max_batch_tokens;
        self.restores_left = budget.restores;
        self.plan.admitted.clear();
        self.plan.copies.clear();
        self.plan.restores.clear();
        self.plan.spills.clear();
        for sequence in &mut self.running {
            sequence.granted = 0;
            sequence.granted_drafts = 0;
            sequence.stalled = false;
        }
        let preemptions_before = self.totals.preemptions;
        self.grant_decode_rows();
        let nobody_decodes = self.left == self.limits.max_batch_tokens;
        let kept_back = if nobody_decodes { 0 } else { self.left.saturating_sub(budget.prefill_rows) };
        self.left -= kept_back;
        // Whoever just lost its blocks would only take them back.
        if self.totals.preemptions == preemptions_before {
            self.admit();
        }
        self.grant_prefill();
        self.left += kept_back;
    }

    fn finish_plan(&mut self) {
        self.grant_drafts();
        self.write_plan();
        self.plan.spills.extend(self.pool.take_evicted());
    }

    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Puts a token in place of what was proposed as number `draft`.
    pub(crate) fn set_draft(&mut self, index: usize, draft: usize, token: u32) {
        self.running[index].draft[draft] = token;
    }

    /// Only `drafts` of the drafts of the plan's entry `place` are to be checked.
    pub(crate) fn cut_drafts(&mut self, place: usize, drafts: usize) {
        let entry = &mut self.plan.entries[place];
        let cut = entry.drafts.saturating_sub(drafts);
        entry.drafts -= cut;
        entry.count -= cut;
        self.plan.tokens -= cut;
    }

    /// The draft model has computed a running sequence's tokens before `position`.
    pub(crate) fn note_drafter_seen(&mut self, index: usize, position: usize) {
        self.running[index].drafter_seen = position;
    }

    /// The tokens of the plan's entry `place` have been computed, and `new` is what followed: nothing while the prompt
    /// is not through, one token, or more where each but the last was the one drafted.
    pub fn settle(&mut self, place: usize, new: &[u32]) {
        let PlanEntry { index, count, drafts, .. } = self.plan.entries[place];
        debug_assert!(new.len() <= drafts + 1);
        let sequence = &mut self.running[index];
        debug_assert!(sequence.draft.starts_with(&new[..new.len().saturating_sub(1)]));
        sequence.tokens.extend_from_slice(new);
        sequence.draft.clear();
        if !self.ahead {
            (sequence.granted, sequence.granted_drafts) = (0, 0);
        }
        sequence.commit(count - drafts + new.len().saturating_sub(1), &mut self.pool);
        sequence.trim_blocks(&mut self.pool);
        sequence.pass_blocks(self.window, &mut self.pool);
        sequence.drafter_seen = sequence.drafter_seen.min(sequence.computed);
        self.shares.charge(&sequence.tenant, GENERATED_TOKEN_PRICE * new.len() as u64);
    }

    /// What the plan wanted to be restored has been, or has not.
    pub fn settle_restores(&mut self, restored: &[bool]) {
        let size = self.pool.block_size();
        for (&Restore { key, block, digest }, &restored) in self.plan.restores.iter().zip(restored) {
            if !restored {
                self.spilled.remove(&digest);
            }
            let Ok(index) = self.running_index(key) else { continue };
            let sequence = &mut self.running[index];
            // What follows a block that could not be had is of no use.
            if restored && sequence.table.blocks().get(sequence.computed / size) == Some(&block) {
                self.totals.restores += 1;
                self.totals.cache_hits += sequence.commit_restored(&mut self.pool) as u64;
            }
        }
        for restore in &self.plan.restores {
            if let Ok(index) = self.running_index(restore.key) {
                self.running[index].trim_blocks(&mut self.pool);
                self.running[index].pass_blocks(self.window, &mut self.pool);
            }
        }
    }

    /// Whether sequences wait for this one's prompt.
    pub fn has_followers(&self, key: SequenceKey) -> bool {
        self.followers.contains_key(&key)
    }

    /// The prompt of `leader`, which is running, has been computed: those who wait for it start from its blocks as far
    /// as there are places, and are owed a token from its logits. The rest joins the queue. Changes places in
    /// [`Scheduler::running`].
    pub fn fork(&mut self, leader: SequenceKey) -> Vec<SequenceKey> {
        let mut forked = Vec::new();
        for mut sequence in self.followers.remove(&leader).unwrap_or_default() {
            let place = self.running.partition_point(|other| other.key < sequence.key);
            match self.running_index(leader) {
                Ok(leader) if self.running.len() < self.limits.max_running => {
                    sequence.fork_from(&self.running[leader], &mut self.pool);
                    forked.push(sequence.key);
                    self.totals.forks += 1;
                    self.running.insert(place, sequence);
                }
                _ => {
                    self.waiting.insert(sequence.key, sequence);
                }
            }
        }
        forked
    }

    /// The first token of a sequence just forked.
    pub fn append(&mut self, key: SequenceKey, token: u32) {
        if let Ok(index) = self.running_index(key) {
            let sequence = &mut self.running[index];
            sequence.tokens.push(token);
            self.shares.charge(&sequence.tenant, GENERATED_TOKEN_PRICE);
        }
    }

    /// The prompt rows of a running sequence before `position` have been seen and need not be computed again.
    pub fn prompt_rows_seen(&mut self, index: usize, position: usize) {
        if let Some(from) = &mut self.running[index].prompt_rows_from {
            *from = (*from).max(position);
        }
    }

    /// Sequences that may hold blocks, in order.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// A running sequence.
    pub fn running_sequence(&self, key: SequenceKey) -> Option<&Sequence> {
        self.running_index(key).ok().map(|index| &self.running[index])
    }

    /// Sequences that hold none: those in the queue, then those that wait for another's prompt.
    pub fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        self.waiting.values().chain(self.followers.values().flatten())
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    fn grant_decode_rows(&mut self) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].pending() == 1 {
                self.grant(index, 1);
            }
            index += 1;
        }
    }

    /// Takes blocks from nobody.
    fn grant_drafts(&mut self) {
        let size = self.pool.block_size();
        for sequence in &mut self.running {
            if sequence.granted != 1 || sequence.draft.is_empty() {
                continue;
            }
            let planned = sequence.computed + 1;
            let room = (sequence.table.len() + self.pool.available()) * size - planned;
            let rows = sequence.draft.len().min(self.left).min(room);
            while sequence.table.len() < blocks_for(planned + rows, size) {
                let Some(block) = self.pool.allocate() else { unreachable!("counted as available") };
                sequence.table.push(block);
            }
            sequence.granted_drafts = rows;
            self.left -= rows;
        }
    }

    fn admit(&mut self) {
        while self.running.len() < self.limits.max_running && self.left > 0 {
            let Some(next) = self.next_in_line() else { return };
            if !self.has_room_for(next) {
                return;
            }
            let key = next.key;
            let Some(mut sequence) = self.waiting.remove(&key) else { return };
            if !sequence.preempted {
                self.plan.admitted.push(key);
                self.shares.charge(&sequence.tenant, sequence.prompt_len as u64);
            }
            if self.prefix_caching && !sequence.preempted && sequence.prompt_rows_from.is_none() {
                self.totals.cache_queries += sequence.prompt_len as u64;
            }
            self.totals.cache_hits += sequence.extend_from_cache(&mut self.pool) as u64;
            sequence.pass_blocks(self.window, &mut self.pool);
            let place = self.running.partition_point(|other| other.key < key);
            self.running.insert(place, sequence);
        }
    }

    /// Who is admitted next: of the best priority who was preempted, then the tenant served least, then the first to come.
    fn next_in_line(&self) -> Option<&Sequence> {
        let first = self.waiting.values().next()?;
        if first.preempted || self.shares.present() == 1 {
            return Some(first);
        }
        let class = self.waiting.values().take_while(|sequence| sequence.key.priority == first.key.priority);
        class.min_by_key(|s| (!s.preempted, if s.preempted { 0 } else { self.shares.served(&s.tenant) }))
    }

    /// Whether all of `sequence` can be computed without taking blocks from those running: neither what their
    /// tokens so far still need, nor one block each to grow into.
    fn has_room_for(&self, sequence: &Sequence) -> bool {
        if self.running.is_empty() {
            return true;
        }
        let promised: usize = self.running.iter().map(|s| self.missing(s, 0) + 1).sum();
        // A hit on a block somebody holds is free; one on an evictable block takes it off the available ones.
        let shared = sequence.hits(&self.pool).filter(|&block| self.pool.holders(block) > 0).count();
        promised + self.missing(sequence, shared) <= self.pool.available()
    }

    /// Blocks that `sequence` will still take to compute the tokens it has, but for `shared` ones that others hold.
    fn missing(&self, sequence: &Sequence, shared: usize) -> usize {
        // Drafts that came to nothing may have been given more than the tokens need.
        let all = blocks_for(sequence.tokens.len(), self.pool.block_size())
            .saturating_sub(sequence.table.len() + shared);
        let most = self.held_max(self.limits.max_batch_tokens);
        all.min(most.saturating_sub(sequence.table.held().len()))
    }

    /// Blocks that a sequence holds at most while it computes `rows` tokens in a step.
    fn held_max(&self, rows: usize) -> usize {
        let size = self.pool.block_size();
        self.window.map_or(usize::MAX, |window| blocks_for(window + rows, size) + 1)
    }

    fn grant_prefill(&mut self) {
        for index in 0..self.running.len() {
            let sequence = &mut self.running[index];
            // What is being computed stays what continues from it.
            if sequence.granted > 0 || sequence.pending() == 1 || sequence.assumed > 0 {
                continue;
            }
            // Another sequence may have computed the same prefix since the last look.
            self.totals.cache_hits += sequence.extend_from_cache(&mut self.pool) as u64;
            sequence.pass_blocks(self.window, &mut self.pool);
            self.plan_restores(index);
        }
        while self.left > 0 {
            let Some(first) = self.running.iter().find(|s| s.ungranted() > 0) else { return };
            let priority = first.key.priority;
            let mut for_shortest = self.left / 2;
            while for_shortest > 0 {
                let class = self.running.iter().enumerate().filter(|(_, s)| s.key.priority == priority);
                let candidates = class.filter(|(_, s)| s.ungranted() > 0);
                let Some((index, _)) = candidates.min_by_key(|(_, s)| s.ungranted()) else { break };
                for_shortest -= self.grant(index, for_shortest);
            }
            while self.left > 0 {
                let oldest = self.running.iter().position(|s| s.ungranted() > 0 && s.key.priority == priority);
                let Some(index) = oldest else { break };
                self.grant(index, self.left);
            }
        }
    }

    /// Gives the sequence blocks for what it can have back, and has it wait for that.
    fn plan_restores(&mut self, index: usize) {
        if self.spilled.is_empty() || self.restores_left == 0 {
            return;
        }
        let sequence = &mut self.running[index];
        let first = self.plan.restores.len();
        for &digest in sequence.next_digests(self.pool.block_size()).iter().take(self.restores_left) {
            if !self.spilled.contains(&digest) {
                break;
            }
            let Some(block) = self.pool.allocate() else { break };
            self.plan.restores.push(Restore { key: sequence.key, block, digest });
        }
        for restore in &self.plan.restores[first..] {
            sequence.table.push(restore.block);
            sequence.stalled = true;
            self.restores_left -= 1;
        }
    }

    /// Grants up to `want` more of the sequence's pending tokens, with the blocks for them, preempting whoever
    /// ranks lower if not even one token fits otherwise. Returns how many.
    fn grant(&mut self, index: usize, want: usize) -> usize {
        let size = self.pool.block_size();
        loop {
            let sequence = &mut self.running[index];
            let planned = sequence.computed + sequence.granted;
            // Others hold the block that the first row goes to.
            let shared = (sequence.granted == 0 && !planned.is_multiple_of(size))
                .then(|| sequence.table.blocks()[planned / size])
                .filter(|&block| self.pool.holders(block) > 1);
            let available = self.pool.available();
            let room = match shared {
                Some(_) if available == 0 => 0,
                shared => (sequence.table.len() + available - usize::from(shared.is_some())) * size - planned,
            };
            let rows = want.min(sequence.ungranted()).min(room);
            if rows > 0 {
                if let Some(block) = shared {
                    let Some(copy) = self.pool.allocate() else { unreachable!("counted as available") };
                    self.plan.copies.push((block, copy));
                    self.totals.copies += 1;
                    sequence.table.replace(planned / size, copy);
                    self.pool.release(block);
                }
                while sequence.table.len() < blocks_for(planned + rows, size) {
                    let Some(block) = self.pool.allocate() else { unreachable!("counted as available") };
                    sequence.table.push(block);
                }
                sequence.granted += rows;
                self.left -= rows;
                return rows;
            }
            if sequence.granted > 0 || index + 1 == self.running.len() {
                self.running[index].stalled = true;
                return 0;
            }
            if self.planning_ahead {
                self.short = true;
                self.running[index].stalled = true;
                return 0;
            }
            self.preempt_last();
        }
    }

    fn preempt_last(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        self.left += std::mem::take(&mut sequence.granted);
        self.plan.restores.retain(|restore| restore.key != sequence.key);
        sequence.draft.clear();
        // It may be admitted again by the time somebody asks.
        sequence.stalled = false;
        sequence.release_blocks(&mut self.pool);
        sequence.preempted = true;
        self.totals.preemptions += 1;
        self.waiting.insert(sequence.key, sequence);
    }

    fn write_plan(&mut self) {
        self.plan.entries.clear();
        self.plan.tokens = 0;
        for single in [true, false] {
            for (index, sequence) in self.running.iter().enumerate() {
                let (drafts, count) = (sequence.granted_drafts, sequence.granted + sequence.granted_drafts);
                if count > 0 && (count == 1) == single {
                    let (key, start) = (sequence.key, sequence.computed);
                    self.plan.entries.push(PlanEntry { index, key, start, count, drafts });
                    self.plan.tokens += count;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn key(priority: i32, arrival: u64) -> SequenceKey {
        SequenceKey { priority, arrival }
    }

    /// A prompt of `len` tokens that shares nothing with other arrivals.
    pub(super) fn add(scheduler: &mut Scheduler, key: SequenceKey, len: usize) {
        let prompt = (0..len as u32).map(|i| i + 1000 * (key.arrival as u32 + 1)).collect();
        scheduler.add(Sequence::new(key, prompt, 100, false, None));
    }

    pub(super) fn scheduler(max_batch_tokens: usize, max_running: usize, num_blocks: usize) -> Scheduler {
        Scheduler::new(Limits { max_batch_tokens, max_running }, num_blocks, 2, true)
    }

    /// Plans and computes a step, gives every sequence that is due a token, and returns the rows by arrival.
    pub(super) fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize)> {
        scheduler.schedule(StepBudget::UNLIMITED);
        scheduler.check_plan().unwrap();
        let entries = scheduler.plan().entries.clone();
        for (place, entry) in entries.iter().enumerate() {
            let through = entry.end() == scheduler.running()[entry.index].tokens().len();
            scheduler.settle(place, if through { &[7] } else { &[] });
        }
        scheduler.check_invariants().unwrap();
        entries.iter().map(|e| (e.key.arrival, e.count)).collect()
    }

    #[test]
    fn decode_rows_come_before_prompts() {
        let mut s = scheduler(8, 4, 64);
        add(&mut s, key(0, 0), 3);
        add(&mut s, key(0, 1), 3);
        assert_eq!(step(&mut s), [(0, 3), (1, 3)]);
        add(&mut s, key(-1, 2), 40);
        assert_eq!(step(&mut s), [(0, 1), (1, 1), (2, 6)]);
    }

    #[test]
    fn half_of_the_rest_goes_to_the_shortest_prompts_and_half_to_the_oldest() {
        let mut s = scheduler(16, 8, 128);
        add(&mut s, key(0, 0), 40);
        add(&mut s, key(0, 1), 30);
        add(&mut s, key(0, 2), 3);
        add(&mut s, key(0, 3), 4);
        // The oldest has 8; of the other 8 the shortest take 3 and 4, and the next shortest 1.
        let mut rows = step(&mut s);
        rows.sort_unstable();
        assert_eq!(rows, [(0, 8), (1, 1), (2, 3), (3, 4)]);
    }

    #[test]
    fn equal_prompts_go_one_after_the_other() {
        let mut s = scheduler(8, 4, 64);
        add(&mut s, key(0, 0), 8);
        add(&mut s, key(0, 1), 8);
        assert_eq!(step(&mut s), [(0, 8)]);
        assert_eq!(step(&mut s), [(0, 1), (1, 7)]);
    }

    #[test]
    fn the_queue_moves_by_priority_then_arrival() {
        let mut s = scheduler(8, 1, 64);
        for (priority, arrival) in [(0, 0), (1, 1), (0, 2), (-1, 3)] {
            add(&mut s, key(priority, arrival), 2);
        }
        let mut order = Vec::new();
        while !s.is_idle() {
            s.schedule(StepBudget::UNLIMITED);
            let running = s.running()[0].key();
            order.push(running.arrival);
            s.remove(running);
        }
        assert_eq!(order, [3, 0, 2, 1]);
    }

    #[test]
    fn nobody_is_admitted_who_would_have_to_be_preempted_at_once() {
        // Five blocks of two: the first needs two and one to grow into, so there is no room for four more tokens.
        let mut s = scheduler(16, 4, 5);
        add(&mut s, key(0, 0), 4);
        add(&mut s, key(0, 1), 6);
        assert_eq!(step(&mut s), [(0, 4)]);
        assert_eq!(s.waiting().count(), 1);
        // Nor does a smaller one overtake it: everybody's wait is bounded.
        add(&mut s, key(0, 2), 1);
        assert_eq!(step(&mut s), [(0, 1)]);
        s.remove(key(0, 0));
        assert_eq!(step(&mut s), [(2, 1), (1, 6)]);
    }

    #[test]
    fn the_last_in_order_is_preempted_and_resumes_from_its_own_blocks() {
        let mut s = scheduler(16, 4, 8);
        add(&mut s, key(1, 0), 4);
        add(&mut s, key(0, 1), 4);
        step(&mut s);
        while s.totals().preemptions == 0 {
            step(&mut s);
        }
        // The one of lower priority, though it came first.
        assert_eq!(s.running().iter().map(|s| s.key().arrival).collect::<Vec<_>>(), [1]);
        let waiting = s.waiting().next().unwrap();
        assert_eq!((waiting.key().arrival, waiting.computed(), waiting.table().len()), (0, 0, 0));
        let length = waiting.tokens().len();
        s.remove(key(0, 1));
        s.schedule(StepBudget::UNLIMITED);
        let entry = s.plan().entries[0];
        assert!(entry.start >= 4, "its prompt's blocks were still cached, yet it starts at {}", entry.start);
        assert_eq!(entry.start + entry.count, length);
        assert_eq!(s.totals().cache_hits, 0, "its own blocks are no cache hits");
    }

    #[test]
    fn the_last_in_order_stalls_instead_of_preempting_itself() {
        let mut s = scheduler(16, 4, 5);
        add(&mut s, key(0, 0), 4);
        add(&mut s, key(0, 1), 3);
        step(&mut s);
        assert_eq!(step(&mut s), [(0, 1), (1, 1)]);
        // Five blocks are in use, and the second wants one more.
        assert_eq!(step(&mut s), [(0, 1)]);
        assert_eq!((s.running().len(), s.totals().preemptions), (2, 0));
        s.remove(key(0, 0));
        assert_eq!(step(&mut s), [(1, 1)], "nothing was lost by waiting");
    }

    #[test]
    fn one_that_stalled_and_was_then_preempted_runs_as_soon_as_it_is_back() {
        let mut s = scheduler(4, 2, 12);
        add(&mut s, key(0, 0), 20);
        add(&mut s, key(0, 1), 1);
        for _ in 0..6 {
            assert_eq!(step(&mut s), [(1, 1), (0, 3)]);
        }
        // The stream finds no block for its seventh token, and then the prompt takes those it has.
        assert_eq!(step(&mut s), [(0, 2)]);
        assert_eq!((s.running().len(), s.totals().preemptions), (1, 1));
        s.remove(key(0, 0));
        assert_eq!(step(&mut s).len(), 1);
    }

    #[test]
    fn a_prompt_catches_up_on_blocks_another_is_computing() {
        let mut s = scheduler(8, 4, 64);
        let prompt: Vec<u32> = (0..32).collect();
        for arrival in 0..2 {
            s.add(Sequence::new(key(0, arrival), prompt.clone(), 10, false, None));
        }
        let mut computed = 0;
        while s.running().len() < 2 || s.running().iter().any(|s| s.computed() < 32) {
            computed += step(&mut s).iter().map(|row| row.1).sum::<usize>();
        }
        // The first computes its 32 tokens, the second only the last block; besides, a row or two of decoding.
        assert!(computed <= 36, "{computed} tokens computed for 32 that are shared");
        assert_eq!(s.totals().cache_hits, 30);
        assert_eq!(s.totals().cache_queries, 64);
    }

    #[test]
    fn equal_salts_share_and_unequal_ones_do_not() {
        let mut s = scheduler(16, 4, 64);
        for (arrival, salt) in [None, Some("a"), Some("a"), Some("b"), None].into_iter().enumerate() {
            let key = key(0, arrival as u64);
            s.add(Sequence::new(key, (0..8).collect(), 10, false, salt.map(Into::into)));
            let hits_before = s.totals().cache_hits;
            step(&mut s);
            let hits = s.totals().cache_hits - hits_before;
            assert_eq!(hits, if [2, 4].contains(&arrival) { 6 } else { 0 }, "arrival {arrival}");
            s.remove(key);
        }
    }
}
