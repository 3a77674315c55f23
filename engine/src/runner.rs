//! What computes logits: the trait the engine drives, and its adapter for models.

use rill_models::{BestLogits, ForwardInput, Model, ModelError, Ranking};

use crate::config::EngineConfig;
use crate::kv::BlockId;

/// A forward pass failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunnerError {
    /// This batch could not be computed; others can. Its requests fail, the engine goes on.
    #[error("{0}")]
    Batch(String),
    /// The runner may not be used again. Every request fails and the engine stops.
    #[error("{0}")]
    Fatal(String),
}

/// Computes next-token logits over a paged KV cache it owns. The engine owns which block is whose.
pub trait Runner: Send {
    /// Width of a logits row; token ids are below it.
    fn vocab_size(&self) -> usize;

    /// How many tokens before its own a token reads of the cache; `None`: all of them.
    fn window_tokens(&self) -> Option<usize> {
        None
    }

    /// Copies whole blocks of the cache, one pair (from, to) after the other.
    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), RunnerError>;

    /// Bytes [`Runner::read_block`] gives.
    fn block_bytes(&self) -> usize;

    /// Fills `out` with the keys and values of a block, which [`Runner::write_block`] puts back.
    fn read_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), RunnerError>;

    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), RunnerError>;

    /// Starts a step where the runner computes while its caller does something else: [`Runner::forward`], or
    /// [`Runner::forward_best`] if there is a ranking, is called next, with the same arguments, and waits for it. False:
    /// it does not, and nothing was done.
    fn start(&mut self, _input: &ForwardInput, _ranking: Option<&Ranking>) -> Result<bool, RunnerError> {
        Ok(false)
    }

    /// Writes the keys and values of `input`'s rows to their slots and fills `logits` with
    /// `input.logit_rows.len() * vocab_size()` values. A row's result must depend on its own sequence alone.
    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), RunnerError>;

    /// How many of a row's logits [`Runner::forward_best`] can rank; 0: none.
    fn best_logits_max(&self) -> usize {
        0
    }

    /// As [`Runner::forward`], but gives the largest of each row alone.
    fn forward_best(&mut self, _input: &ForwardInput, ranking: &Ranking) -> Result<Vec<BestLogits>, RunnerError> {
        Err(RunnerError::Fatal(format!("{} logits of a row cannot be ranked", ranking.count)))
    }

    /// A whole row of those [`Runner::forward_best`] ranked last.
    fn ranked_row(&mut self, row: usize) -> Result<Vec<f32>, RunnerError> {
        Err(RunnerError::Fatal(format!("row {row} of the logits was not ranked")))
    }

    /// Width of a hidden state; 0 where there are none to be had, and so no embeddings.
    fn hidden_size(&self) -> usize {
        0
    }

    /// Appends to `out` the final hidden states of `rows` of the last forward pass, `hidden_size` values each. They
    /// must depend on a row's own sequence alone, too.
    fn hidden_states(&mut self, _rows: &[u32], _out: &mut Vec<f32>) -> Result<(), RunnerError> {
        Err(RunnerError::Fatal("this runner has no hidden states".to_owned()))
    }
}

/// Runs a `rill_models::Model`.
pub struct ModelRunner {
    model: Box<dyn Model>,
}

impl ModelRunner {
    /// Allocates the model's KV cache for `config`.
    pub fn new(mut model: Box<dyn Model>, config: &EngineConfig) -> Result<ModelRunner, ModelError> {
        model.allocate_kv_cache(config.num_blocks, config.block_size)?;
        Ok(ModelRunner { model })
    }
}

impl Runner for ModelRunner {
    fn vocab_size(&self) -> usize {
        self.model.shape().vocab_size
    }

    fn window_tokens(&self) -> Option<usize> {
        self.model.shape().window_tokens
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), RunnerError> {
        self.model.copy_blocks(pairs).map_err(fatal)
    }

    fn block_bytes(&self) -> usize {
        self.model.block_bytes()
    }

    fn read_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), RunnerError> {
        self.model.read_block(block, out).map_err(fatal)
    }

    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), RunnerError> {
        self.model.write_block(block, bytes).map_err(fatal)
    }

    fn start(&mut self, input: &ForwardInput, ranking: Option<&Ranking>) -> Result<bool, RunnerError> {
        self.model.start(input, ranking).map_err(fatal)
    }

    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), RunnerError> {
        self.model.forward(input, logits).map_err(fatal)
    }

    fn best_logits_max(&self) -> usize {
        self.model.best_logits_max()
    }

    fn forward_best(&mut self, input: &ForwardInput, ranking: &Ranking) -> Result<Vec<BestLogits>, RunnerError> {
        self.model.forward_best(input, ranking).map_err(fatal)
    }

    fn ranked_row(&mut self, row: usize) -> Result<Vec<f32>, RunnerError> {
        self.model.ranked_row(row).map_err(fatal)
    }

    fn hidden_size(&self) -> usize {
        self.model.shape().hidden_size
    }

    fn hidden_states(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), RunnerError> {
        self.model.hidden_states(rows, out).map_err(|error| RunnerError::Fatal(error.to_string()))
    }
}

/// A model gives no way to tell whether its cache survived an error.
fn fatal(error: ModelError) -> RunnerError {
    RunnerError::Fatal(error.to_string())
}
