//! Gemma 2 and 3: norms before and after both sub-layers. Gemma 2 caps scores and logits; Gemma 3 norms each head's
//! queries and keys, and its sliding layers turn with a base of their own.

use crate::layers::{Attention, Block, Decoder, FeedForward, HeadNorm, Join, NormKind, QkvOrder};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

pub(crate) fn load<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
) -> Result<Box<dyn Model>, ModelError> {
    let decoder = Decoder::load(backend, config, weights, NormKind::RootMeanSquare, |at| {
        let head_norm = if at.has("attn_q_norm") { HeadNorm::PerHead } else { HeadNorm::None };
        Ok(Block {
            attention_norm: at.norm("attn_norm", NormKind::RootMeanSquare)?,
            attention: Attention::load(at, QkvOrder::Blocks, head_norm)?,
            attention_join: Join::normed(at, "post_attention_norm")?,
            feed_forward_norm: at.norm("ffn_norm", NormKind::RootMeanSquare)?,
            feed_forward: FeedForward::load(at)?,
            feed_forward_join: Join::normed(at, "post_ffw_norm")?,
        })
    })?;
    Ok(Box::new(decoder))
}
