//! Cohere's Command models and the first Phis: attention and feed-forward layer read one layer norm of the stream, and
//! both are added to it. Cohere's feed-forward layer is gated, and its newer models turn queries and keys where they
//! slide a window only; Phi's has no gate, and biases everywhere.

use crate::layers::{Attention, Decoder, HeadNorm, LayerLoader, Mlp, NormKind, Parallel, QkvOrder};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

fn layer<B: Backend>(at: &mut LayerLoader<'_, '_, B>, gated: bool) -> Result<Parallel<B>, ModelError> {
    Ok(Parallel {
        attention_norm: at.norm("attn_norm", NormKind::Layer)?,
        attention: Attention::load(at, QkvOrder::Blocks, HeadNorm::None)?,
        feed_forward_norm: at.norm("attn_norm", NormKind::Layer)?,
        feed_forward: if gated { Mlp::gated(at, ["ffn_gate", "ffn_up", "ffn_down"])? } else { Mlp::plain(at)? },
    })
}

/// `gated` as the feed-forward layers are.
pub(crate) fn load<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
    gated: bool,
) -> Result<Box<dyn Model>, ModelError> {
    Ok(Box::new(Decoder::load(backend, config, weights, NormKind::Layer, |at| layer(at, gated))?))
}
