//! What every decoder does around its layers: embed, run the layers, norm, project to logits.

use super::attention::{Attention, AttentionKind, kinds};
use super::block::Join;
use super::dense::Dense;
use super::hidden::HostNorm;
use super::loader::{LayerLoader, Loader};
use super::norm::{Norm, NormKind};
use crate::weights::Weights;
use crate::{ForwardInput, Model, ModelConfig, ModelError, ModelShape};
use rill_kernels::{Backend, CacheShape, DeviceError, StepInput};
use std::ops::Range;

/// One layer of an architecture.
pub(crate) trait Layer<B: Backend>: Send {
    /// The layer's attention, to be told its kind.
    fn attention(&mut self) -> &mut Attention<B>;

    /// Adds the layer's output to `run.residual`.
    fn forward(&self, run: &mut Run<'_, B>);
}

/// What layers work on during a step.
pub(crate) struct Run<'a, B: Backend> {
    pub(crate) backend: &'a mut B,
    pub(crate) input: StepInput<'a>,
    pub(crate) kinds: &'a [AttentionKind],
    /// One for each kind.
    pub(crate) steps: &'a mut [B::Step],
    /// This layer's.
    pub(crate) cache: &'a mut B::KvCache,
    /// The residual stream.
    pub(crate) residual: &'a mut B::Matrix,
    /// What the next linear layer reads.
    pub(crate) rows: &'a mut B::Rows,
    /// What takes the place of `rows` when they are needed while it is written.
    pub(crate) next_rows: &'a mut B::Rows,
    /// What the last linear layer wrote.
    pub(crate) wide: &'a mut B::Matrix,
    /// A sub-layer's whole output, where it does not go into the stream directly.
    pub(crate) mixed: &'a mut B::Matrix,
    /// Columns of the stream.
    pub(crate) width: Range<usize>,
}

impl<B: Backend> Run<'_, B> {
    /// Projects `rows` and joins the result to the residual stream.
    pub(crate) fn join(&mut self, dense: &Dense<B>, join: &Join<B>) {
        match join {
            Join::Add => dense.add(self.backend, self.rows, self.residual),
            join => {
                dense.run(self.backend, self.rows, self.mixed);
                self.join_mixed(join);
            }
        }
    }

    /// Joins `mixed` to the residual stream.
    pub(crate) fn join_mixed(&mut self, join: &Join<B>) {
        let scale = match join {
            Join::Add => 1.0,
            Join::Scaled(scale) => *scale,
            Join::Normed { weight, eps } => {
                self.backend.rms_norm_in_place(self.mixed, self.width.clone(), weight, *eps);
                1.0
            }
        };
        self.backend.add_scaled(self.mixed, scale, self.residual);
    }
}

/// A decoder of layers `L` on backend `B`.
pub(crate) struct Decoder<B: Backend, L> {
    backend: B,
    shape: ModelShape,
    hidden_size: usize,
    kinds: Vec<AttentionKind>,
    embedding: Dense<B>,
    embedding_scale: f32,
    /// A learned embedding of each position, added to the token's.
    positions: Option<Dense<B>>,
    layers: Vec<L>,
    norm: Norm<B>,
    /// The same, for hidden states.
    host_norm: HostNorm,
    /// `None`: the embedding table is the output projection too.
    head: Option<Dense<B>>,
    head_bias: Vec<f32>,
    logit_scale: f32,
    logit_softcap: Option<f32>,
    caches: Vec<B::KvCache>,
    buffers: Buffers<B>,
}

/// A device that failed fails the model: what it holds is lost.
fn runtime(error: DeviceError) -> ModelError {
    ModelError::Runtime(error.to_string())
}

/// Activations, kept from step to step.
struct Buffers<B: Backend> {
    steps: Vec<B::Step>,
    residual: B::Matrix,
    rows: B::Rows,
    next_rows: B::Rows,
    wide: B::Matrix,
    mixed: B::Matrix,
}

