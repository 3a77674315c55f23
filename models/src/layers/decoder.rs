//! What every decoder does around its layers: embed, run the layers, norm, project to logits.

use super::attention::{Attention, AttentionKind, kinds};
use super::block::Join;
use super::dense::Dense;
use super::head::Head;
use super::hidden::HostNorm;
use super::loader::{LayerLoader, Loader};
use super::norm::{Norm, NormKind};
use super::updates::StepUpdates;
use crate::adapter::{AdapterSites, LayerSites};
use crate::weights::Weights;
use crate::{ForwardInput, Model, ModelConfig, ModelError, ModelShape};
use rill_kernels::{Backend, BestLogits, CacheShape, DeviceError, Form, LowRankUpdate, Ranking, StepInput};
use std::ops::Range;

/// One layer of an architecture.
pub(crate) trait Layer<B: Backend>: Send {
    /// The layer's attention, to be told its kind.
    fn attention(&mut self) -> &mut Attention<B>;

    /// What of it adapters may update.
    fn sites(&self) -> LayerSites {
        LayerSites::default()
    }

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
    /// The layer's number.
    pub(crate) layer: usize,
    /// What this step's adapters add to linear layers.
    pub(crate) updates: &'a StepUpdates<'a>,
}

impl<'a, B: Backend> Run<'a, B> {
    /// The form of rows `dense` and its updates read.
    pub(crate) fn form(&self, dense: &Dense<B>) -> Form {
        let form = dense.form(self.backend);
        if self.updates.is_empty() { form } else { form.and(Form::F32) }
    }

