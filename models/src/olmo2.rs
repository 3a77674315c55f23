//! OLMo 2 and 3: norms come after both sub-layers, which read the residual stream as it is, and over all queries and keys.

use crate::layers::{Attention, Block, Decoder, FeedForward, HeadNorm, Join, Norm, NormKind, QkvOrder};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

pub(crate) fn load<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
) -> Result<Box<dyn Model>, ModelError> {
    let decoder = Decoder::load(backend, config, weights, NormKind::RootMeanSquare, |at| {
        Ok(Block {
            attention_norm: Norm::Identity,
            attention: Attention::load(at, QkvOrder::Blocks, HeadNorm::Whole)?,
            attention_join: Join::normed(at, "post_attention_norm")?,
            feed_forward_norm: Norm::Identity,
            feed_forward: FeedForward::load(at)?,
            feed_forward_join: Join::normed(at, "post_ffw_norm")?,
        })
    })?;
    Ok(Box::new(decoder))
}
