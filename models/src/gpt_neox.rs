//! GPT-NeoX (Pythia, Dolly, RedPajama): both sub-layers read the same residual stream, each through its own layer norm,
//! and both are added to it; some models of the family take them one after the other instead.

use crate::layers::{
    Attention, Block, Decoder, FeedForward, HeadNorm, Join, LayerLoader, Mlp, NormKind, Parallel, QkvOrder,
};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

/// The parts both orders are made of.
fn parts<B: Backend>(at: &mut LayerLoader<'_, '_, B>) -> Result<Parallel<B>, ModelError> {
    let order = if at.all.weights.are_from_hub() { QkvOrder::Heads } else { QkvOrder::Blocks };
    Ok(Parallel {
        attention_norm: at.norm("attn_norm", NormKind::Layer)?,
        attention: Attention::load(at, order, HeadNorm::None)?,
        feed_forward_norm: at.norm("ffn_norm", NormKind::Layer)?,
        feed_forward: Mlp::plain(at)?,
    })
}

pub(crate) fn load<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
) -> Result<Box<dyn Model>, ModelError> {
    if config.parallel_residual {
        return Ok(Box::new(Decoder::load(backend, config, weights, NormKind::Layer, parts)?));
    }
    let decoder = Decoder::load(backend, config, weights, NormKind::Layer, |at| {
        let Parallel { attention_norm, attention, feed_forward_norm, feed_forward } = parts(at)?;
        Ok(Block {
            attention_norm,
            attention,
            attention_join: Join::Add,
            feed_forward_norm,
            feed_forward: FeedForward::Mlp(feed_forward),
            feed_forward_join: Join::Add,
        })
    })?;
    Ok(Box::new(decoder))
}
