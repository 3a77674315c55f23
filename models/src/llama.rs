//! The llama family: pre-norm attention with rotary positions, then a gated feed-forward layer. Reads top to bottom.

use crate::config::RopeStyle;
use crate::layers::rope::rope;
use crate::weights::{Weights, halves_from_interleaved};
use crate::{Activation, ForwardInput, Model, ModelConfig, ModelError, ModelShape};
use rill_kernels::{AttentionShape, Backend, CacheShape, Rope, StepInput, Stored};

/// A llama-family decoder on backend `B`.
pub(crate) struct Llama<B: Backend> {
    backend: B,
    shape: ModelShape,
    heads: AttentionShape,
    rope: Rope,
    norm_eps: f32,
    embedding: B::Linear,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// `None`: the embedding table is the output projection too.
    head: Option<B::Linear>,
    caches: Vec<B::KvCache>,
    buffers: Buffers<B>,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    /// Queries, keys and values side by side.
    qkv: B::Linear,
    attention_output: B::Linear,
    feed_forward_norm: B::Vector,
    /// Gate and up side by side.
    gate_up: B::Linear,
    down: B::Linear,
}

/// Activations, kept from step to step.
struct Buffers<B: Backend> {
    step: B::Step,
    /// The residual stream.
    residual: B::Matrix,
    /// What the next linear layer reads.
    rows: B::Rows,
    /// What the last linear layer wrote.
    wide: B::Matrix,
}

/// Refuses what the configuration asks for and this file does not do.
fn check(config: &ModelConfig) -> Result<(), ModelError> {
    let refused = [
        (config.activation != Activation::Silu, "an activation other than SiLU"),
        (config.qkv_bias || config.attention_output_bias, "attention biases"),
        (config.mlp_bias, "feed-forward biases"),
        (config.sliding_window.is_some_and(|window| window < config.context_len), "sliding-window attention"),
        (config.embedding_scale.is_some(), "an embedding scale"),
        (config.residual_scale.is_some(), "a residual scale"),
        (config.logit_scale.is_some(), "a logit scale"),
        (config.attention_softcap.is_some() || config.final_logit_softcap.is_some(), "soft-capping"),
        (!config.hidden_size.is_multiple_of(32), "a hidden size that is no multiple of 32"),
        (!config.intermediate_size.is_multiple_of(32), "a feed-forward size that is no multiple of 32"),
        (!config.head_dim.is_multiple_of(32) || config.head_dim > 256, "heads that are not 32, 64, … 256 wide"),
    ];
    match refused.iter().find(|(asked, _)| *asked) {
        Some((_, what)) => {
            Err(ModelError::Unsupported(format!("{} with {what} is not supported yet", config.architecture)))
        }
        None => Ok(()),
    }
}

impl<B: Backend> Llama<B> {
    pub(crate) fn load(mut backend: B, config: &ModelConfig, weights: &Weights) -> Result<Llama<B>, ModelError> {
        check(config)?;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let heads = AttentionShape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale.unwrap_or(1.0 / (config.head_dim as f32).sqrt()),
        };
        let packed = |error: rill_kernels::PackError| ModelError::Unsupported(error.to_string());
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let matrix = |part: &str, rows, cols| weights.matrix(&name(part), rows, cols);
            let rotated = |part: &str, heads: usize| {
                let stored = matrix(part, heads * config.head_dim, hidden)?;
                stored.check().map_err(packed)?;
                Ok::<_, ModelError>((
                    stored,
                    match config.rope.style {
                        RopeStyle::Half => stored.data.into(),
                        RopeStyle::Interleaved => {
                            halves_from_interleaved(stored, heads, config.rope.dimension_count)
                        }
                    },
                ))
            };
            let (q, q_data) = rotated("attn_q", config.heads)?;
            let (k, k_data) = rotated("attn_k", config.kv_heads)?;
            let qkv = [
                Stored { data: &q_data, ..q },
                Stored { data: &k_data, ..k },
                matrix("attn_v", config.kv_heads * config.head_dim, hidden)?,
            ];
            let gate_up = [matrix("ffn_gate", inner, hidden)?, matrix("ffn_up", inner, hidden)?];
            let attention_output = matrix("attn_output", hidden, config.heads * config.head_dim)?;
            layers.push(Layer {
                attention_norm: backend.load_vector(&weights.vector(&name("attn_norm"), hidden)?),
                qkv: backend.load_linear(&qkv).map_err(packed)?,
                attention_output: backend.load_linear(&[attention_output]).map_err(packed)?,
                feed_forward_norm: backend.load_vector(&weights.vector(&name("ffn_norm"), hidden)?),
                gate_up: backend.load_linear(&gate_up).map_err(packed)?,
                down: backend.load_linear(&[matrix("ffn_down", hidden, inner)?]).map_err(packed)?,
            });
        }
        let embedding = weights.matrix("token_embd.weight", config.vocab_size, hidden)?;
        let head = if config.tie_embeddings || !weights.has("output.weight") {
            None
        } else {
            let output = weights.matrix("output.weight", config.vocab_size, hidden)?;
            Some(backend.load_linear(&[output]).map_err(packed)?)
        };
        Ok(Llama {
            shape: ModelShape {
                vocab_size: config.vocab_size,
                context_len: config.context_len,
                kv_bytes_per_token: config.layers * rill_kernels::KvCache::bytes_per_token(heads),
            },
            heads,
            rope: rope(&config.rope)?,
            norm_eps: config.norm_eps,
            embedding: backend.load_linear(&[embedding]).map_err(packed)?,
            layers,
            norm: backend.load_vector(&weights.vector("output_norm.weight", hidden)?),
            head,
            caches: Vec::new(),
            buffers: Buffers {
                step: B::Step::default(),
                residual: B::Matrix::default(),
                rows: B::Rows::default(),
                wide: B::Matrix::default(),
            },
            backend,
        })
    }
}

impl<B: Backend> Model for Llama<B> {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn allocate_kv_cache(&mut self, blocks: usize, block_size: usize) -> Result<(), ModelError> {
        let shape = CacheShape { blocks, block_size };
        self.caches.clear();
        for _ in 0..self.layers.len() {
            self.caches.push(self.backend.new_kv_cache(shape, self.heads));
        }
        Ok(())
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
        let (backend, heads, eps) = (&mut self.backend, self.heads, self.norm_eps);
        let Buffers { step, residual, rows, wide } = &mut self.buffers;

        backend.prepare(step_input, &self.rope, heads, step);
        backend.embed(&self.embedding, &input.token_ids, 1.0, residual);
        for (layer, cache) in self.layers.iter().zip(&mut self.caches) {
            let form = backend.form(&layer.qkv);
            backend.rms_norm(residual, None, &layer.attention_norm, eps, (rows, form));
            backend.linear(&layer.qkv, rows, wide);
            let form = backend.form(&layer.attention_output);
            backend.attention(wide, heads, step_input, step, cache, (rows, form));
            backend.linear_add(&layer.attention_output, rows, residual);

            let form = backend.form(&layer.gate_up);
            backend.rms_norm(residual, None, &layer.feed_forward_norm, eps, (rows, form));
            backend.linear(&layer.gate_up, rows, wide);
            let form = backend.form(&layer.down);
            backend.silu_mul(wide, (rows, form));
            backend.linear_add(&layer.down, rows, residual);
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let form = backend.form(head);
        backend.rms_norm(residual, Some(&input.logit_rows), &self.norm, eps, (rows, form));
        backend.logits(head, rows, logits);
        Ok(())
    }
}
