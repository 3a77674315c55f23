//! Models through candle-transformers: architectures rill has no forward pass of its own for, and a second opinion on
//! those it has. One sequence at a time, in f32 (or the file's quantised types) on the CPU.
//!
//! The engine's paged interface is kept like this: a slot of the cache holds the token that was put there, so that the
//! tokens of any sequence can be read back through its block table. Candle's own keys and values, or a recurrence's state,
//! are those of one sequence, `held`, and only ever go on: where another sequence is wanted, or the same one cut short, they
//! are computed anew from nothing. So prefix hits, preemption, refused drafts and several sequences in turn are right, if
//! slow. Other chunks are other sums: last bits may differ, unlike elsewhere.

mod networks;
mod settings;

use crate::config::ModelConfig;
use crate::source::ModelKind;
use crate::{ForwardInput, Model, ModelError, ModelShape};
use candle_core::{Device, Tensor};
pub(crate) use networks::{KNOWN, knows};

/// Tokens and the position of the first → logits after the last.
type Network = Box<dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor> + Send>;
/// Makes a network that has seen nothing.
type Fresh = Box<dyn FnMut() -> candle_core::Result<Network> + Send>;

/// Fewer than one in this many tokens are taken one by one after those held; more are computed with all before them.
const FEW: usize = 8;

struct CandleModel {
    fresh: Fresh,
    /// Whether a network that has seen nothing takes its first tokens one by one too, as all do after those.
    one_by_one: bool,
    network: Option<Network>,
    /// Tokens `network` has seen.
    held: Vec<u32>,
    /// The token in each slot.
    slots: Vec<u32>,
    block_size: usize,
    /// What candle's own threads are taken from.
    threads: rayon::ThreadPool,
    shape: ModelShape,
}

/// Loads the model of `kind`, to compute on `threads` threads.
pub(crate) fn load(kind: &ModelKind, config: &ModelConfig, threads: usize) -> Result<Box<dyn Model>, ModelError> {
    let fresh = networks::load(kind, config)?;
    let threads = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|number| format!("rill-candle-{number}"))
        .build()
        .map_err(|error| ModelError::Device(format!("threads for candle: {error}")))?;
    let architecture = config.architecture.as_str();
    let context_len = match config.sliding_window {
        Some(window) if window < config.context_len && !networks::slides(architecture) => {
            tracing::warn!(
                "candle does not slide {architecture}'s window: no sequence may be longer than its {window} tokens"
            );
            window
        }
        _ => config.context_len,
    };
    let attention_bytes = 2 * size_of::<f32>() * config.attention_layers * config.kv_heads * config.head_dim;
    let shape = ModelShape {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        context_len,
        // What candle keeps for its one sequence, in f32, and the token in its slot.
        kv_bytes_per_token: attention_bytes + size_of::<u32>(),
        window_tokens: None,
        running_max: Some(1),
    };
    let (held, slots) = (Vec::new(), Vec::new());
    let one_by_one = networks::one_by_one(architecture);
    if one_by_one {
        tracing::warn!("{architecture} takes prompts token by token");
    }
    Ok(Box::new(CandleModel { fresh, one_by_one, network: None, held, slots, block_size: 1, threads, shape }))
}

impl CandleModel {
    /// Logits after the last of `tokens`, which begin a sequence.
    fn logits(&mut self, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
        let CandleModel { fresh, one_by_one, network, held, threads, .. } = self;
        let known = held.len();
        let goes_on = known < tokens.len() && tokens.starts_with(held);
        // Where all go one by one, going on is never slower than from nothing.
        let few = *one_by_one || tokens.len().saturating_sub(known) * FEW <= tokens.len() + FEW;
        // What cannot go on is gone before there is another.
        let mut running = match network.take().filter(|_| goes_on && few) {
            Some(running) => running,
            None => {
                held.clear();
                fresh()?
            }
        };
        // Not every model's mask knows of tokens before a chunk: after the first chunk they go one by one.
        let step = if held.is_empty() && !*one_by_one { tokens.len() } else { 1 };
        let mut last = Vec::new();
        for chunk in tokens[held.len()..].chunks(step) {
            let input = Tensor::new(chunk, &Device::Cpu)?.unsqueeze(0)?;
            let position = held.len();
            let output = threads.install(|| running(&input, position))?;
            last = output.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1()?;
            held.extend_from_slice(chunk);
        }
        *network = Some(running);
        Ok(last)
    }
}

impl Model for CandleModel {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn allocate_kv_cache(&mut self, blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.block_size = block_size;
        self.slots = vec![0; blocks * block_size];
        self.network = None;
        self.held.clear();
        Ok(())
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), ModelError> {
        for &(from, to) in pairs {
            let start = from as usize * self.block_size;
            self.slots.copy_within(start..start + self.block_size, to as usize * self.block_size);
        }
        Ok(())
    }

    fn block_bytes(&self) -> usize {
        self.block_size * size_of::<u32>()
    }

    fn read_block(&mut self, block: u32, out: &mut Vec<u8>) -> Result<(), ModelError> {
        let slots = &self.slots[block as usize * self.block_size..][..self.block_size];
        out.clear();
        out.extend(slots.iter().flat_map(|token| token.to_le_bytes()));
        Ok(())
    }

    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), ModelError> {
        let slots = &mut self.slots[block as usize * self.block_size..][..self.block_size];
        for (slot, bytes) in slots.iter_mut().zip(bytes.chunks_exact(size_of::<u32>())) {
            *slot = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Ok(())
    }

    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        for (&slot, &token) in input.slot_mapping.iter().zip(&input.token_ids) {
            self.slots[slot as usize] = token;
        }
        logits.clear();
        for (sequence, rows) in input.query_starts.windows(2).enumerate() {
            let tables = &input.block_table_starts[sequence..];
            let table = &input.block_tables[tables[0] as usize..tables[1] as usize];
            let context = input.context_lens[sequence] as usize;
            let token = |position: usize| {
                let block = table[position / self.block_size] as usize;
                self.slots[block * self.block_size + position % self.block_size]
            };
            let tokens: Vec<u32> = (0..context).map(token).collect();
            for row in input.logit_rows.iter().filter(|&&row| (rows[0]..rows[1]).contains(&row)) {
                let end = input.positions[*row as usize] as usize + 1;
                let row = self.logits(&tokens[..end]).and_then(|row| {
                    if row.len() == self.shape.vocab_size {
                        return Ok(row);
                    }
                    candle_core::bail!("{} logits, not {}", row.len(), self.shape.vocab_size)
                });
                let row = row.map_err(|error| {
                    self.network = None;
                    self.held.clear();
                    ModelError::Runtime(format!("candle: {error}"))
                })?;
                logits.extend(row);
            }
        }
        Ok(())
    }
}
