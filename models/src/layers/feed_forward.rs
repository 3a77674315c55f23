//! Feed-forward layers: one for every token, or experts of which each token picks a few.

use super::block::Join;
use super::decoder::Run;
use super::dense::Dense;
use super::loader::LayerLoader;
use super::moe::Experts;
use super::norm::Norm;
use crate::ModelError;
use crate::adapter::Projection;
use rill_kernels::{Activation, Backend, Form};

/// A layer of either kind.
pub(crate) enum FeedForward<B: Backend> {
    Mlp(Mlp<B>),
    Experts(Experts<B>),
}

/// down(activation(gate(x)) · up(x)), or down(activation(up(x))).
pub(crate) struct Mlp<B: Backend> {
    /// Gate and up side by side where the layer is gated.
    up: Dense<B>,
    pub(crate) gated: bool,
    activation: Activation,
    pub(crate) down: Dense<B>,
}

impl<B: Backend> FeedForward<B> {
    /// A gated layer, or experts where this layer of the file has a router.
    pub(crate) fn load(at: &mut LayerLoader<'_, '_, B>) -> Result<FeedForward<B>, ModelError> {
        Ok(match &at.config().experts {
            Some(experts) if at.has("ffn_gate_inp") => FeedForward::Experts(Experts::load(at, experts)?),
            _ => FeedForward::Mlp(Mlp::gated(at, ["ffn_gate", "ffn_up", "ffn_down"])?),
        })
    }

    /// Norms the residual stream, computes, and joins the result to it.
    pub(crate) fn run(&self, run: &mut Run<'_, B>, norm: &Norm<B>, join: &Join<B>) {
        match self {
            FeedForward::Mlp(mlp) => {
                let form = mlp.form(run);
                norm.read(run.backend, run.residual, None, (run.rows, form));
                mlp.hidden(run);
                run.join(&mlp.down, join);
            }
            FeedForward::Experts(experts) => {
                experts.run(run, norm);
                run.join_mixed(join);
            }
        }
    }
}

impl<B: Backend> Mlp<B> {
    /// Gate, up and down matrices of these names; an `up` of twice the width holds the gate's rows first.
    pub(crate) fn gated(at: &mut LayerLoader<'_, '_, B>, names: [&str; 3]) -> Result<Mlp<B>, ModelError> {
        let width = at.config().intermediate_size;
        Mlp::gated_of_width(at, names, width)
    }

    pub(crate) fn gated_of_width(
        at: &mut LayerLoader<'_, '_, B>,
        [gate, up, down]: [&str; 3],
        width: usize,
    ) -> Result<Mlp<B>, ModelError> {
        let hidden = at.config().hidden_size;
        let fused = if at.has(gate) {
            let parts = [at.matrix(gate, width, hidden)?, at.matrix(up, width, hidden)?];
            let bias = match (at.bias(gate, width)?, at.bias(up, width)?) {
                (None, None) => None,
                (gate, up) => {
                    let zeros = || vec![0.0; width];
                    Some([gate.unwrap_or_else(zeros), up.unwrap_or_else(zeros)].concat())
                }
            };
            at.pack(&parts, bias)?
        } else {
            at.dense(up, 2 * width, hidden)?
        };
        let fused = fused.updatable(Projection::Up);
        let down = at.dense(down, hidden, width)?.updatable(Projection::Down);
        Ok(Mlp { up: fused, gated: true, activation: at.config().activation, down })
    }

    /// `ffn_up` and `ffn_down`, no gate.
    pub(crate) fn plain(at: &mut LayerLoader<'_, '_, B>) -> Result<Mlp<B>, ModelError> {
        let config = at.config();
        Ok(Mlp {
            up: at.dense("ffn_up", config.intermediate_size, config.hidden_size)?.updatable(Projection::Up),
            gated: false,
            activation: config.activation,
            down: at.dense("ffn_down", config.hidden_size, config.intermediate_size)?.updatable(Projection::Down),
        })
    }

    /// The form of rows it reads.
    pub(crate) fn form(&self, run: &Run<'_, B>) -> Form {
        run.form(&self.up)
    }

    /// Everything before the down projection: `run.rows` in and out.
    pub(crate) fn hidden(&self, run: &mut Run<'_, B>) {
        let form = run.form(&self.down);
        if self.gated && !run.updates.is_empty() {
            // The bits of the layer and the activation in one: `linear_gated` promises no less.
            self.up.run(run.backend, run.rows, run.wide);
            run.update_wide(&self.up);
            run.backend.gated(self.activation, run.wide, (run.rows, form));
        } else if self.gated {
            self.up.gated(run.backend, self.activation, run.rows, run.wide, (run.next_rows, form));
            std::mem::swap(run.rows, run.next_rows);
        } else {
            self.up.run(run.backend, run.rows, run.wide);
            run.update_wide(&self.up);
            run.backend.activate(self.activation, run.wide, (run.rows, form));
        }
    }
}
