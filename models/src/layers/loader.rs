//! What an architecture loads its weights with: a backend, a configuration, and tensors by name.

use super::dense::Dense;
use super::norm::{Norm, NormKind};
use crate::weights::{Matrix, Weights};
use crate::{ModelConfig, ModelError};
use rill_kernels::Backend;

/// Loads tensors outside layers.
pub(crate) struct Loader<'a, B: Backend> {
    pub(crate) backend: &'a mut B,
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a Weights,
}

/// Loads the tensors of one layer.
pub(crate) struct LayerLoader<'a, 'b, B: Backend> {
    pub(crate) all: &'b mut Loader<'a, B>,
    pub(crate) number: usize,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// The norm called `name`, `width` wide.
    pub(crate) fn norm(&mut self, name: &str, kind: NormKind, width: usize) -> Result<Norm<B>, ModelError> {
        let eps = self.config.norm_eps;
        if kind == NormKind::Plain {
            return Ok(Norm::Layer { weight: self.backend.load_vector(&vec![1.0; width]), bias: None, eps });
        }
        let weight = self.norm_weight(name, width)?;
        Ok(match kind {
            NormKind::RootMeanSquare => Norm::RootMeanSquare { weight, eps },
            NormKind::Layer | NormKind::Plain => {
                let bias = self.vector_if_there(&format!("{name}.bias"), width)?;
                Norm::Layer { weight, bias: bias.map(|values| self.backend.load_vector(&values)), eps }
            }
        })
    }

    /// A norm's weight, with the one of `(1 + w)` norms added.
    pub(crate) fn norm_weight(&mut self, name: &str, width: usize) -> Result<B::Vector, ModelError> {
        let mut values = self.weights.vector(&format!("{name}.weight"), width)?;
        values.iter_mut().for_each(|w| *w += self.config.norm_weight_offset);
        Ok(self.backend.load_vector(&values))
    }

    pub(crate) fn vector_if_there(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>, ModelError> {
        if self.weights.has(name) { self.weights.vector(name, len).map(Some) } else { Ok(None) }
    }
}

impl<'a, B: Backend> LayerLoader<'a, '_, B> {
    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.all.config
    }

    fn name(&self, part: &str) -> String {
        format!("blk.{}.{part}", self.number)
    }

    /// Whether the layer has a weight of this name.
    pub(crate) fn has(&self, part: &str) -> bool {
        self.all.weights.has(&self.name(&format!("{part}.weight")))
    }

    pub(crate) fn matrix(&self, part: &str, rows: usize, cols: usize) -> Result<Matrix<'a>, ModelError> {
        self.all.weights.matrix(&self.name(&format!("{part}.weight")), rows, cols)
    }

    /// `count` matrices in one tensor.
    pub(crate) fn stack(
        &self,
        part: &str,
        (count, rows, cols): (usize, usize, usize),
    ) -> Result<Vec<Matrix<'a>>, ModelError> {
        self.all.weights.stack(&self.name(&format!("{part}.weight")), count, rows, cols)
    }

    /// A bias, where the file has one.
    pub(crate) fn bias(&self, part: &str, len: usize) -> Result<Option<Vec<f32>>, ModelError> {
        self.all.vector_if_there(&self.name(&format!("{part}.bias")), len)
    }

    /// Loads matrices, side by side.
    pub(crate) fn pack(&mut self, parts: &[Matrix<'_>], bias: Option<Vec<f32>>) -> Result<Dense<B>, ModelError> {
        Dense::new(self.all.backend, parts, bias)
    }

    /// One matrix with its bias, where there is one.
    pub(crate) fn dense(&mut self, part: &str, rows: usize, cols: usize) -> Result<Dense<B>, ModelError> {
        let (matrix, bias) = (self.matrix(part, rows, cols)?, self.bias(part, rows)?);
        self.pack(&[matrix], bias)
    }

    /// The same, row `source(r)` in the place of row `r`.
    pub(crate) fn reordered(
        &mut self,
        part: &str,
        (rows, cols): (usize, usize),
        source: &dyn Fn(usize) -> usize,
    ) -> Result<Dense<B>, ModelError> {
        let (matrix, bias) = (self.matrix(part, rows, cols)?, self.bias(part, rows)?);
        let bias = bias.map(|bias| (0..rows).map(|r| bias[source(r)]).collect());
        self.pack(&[matrix.reordered(source)], bias)
    }

    /// A norm over the residual stream.
    pub(crate) fn norm(&mut self, part: &str, kind: NormKind) -> Result<Norm<B>, ModelError> {
        let (name, width) = (self.name(part), self.config().hidden_size);
        self.all.norm(&name, kind, width)
    }

    pub(crate) fn norm_weight(&mut self, part: &str, width: usize) -> Result<B::Vector, ModelError> {
        let name = self.name(part);
        self.all.norm_weight(&name, width)
    }
}
