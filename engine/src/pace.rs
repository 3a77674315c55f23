//! How long a step takes: learnt from the steps there have been, so that prompts are computed in chunks that no stream
//! notices, and drafts are checked where that is faster than generating.
//!
//! The time of a step without prompts is taken to be linear in what it computes, with weights of least squares over the
//! latest steps, none of them negative. They are solved for anew from the steps' moments: updating an inverse instead
//! (recursive least squares) diverges once all steps are alike. Steps with prompts leave them alone, so that a long prompt
//! does not change what is thought of life without it. What a prompt's row costs is what such a step took beyond that. Time
//! decides how the work is cut into steps and never what comes out of it.

/// Rows of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Work {
    pub(crate) rows: usize,
    /// Tokens that all rows together attend to.
    pub(crate) attended: usize,
}

const FEATURES: usize = 3;
/// Makes the parts of a usual step about equally large.
const SCALE: [f64; FEATURES] = [1.0, 1.0 / 32.0, 1.0 / 32_768.0];
/// Weight of what was known, a step.
const MEMORY: f64 = 0.98;
/// Added to each feature's moment, where the steps' own sum up to about 50: decides what alike steps leave open, in favour
/// of small weights.
const RIDGE: f64 = 1e-3;
/// Steps after which an outlier is told from a machine not known yet.
const STEPS_TO_KNOW: u64 = 8;
/// Weight of the latest step in what a prompt's row costs: it grows with the prompt, and from prompt to prompt it jumps.
const ROW_WEIGHT: f64 = 0.3;

/// A stream's gap may grow by this while a prompt is computed beside it. The promise is 2; the rest is for what the
/// prediction misses.
const GAP_FACTOR_MAX: f64 = 1.7;
/// Rows of prompts a step computes whatever it takes: prompts must get through.
const PREFILL_ROWS_MIN: usize = 4;

/// A step's time, as far as known.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    weights: [f64; FEATURES],
    /// Sums over the steps, later ones weighing more: products of two features, and of a feature and the time.
    moments: [[f64; FEATURES]; FEATURES],
    responses: [f64; FEATURES],
    steps: u64,
    /// Seconds a row of a prompt takes; 0 while nothing is known.
    prefill_row_seconds: f64,
    /// Rows of prompts in the last step: the next one has at most half as many more beside streams.
    last_prefill: usize,
}

impl Work {
    /// `count` tokens up to, but not with, position `end` of one sequence.
    pub(crate) fn add_tokens(&mut self, end: usize, count: usize) {
        self.rows += count;
        self.attended += count * end - count * count.saturating_sub(1) / 2;
    }

    fn features(self) -> [f64; FEATURES] {
        let raw = [1.0, self.rows as f64, self.attended as f64];
        std::array::from_fn(|i| raw[i] * SCALE[i])
    }
}

impl Pace {
    /// Seconds a step of `streams` alone will take; 0 while nothing is known.
    pub(crate) fn predict(&self, streams: Work) -> f64 {
        if streams.rows == 0 { 0.0 } else { dot(self.weights, streams.features()) }
    }

    /// A step of `streams` and `prefill` rows of prompts took `seconds`.
    pub(crate) fn observe(&mut self, streams: Work, prefill: usize, seconds: f64) {
        self.last_prefill = prefill;
        if prefill == 0 {
            self.learn(streams, seconds);
            return;
        }
        let of_a_row = (seconds - self.predict(streams)).max(0.1 * seconds) / prefill as f64;
        let weight = if self.prefill_row_seconds == 0.0 { 1.0 } else { ROW_WEIGHT };
        self.prefill_row_seconds += weight * (of_a_row - self.prefill_row_seconds);
    }

    fn learn(&mut self, streams: Work, seconds: f64) {
        let features = streams.features();
        // One step held up by something else must not count for more than a slow one.
        let predicted = self.predict(streams);
        let seconds = if self.steps < STEPS_TO_KNOW { seconds } else { seconds.min(4.0 * predicted) };
        for ((row, response), a) in self.moments.iter_mut().zip(&mut self.responses).zip(features) {
            for (moment, b) in row.iter_mut().zip(features) {
                *moment = *moment * MEMORY + a * b;
            }
            *response = *response * MEMORY + a * seconds;
        }
        self.weights = self.solve();
        self.steps += 1;
    }

    /// The weights that fit the steps best; whichever would have to be negative is 0.
    fn solve(&self) -> [f64; FEATURES] {
        let mut used = [true; FEATURES];
        loop {
            let mut moments = self.moments;
            let mut responses = self.responses;
            for i in 0..FEATURES {
                moments[i][i] += RIDGE;
                if !used[i] {
                    moments[i] = [0.0; FEATURES];
                    moments.iter_mut().for_each(|row| row[i] = 0.0);
                    (moments[i][i], responses[i]) = (1.0, 0.0);
                }
            }
            let weights = solve_positive_definite(moments, responses);
            let Some(worst) =
                (0..FEATURES).filter(|&i| weights[i] < 0.0).min_by(|&i, &j| weights[i].total_cmp(&weights[j]))
            else {
                return weights;
            };
            used[worst] = false;
        }
    }

    /// Rows of prompts the coming step may compute beside `streams`, the next tokens of running sequences.
    pub(crate) fn prefill_rows(&self, streams: Work) -> usize {
        let Some(patience) = self.patience(streams) else { return usize::MAX };
        let allowed = patience / self.prefill_row_seconds.max(f64::MIN_POSITIVE);
        let allowed = if allowed.is_finite() { allowed as usize } else { 0 };
        allowed.min(self.last_prefill + self.last_prefill / 2).max(PREFILL_ROWS_MIN)
    }

