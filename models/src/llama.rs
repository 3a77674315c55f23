//! The llama family: pre-norm attention with rotary positions, then a gated feed-forward layer. Mistral slides a
//! window over it, SmolLM3 leaves the rotation out of every fourth layer, Phi-3 stores its matrices fused, Mixtral has
//! experts in place of the one feed-forward layer, DeepSeek has many of them and latent attention, Granite scales
//! embeddings, residuals, scores and logits: all of that is in the configuration. Qwen 3 and OLMoE also norm queries
//! and keys, StableLM and the first OLMo have layer norms, which the registry says.

use crate::layers::{Block, Decoder, HeadNorm, NormKind};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

pub(crate) fn load<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
    (norm, heads): (NormKind, HeadNorm),
) -> Result<Box<dyn Model>, ModelError> {
    let decoder = Decoder::load(backend, config, weights, norm, |at| Block::pre_norm(at, norm, heads))?;
    Ok(Box::new(decoder))
}
