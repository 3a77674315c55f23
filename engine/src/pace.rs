//! How long a step takes: learnt from the steps there have been, so that prompts are computed in chunks that no stream
//! notices, and drafts are checked where that is faster than generating.
//!
//! The time of a step without prompts is taken to be linear in what it computes, and so is what a step with prompts takes
//! beyond that. The two are learnt apart, so that a long prompt does not change what is thought of life without it, and
//! however many prompts there are, now and then a step is made without. Time decides how the work is cut into steps and
//! never what comes out of it.

use crate::least_squares::LeastSquares;

/// Rows of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Work {
    pub(crate) rows: usize,
    /// Tokens that all rows together attend to.
    pub(crate) attended: usize,
}

/// Of what streams take alone, a step may take so much longer for each prompt that is here. For one the promise is that a gap
/// is doubled at most; the rest is for what the prediction misses (docs/performance.md).
const PROMPT_SHARE: f64 = 0.3;
/// A stream's gap may grow by this however many prompts there are.
const GAP_FACTOR_MAX: f64 = 2.0;
/// Rows of prompts beside streams in the first step that has any: what they take is not known yet, or was of another prompt.
const FIRST_ROWS: usize = 8;
/// Of so many steps in a row with streams, one at least has no prompts: what streams take alone must stay known.
const STEPS_WITH_PROMPTS_MAX: usize = 15;

/// A step's time, in seconds, as far as known.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Of a step without prompts: for being a step, a row, an attended token.
    streams: LeastSquares<3>,
    /// Of a prompt's row beyond that: for being a row, an attended token. By the row, since a chunk of hundreds would else
    /// count for more than hundreds of small ones, where a row takes longer.
    prompt_row: LeastSquares<2>,
    /// Rows of prompts in the last step, halved by each that had none: the next one has at most twice as many beside
    /// streams.
    last_prompt_rows: usize,
    /// Steps since streams were alone in one; `None`: they never were.
    steps_with_prompts: Option<usize>,
}

impl Work {
    /// `count` tokens up to, but not with, position `end` of one sequence.
    pub(crate) fn add_tokens(&mut self, end: usize, count: usize) {
        self.rows += count;
        self.attended += count * end - count * count.saturating_sub(1) / 2;
    }

    /// About 1 each for what is usual.
    fn features(self) -> [f64; 3] {
        [1.0, self.rows as f64 / 32.0, self.attended as f64 / 32_768.0]
    }

    fn row_features(self) -> [f64; 2] {
        [1.0, self.attended as f64 / self.rows as f64 / 1024.0]
    }
}

impl Pace {
    /// Seconds a step of `streams` alone will take; 0 while nothing is known.
    pub(crate) fn predict(&self, streams: Work) -> f64 {
        if streams.rows == 0 { 0.0 } else { self.streams.predict(streams.features()) }
    }

    /// A step of `streams` and `prompts` took `seconds`.
    pub(crate) fn observe(&mut self, streams: Work, prompts: Work, seconds: f64) {
        if prompts.rows == 0 {
            self.last_prompt_rows /= 2;
            self.steps_with_prompts = Some(0);
            self.streams.observe(streams.features(), seconds);
        } else {
            self.last_prompt_rows = prompts.rows;
            self.steps_with_prompts = self.steps_with_prompts.map(|steps| steps + usize::from(streams.rows > 0));
            let beyond = (seconds - self.predict(streams)).max(0.0);
            self.prompt_row.observe(prompts.row_features(), beyond / prompts.rows as f64);
        }
    }

    /// Rows of prompts, up to position `depth`, that the coming step may compute beside `streams`, the next tokens of
    /// running sequences; `others` are here besides one whose prompt it is. Never 0 twice in a row.
    pub(crate) fn prompt_rows(&self, streams: Work, others: usize, depth: usize) -> usize {
        let Some(patience) = self.patience(streams, others) else { return usize::MAX };
        if self.steps_with_prompts.is_none_or(|steps| steps >= STEPS_WITH_PROMPTS_MAX) {
            return 0;
        }
        // Rows that seem to cost nothing are as many as there may be: the cast saturates.
        let allowed = (patience / self.prompt_row_cost(depth)) as usize;
        allowed.min((2 * self.last_prompt_rows).max(FIRST_ROWS)).max(1)
    }

    /// Seconds the coming step may take beyond what `streams` take alone; `None` if nobody waits for it. It is the gaps
    /// there are once all `others` generate that are to grow by no more than is promised: many that wait to generate will
    /// make each other's longer anyway, and prompts paced for the few that do already would hold them up. A prompt alone takes
    /// its time so that nobody notices; the more wait, the more of a step is theirs.
    pub(crate) fn patience(&self, streams: Work, others: usize) -> Option<f64> {
        let context = streams.attended.checked_div(streams.rows)?;
        let rows = others.max(streams.rows);
        let waiting = (others + 1).saturating_sub(streams.rows).max(1);
        let factor = (1.0 + PROMPT_SHARE * waiting as f64).min(GAP_FACTOR_MAX);
        let in_the_end = self.predict(Work { rows, attended: rows * context });
        Some((factor * in_the_end - self.predict(streams)).max(0.0))
    }

