//! Sparse mixture of experts: a router picks a few gated layers for every token (Shazeer et al. 2017,
//! arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961).
//!
//! Tokens are grouped by expert, so that each expert's weights are read once a step. A token's outputs are added up in
//! ascending order of its experts, whoever else is in the batch.

use super::decoder::Run;
use super::dense::Dense;
use super::feed_forward::Mlp;
use super::loader::LayerLoader;
use super::norm::Norm;
use crate::ModelError;
use crate::config::{ExpertsConfig, Routing};
use crate::weights::Matrix;
use rill_kernels::{Activation, Backend};

/// Router and experts of one layer.
pub(crate) struct Experts<B: Backend> {
    router: Dense<B>,
    /// Added to the experts' scores where it is decided which are picked.
    favour: Option<Vec<f32>>,
    experts: Vec<Expert<B>>,
    /// Computed for every token, its output scaled by a sigmoid gate where there is one.
    shared: Option<Shared<B>>,
    activation: Activation,
    config: ExpertsConfig,
    hidden_size: usize,
}

struct Expert<B: Backend> {
    gate_up: Dense<B>,
    down: Dense<B>,
}

struct Shared<B: Backend> {
    mlp: Mlp<B>,
    gate: Option<Dense<B>>,
}

/// The tokens that picked one expert, and how much each wants of it.
#[derive(Default, Clone)]
struct Group {
    rows: Vec<u32>,
    weights: Vec<f32>,
}

impl<B: Backend> Experts<B> {
    /// Loads `ffn_gate_inp` and the experts: stacked in one tensor a kind, or each in tensors of its own.
    pub(crate) fn load(at: &mut LayerLoader<'_, '_, B>, config: &ExpertsConfig) -> Result<Experts<B>, ModelError> {
        let (hidden, width, count) = (at.config().hidden_size, config.intermediate_size, config.count);
        let router = at.dense("ffn_gate_inp", count, hidden)?;
        let favour = at.bias("exp_probs_b", count)?;
        let mut experts = Vec::with_capacity(count);
        if at.has("ffn_gate_up_exps") {
            let gate_up = at.stack("ffn_gate_up_exps", (count, 2 * width, hidden))?;
            let down = at.stack("ffn_down_exps", (count, hidden, width))?;
            for (gate_up, down) in gate_up.into_iter().zip(down) {
                experts.push(Expert { gate_up: at.pack(&[gate_up], None)?, down: at.pack(&[down], None)? });
            }
        } else if at.has("ffn_gate_exps") {
            let gate = at.stack("ffn_gate_exps", (count, width, hidden))?;
            let up = at.stack("ffn_up_exps", (count, width, hidden))?;
            let down = at.stack("ffn_down_exps", (count, hidden, width))?;
            for ((gate, up), down) in gate.into_iter().zip(up).zip(down) {
                experts.push(Expert { gate_up: at.pack(&[gate, up], None)?, down: at.pack(&[down], None)? });
            }
        } else {
            for expert in 0..count {
                let gate = at.matrix(&format!("ffn_gate.{expert}"), width, hidden)?;
                let up = at.matrix(&format!("ffn_up.{expert}"), width, hidden)?;
                let gate_up = at.pack(&[gate, up], None)?;
                let down = at.matrix(&format!("ffn_down.{expert}"), hidden, width)?;
                experts.push(Expert { gate_up, down: at.pack(&[down], None)? });
            }
        }
        let shared = match config.shared_size {
            None => None,
            Some(width) => Some(Shared {
                mlp: Mlp::gated_of_width(at, ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"], width)?,
                gate: if at.has("ffn_gate_inp_shexp") { Some(shared_gate(at)?) } else { None },
            }),
        };
        let activation = at.config().activation;
        Ok(Experts { router, favour, experts, shared, activation, config: config.clone(), hidden_size: hidden })
    }

    /// `run.mixed` = the weighted sum of each token's experts.
    pub(crate) fn run(&self, run: &mut Run<'_, B>, norm: &Norm<B>) {
        let rows = run.input.positions.len();
        norm.read(run.backend, run.residual, None, (run.rows, self.router.form(run.backend)));
        self.router.run(run.backend, run.rows, run.wide);
        let groups = self.config.route(&run.backend.read(run.wide, 0..rows), self.favour.as_deref());
        run.backend.clear(run.mixed, rows, self.hidden_size);
        for (expert, group) in self.experts.iter().zip(&groups) {
            if group.rows.is_empty() {
                continue;
            }
            let form = expert.gate_up.form(run.backend);
            norm.read(run.backend, run.residual, Some(&group.rows), (run.rows, form));
            let form = expert.down.form(run.backend);
            expert.gate_up.gated(run.backend, self.activation, run.rows, run.wide, (run.next_rows, form));
            expert.down.run(run.backend, run.next_rows, run.wide);
            run.backend.scatter_add(run.wide, &group.rows, &group.weights, run.mixed);
        }
        if let Some(shared) = &self.shared {
            let weights = shared.weights(run, norm, rows);
            let form = shared.mlp.form(run);
            norm.read(run.backend, run.residual, None, (run.rows, form));
            shared.mlp.hidden(run);
            shared.mlp.down.run(run.backend, run.rows, run.wide);
            let all: Vec<u32> = (0..rows as u32).collect();
            run.backend.scatter_add(run.wide, &all, &weights, run.mixed);
        }
    }
}

/// The shared expert's gate: one row of weights, stored as a matrix or as a vector.
fn shared_gate<B: Backend>(at: &mut LayerLoader<'_, '_, B>) -> Result<Dense<B>, ModelError> {
    let hidden = at.config().hidden_size;
    let values = at.all.weights.vector(&format!("blk.{}.ffn_gate_inp_shexp.weight", at.number), hidden)?;
    at.pack(&[Matrix::row(&values)], None)
}

impl<B: Backend> Shared<B> {
    /// How much each token wants of the shared expert.
    fn weights(&self, run: &mut Run<'_, B>, norm: &Norm<B>, rows: usize) -> Vec<f32> {
        let Some(gate) = &self.gate else { return vec![1.0; rows] };
        norm.read(run.backend, run.residual, None, (run.rows, gate.form(run.backend)));
        gate.run(run.backend, run.rows, run.wide);
        run.backend.read(run.wide, 0..rows).into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()
    }
}

impl ExpertsConfig {
    /// Each expert's tokens, from rows of router logits. The softmax is over all experts; equal ones go by number.
    fn route(&self, logits: &[f32], favour: Option<&[f32]>) -> Vec<Group> {
        let mut groups = vec![Group::default(); self.count];
        for (row, logits) in logits.chunks_exact(self.count).enumerate() {
            // Scores are in units of `total`.
            let (scores, total): (Vec<f32>, f32) = match self.routing {
                Routing::Softmax => {
                    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let powers: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
                    let total = powers.iter().sum();
                    (powers, total)
                }
                Routing::Sigmoid => (logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(), 1.0),
            };
            let mut choice = scores.clone();
            if let Some(favour) = favour {
                choice.iter_mut().zip(favour).for_each(|(x, favour)| *x = *x / total + favour);
            }
            self.keep_best_groups(&mut choice);
            let mut order: Vec<usize> = (0..self.count).collect();
            order.sort_by(|&a, &b| choice[b].total_cmp(&choice[a]).then(a.cmp(&b)));
            let picked = &order[..self.per_token];
            let share = if self.normalise { picked.iter().map(|&e| scores[e]).sum() } else { total };
            for &expert in picked {
                groups[expert].rows.push(row as u32);
                groups[expert].weights.push(scores[expert] / share * self.scale);
            }
        }
        groups
    }

