//! What one forward pass is given and must return: the ragged batch, and the trait every model implements.

use std::sync::Arc;

use rill_kernels::{BestLogits, Ranking};

use crate::{Adapter, AdapterSites, ModelError};

/// One engine step as flat, ragged arrays. Row `r` of the batch is token `token_ids[r]`; sequence `s` owns
/// rows `query_starts[s]..query_starts[s + 1]`, which are the *last* tokens of its `context_lens[s]`-token
/// context. Everything before them is already in the KV cache.
#[derive(Debug, Default, Clone)]
pub struct ForwardInput {
    pub token_ids: Vec<u32>,
    /// Position of each row in its sequence, from 0.
    pub positions: Vec<u32>,
    /// Where each row's keys and values go: `block_id * block_size + offset_in_block`.
    pub slot_mapping: Vec<u32>,
    /// Prefix sums of rows per sequence: `sequences + 1` entries, the first 0, the last `token_ids.len()`.
    pub query_starts: Vec<u32>,
    /// Tokens of each sequence that attention may see, this step's rows included.
    pub context_lens: Vec<u32>,
    /// All sequences' block tables, one after another. Blocks that hold nothing but tokens further back than
    /// [`ModelShape::window_tokens`] are not read: their entries may be anything.
    pub block_tables: Vec<u32>,
    /// Prefix sums of block-table lengths: `sequences + 1` entries.
    pub block_table_starts: Vec<u32>,
    /// Ascending rows whose next-token logits are wanted; the output holds one row of logits for each.
    pub logit_rows: Vec<u32>,
    /// What each sequence runs with beside the model's own weights; empty where that is nothing for all of them.
    pub adapters: Vec<Option<Arc<Adapter>>>,
}

impl ForwardInput {
    pub fn rows(&self) -> usize {
        self.token_ids.len()
    }

    pub fn sequences(&self) -> usize {
        self.context_lens.len()
    }

    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        self.query_starts.clear();
        self.context_lens.clear();
        self.block_tables.clear();
        self.block_table_starts.clear();
        self.logit_rows.clear();
        self.adapters.clear();
    }
}

/// Shape facts the engine needs about a loaded model.
#[derive(Debug, Clone)]
pub struct ModelShape {
    /// Width of a logits row.
    pub vocab_size: usize,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Longest sequence the model was trained for, in tokens.
    pub context_len: usize,
    /// Bytes of KV cache one token takes over all layers.
    pub kv_bytes_per_token: usize,
    /// How many tokens before a token's own any layer reads, if every layer slides a window.
    pub window_tokens: Option<usize>,
    /// More sequences than this must not run at once; `None`: no such limit.
    pub running_max: Option<usize>,
}

/// A decoder ready to run. Implementations own their weights and KV cache; the engine owns which block is whose.
pub trait Model: Send {
    fn shape(&self) -> &ModelShape;

    /// Bytes left on a device with memory of its own; `None` where the model shares the host's.
    fn device_memory_free(&self) -> Option<usize> {
        None
    }

    /// Where it takes adapters; `None` where it, or what it runs on, takes none.
    fn adapter_sites(&self) -> Option<&AdapterSites> {
        None
    }

    /// Allocates (or re-allocates, forgetting everything) the paged KV cache.
    fn allocate_kv_cache(&mut self, blocks: usize, block_size: usize) -> Result<(), ModelError>;

    /// Copies whole blocks of the KV cache, one pair (from, to) after the other.
    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), ModelError>;

    /// Bytes [`Model::read_block`] gives: a block of all layers.
    fn block_bytes(&self) -> usize;

    /// Fills `out` with the keys and values of `block`, in a form that only this model, with a cache of the same block
    /// size and dtype on the same kind of device, understands.
    fn read_block(&mut self, block: u32, out: &mut Vec<u8>) -> Result<(), ModelError>;

    /// Puts back what [`Model::read_block`] gave; `bytes` is [`Model::block_bytes`] long.
    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), ModelError>;

    /// Starts a step on a device that works while the host does something else: [`Model::forward`], or
    /// [`Model::forward_best`] if there is a ranking, is called next, with the same arguments, and waits for it. False:
    /// there is no such device, and nothing was done.
    fn start(&mut self, _input: &ForwardInput, _ranking: Option<&Ranking>) -> Result<bool, ModelError> {
        Ok(false)
    }

    /// Runs the rows of `input`, writes their keys and values to the KV cache and fills `logits` with
    /// `input.logit_rows.len() * vocab_size` values, one row after another.
    ///
    /// A row's result depends on its own sequence alone, bit for bit, never on what else is in the batch or on
    /// how its context was cut into steps.
    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), ModelError>;

    /// How many of a row's logits [`Model::forward_best`] can rank; 0: none.
    fn best_logits_max(&self) -> usize {
        0
    }

    /// As [`Model::forward`], but only the largest of each row of logits come to host memory: the same values.
    fn forward_best(&mut self, _input: &ForwardInput, ranking: &Ranking) -> Result<Vec<BestLogits>, ModelError> {
        Err(ModelError::Unsupported(format!("{} logits of a row cannot be ranked where it runs", ranking.count)))
    }

    /// A whole row of the logits that [`Model::forward_best`] ranked last, for whom the largest are not enough.
    fn ranked_row(&mut self, row: usize) -> Result<Vec<f32>, ModelError> {
        Err(ModelError::Unsupported(format!("no logits were ranked, so there is no row {row}")))
    }

    /// Appends to `out` the hidden states, after the final norm, of `rows` of the last forward pass: `hidden_size`
    /// values each. They depend on a row's own sequence alone, too.
    fn hidden_states(&mut self, _rows: &[u32], _out: &mut Vec<f32>) -> Result<(), ModelError> {
        Err(ModelError::Unsupported("this model does not show its hidden states".into()))
    }
}