    /// The updates of `dense` in this layer.
    fn updates_of(&self, dense: &Dense<B>) -> Vec<LowRankUpdate<'a>> {
        dense.projection.map(|projection| self.updates.of(self.layer, projection)).unwrap_or_default()
    }

    /// Adds its updates to what `dense` made of `rows` in `wide`.
    pub(crate) fn update_wide(&mut self, dense: &Dense<B>) {
        let updates = self.updates_of(dense);
        if !updates.is_empty() {
            self.backend.add_low_rank(self.rows, &updates, self.wide);
        }
    }

    /// `mixed` = `dense` of `rows`, updates included.
    pub(crate) fn mix(&mut self, dense: &Dense<B>) {
        dense.run(self.backend, self.rows, self.mixed);
        let updates = self.updates_of(dense);
        if !updates.is_empty() {
            self.backend.add_low_rank(self.rows, &updates, self.mixed);
        }
    }

    /// Projects `rows` and joins the result to the residual stream.
    pub(crate) fn join(&mut self, dense: &Dense<B>, join: &Join<B>) {
        match join {
            Join::Add => {
                dense.add(self.backend, self.rows, self.residual);
                let updates = self.updates_of(dense);
                if !updates.is_empty() {
                    self.backend.add_low_rank(self.rows, &updates, self.residual);
                }
            }
            join => {
                self.mix(dense);
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
    head: Head<B>,
    caches: Vec<B::KvCache>,
    adapter_sites: AdapterSites,
    buffers: Buffers<B>,
    /// The step's rows, filled up.
    padded: Padded,
    /// A step is under way.
    started: bool,
}

/// How far back any layer reads, unless one reads everything.
fn longest_reach(kinds: &[AttentionKind]) -> Option<usize> {
    kinds.iter().map(|kind| kind.heads.reach()).collect::<Option<Vec<usize>>>()?.into_iter().max()
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

/// What a step's rows have each, filled up with rows that belong to no sequence.
#[derive(Default)]
struct Padded {
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
}

impl Padded {
    fn fill(&mut self, input: &ForwardInput, rows: usize) {
        let given = [(&input.token_ids, 0), (&input.positions, 0), (&input.slot_mapping, StepInput::NOWHERE)];
        for (kept, (given, filler)) in
            [&mut self.token_ids, &mut self.positions, &mut self.slots].into_iter().zip(given)
        {
            kept.clear();
            kept.extend_from_slice(given);
            kept.resize(rows, filler);
        }
    }
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
        let head = Head::load(&mut all, (vocab, hidden))?;
        let host_norm = HostNorm::load(&all, "output_norm", norm, hidden)?;
        let norm = all.norm("output_norm", norm, hidden)?;
        let cache_bytes = |layer: &mut L| backend.kv_bytes_per_token(kinds[layer.attention().kind].heads);
        let kv_bytes_per_token = layers.iter_mut().map(cache_bytes).sum();
        let sites = layers.iter().map(|layer| layer.sites()).collect();
        let adapter_sites = AdapterSites::new(config, weights.are_from_hub(), sites, backend.low_rank_memory());
        backend.check().map_err(runtime)?;
        Ok(Decoder {
            shape: ModelShape {
                vocab_size: vocab,
                hidden_size: hidden,
                context_len: config.context_len,
                kv_bytes_per_token,
                window_tokens: longest_reach(&kinds),
                running_max: None,
            },
            hidden_size: hidden,
            embedding,
            embedding_scale: config.embedding_scale.unwrap_or(1.0),
            positions,
            layers,
            norm,
            host_norm,
            head,
            caches: Vec::new(),
            adapter_sites,
            buffers: Buffers {
                steps: kinds.iter().map(|_| B::Step::default()).collect(),
                residual: B::Matrix::default(),
                rows: B::Rows::default(),
                next_rows: B::Rows::default(),
                wide: B::Matrix::default(),
                mixed: B::Matrix::default(),
            },
            padded: Padded::default(),
            started: false,
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

    fn adapter_sites(&self) -> Option<&AdapterSites> {
        Some(&self.adapter_sites)
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

    fn start(&mut self, input: &ForwardInput, ranking: Option<&Ranking>) -> Result<bool, ModelError> {
        if self.backend.runs_aside() {
            self.launch(input, ranking)?;
            self.started = true;
        }
        Ok(self.started)
    }

    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        if self.backend.runs_aside() {
            if !std::mem::take(&mut self.started) {
                self.launch(input, None)?;
            }
            self.backend.wait_logits(logits);
            return self.backend.check().map_err(runtime);
        }
        self.run(input)?;
        let layer = self.head.layer(&self.embedding);
        layer.logits(&mut self.backend, &self.buffers.rows, self.head.finish(), logits);
        self.backend.check().map_err(runtime)
    }

    fn best_logits_max(&self) -> usize {
        self.head.layer(&self.embedding).best_logits_max(&self.backend)
    }

    fn forward_best(&mut self, input: &ForwardInput, ranking: &Ranking) -> Result<Vec<BestLogits>, ModelError> {
        if !std::mem::take(&mut self.started) {
            let count = ranking.count;
            if !(1..=self.best_logits_max()).contains(&count) {
                return Err(ModelError::Unsupported(format!("{count} logits of a row cannot be ranked here")));
            }
            self.launch(input, Some(ranking))?;
        }
        let best = self.backend.wait_best();
        self.backend.check().map_err(runtime)?;
        Ok(best)
    }

    fn ranked_row(&mut self, row: usize) -> Result<Vec<f32>, ModelError> {
        let logits = self.backend.ranked_row(row);
        self.backend.check().map_err(runtime)?;
        Ok(logits)
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

impl<B: Backend, L: Layer<B>> Decoder<B, L> {
    /// Has a device compute the rows of `input` and their logits.
    fn launch(&mut self, input: &ForwardInput, ranking: Option<&Ranking>) -> Result<(), ModelError> {
        self.run(input)?;
        let layer = self.head.layer(&self.embedding);
        layer.start_logits(&mut self.backend, &self.buffers.rows, self.head.finish(), ranking);
        self.backend.check().map_err(runtime)
    }

    /// Runs the rows of `input`; those whose logits are wanted are left in `buffers.rows`, normed.
    fn run(&mut self, input: &ForwardInput) -> Result<(), ModelError> {
        // A step of one row for each sequence is one of many.
        let rows =
            if input.rows() == input.sequences() { self.backend.bucket(input.rows()) } else { input.rows() };
        self.padded.fill(input, rows);
        let padded = &self.padded;
        let step_input = StepInput {
            positions: &padded.positions,
            slot_mapping: &padded.slots,
            query_starts: &input.query_starts,
            context_lens: &input.context_lens,
            block_tables: &input.block_tables,
            block_table_starts: &input.block_table_starts,
        };
        let updates = StepUpdates::new(input)?;
        let backend = &mut self.backend;
        let Buffers { steps, residual, rows, next_rows, wide, mixed } = &mut self.buffers;

        for (kind, step) in self.kinds.iter().zip(steps.iter_mut()) {
            backend.prepare(step_input, &kind.rope, kind.heads, step);
        }
        self.embedding.look_up(backend, &padded.token_ids, self.embedding_scale, residual);
        if let Some(positions) = &self.positions {
            positions.look_up(backend, &padded.positions, 1.0, mixed);
            backend.add_scaled(mixed, 1.0, residual);
        }
        for (number, (layer, cache)) in self.layers.iter().zip(&mut self.caches).enumerate() {
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
                layer: number,
                updates: &updates,
            });
        }
        let form = self.head.layer(&self.embedding).form(backend);
        self.norm.read(backend, residual, Some(&input.logit_rows), (rows, form));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rill_kernels::{AttentionShape, Rope};

    #[test]
    fn blocks_may_go_once_every_layer_slides_past_them() {
        let kinds = |windows: &[Option<usize>]| -> Vec<AttentionKind> {
            let rope = Rope { inverse_frequencies: Vec::new(), factor: 1.0 };
            let heads = |window| AttentionShape { window, ..AttentionShape::full(1, 1, 32, 1.0) };
            windows.iter().map(|&window| AttentionKind { heads: heads(window), rope: rope.clone() }).collect()
        };
        // 19 tokens before the query's own, and those before them in the same span.
        assert_eq!(longest_reach(&kinds(&[Some(8), Some(20)])), Some(19 + 63));
        assert_eq!(longest_reach(&kinds(&[Some(8), None])), None);
        assert_eq!(longest_reach(&kinds(&[None])), None);
    }
}