impl<B: Backend, L: Layer<B>> Decoder<B, L> {
    /// Loads everything; `layer` loads one layer, `norm` is the kind of the final norm.
    pub(crate) fn load(
        mut backend: B,
        config: &ModelConfig,
        weights: &Weights,
        norm: NormKind,
        layer: impl Fn(&mut LayerLoader<'_, '_, B>) -> Result<L, ModelError>,
    ) -> Result<Decoder<B, L>, ModelError> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let (kinds, kind_of) = kinds(config)?;
        let mut all = Loader { backend: &mut backend, config, weights };
        let mut layers = Vec::with_capacity(config.layers);
        for (number, kind) in kind_of.into_iter().enumerate() {
            let mut loaded = layer(&mut LayerLoader { all: &mut all, number })?;
            loaded.attention().kind = kind;
            layers.push(loaded);
        }
        weights.check_all_used(config.layers)?;
        let table = weights.matrix("token_embd.weight", vocab, hidden)?;
        let embedding = Dense::new(all.backend, &[table], None)?;
        let positions = match config.learned_positions {
            true => {
                let table = weights.matrix("position_embd.weight", config.context_len, hidden)?;
                Some(Dense::new(all.backend, &[table], None)?)
            }
            false => None,
        };
        let tied = config.tie_embeddings.unwrap_or(!weights.has("output.weight"));
        let head = if tied {
            None
        } else {
            let output = weights.matrix("output.weight", vocab, hidden)?;
            Some(Dense::new(all.backend, &[output], None)?)
        };
        let head_bias = all.vector_if_there("output.bias", vocab)?.unwrap_or_default();
        let host_norm = HostNorm::load(&all, "output_norm", norm, hidden)?;
        let norm = all.norm("output_norm", norm, hidden)?;
        let cache_bytes = |layer: &mut L| backend.kv_bytes_per_token(kinds[layer.attention().kind].heads);
        let kv_bytes_per_token = layers.iter_mut().map(cache_bytes).sum();
        backend.check().map_err(runtime)?;
        Ok(Decoder {
            shape: ModelShape {
                vocab_size: vocab,
                hidden_size: hidden,
                context_len: config.context_len,
                kv_bytes_per_token,
            },
            hidden_size: hidden,
            embedding,
            embedding_scale: config.embedding_scale.unwrap_or(1.0),
            positions,
            layers,
            norm,
            host_norm,
            head,
            head_bias,
            logit_scale: config.logit_scale.unwrap_or(1.0),
            logit_softcap: config.final_logit_softcap,
            caches: Vec::new(),
            buffers: Buffers {
                steps: kinds.iter().map(|_| B::Step::default()).collect(),
                residual: B::Matrix::default(),
                rows: B::Rows::default(),
                next_rows: B::Rows::default(),
                wide: B::Matrix::default(),
                mixed: B::Matrix::default(),
            },
            kinds,
            backend,
        })
    }
}

impl<B: Backend, L: Layer<B>> Model for Decoder<B, L> {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn device_memory_free(&self) -> Option<usize> {
        self.backend.memory_free()
    }

    fn allocate_kv_cache(&mut self, blocks: usize, block_size: usize) -> Result<(), ModelError> {
        let shape = CacheShape { blocks, block_size };
        self.caches.clear();
        for layer in &mut self.layers {
            let heads = self.kinds[layer.attention().kind].heads;
            self.caches.push(self.backend.new_kv_cache(shape, heads));
        }
        self.backend.check().map_err(runtime)
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), ModelError> {
        for cache in &mut self.caches {
            self.backend.copy_blocks(cache, pairs);
        }
        self.backend.check().map_err(runtime)
    }

    fn block_bytes(&self) -> usize {
        self.caches.iter().map(|cache| self.backend.block_bytes(cache)).sum()
    }

    fn read_block(&mut self, block: u32, out: &mut Vec<u8>) -> Result<(), ModelError> {
        out.clear();
        for cache in &self.caches {
            self.backend.read_block(cache, block, out);
        }
        self.backend.check().map_err(runtime)
    }

    fn write_block(&mut self, block: u32, mut bytes: &[u8]) -> Result<(), ModelError> {
        for cache in &mut self.caches {
            let (layer, rest) = bytes.split_at(self.backend.block_bytes(cache));
            self.backend.write_block(cache, block, layer);
            bytes = rest;
        }
        self.backend.check().map_err(runtime)
    }

    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let step_input = StepInput {
            positions: &input.positions,
            slot_mapping: &input.slot_mapping,
            query_starts: &input.query_starts,
            context_lens: &input.context_lens,
            block_tables: &input.block_tables,
            block_table_starts: &input.block_table_starts,
        };
        let backend = &mut self.backend;
        let Buffers { steps, residual, rows, next_rows, wide, mixed } = &mut self.buffers;

        for (kind, step) in self.kinds.iter().zip(steps.iter_mut()) {
            backend.prepare(step_input, &kind.rope, kind.heads, step);
        }
        self.embedding.look_up(backend, &input.token_ids, self.embedding_scale, residual);
        if let Some(positions) = &self.positions {
            positions.look_up(backend, &input.positions, 1.0, mixed);
            backend.add_scaled(mixed, 1.0, residual);
        }
        for (layer, cache) in self.layers.iter().zip(&mut self.caches) {
            layer.forward(&mut Run {
                backend,
                input: step_input,
                kinds: &self.kinds,
                steps,
                cache,
                residual,
                rows,
                next_rows,
                wide,
                mixed,
                width: 0..self.hidden_size,
            });
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        self.norm.read(backend, residual, Some(&input.logit_rows), (rows, head.form(backend)));
        head.logits(backend, rows, logits, &self.head_bias);
        if self.logit_scale != 1.0 || self.logit_softcap.is_some() {
            backend.scale_logits(logits, self.logit_scale, self.logit_softcap);
        }
        self.backend.check().map_err(runtime)
    }

    fn hidden_states(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), ModelError> {
        for run in rows.chunk_by(|&row, &next| row + 1 == next) {
            let first = run[0] as usize;
            let mut states = self.backend.read(&self.buffers.residual, first..first + run.len());
            states.chunks_exact_mut(self.hidden_size).for_each(|row| self.host_norm.apply(row));
            out.append(&mut states);
        }
        self.backend.check().map_err(runtime)
    }
}
