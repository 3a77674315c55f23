//! What must hold of the queues, the blocks and the plan. Tests and simulations ask at every step.

use super::{PlanEntry, Scheduler};
use crate::kv::blocks_for;
use crate::sequence::{Sequence, SequenceKey};

impl Scheduler {
    /// What must hold between steps. `Err` says what does not.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.pool.check_invariants()?;
        let size = self.pool.block_size();
        let mut holders = vec![0u32; self.pool.num_blocks()];
        if !self.running.is_sorted_by_key(|s| s.key) {
            return Err("running sequences are out of order".into());
        }
        if self.running.len() > self.limits.max_running {
            return Err(format!("{} sequences run, the limit is {}", self.running.len(), self.limits.max_running));
        }
        for sequence in &self.running {
            let Sequence { key, computed, table, tokens, granted, .. } = sequence;
            if *computed > tokens.len() {
                return Err(format!("{key:?}: {computed} tokens computed of {}", tokens.len()));
            }
            let (ahead, restores) = match self.ahead {
                true => (*granted, self.next.restores.iter().filter(|restore| restore.key == *key).count()),
                false => (0, 0),
            };
            if table.len() != blocks_for(*computed + ahead, size) + restores {
                let (blocks, planned) = (table.len(), ahead + restores * size);
                return Err(format!("{key:?}: {blocks} blocks for {computed} tokens and {planned} to come"));
            }
            // Counted from the definition, and not by what gave them back: the next token reads the `window` before its own.
            let unread = |window: usize| (1..).take_while(|blocks| blocks * size + window <= *computed).count();
            if table.passed() != self.window.map_or(0, unread) {
                return Err(format!("{key:?}: {} blocks given back of {computed} tokens", table.passed()));
            }
            for (index, &block) in table.blocks().iter().enumerate().skip(table.passed()) {
                holders[block as usize] += 1;
                if (index + 1) * size > *computed && self.pool.is_cached(block) {
                    return Err(format!("{key:?}: block {block} is not full and cached"));
                }
            }
        }
        for sequence in self.waiting() {
            if !sequence.table.is_empty() || sequence.computed != 0 {
                return Err(format!("{:?} waits and holds blocks", sequence.key));
            }
        }
        for (block, &count) in holders.iter().enumerate() {
            let known = self.pool.holders(block as u32);
            if known != count {
                return Err(format!("block {block} is in {count} tables and has {known} holders"));
            }
        }
        let known = |key: &SequenceKey| self.waiting.contains_key(key) || self.running_index(*key).is_ok();
        match self.followers.keys().find(|leader| !known(leader)) {
            Some(leader) => Err(format!("{leader:?} is waited for and gone")),
            None => Ok(()),
        }
    }

    /// What must hold of a plan before it runs: within the budget, and every slot written is in a block that its
    /// sequence holds alone and nobody can find. `Err` says what does not.
    pub fn check_plan(&self) -> Result<(), String> {
        let size = self.pool.block_size();
        if self.plan.tokens > self.limits.max_batch_tokens {
            return Err(format!(
                "{} tokens planned, the budget is {}",
                self.plan.tokens, self.limits.max_batch_tokens
            ));
        }
        if self.plan.tokens == 0 && self.plan.restores.is_empty() && !self.is_idle() {
            return Err("nothing planned though there is work: no progress".into());
        }
        for entry @ &PlanEntry { index, key, start, count, drafts } in &self.plan.entries {
            let sequence = &self.running[index];
            let known = (1..=sequence.pending()).contains(&(entry.end() - start));
            let drafted = drafts == 0 || (entry.end() == sequence.tokens.len() && drafts <= sequence.draft.len());
            if sequence.key != key || start != sequence.computed || !known || !drafted {
                return Err(format!("{key:?}: planned {start} + {count}, computed {}", sequence.computed));
            }
            if sequence.table.len() < blocks_for(start + count, size) {
                return Err(format!("{key:?}: rows beyond its blocks"));
            }
            if sequence.table.held().len() > self.held_max(count) {
                return Err(format!("{key:?}: holds blocks that its window has passed by"));
            }
            for &block in &sequence.table.blocks()[start / size..blocks_for(start + count, size)] {
                if self.pool.holders(block) != 1 || self.pool.is_cached(block) {
                    return Err(format!("{key:?}: would write to block {block}, which is not its own"));
                }
            }
        }
        Ok(())
    }
}
