//! The layer whose sub-layers both read the stream as it came in: x + attention(norm₁(x)) + feed_forward(norm₂(x)).

use super::attention::Attention;
use super::block::Join;
use super::decoder::{Layer, Run};
use super::feed_forward::Mlp;
use super::norm::Norm;
use crate::adapter::LayerSites;
use rill_kernels::Backend;

/// Where the file has one norm for both, it is there twice.
pub(crate) struct Parallel<B: Backend> {
    pub(crate) attention_norm: Norm<B>,
    pub(crate) attention: Attention<B>,
    pub(crate) feed_forward_norm: Norm<B>,
    pub(crate) feed_forward: Mlp<B>,
}

impl<B: Backend> Layer<B> for Parallel<B> {
    fn attention(&mut self) -> &mut Attention<B> {
        &mut self.attention
    }

    fn sites(&self) -> LayerSites {
        LayerSites { attention: self.attention.sites(), feed_forward: Some(self.feed_forward.gated) }
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