    /// Rules out experts of all groups but the best: by their best expert's score, or by their best two where scores
    /// are sigmoids.
    fn keep_best_groups(&self, choice: &mut [f32]) {
        let Some((count, kept)) = self.groups else { return };
        let size = self.count / count;
        let judged = |group: &[f32]| {
            let mut sorted = group.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            match self.routing {
                Routing::Softmax => sorted[0],
                Routing::Sigmoid => sorted.iter().take(2).sum(),
            }
        };
        let scores: Vec<f32> = choice.chunks_exact(size).map(judged).collect();
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        for &group in &order[kept..] {
            choice[group * size..][..size].fill(f32::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{ExpertsConfig, Routing};

    #[test]
    fn tokens_go_to_their_best_experts() {
        let mut config = ExpertsConfig { normalise: true, ..ExpertsConfig::softmax(4, 2, 1) };
        let logits = [0.0, 3.0, 1.0, 3.0, 5.0, 5.0, 5.0, 5.0];
        let groups = config.route(&logits, None);
        let rows: Vec<&[u32]> = groups.iter().map(|g| &g.rows[..]).collect();
        assert_eq!(rows, [&[1][..], &[0, 1], &[], &[0]]);
        assert_eq!(groups[1].weights, [0.5, 0.5]);
        config.normalise = false;
        let groups = config.route(&logits, None);
        assert!((groups[0].weights[0] - 0.25).abs() < 1e-6);
        assert!(groups[1].weights[0] < 0.5 && groups[1].weights[0] > 0.4);
    }

    #[test]
    fn groups_and_favours_decide_who_is_picked_but_not_how_much() {
        let mut config = ExpertsConfig { groups: Some((3, 1)), scale: 2.0, ..ExpertsConfig::softmax(6, 2, 1) };
        config.routing = Routing::Sigmoid;
        // The best expert is in the first group, the best two are in the second.
        let logits = [4.0, -9.0, 1.0, 2.0, 0.0, 0.0];
        let picked = |config: &ExpertsConfig, favour: Option<&[f32]>| {
            let groups = config.route(&logits, favour);
            (0..6).filter(|&e| !groups[e].rows.is_empty()).map(|e| (e, groups[e].weights[0])).collect::<Vec<_>>()
        };
        let twice = |x: f32| 2.0 / (1.0 + (-x).exp());
        assert_eq!(picked(&config, None), [(2, twice(1.0)), (3, twice(2.0))]);
        assert_eq!(picked(&config, Some(&[0.0, 0.0, 0.0, 0.0, 0.7, 0.7])), [(4, 1.0), (5, 1.0)]);
        config.routing = Routing::Softmax;
        assert_eq!(picked(&config, None).iter().map(|(e, _)| *e).collect::<Vec<_>>(), [0, 1]);
    }
}
