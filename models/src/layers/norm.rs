//! Normalisation before, after and inside sub-layers.

use rill_kernels::{Backend, Form};

/// Which norm an architecture uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormKind {
    RootMeanSquare,
    /// With a bias where the file has one.
    Layer,
    /// A layer norm that nothing is learnt about.
    Plain,
}

/// A norm with its weights.
pub(crate) enum Norm<B: Backend> {
    RootMeanSquare {
        weight: B::Vector,
        eps: f32,
    },
    Layer {
        weight: B::Vector,
        bias: Option<B::Vector>,
        eps: f32,
    },
    /// None: the sub-layer reads the residual stream as it is.
    Identity,
}

impl<B: Backend> Norm<B> {
    /// `out` = the norm of all rows of `x`, or of those `select` names, in the form the next layer reads.
    pub(crate) fn read(&self, backend: &mut B, x: &B::Matrix, select: Option<&[u32]>, out: (&mut B::Rows, Form)) {
        match self {
            Norm::RootMeanSquare { weight, eps } => backend.rms_norm(x, select, weight, *eps, out),
            Norm::Layer { weight, bias, eps } => {
                backend.layer_norm(x, select, (weight, bias.as_ref()), *eps, out);
            }
            Norm::Identity => backend.to_rows(x, select, out),
        }
    }
}
