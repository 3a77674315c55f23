//! One sequence through a `Model`, without an engine: what parity and determinism tests drive the forward pass with.

use rill_models::{Adapter, AdapterSites, ForwardInput, Model, ModelError};
use std::sync::Arc;

/// A model whose KV cache belongs to one sequence at a time.
pub struct SingleSequence {
    model: Box<dyn Model>,
    block_size: usize,
    blocks: usize,
    /// Tokens in the KV cache.
    computed: usize,
    adapter: Option<Arc<Adapter>>,
}

impl SingleSequence {
    /// A cache for `tokens_max` tokens in blocks of `block_size`.
    pub fn new(
        mut model: Box<dyn Model>,
        block_size: usize,
        tokens_max: usize,
    ) -> Result<SingleSequence, ModelError> {
        let blocks = tokens_max.div_ceil(block_size);
        model.allocate_kv_cache(blocks, block_size)?;
        Ok(SingleSequence { model, block_size, blocks, computed: 0, adapter: None })
    }

    /// Runs with `adapter` from now on, from position 0.
    pub fn set_adapter(&mut self, adapter: Option<Arc<Adapter>>) {
        self.adapter = adapter;
        self.restart();
    }

    pub fn adapter_sites(&self) -> Option<&AdapterSites> {
        self.model.adapter_sites()
    }

    pub fn vocab_size(&self) -> usize {
        self.model.shape().vocab_size
    }

    /// Forgets the sequence; the next call starts at position 0.
    pub fn restart(&mut self) {
        self.computed = 0;
    }

    /// Appends `tokens` in one step and returns a row of logits for each (`every`) or for the last only.
    ///
    /// Blocks are used in descending order, so that a table which is read as if it were the identity shows.
    pub fn step(&mut self, tokens: &[u32], every: bool) -> Result<Vec<f32>, ModelError> {
        let (start, end) = (self.computed, self.computed + tokens.len());
        assert!(
            end <= self.blocks * self.block_size,
            "{end} tokens in {} blocks of {}",
            self.blocks,
            self.block_size
        );
        let block_of = |position: usize| (self.blocks - 1 - position / self.block_size) as u32;
        let rows = tokens.len() as u32;
        let table: Vec<u32> = (0..end.div_ceil(self.block_size)).map(|i| block_of(i * self.block_size)).collect();
        let input = ForwardInput {
            token_ids: tokens.to_vec(),
            positions: (start as u32..end as u32).collect(),
            slot_mapping: (start..end)
                .map(|position| block_of(position) * self.block_size as u32 + (position % self.block_size) as u32)
                .collect(),
            query_starts: vec![0, rows],
            context_lens: vec![end as u32],
            block_table_starts: vec![0, table.len() as u32],
            block_tables: table,
            logit_rows: if every { (0..rows).collect() } else { vec![rows - 1] },
            adapters: self.adapter.iter().cloned().map(Some).collect(),
        };
        let mut logits = Vec::new();
        self.model.forward(&input, &mut logits)?;
        self.computed = end;
        Ok(logits)
    }

    /// Goes on after the first `tokens` of the sequence, whose blocks are kept, as after a hit in the prefix cache.
    pub fn rewind(&mut self, tokens: usize) {
        assert!(tokens <= self.computed);
        self.computed = tokens;
    }

    /// Logits after each of `tokens`, from position 0, in steps of at most `chunk` tokens.
    pub fn logits(&mut self, tokens: &[u32], chunk: usize) -> Result<Vec<f32>, ModelError> {
        self.restart();
        let mut logits = Vec::with_capacity(tokens.len() * self.vocab_size());
        for part in tokens.chunks(chunk) {
            logits.extend(self.step(part, true)?);
        }
        Ok(logits)
    }
}
