//! The plan of the next step, made while the current one is being computed.

use super::{Scheduler, StepBudget};
use crate::sequence::SequenceKey;

impl Scheduler {
    /// Plans the step after the current one while that is being computed, as far as it can be known: as if every token had been
    /// computed and every sequence that is due one had got its next. Returns whom it admits; `None` if it is to be planned when
    /// the step is over: drafts may be wrong, choices may start from a prompt, or somebody has to be preempted.
    ///
    /// [`Scheduler::take_ahead`] makes it the current plan once the step is settled.
    pub fn schedule_ahead(&mut self, budget: StepBudget) -> Option<&[SequenceKey]> {
        let sure = self.followers.is_empty() && self.plan.entries.iter().all(|entry| entry.drafts == 0);
        if self.ahead || self.short || !sure || self.plan.tokens == 0 {
            return None;
        }
        std::mem::swap(&mut self.plan, &mut self.next);
        for entry in &self.next.entries {
            self.running[entry.index].assume(entry.count);
        }
        self.planning_ahead = true;
        self.grant_all(budget);
        self.planning_ahead = false;
        self.plan.spills.extend(self.pool.take_evicted());
        std::mem::swap(&mut self.plan, &mut self.next);
        // Whoever was admitted has moved the others.
        for entry in &mut self.plan.entries {
            if let Ok(index) = self.running.binary_search_by_key(&entry.key, |sequence| sequence.key) {
                entry.index = index;
                self.running[index].forget_assumed();
            }
        }
        self.ahead = true;
        self.totals.planned_ahead += 1;
        Some(&self.next.admitted)
    }

    /// Makes what was planned ahead the current plan, without those who have been removed and with what drafts there are by
    /// now. False: there is no such plan, or nothing left of it.
    pub fn take_ahead(&mut self) -> bool {
        if !std::mem::take(&mut self.ahead) {
            return false;
        }
        std::mem::swap(&mut self.plan, &mut self.next);
        // They are known to whoever planned.
        self.plan.admitted.clear();
        let running = &self.running;
        self.plan.restores.retain(|r| running.binary_search_by_key(&r.key, |sequence| sequence.key).is_ok());
        self.left = self.limits.max_batch_tokens - self.running.iter().map(|s| s.granted).sum::<usize>();
        self.finish_plan();
        self.plan.tokens > 0 || !self.plan.restores.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{add, key, scheduler, step};
    use super::*;

    #[test]
    fn a_plan_made_ahead_is_the_plan_made_after() {
        let (mut ahead, mut after) = (scheduler(16, 4, 64), scheduler(16, 4, 64));
        for s in [&mut ahead, &mut after] {
            add(s, key(0, 0), 3);
            add(s, key(0, 1), 5);
            s.schedule(StepBudget::UNLIMITED);
            // It comes while the step runs.
            add(s, key(0, 2), 20);
        }
        assert_eq!(ahead.schedule_ahead(StepBudget::UNLIMITED), Some(&[key(0, 2)][..]));
        assert_eq!(ahead.plan(), after.plan(), "the step that runs is what it was");
        assert_eq!(ahead.schedule_ahead(StepBudget::UNLIMITED), None, "one step ahead is enough");
        for s in [&mut ahead, &mut after] {
            (0..2).for_each(|place| s.settle(place, &[7]));
            s.check_invariants().unwrap();
        }
        assert!(ahead.take_ahead());
        after.schedule(StepBudget::UNLIMITED);
        assert_eq!(ahead.plan().entries, after.plan().entries);
        assert_eq!(ahead.plan().tokens, 16);
        ahead.check_plan().unwrap();
        // Nothing of it is left over.
        assert!(!ahead.take_ahead());
    }

    #[test]
    fn whoever_ends_is_not_in_the_plan_made_ahead() {
        let mut s = scheduler(16, 4, 64);
        (0..3).for_each(|arrival| add(&mut s, key(0, arrival), 3));
        step(&mut s);
        s.schedule(StepBudget::UNLIMITED);
        assert!(s.schedule_ahead(StepBudget::UNLIMITED).is_some());
        (0..3).for_each(|place| s.settle(place, &[7]));
        s.remove(key(0, 1));
        s.check_invariants().unwrap();
        s.propose(1, &[8, 9]);
        assert!(s.take_ahead());
        s.check_plan().unwrap();
        let rows: Vec<_> =
            s.plan().entries.iter().map(|e| (e.index, e.key.arrival, e.start, e.count, e.drafts)).collect();
        assert_eq!(rows, [(0, 0, 4, 1, 0), (1, 2, 4, 3, 2)], "the drafts join it");
        // Drafts may be wrong: what follows is planned when that is known.
        assert_eq!(s.schedule_ahead(StepBudget::UNLIMITED), None);
    }

    #[test]
    fn nobody_loses_blocks_to_a_plan_made_ahead() {
        // Five blocks of two tokens: one of the two has to go when both want a third block.
        let mut s = scheduler(16, 4, 5);
        add(&mut s, key(0, 0), 3);
        add(&mut s, key(0, 1), 3);
        let mut ahead = 0;
        while s.totals().preemptions == 0 {
            if !s.take_ahead() {
                s.schedule(StepBudget::UNLIMITED);
            }
            s.check_plan().unwrap();
            let before = s.totals().preemptions;
            ahead += u32::from(s.schedule_ahead(StepBudget::UNLIMITED).is_some());
            assert_eq!(s.totals().preemptions, before);
            for (place, entry) in s.plan().entries.clone().into_iter().enumerate() {
                let through = entry.end() == s.running()[entry.index].tokens().len();
                s.settle(place, if through { &[7] } else { &[] });
            }
            s.check_invariants().unwrap();
            assert!(ahead < 10, "nobody ever goes");
        }
        assert!(ahead > 1, "planned ahead {ahead} times");
        assert_eq!(s.running().iter().map(|s| s.key().arrival).collect::<Vec<_>>(), [0]);
    }
}
