//! GPT-NeoX (Pythia, Dolly, RedPajama): both sub-layers read the same residual stream, each through its own layer norm,
//! and both are added to it; some models of the family take them one after the other instead.

use crate::adapter::LayerSites;
use crate::layers::{
    Attention, Block, Decoder, FeedForward, HeadNorm, Join, Layer, LayerLoader, Mlp, Norm, NormKind, QkvOrder, Run,
};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

/// x + attention(norm₁(x)) + feed_forward(norm₂(x)).
struct Parallel<B: Backend> {
    attention_norm: Norm<B>,
    attention: Attention<B>,
    feed_forward_norm: Norm<B>,
    feed_forward: Mlp<B>,
}

impl<B: Backend> Layer<B> for Parallel<B> {
    fn attention(&mut self) -> &mut Attention<B> {
        &mut self.attention
    }

    fn sites(&self) -> LayerSites {
        LayerSites { attention: Some(self.attention.order), feed_forward: Some(self.feed_forward.gated) }
    }

    fn forward(&self, run: &mut Run<'_, B>) {
        let form = self.attention.form(run);
        self.attention_norm.read(run.backend, run.residual, None, (run.rows, form));
        self.attention.run(run);
        run.mix(&self.attention.output);

        let form = self.feed_forward.form(run);
        self.feed_forward_norm.read(run.backend, run.residual, None, (run.rows, form));
        self.feed_forward.hidden(run);
        run.join(&self.feed_forward.down, &Join::Add);
        run.join_mixed(&Join::Add);
    }
}

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
