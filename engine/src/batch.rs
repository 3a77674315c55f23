//! A step's plan as the flat, ragged arrays the forward pass takes.

use rill_models::ForwardInput;

use crate::scheduler::{PlanEntry, Scheduler};

/// The forward pass's input, and which logits rows are whose. Reused from step to step.
#[derive(Debug, Default)]
pub struct Batch {
    pub input: ForwardInput,
    /// Plan entry `i` owns rows `logit_starts[i] .. logit_starts[i + 1]` of the logits.
    pub logit_starts: Vec<usize>,
}

impl Batch {
    /// Fills the arrays from the scheduler's current plan.
    pub fn build(&mut self, scheduler: &Scheduler) {
        let block_size = scheduler.pool().block_size();
        let input = &mut self.input;
        input.clear();
        self.logit_starts.clear();
        input.query_starts.push(0);
        input.block_table_starts.push(0);
        self.logit_starts.push(0);
        for &PlanEntry { index, start, count, .. } in &scheduler.plan().entries {
            let sequence = &scheduler.running()[index];
            let end = start + count;
            for position in start..end {
                if sequence.wants_logits(position) {
                    input.logit_rows.push(input.token_ids.len() as u32);
                }
                input.token_ids.push(sequence.token_at(position));
                input.positions.push(position as u32);
                input.slot_mapping.push(sequence.table().slot(position, block_size));
            }
            input.query_starts.push(input.token_ids.len() as u32);
            input.context_lens.push(end as u32);
            input.block_tables.extend_from_slice(sequence.table().blocks());
            input.block_table_starts.push(input.block_tables.len() as u32);
            self.logit_starts.push(input.logit_rows.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Limits, StepBudget};
    use crate::sequence::{Sequence, SequenceKey};

    #[test]
    fn two_sequences_in_chunks() {
        let limits = Limits { max_batch_tokens: 5, max_running: 4 };
        let mut scheduler = Scheduler::new(limits, 8, 2, true);
        for (arrival, prompt, scored) in [(0, vec![10, 11, 12, 13], false), (1, vec![20, 21, 22], true)] {
            let key = SequenceKey { priority: 0, arrival };
            scheduler.add(Sequence::new(key, prompt, 1, scored, None));
        }
        scheduler.schedule(StepBudget::UNLIMITED);
        let mut batch = Batch::default();
        batch.build(&scheduler);
        // Half of five for the shorter prompt, the rest for the older one.
        let input = &batch.input;
        assert_eq!(input.token_ids, [10, 11, 12, 20, 21]);
        assert_eq!(input.positions, [0, 1, 2, 0, 1]);
        assert_eq!(input.query_starts, [0, 3, 5]);
        assert_eq!(input.context_lens, [3, 2]);
        assert_eq!(input.block_table_starts, [0, 2, 3]);
        assert_eq!(input.logit_rows, [3, 4], "only the scored prompt's rows");
        assert_eq!(batch.logit_starts, [0, 0, 2]);
        for (row, &slot) in input.slot_mapping.iter().enumerate() {
            let table = usize::from(row >= 3);
            let first = input.block_table_starts[table] as usize;
            let position = input.positions[row];
            assert_eq!(slot, input.block_tables[first + position as usize / 2] * 2 + position % 2);
        }
        scheduler.settle(0, &[]);
        scheduler.settle(1, &[]);
        scheduler.schedule(StepBudget::UNLIMITED);
        batch.build(&scheduler);
        assert_eq!(batch.input.token_ids, [13, 22]);
        assert_eq!(batch.input.positions, [3, 2]);
        assert_eq!(batch.input.context_lens, [4, 3]);
        assert_eq!(batch.input.logit_rows, [0, 1]);
    }
}
