//! A step's logits as far as they came to host memory: whole rows, or the largest of each where those decide.

use std::collections::HashMap;

use rill_models::{BestLogits, ForwardInput, Ranking};

use crate::runner::{Runner, RunnerError};
use crate::sampler::Deciding;

/// One row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Row<'a> {
    Whole(&'a [f32]),
    /// As many as whoever samples from it said would decide.
    Best(&'a BestLogits),
}

/// Reused from step to step.
#[derive(Debug, Default)]
pub(crate) struct StepLogits {
    /// All rows, one after another, unless only the best of each are there.
    whole: Vec<f32>,
    width: usize,
    best: Vec<BestLogits>,
    /// Rows whose best do not decide.
    fetched: HashMap<usize, Vec<f32>>,
    ranking: Ranking,
    /// The best of the rows come in place of the rows.
    ranked: bool,
}

impl StepLogits {
    /// Starts a step, if the runner computes while others do something; in any case [`StepLogits::compute`], with the same
    /// arguments, is next. `deciding` has an entry for each row of logits; `None`: all of it decides.
    pub(crate) fn start(
        &mut self,
        runner: &mut dyn Runner,
        input: &ForwardInput,
        deciding: &[Option<Deciding>],
    ) -> Result<bool, RunnerError> {
        self.ranked = self.rank(runner.best_logits_max(), deciding);
        runner.start(input, self.ranked.then_some(&self.ranking))
    }

    /// Runs the step, or waits for it.
    pub(crate) fn compute(
        &mut self,
        runner: &mut dyn Runner,
        input: &ForwardInput,
        deciding: &[Option<Deciding>],
    ) -> Result<(), RunnerError> {
        self.width = runner.vocab_size();
        self.best.clear();
        self.fetched.clear();
        if !self.ranked {
            runner.forward(input, &mut self.whole)?;
            return check(self.whole.len(), deciding.len() * self.width, "logits");
        }
        self.best = runner.forward_best(input, &self.ranking)?;
        check(self.best.len(), deciding.len(), "ranked rows of logits")?;
        for (row, (deciding, best)) in deciding.iter().zip(&self.best).enumerate() {
            if deciding.is_some_and(|deciding| deciding.count <= self.ranking.count && deciding.by(best)) {
                continue;
            }
            let logits = runner.ranked_row(row)?;
            check(logits.len(), self.width, "logits of a row")?;
            self.fetched.insert(row, logits);
        }
        Ok(())
    }

    /// Says in `ranking` what to rank, where at most `most` can be. False: all rows come whole.
    fn rank(&mut self, most: usize, deciding: &[Option<Deciding>]) -> bool {
        let enough = |deciding: &Option<Deciding>| deciding.filter(|deciding| deciding.count <= most);
        let ranked = deciding.iter().filter_map(enough);
        // Rows fetched one by one cost more than rows copied together.
        if ranked.clone().count() * 2 <= deciding.len() {
            return false;
        }
        self.ranking.count = ranked.map(|deciding| deciding.count).max().unwrap_or(1);
        self.ranking.rates.clear();
        let rate = |deciding: &Option<Deciding>| enough(deciding)?.nucleus.map(|nucleus| nucleus.rate);
        if deciding.iter().any(|deciding| rate(deciding).is_some()) {
            self.ranking.rates.extend(deciding.iter().map(|deciding| rate(deciding).unwrap_or(0.0)));
        }
        true
    }

    /// Row `number` of the step.
    pub(crate) fn row(&self, number: usize) -> Row<'_> {
        match (self.fetched.get(&number), self.best.get(number)) {
            (Some(row), _) => Row::Whole(row),
            (None, Some(best)) => Row::Best(best),
            (None, None) => Row::Whole(&self.whole[number * self.width..(number + 1) * self.width]),
        }
    }
}