    /// Seconds for one more row beside streams that attends to `context` tokens.
    pub(crate) fn row_cost(&self, context: usize) -> f64 {
        let [_, row, attended] = Work { rows: 1, attended: context }.features();
        self.streams.predict([0.0, row, attended])
    }

    /// Seconds for a row of a prompt that attends to `context` tokens.
    pub(crate) fn prompt_row_cost(&self, context: usize) -> f64 {
        self.prompt_row.predict(Work { rows: 1, attended: context }.row_features())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine's true times.
    fn seconds(streams: Work, prompts: Work) -> f64 {
        let rows = (streams.rows + prompts.rows) as f64;
        4e-3 + rows * 4e-4 + streams.attended as f64 * 1e-6 + prompts.attended as f64 * 4e-7
    }

    fn decoding(streams: usize, context: usize) -> Work {
        Work { rows: streams, attended: streams * context }
    }

    /// Between 0 and 1.
    fn noise() -> impl FnMut() -> f64 {
        let mut state = 1u64;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1u64 << 24) as f64
        }
    }

    /// Prompts alone and streams alone, as they are in life.
    fn after_some_steps(streams: usize) -> Pace {
        let mut pace = Pace::default();
        for step in 0..50 {
            let (alone, prompts) = match step % 5 {
                0 => (Work::default(), Work { rows: 60, attended: 60 * 30 }),
                _ => (decoding(streams, 90 + step), Work::default()),
            };
            pace.observe(alone, prompts, seconds(alone, prompts));
        }
        pace
    }

    #[test]
    fn attended_tokens_of_a_run() {
        let mut work = Work::default();
        work.add_tokens(10, 3);
        assert_eq!(work, Work { rows: 3, attended: 10 + 9 + 8 });
    }

    /// Streams decode, then a long prompt arrives: no step takes more than twice the time of one without it, but where
    /// a single row does.
    #[test]
    fn a_long_prompt_is_cut_to_the_streams_measure() {
        for streams in [1, 4, 8, 32] {
            let mut pace = after_some_steps(streams);
            let mut random = noise();
            let (mut computed, mut steps) = (0, 0);
            while computed < 6000 {
                let alone = decoding(streams, 140 + steps);
                let rows = pace.prompt_rows(alone, streams, computed).min(6000 - computed);
                let mut prompt = Work::default();
                prompt.add_tokens(computed + rows, rows);
                let taken = seconds(alone, prompt);
                assert!(
                    rows <= 1 || taken <= 2.1 * seconds(alone, Work::default()),
                    "{streams} streams, {rows} rows at {computed}"
                );
                pace.observe(alone, prompt, taken * (0.9 + 0.2 * random()));
                computed += rows;
                steps += 1;
            }
            assert!(steps <= 6000 * 16 / 15 + 1, "{streams} streams: {steps} steps");
        }
    }

    /// Many arrive at once where nothing is known yet: they are not fed through the gaps of the few that generate first.
    #[test]
    fn many_prompts_are_not_held_up_by_a_few_streams() {
        let mut pace = Pace::default();
        let (mut running, mut steps) = (4, 0);
        let mut pending = 252 * 60;
        while pending > 0 {
            let alone = decoding(running, 60);
            let rows = pace.prompt_rows(alone, 255, 0).min(pending);
            let mut prompt = Work::default();
            prompt.add_tokens(rows.min(60), rows.min(60));
            prompt.rows = rows;
            pace.observe(alone, prompt, seconds(alone, prompt));
            pending -= rows;
            running = 256 - pending.div_ceil(60);
            steps += 1;
        }
        assert!(steps < 120, "{steps} steps");
    }

    #[test]
    fn nobody_waits_where_nobody_decodes() {
        assert_eq!(Pace::default().prompt_rows(Work::default(), 3, 0), usize::MAX);
    }

    /// Ten thousand steps as they are in life: streams that grow and are replaced, times that jitter and now and then jump.
    #[test]
    fn what_is_thought_of_a_step_stays_near_what_it_takes() {
        let mut random = noise();
        let mut pace = Pace::default();
        for streams in [8, 1, 32, 8] {
            for step in 0..10_000 {
                let alone = decoding(streams, 32 + step % 400);
                let seconds = seconds(alone, Work::default());
                if step > 100 {
                    let ratio = pace.predict(alone) / seconds;
                    assert!((0.6..2.5).contains(&ratio), "{streams} streams, step {step}: {ratio} of {seconds}");
                }
                let jitter = if random() < 0.01 { 5.0 } else { 0.8 + 0.6 * random() };
                pace.observe(alone, Work::default(), seconds * jitter);
            }
        }
    }

    #[test]
    fn what_a_row_more_takes_is_seen_once_steps_differ() {
        let mut pace = Pace::default();
        for step in 0..200 {
            let alone = decoding(4 + step % 5, 300);
            pace.observe(alone, Work::default(), seconds(alone, Work::default()));
        }
        let (cost, truth) = (pace.row_cost(300), 4e-4 + 300.0 * 1e-6);
        assert!((0.8..1.25).contains(&(cost / truth)), "{cost} for {truth}");
    }
}
