//! How long a step takes: learnt from the steps there have been, so that prompts are computed in chunks that no stream
//! notices, and drafts are checked where that is faster than generating.
//!
//! A step's time is taken to be linear in what it computes. The weights follow the observations by recursive least
//! squares with exponential forgetting (Plackett 1950; Haykin, "Adaptive Filter Theory") and never turn negative. Time
//! decides how the work is cut into steps and never what comes out of it.

/// What a step computes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Work {
    pub(crate) rows: usize,
    /// Rows whose logits are wanted.
    pub(crate) logit_rows: usize,
    /// Tokens that all rows together attend to.
    pub(crate) attended: usize,
}

const FEATURES: usize = 4;
/// Makes the parts of a usual step about equally large.
const SCALE: [f64; FEATURES] = [1.0, 1.0 / 32.0, 1.0 / 32.0, 1.0 / 32_768.0];
/// Weight of what was known, a step.
const MEMORY: f64 = 0.98;
/// Uncertainty of a weight about which nothing is known; and no weight is ever less certain.
const UNCERTAINTY_MAX: f64 = 1e4;
/// Steps after which an outlier is told from a machine not known yet.
const STEPS_TO_KNOW: u64 = 8;

/// A stream's gap may grow by this while a prompt is computed beside it. The promise is 2; the rest is for what the
/// prediction misses.
const GAP_FACTOR_MAX: f64 = 1.7;
/// Rows of prompts a step computes whatever it takes: prompts must get through.
const PREFILL_ROWS_MIN: usize = 4;

/// A step's time, as far as known.
#[derive(Debug)]
pub(crate) struct Pace {
    weights: [f64; FEATURES],
    /// The inverse of the features' weighted correlation.
    uncertainty: [[f64; FEATURES]; FEATURES],
    steps: u64,
    /// Rows of prompts in the last step: the next one has at most twice as many beside streams.
    last_prefill: usize,
}

impl Work {
    /// `count` tokens up to, but not with, position `end` of one sequence.
    pub(crate) fn add_tokens(&mut self, end: usize, count: usize) {
        self.rows += count;
        self.attended += count * end - count * count.saturating_sub(1) / 2;
    }

    fn features(self) -> [f64; FEATURES] {
        let raw = [1.0, self.rows as f64, self.logit_rows as f64, self.attended as f64];
        std::array::from_fn(|i| raw[i] * SCALE[i])
    }
}

impl Pace {
    /// Seconds `work` will take; 0 while nothing is known.
    pub(crate) fn predict(&self, work: Work) -> f64 {
        dot(self.weights, work.features())
    }

    /// `work`, of which `prefill` rows were prompts', took `seconds`.
    pub(crate) fn observe(&mut self, work: Work, prefill: usize, seconds: f64) {
        self.last_prefill = prefill;
        let features = work.features();
        // One step held up by something else must not count for more than a slow one.
        let predicted = self.predict(work);
        let seconds = if self.steps < STEPS_TO_KNOW { seconds } else { seconds.min(4.0 * predicted) };
        let spread = self.uncertainty.map(|row| dot(row, features));
        let norm = MEMORY + dot(spread, features);
        for (weight, spread) in self.weights.iter_mut().zip(spread) {
            *weight = (*weight + spread / norm * (seconds - predicted)).max(0.0);
        }
        for (row, a) in self.uncertainty.iter_mut().zip(spread) {
            for (value, b) in row.iter_mut().zip(spread) {
                *value -= a * b / norm;
            }
        }
        // What has not been seen for long is forgotten, but not without end.
        if (0..FEATURES).all(|i| self.uncertainty[i][i] < UNCERTAINTY_MAX * MEMORY) {
            self.uncertainty.as_flattened_mut().iter_mut().for_each(|value| *value /= MEMORY);
        }
        self.steps += 1;
    }

