//! The output projection: the last hidden state's rows to logits, and what is done to them after it.

use super::dense::Dense;
use super::loader::Loader;
use crate::ModelError;
use rill_kernels::{Backend, LogitFinish};

pub(crate) struct Head<B: Backend> {
    /// `None`: the embedding table is the output projection too.
    own: Option<Dense<B>>,
    bias: Option<B::Vector>,
    scale: f32,
    softcap: Option<f32>,
}

impl<B: Backend> Head<B> {
    pub(crate) fn load(all: &mut Loader<'_, B>, (vocab, hidden): (usize, usize)) -> Result<Head<B>, ModelError> {
        let tied = all.config.tie_embeddings.unwrap_or(!all.weights.has("output.weight"));
        let own = if tied {
            None
        } else {
            let output = all.weights.matrix("output.weight", vocab, hidden)?;
            Some(Dense::new(all.backend, &[output], None)?)
        };
        let bias = all.vector_if_there("output.bias", vocab)?;
        Ok(Head {
            own,
            bias: bias.map(|values| all.backend.load_vector(&values)),
            scale: all.config.logit_scale.unwrap_or(1.0),
            softcap: all.config.final_logit_softcap,
        })
    }

    /// The projection, where `embedding` is the table it may share.
    pub(crate) fn layer<'a>(&'a self, embedding: &'a Dense<B>) -> &'a Dense<B> {
        self.own.as_ref().unwrap_or(embedding)
    }

    /// What is done to what it gives.
    pub(crate) fn finish(&self) -> LogitFinish<'_, B::Vector> {
        LogitFinish { bias: self.bias.as_ref(), scale: self.scale, softcap: self.softcap }
    }
}
