//! The engine's state at one moment, for people who wonder what it is doing.

use crate::generation::Generation;
use crate::scheduler::Scheduler;
use crate::sequence::{Sequence, SequenceKey};

/// Sequences told of at most, of each kind.
pub const SEQUENCES_MAX: usize = 256;

/// What runs and what waits, in the order of the scheduler.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineState {
    pub running: Vec<SequenceState>,
    pub waiting: Vec<SequenceState>,
    /// Sequences that run or wait beyond those told of.
    pub untold: usize,
    pub tenants: usize,
    /// Contents that can be read back from the second tier.
    pub blocks_spilled: usize,
}

/// One sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceState {
    /// Number of the request in order of arrival.
    pub arrival: u64,
    pub priority: i32,
    pub tenant: Option<String>,
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
    /// Tokens whose keys and values are in the cache.
    pub computed_tokens: usize,
    pub cached_prompt_tokens: usize,
    pub blocks: usize,
    /// It has run and lost its blocks.
    pub preempted: bool,
    pub age_ms: u64,
}

impl EngineState {
    pub(crate) fn of<'a>(
        scheduler: &Scheduler,
        generation: impl Fn(SequenceKey) -> Option<&'a Generation>,
        now_us: u64,
    ) -> EngineState {
        let state = |sequence: &Sequence| SequenceState {
            arrival: sequence.key.arrival,
            priority: sequence.key.priority,
            tenant: sequence.tenant.as_deref().map(str::to_owned),
            prompt_tokens: sequence.prompt_len(),
            generated_tokens: sequence.tokens().len() - sequence.prompt_len(),
            computed_tokens: sequence.computed(),
            cached_prompt_tokens: sequence.cached_prompt_tokens,
            blocks: sequence.table().held().len(),
            preempted: sequence.preempted,
            age_ms: generation(sequence.key()).map_or(0, |generation| generation.age_us(now_us) / 1000),
        };
        let (running, waiting) = (scheduler.running().len(), scheduler.waiting().count());
        EngineState {
            running: scheduler.running().iter().take(SEQUENCES_MAX).map(state).collect(),
            waiting: scheduler.waiting().take(SEQUENCES_MAX).map(state).collect(),
            untold: running.saturating_sub(SEQUENCES_MAX) + waiting.saturating_sub(SEQUENCES_MAX),
            tenants: scheduler.tenants(),
            blocks_spilled: scheduler.spilled(),
        }
    }
}