    /// Seconds the coming step may take beyond what `streams` take alone; `None` if nobody waits for it.
    pub(crate) fn patience(&self, streams: Work) -> Option<f64> {
        (streams.rows > 0).then(|| (GAP_FACTOR_MAX - 1.0) * self.predict(streams))
    }

    /// Seconds for one more row beside streams that attends to `context` tokens.
    pub(crate) fn row_cost(&self, context: usize) -> f64 {
        self.weights[1] * SCALE[1] + self.weights[2] * SCALE[2] * context as f64
    }

    /// Seconds for a row of a prompt.
    pub(crate) fn prefill_row_cost(&self) -> f64 {
        self.prefill_row_seconds
    }
}

/// Gaussian elimination; such a matrix needs no pivoting.
fn solve_positive_definite(mut a: [[f64; FEATURES]; FEATURES], mut b: [f64; FEATURES]) -> [f64; FEATURES] {
    for pivot in 0..FEATURES {
        for row in pivot + 1..FEATURES {
            let factor = a[row][pivot] / a[pivot][pivot];
            for column in pivot..FEATURES {
                a[row][column] -= factor * a[pivot][column];
            }
            b[row] -= factor * b[pivot];
        }
    }
    for row in (0..FEATURES).rev() {
        let known: f64 = (row + 1..FEATURES).map(|column| a[row][column] * b[column]).sum();
        b[row] = (b[row] - known) / a[row][row];
    }
    b
}

fn dot(a: [f64; FEATURES], b: [f64; FEATURES]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine's true times.
    fn seconds(streams: Work, prompt: Work) -> f64 {
        let rows = (streams.rows + prompt.rows) as f64;
        4e-3 + rows * 4e-4 + streams.attended as f64 * 1e-6 + prompt.attended as f64 * 1e-7
    }

    fn decoding(streams: usize, context: usize) -> Work {
        Work { rows: streams, attended: streams * context }
    }

    #[test]
    fn attended_tokens_of_a_run() {
        let mut work = Work::default();
        work.add_tokens(10, 3);
        assert_eq!(work, Work { rows: 3, attended: 10 + 9 + 8 });
    }

    /// Streams decode, then a long prompt arrives: no step takes more than twice the time of one without it.
    #[test]
    fn a_long_prompt_is_cut_to_the_streams_measure() {
        for streams in [1, 4, 8, 32] {
            let mut pace = Pace::default();
            for step in 0..50 {
                // Prompts alone and streams alone are seen first, as they are in life.
                let (alone, prompt) = match step % 5 {
                    0 => (Work::default(), Work { rows: 60, attended: 60 * 30 }),
                    _ => (decoding(streams, 90 + step), Work::default()),
                };
                pace.observe(alone, prompt.rows, seconds(alone, prompt));
            }
            let (mut computed, mut steps) = (0, 0);
            while computed < 6000 {
                let alone = decoding(streams, 140 + steps);
                let rows = pace.prefill_rows(alone).min(6000 - computed);
                let mut prompt = Work::default();
                prompt.add_tokens(computed + rows, rows);
                let taken = seconds(alone, prompt);
                let patient = rows == PREFILL_ROWS_MIN || taken <= 2.0 * seconds(alone, Work::default());
                assert!(patient, "{streams} streams, {rows} rows at {computed}");
                pace.observe(alone, rows, taken);
                computed += rows;
                steps += 1;
            }
            assert!(steps <= 6000 / PREFILL_ROWS_MIN + 1);
        }
    }

    /// Ten thousand steps as they are in life: streams that grow and are replaced, times that jitter and now and then jump.
    #[test]
    fn what_is_thought_of_a_step_stays_near_what_it_takes() {
        let mut random = 1u64;
        let mut uniform = || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 40) as f64 / (1u64 << 24) as f64
        };
        let mut pace = Pace::default();
        for phase in [8, 1, 32, 8] {
            for step in 0..10_000 {
                let streams = decoding(phase, 32 + step % 400);
                let seconds = seconds(streams, Work::default());
                if step > 100 {
                    let ratio = pace.predict(streams) / seconds;
                    assert!((0.6..2.5).contains(&ratio), "{phase} streams, step {step}: {ratio} of {seconds}");
                }
                let jitter = if uniform() < 0.01 { 5.0 } else { 0.8 + 0.6 * uniform() };
                pace.observe(streams, 0, seconds * jitter);
            }
        }
    }

    #[test]
    fn what_a_row_more_takes_is_seen_once_steps_differ() {
        let mut pace = Pace::default();
        for step in 0..200 {
            let streams = decoding(4 + step % 5, 300);
            pace.observe(streams, 0, seconds(streams, Work::default()));
        }
        let (cost, truth) = (pace.row_cost(300), 4e-4 + 300.0 * 1e-6);
        assert!((0.8..1.25).contains(&(cost / truth)), "{cost} for {truth}");
    }

    #[test]
    fn nobody_waits_where_nobody_decodes() {
        assert_eq!(Pace::default().prefill_rows(Work::default()), usize::MAX);
    }

    #[test]
    fn one_step_that_was_held_up_is_not_believed() {
        let mut pace = Pace::default();
        let alone = seconds(decoding(8, 100), Work::default());
        for _ in 0..40 {
            pace.observe(decoding(8, 100), 0, alone);
        }
        pace.observe(decoding(8, 100), 0, 10.0);
        assert!(pace.predict(decoding(8, 100)) < 2.0 * alone);
    }
}
