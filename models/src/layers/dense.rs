//! A linear layer with or without a bias.

use super::decoder::Run;
use crate::ModelError;
use crate::adapter::Projection;
use crate::weights::Matrix;
use rill_kernels::{Activation, Backend, Form, LogitFinish, Ranking};

/// x · Wᵀ + b; several matrices side by side count as one.
pub(crate) struct Dense<B: Backend> {
    weights: B::Linear,
    bias: Option<B::Vector>,
    /// What of its decoder layer it is, where adapters may update it.
    pub(crate) projection: Option<Projection>,
}

impl<B: Backend> Dense<B> {
    pub(crate) fn new(
        backend: &mut B,
        parts: &[Matrix<'_>],
        bias: Option<Vec<f32>>,
    ) -> Result<Dense<B>, ModelError> {
        let stored: Vec<_> = parts.iter().map(Matrix::stored).collect();
        let weights = backend.load_linear(&stored).map_err(|error| ModelError::Unsupported(error.to_string()))?;
        Ok(Dense { weights, bias: bias.map(|values| backend.load_vector(&values)), projection: None })
    }

    /// The same, as part of its layer that adapters may update.
    pub(crate) fn updatable(self, projection: Projection) -> Dense<B> {
        Dense { projection: Some(projection), ..self }
    }

    /// The form of rows it reads.
    pub(crate) fn form(&self, backend: &B) -> Form {
        backend.form(&self.weights)
    }

    /// `out` = the layer's output.
    pub(crate) fn run(&self, backend: &mut B, x: &B::Rows, out: &mut B::Matrix) {
        backend.linear(&self.weights, x, out);
        if let Some(bias) = &self.bias {
            backend.add_bias(out, bias);
        }
    }

    /// `run.wide` = the layer's output for the root-mean-square norm of `run.wide`.
    pub(crate) fn run_normed(&self, run: &mut Run<'_, B>, norm: &B::Vector, eps: f32) {
        let form = self.form(run.backend);
        run.backend.rms_norm(run.wide, None, norm, eps, (run.next_rows, form));
        self.run(run.backend, run.next_rows, run.wide);
    }

    /// `out` = activation(gate) · up, where the layer's output is the gate's values followed by up's.
    pub(crate) fn gated(
        &self,
        backend: &mut B,
        activation: Activation,
        x: &B::Rows,
        scratch: &mut B::Matrix,
        out: (&mut B::Rows, Form),
    ) {
        if self.bias.is_none() {
            backend.linear_gated(&self.weights, activation, x, scratch, out);
        } else {
            self.run(backend, x, scratch);
            backend.gated(activation, scratch, out);
        }
    }

    /// `out` += the layer's output.
    pub(crate) fn add(&self, backend: &mut B, x: &B::Rows, out: &mut B::Matrix) {
        backend.linear_add(&self.weights, x, out);
        if let Some(bias) = &self.bias {
            backend.add_bias(out, bias);
        }
    }

    /// The output, finished, in host memory, rows one after another.
    pub(crate) fn logits(
        &self,
        backend: &mut B,
        x: &B::Rows,
        finish: LogitFinish<'_, B::Vector>,
        out: &mut Vec<f32>,
    ) {
        backend.logits(&self.weights, x, finish, out);
    }

    /// How many of a row's logits can be ranked on the device.
    pub(crate) fn best_logits_max(&self, backend: &B) -> usize {
        backend.best_logits_max(&self.weights)
    }

    /// Has logits computed by a device of its own.
    pub(crate) fn start_logits(
        &self,
        backend: &mut B,
        x: &B::Rows,
        finish: LogitFinish<'_, B::Vector>,
        ranking: Option<&Ranking>,
    ) {
        backend.start_logits(&self.weights, x, finish, ranking);
    }

    /// Row `ids[r]` of the weights: the layer as a table.
    pub(crate) fn look_up(&self, backend: &mut B, ids: &[u32], scale: f32, out: &mut B::Matrix) {
        backend.embed(&self.weights, ids, scale, out);
    }
}
