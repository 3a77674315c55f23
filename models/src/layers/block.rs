//! The layer most decoders are made of: attention, then a feed-forward layer, each between norms.

use super::attention::{Attention, HeadNorm, QkvOrder};
use super::decoder::{Layer, Run};
use super::feed_forward::FeedForward;
use super::loader::LayerLoader;
use super::norm::{Norm, NormKind};
use crate::ModelError;
use crate::adapter::LayerSites;
use rill_kernels::Backend;

/// How a sub-layer's output joins the residual stream.
pub(crate) enum Join<B: Backend> {
    Add,
    /// Times a factor.
    Scaled(f32),
    /// After a norm of its own.
    Normed {
        weight: B::Vector,
        eps: f32,
    },
}

/// x + attention(norm(x)), then x + feed_forward(norm(x)).
pub(crate) struct Block<B: Backend> {
    pub(crate) attention_norm: Norm<B>,
    pub(crate) attention: Attention<B>,
    pub(crate) attention_join: Join<B>,
    pub(crate) feed_forward_norm: Norm<B>,
    pub(crate) feed_forward: FeedForward<B>,
    pub(crate) feed_forward_join: Join<B>,
}

impl<B: Backend> Block<B> {
    /// Norms of one kind before both sub-layers, a gated feed-forward layer or experts.
    pub(crate) fn pre_norm(
        at: &mut LayerLoader<'_, '_, B>,
        norm: NormKind,
        heads: HeadNorm,
    ) -> Result<Block<B>, ModelError> {
        let join = || at.all.config.residual_scale.map_or(Join::Add, Join::Scaled);
        let (attention_join, feed_forward_join) = (join(), join());
        Ok(Block {
            attention_norm: at.norm("attn_norm", norm)?,
            attention: Attention::load(at, QkvOrder::Blocks, heads)?,
            attention_join,
            feed_forward_norm: at.norm("ffn_norm", norm)?,
            feed_forward: FeedForward::load(at)?,
            feed_forward_join,
        })
    }
}

impl<B: Backend> Join<B> {
    /// Through the norm called `part`.
    pub(crate) fn normed(at: &mut LayerLoader<'_, '_, B>, part: &str) -> Result<Join<B>, ModelError> {
        let config = at.config();
        Ok(Join::Normed { weight: at.norm_weight(part, config.hidden_size)?, eps: config.norm_eps })
    }
}

impl<B: Backend> Layer<B> for Block<B> {
    fn attention(&mut self) -> &mut Attention<B> {
        &mut self.attention
    }

    fn sites(&self) -> LayerSites {
        let feed_forward = match &self.feed_forward {
            FeedForward::Mlp(mlp) => Some(mlp.gated),
            FeedForward::Experts(_) => None,
        };
        LayerSites { attention: self.attention.sites(), feed_forward }
    }

    fn forward(&self, run: &mut Run<'_, B>) {
        let form = self.attention.form(run);
        self.attention_norm.read(run.backend, run.residual, None, (run.rows, form));
        self.attention.run(run);
        run.join(&self.attention.output, &self.attention_join);
        self.feed_forward.run(run, &self.feed_forward_norm, &self.feed_forward_join);
    }
}
