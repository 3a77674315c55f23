//! Drafts from a smaller model of the same vocabulary, with a KV cache of its own over the same blocks.
//!
//! Before a step that checks drafts, the small model generates them one by one, all drafting sequences together. It
//! computes what it has not seen of a sequence when it first drafts for it, in pieces. What it computes decides how
//! fast tokens come and never which.

use rill_models::ForwardInput;

use crate::batch::push_rows;
use crate::kv::BlockId;
use crate::runner::{Runner, RunnerError};
use crate::scheduler::Scheduler;
use crate::sequence::{Sequence, SequenceKey};

/// Tokens of one sequence it catches up on in a step.
const CATCH_UP_MAX: usize = 256;
/// Weight of the latest round in the estimate of what one costs.
const ROUND_WEIGHT: f64 = 0.1;

/// The small model and its working memory.
pub(crate) struct DraftModel {
    runner: Box<dyn Runner>,
    input: ForwardInput,
    logits: Vec<f32>,
    drafting: Vec<Drafting>,
    round_seconds: f64,
}

/// A sequence that drafts in this step.
struct Drafting {
    /// Its place in the plan, and among those that run.
    place: usize,
    index: usize,
    key: SequenceKey,
    wanted: usize,
    /// Whether this round's last row is one to draw from.
    draws: bool,
}

impl DraftModel {
    pub(crate) fn new(runner: Box<dyn Runner>) -> DraftModel {
        let (input, logits) = (ForwardInput::default(), Vec::new());
        DraftModel { runner, input, logits, drafting: Vec::new(), round_seconds: 0.0 }
    }

    /// Seconds to draft one token for each of the sequences that draft.
    pub(crate) fn round_seconds(&self) -> f64 {
        self.round_seconds
    }

    pub(crate) fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), RunnerError> {
        self.runner.copy_blocks(pairs)
    }

    /// Puts drafts where the plan has room for them. `choose` draws the draft of that number for a sequence.
    pub(crate) fn draft(
        &mut self,
        scheduler: &mut Scheduler,
        now_us: impl Fn() -> u64,
        mut choose: impl FnMut(SequenceKey, usize, &[f32]) -> Option<u32>,
    ) -> Result<(), RunnerError> {
        self.drafting.clear();
        let entries = scheduler.plan().entries.iter().enumerate().filter(|(_, entry)| entry.drafts > 0);
        self.drafting.extend(entries.map(|(place, entry)| Drafting {
            place,
            index: entry.index,
            key: entry.key,
            wanted: entry.drafts,
            draws: false,
        }));
        for round in 0.. {
            self.drafting.retain(|drafting| drafting.wanted > round);
            if self.drafting.is_empty() {
                break;
            }
            let started = now_us();
            self.fill(scheduler, round);
            self.runner.forward(&self.input, &mut self.logits)?;
            self.take(scheduler, round, &mut choose);
            let seconds = now_us().saturating_sub(started) as f64 * 1e-6;
            self.round_seconds += ROUND_WEIGHT * (seconds - self.round_seconds);
        }
        Ok(())
    }

    /// The rows of a round: first what has not been seen of each sequence, then its latest draft.
    fn fill(&mut self, scheduler: &Scheduler, round: usize) {
        let block_size = scheduler.pool().block_size();
        self.input.clear();
        self.input.query_starts.push(0);
        self.input.block_table_starts.push(0);
        for drafting in &mut self.drafting {
            let sequence: &Sequence = &scheduler.running()[drafting.index];
            let end = sequence.tokens().len() + round;
            let seen = if round == 0 { sequence.drafter_seen } else { end - 1 };
            let rows = seen..end.min(seen + CATCH_UP_MAX);
            drafting.draws = rows.end == end;
            push_rows(&mut self.input, sequence, rows, block_size, |position| position + 1 == end);
        }
    }

    fn take(
        &mut self,
        scheduler: &mut Scheduler,
        round: usize,
        choose: &mut impl FnMut(SequenceKey, usize, &[f32]) -> Option<u32>,
    ) {
        let mut rows = self.logits.chunks_exact(self.runner.vocab_size());
        for (sequence, drafting) in self.drafting.iter_mut().enumerate() {
            let end = self.input.context_lens[sequence] as usize;
            scheduler.note_drafter_seen(drafting.index, end);
            let row = if drafting.draws { rows.next() } else { None };
            match row.and_then(|row| choose(drafting.key, round, row)) {
                Some(token) => scheduler.set_draft(drafting.index, round, token),
                None => {
                    scheduler.cut_drafts(drafting.place, round);
                    drafting.wanted = 0;
                }
            }
        }
    }
}
