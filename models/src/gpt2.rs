//! GPT-2 and StarCoder2: layer norms with biases, biases everywhere, a feed-forward layer without a gate. GPT-2 learns
//! an embedding of each position; StarCoder2 turns queries and keys instead, and may slide a window.

use crate::layers::{Attention, Block, Decoder, FeedForward, HeadNorm, Join, Mlp, NormKind, QkvOrder};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

pub(crate) fn load<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
) -> Result<Box<dyn Model>, ModelError> {
    let decoder = Decoder::load(backend, config, weights, NormKind::Layer, |at| {
        Ok(Block {
            attention_norm: at.norm("attn_norm", NormKind::Layer)?,
            attention: Attention::load(at, QkvOrder::Blocks, HeadNorm::None)?,
            attention_join: Join::Add,
            feed_forward_norm: at.norm("ffn_norm", NormKind::Layer)?,
            feed_forward: FeedForward::Mlp(Mlp::plain(at)?),
            feed_forward_join: Join::Add,
        })
    })?;
    Ok(Box::new(decoder))
}