    /// Rows of prompts the coming step may compute beside `streams`, whose rows are the next tokens of running
    /// sequences, where each of those rows attends to up to `context` tokens.
    pub(crate) fn prefill_rows(&self, streams: Work, context: usize) -> usize {
        if streams.rows == 0 {
            return usize::MAX;
        }
        let of_a_row = self.row_cost(context) - self.weights[2] * SCALE[2];
        let allowed = self.patience(streams).unwrap_or(0.0) / of_a_row.max(f64::MIN_POSITIVE);
        let allowed = if allowed.is_finite() { allowed as usize } else { 0 };
        allowed.min(2 * self.last_prefill).max(PREFILL_ROWS_MIN)
    }

    /// Seconds the coming step may take beyond what `streams` take alone; `None` if nobody waits for it.
    pub(crate) fn patience(&self, streams: Work) -> Option<f64> {
        (streams.rows > 0).then(|| (GAP_FACTOR_MAX - 1.0) * self.predict(streams))
    }

    /// Seconds for one more row with logits that attends to `context` tokens.
    pub(crate) fn row_cost(&self, context: usize) -> f64 {
        let more = Work { rows: 1, logit_rows: 1, attended: context };
        self.predict(more) - self.predict(Work::default())
    }
}

impl Default for Pace {
    fn default() -> Pace {
        let uncertainty =
            std::array::from_fn(|i| std::array::from_fn(|j| if i == j { UNCERTAINTY_MAX } else { 0.0 }));
        Pace { weights: [0.0; FEATURES], uncertainty, steps: 0, last_prefill: 0 }
    }
}

fn dot(a: [f64; FEATURES], b: [f64; FEATURES]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine's true times.
    fn seconds(work: Work) -> f64 {
        4e-3 + work.rows as f64 * 4e-4 + work.logit_rows as f64 * 1e-4 + work.attended as f64 * 1e-7
    }

    fn decoding(streams: usize, context: usize) -> Work {
        Work { rows: streams, logit_rows: streams, attended: streams * context }
    }

    #[test]
    fn attended_tokens_of_a_run() {
        let mut work = Work::default();
        work.add_tokens(10, 3);
        assert_eq!(work, Work { rows: 3, logit_rows: 0, attended: 10 + 9 + 8 });
    }

    /// Streams decode, then a long prompt arrives: no step takes more than twice the time of one without it.
    #[test]
    fn a_long_prompt_is_cut_to_the_streams_measure() {
        for streams in [1, 4, 8, 32] {
            let mut pace = Pace::default();
            for step in 0..50 {
                // Prompts alone and streams alone are seen first, as they are in life.
                let work = match step % 5 {
                    0 => Work { rows: 60, logit_rows: 1, attended: 60 * 30 },
                    _ => decoding(streams, 90),
                };
                pace.observe(work, 0, seconds(work));
            }
            let (mut computed, mut steps) = (0, 0);
            while computed < 6000 {
                let alone = decoding(streams, 100 + steps);
                let rows = pace.prefill_rows(alone, computed).min(6000 - computed);
                let mut work = alone;
                work.add_tokens(computed + rows, rows);
                let floor = rows == PREFILL_ROWS_MIN;
                assert!(
                    floor || seconds(work) <= 2.0 * seconds(alone),
                    "{streams} streams, {rows} rows at {computed}"
                );
                pace.observe(work, rows, seconds(work));
                computed += rows;
                steps += 1;
            }
            assert!(steps <= 6000 / PREFILL_ROWS_MIN + 1);
        }
    }

    #[test]
    fn nobody_waits_where_nobody_decodes() {
        assert_eq!(Pace::default().prefill_rows(Work::default(), 0), usize::MAX);
    }

    #[test]
    fn one_step_that_was_held_up_is_not_believed() {
        let mut pace = Pace::default();
        for _ in 0..40 {
            pace.observe(decoding(8, 100), 0, seconds(decoding(8, 100)));
        }
        pace.observe(decoding(8, 100), 0, 10.0);
        assert!(pace.predict(decoding(8, 100)) < 2.0 * seconds(decoding(8, 100)));
    }
}