fn check(given: usize, expected: usize, what: &str) -> Result<(), RunnerError> {
    if given == expected {
        return Ok(());
    }
    Err(RunnerError::Fatal(format!("{given} {what} came back instead of {expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::BlockId;

    /// Row r's logits are r, r + 1 and r + 2; it ranks two of them, and counts what it was asked for.
    #[derive(Default)]
    struct Ranks {
        whole: usize,
        ranked: Vec<usize>,
        fetched: Vec<usize>,
    }

    fn logits(row: usize) -> Vec<f32> {
        (row..row + 3).map(|x| x as f32).collect()
    }

    impl Runner for Ranks {
        fn vocab_size(&self) -> usize {
            3
        }
        fn copy_blocks(&mut self, _: &[(BlockId, BlockId)]) -> Result<(), RunnerError> {
            Ok(())
        }
        fn block_bytes(&self) -> usize {
            0
        }
        fn read_block(&mut self, _: BlockId, _: &mut Vec<u8>) -> Result<(), RunnerError> {
            Ok(())
        }
        fn write_block(&mut self, _: BlockId, _: &[u8]) -> Result<(), RunnerError> {
            Ok(())
        }
        fn forward(&mut self, input: &ForwardInput, out: &mut Vec<f32>) -> Result<(), RunnerError> {
            self.whole += 1;
            *out = (0..input.logit_rows.len()).flat_map(logits).collect();
            Ok(())
        }
        fn best_logits_max(&self) -> usize {
            2
        }
        fn forward_best(
            &mut self,
            input: &ForwardInput,
            ranking: &Ranking,
        ) -> Result<Vec<BestLogits>, RunnerError> {
            let count = ranking.count;
            self.ranked.push(count);
            let best = |row: usize| (0..3).rev().take(count).map(|id| (id as u32, logits(row)[id])).collect();
            let of_row = |row| BestLogits { ranked: best(row), finite: true, mass: 0.0 };
            Ok((0..input.logit_rows.len()).map(of_row).collect())
        }
        fn ranked_row(&mut self, row: usize) -> Result<Vec<f32>, RunnerError> {
            self.fetched.push(row);
            Ok(logits(row))
        }
    }

    #[test]
    fn rows_come_whole_unless_the_best_decide_most_of_them() {
        let mut runner = Ranks::default();
        let mut step = StepLogits::default();
        let run = |step: &mut StepLogits, runner: &mut Ranks, deciding: &[Option<usize>]| {
            let input =
                ForwardInput { logit_rows: (0..deciding.len() as u32).collect(), ..ForwardInput::default() };
            let deciding: Vec<Option<Deciding>> =
                deciding.iter().map(|count| count.map(|count| Deciding { count, nucleus: None })).collect();
            assert!(!step.start(runner, &input, &deciding).expect("started"), "it computes when it is asked");
            step.compute(runner, &input, &deciding).expect("computed");
            (0..deciding.len())
                .map(|row| match step.row(row) {
                    Row::Whole(found) => {
                        assert_eq!(found, logits(row));
                        0
                    }
                    Row::Best(best) => {
                        assert_eq!(best.ranked[0], (2, row as f32 + 2.0));
                        best.ranked.len()
                    }
                })
                .collect::<Vec<usize>>()
        };
        assert!(run(&mut step, &mut runner, &[]).is_empty());
        assert_eq!(run(&mut step, &mut runner, &[None, Some(1)]), [0, 0]);
        assert_eq!((runner.whole, runner.ranked.len()), (2, 0));
        assert_eq!(run(&mut step, &mut runner, &[Some(1), Some(2), None]), [2, 2, 0]);
        // Three are more than it ranks.
        assert_eq!(run(&mut step, &mut runner, &[Some(1), Some(1), Some(3), Some(1)]), [1, 1, 0, 1]);
        assert_eq!((&runner.ranked[..], &runner.fetched[..]), (&[2, 1][..], &[2, 2][..]));
        // Nothing is left of it.
        assert_eq!(run(&mut step, &mut runner, &[None]), [0]);
    }
}
