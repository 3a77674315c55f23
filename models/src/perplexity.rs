//! How surprised a model is by a text: the measure by which weight formats are compared.

use crate::{ForwardInput, Model, ModelError};

/// Rows a forward pass; bounds the logits kept at once.
const STEP_ROWS: usize = 128;
const BLOCK_SIZE: usize = 32;

/// How a text is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens a window; each is read on its own, and what is left at the end of the text is not.
    pub len: usize,
    /// Tokens of a window that are read but not scored; the first never is.
    pub unscored: usize,
}

/// Negative log-likelihood of the scored tokens, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    pub tokens: usize,
    sum: f64,
    sum_of_squares: f64,
}

impl Score {
    fn add(&mut self, nats: f64) {
        self.tokens += 1;
        self.sum += nats;
        self.sum_of_squares += nats * nats;
    }

    /// e to the mean; not a number while nothing is scored.
    pub fn perplexity(&self) -> f64 {
        (self.sum / self.tokens as f64).exp()
    }

    /// Standard error of the perplexity, as if tokens were independent.
    pub fn standard_error(&self) -> f64 {
        let n = self.tokens as f64;
        let mean = self.sum / n;
        let variance = (self.sum_of_squares / n - mean * mean).max(0.0);
        self.perplexity() * (variance / (n - 1.0).max(1.0)).sqrt()
    }
}

/// Scores `tokens` in windows and calls `each` after every one, until it returns false. With `bos` each window begins
/// with it in place of its first token, as llama.cpp does it. Forgets the model's KV cache.
pub fn perplexity(
    model: &mut dyn Model,
    tokens: &[u32],
    windows: Windows,
    bos: Option<u32>,
    mut each: impl FnMut(&Score) -> bool,
) -> Result<Score, ModelError> {
    let shape = model.shape().clone();
    let Windows { len, unscored } = windows;
    if !(2..=shape.context_len).contains(&len) || unscored >= len - 1 {
        return Err(ModelError::Runtime(format!(
            "windows of {len} tokens, {unscored} of them unscored: the model reads 2 to {} and one must be scored",
            shape.context_len
        )));
    }
    if let Some(id) = tokens.iter().chain(&bos).find(|&&id| id as usize >= shape.vocab_size) {
        return Err(ModelError::Runtime(format!("token {id} is beyond the vocabulary of {}", shape.vocab_size)));
    }
    let blocks = len.div_ceil(BLOCK_SIZE);
    model.allocate_kv_cache(blocks, BLOCK_SIZE)?;
    let (mut score, mut logits, mut window) = (Score::default(), Vec::new(), Vec::with_capacity(len));
    for text in tokens.chunks_exact(len) {
        window.clear();
        window.extend_from_slice(text);
        if let Some(bos) = bos {
            window[0] = bos;
        }
        for start in (0..len).step_by(STEP_ROWS) {
            let end = (start + STEP_ROWS).min(len);
            // The row of token t tells how likely token t + 1 was.
            let first = start.max(unscored.max(1) - 1);
            let last = end.min(len - 1);
            model.forward(&step(&window[..end], start, first..last, blocks), &mut logits)?;
            for (row, at) in (first..last).enumerate() {
                let row = &logits[row * shape.vocab_size..][..shape.vocab_size];
                score.add(-log_probability(row, window[at + 1] as usize));
            }
        }
        if !each(&score) {
            break;
        }
    }
    Ok(score)
}

/// Tokens `start..` of a window, with logits for the rows given by their positions.
fn step(window: &[u32], start: usize, logits: std::ops::Range<usize>, blocks: usize) -> ForwardInput {
    let positions: Vec<u32> = (start as u32..window.len() as u32).collect();
    let table: Vec<u32> = (0..blocks as u32).take(window.len().div_ceil(BLOCK_SIZE)).collect();
    ForwardInput {
        token_ids: window[start..].to_vec(),
        slot_mapping: positions.clone(),
        query_starts: vec![0, positions.len() as u32],
        positions,
        context_lens: vec![window.len() as u32],
        block_table_starts: vec![0, table.len() as u32],
        block_tables: table,
        logit_rows: logits.map(|position| (position - start) as u32).collect(),
    }
}

fn log_probability(row: &[f32], token: usize) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Sixteen sums, so that the compiler may keep them in one register.
    let mut sums = [0.0_f32; 16];
    let mut pieces = row.chunks_exact(16);
    for piece in &mut pieces {
        sums.iter_mut().zip(piece).for_each(|(sum, x)| *sum += (x - max).exp());
    }
    let rest: f32 = pieces.remainder().iter().map(|x| (x - max).exp()).sum();
    let sum: f64 = sums.iter().map(|&sum| f64::from(sum)).sum::<f64>() + f64::from(rest);
    f64::from(row[token] - max) - sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelShape;

    /// Thinks that token t is followed by t + 1, twice as likely as by any other of ten.
    struct Counting {
        shape: ModelShape,
        seen: Vec<Vec<u32>>,
    }

    impl Model for Counting {
        fn shape(&self) -> &ModelShape {
            &self.shape
        }

        fn allocate_kv_cache(&mut self, _: usize, _: usize) -> Result<(), ModelError> {
            Ok(())
        }

        fn copy_blocks(&mut self, _: &[(u32, u32)]) -> Result<(), ModelError> {
            Ok(())
        }

        fn block_bytes(&self) -> usize {
            0
        }

        fn read_block(&mut self, _: u32, _: &mut Vec<u8>) -> Result<(), ModelError> {
            Ok(())
        }

        fn write_block(&mut self, _: u32, _: &[u8]) -> Result<(), ModelError> {
            Ok(())
        }

        fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), ModelError> {
            self.seen.push(input.token_ids.clone());
            logits.clear();
            for &row in &input.logit_rows {
                let next = (input.token_ids[row as usize] + 1) % 10;
                logits.extend((0..10).map(|id| if id == next { 2.0_f32.ln() } else { 0.0 }));
            }
            Ok(())
        }
    }

    fn counting() -> Counting {
        let shape = ModelShape { vocab_size: 10, hidden_size: 1, context_len: 300, kv_bytes_per_token: 1 };
        Counting { shape, seen: Vec::new() }
    }

    #[test]
    fn what_is_foreseen_costs_less() {
        let tokens: Vec<u32> = (0..300).map(|i| i % 10).collect();
        for (windows, scored) in
            [((300, 0), 299), ((300, 150), 150), ((10, 1), 30 * 9), ((10, 8), 60), ((200, 0), 199)]
        {
            let windows = Windows { len: windows.0, unscored: windows.1 };
            let score = perplexity(&mut counting(), &tokens, windows, None, |_| true).unwrap();
            assert_eq!(score.tokens, scored, "{windows:?}");
            assert!((score.perplexity() - 5.5).abs() < 1e-5 && score.standard_error() < 1e-2);
        }
        let mut model = counting();
        let score = perplexity(&mut model, &tokens, Windows { len: 10, unscored: 0 }, Some(7), |_| false).unwrap();
        assert_eq!((score.tokens, model.seen), (9, vec![vec![7, 1, 2, 3, 4, 5, 6, 7, 8, 9]]));
    }

    #[test]
    fn impossible_windows_are_refused() {
        for (len, unscored) in [(1, 0), (301, 0), (10, 9)] {
            assert!(perplexity(&mut counting(), &[0; 400], Windows { len, unscored }, None, |_| true).is_err());
        }
        assert!(perplexity(&mut counting(), &[10; 20], Windows { len: 10, unscored: 0 }, None, |_| true).is_err());
    }
}
