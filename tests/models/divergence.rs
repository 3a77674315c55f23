//! How far one model's logits are from another's: errors, agreement, Kullback-Leibler divergence, perplexity.

use std::fmt;

/// Logits of many positions, one row after another.
pub struct Rows<'a> {
    pub logits: &'a [f32],
    pub vocab_size: usize,
}

impl Rows<'_> {
    pub fn count(&self) -> usize {
        self.logits.len() / self.vocab_size
    }

    pub fn row(&self, index: usize) -> &[f32] {
        &self.logits[index * self.vocab_size..(index + 1) * self.vocab_size]
    }
}

/// What `measure` found over all rows.
#[derive(Debug)]
pub struct Divergence {
    pub positions: usize,
    pub error_max: f32,
    pub error_mean: f64,
    /// Share of positions where both have the same most likely token.
    pub top1_agreement: f64,
    /// Mean of KL(truth ‖ other), in nats.
    pub kl_mean: f64,
    pub kl_max: f64,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "logit error max {:.4} mean {:.5}, top-1 agreement {:.2} % of {}, KL mean {:.6} max {:.4} nats",
            self.error_max,
            self.error_mean,
            self.top1_agreement * 100.0,
            self.positions,
            self.kl_mean,
            self.kl_max
        )
    }
}

/// Compares the first `min` rows of both.
pub fn measure(truth: &Rows, other: &Rows) -> Divergence {
    assert_eq!(truth.vocab_size, other.vocab_size);
    let positions = truth.count().min(other.count());
    let (mut error_max, mut error_sum, mut agreed) = (0f32, 0f64, 0usize);
    let (mut kl_sum, mut kl_max) = (0f64, 0f64);
    for index in 0..positions {
        let (a, b) = (truth.row(index), other.row(index));
        for (x, y) in a.iter().zip(b) {
            let error = (x - y).abs();
            assert!(error.is_finite(), "position {index} holds a value that is not finite");
            error_max = error_max.max(error);
            error_sum += f64::from(error);
        }
        agreed += usize::from(argmax(a) == argmax(b));
        let (log_a, log_b) = (log_sum_exp(a), log_sum_exp(b));
        let kl: f64 = a
            .iter()
            .zip(b)
            .map(|(x, y)| {
                let p = f64::from(*x) - log_a;
                p.exp() * (p - (f64::from(*y) - log_b))
            })
            .sum();
        kl_sum += kl;
        kl_max = kl_max.max(kl);
    }
    Divergence {
        positions,
        error_max,
        error_mean: error_sum / (positions * truth.vocab_size) as f64,
        top1_agreement: agreed as f64 / positions as f64,
        kl_mean: kl_sum / positions as f64,
        kl_max,
    }
}

/// Perplexity of `next`, the token that really follows each row.
pub fn perplexity(rows: &Rows, next: &[u32]) -> f64 {
    let positions = rows.count().min(next.len());
    let sum: f64 = (0..positions).map(|index| logprob(rows.row(index), next[index])).sum();
    (-sum / positions as f64).exp()
}

pub fn logprob(row: &[f32], token: u32) -> f64 {
    f64::from(row[token as usize]) - log_sum_exp(row)
}

/// The most likely token; the lowest id among equals.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row[argmax(row) as usize]);
    max + row.iter().map(|x| (f64::from(*x) - max).exp()).sum::<f64>().ln()
}
