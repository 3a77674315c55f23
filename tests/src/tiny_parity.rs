//! A tiny model against transformers: logits at every position, whole, in chunks, after a cached block and in a ragged
//! batch.

use crate::single_sequence::SingleSequence;
use crate::tiny_models::TinyModel;
use rill_models::{ForwardInput, LoadedModel, ModelError};

const BLOCK_SIZE: usize = 16;

/// Of the differences, relative to the logits' own size.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub root_mean_square: f64,
    pub largest: f64,
}

fn rms(values: impl Iterator<Item = f32>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, n), x| (sum + f64::from(x) * f64::from(x), n + 1));
    (sum / f64::from(count)).sqrt()
}

/// The difference's size, relative to the expected one's.
pub fn distance(given: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(given.len(), expected.len());
    rms(given.iter().zip(expected).map(|(a, b)| a - b)) / rms(expected.iter().copied())
}

/// Logits after every token of two sequences that take turns of 1 to 5 tokens in the same steps: `tokens`, and a copy
/// that starts three steps later.
fn ragged(mut loaded: LoadedModel, tokens: &[u32]) -> [Vec<f32>; 2] {
    let blocks = tokens.len().div_ceil(BLOCK_SIZE) as u32;
    loaded.model.allocate_kv_cache(2 * blocks as usize, BLOCK_SIZE).expect("a small cache fits");
    let (mut done, mut outputs, mut step) = ([0, 0], [Vec::new(), Vec::new()], 0);
    while done[1] < tokens.len() {
        let mut input =
            ForwardInput { query_starts: vec![0], block_table_starts: vec![0], ..ForwardInput::default() };
        let mut whose = Vec::new();
        for sequence in [1, 0] {
            let wanted = if sequence == 1 && step < 3 { 0 } else { 1 + (step * 3 + sequence * 2) % 5 };
            let end = tokens.len().min(done[sequence] + wanted);
            if end == done[sequence] {
                continue;
            }
            // Blocks of the two alternate, the last ones first.
            let block = |position: usize| 2 * (blocks - 1 - (position / BLOCK_SIZE) as u32) + sequence as u32;
            for (position, &token) in tokens.iter().enumerate().take(end).skip(done[sequence]) {
                input.logit_rows.push(input.token_ids.len() as u32);
                input.token_ids.push(token);
                input.positions.push(position as u32);
                input.slot_mapping.push(block(position) * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
                whose.push(sequence);
            }
            input.query_starts.push(input.token_ids.len() as u32);
            input.context_lens.push(end as u32);
            input.block_tables.extend((0..end.div_ceil(BLOCK_SIZE)).map(|i| block(i * BLOCK_SIZE)));
            input.block_table_starts.push(input.block_tables.len() as u32);
            done[sequence] = end;
        }
        let mut logits = Vec::new();
        loaded.model.forward(&input, &mut logits).expect("a sound batch runs");
        let width = logits.len() / whose.len();
        for (row, sequence) in logits.chunks_exact(width).zip(whose) {
            outputs[sequence].extend_from_slice(row);
        }
        step += 1;
    }
    outputs
}

/// Compares a tiny model, which `load` loads, with transformers: whole, in chunks of each of these lengths, and beside
/// another sequence. However it is cut up, the bits must be the same.
pub fn check(
    name: &str,
    model: &TinyModel,
    load: &dyn Fn() -> Result<LoadedModel, ModelError>,
    chunks: &[usize],
    bounds: Bounds,
) -> Result<(), String> {
    compare(name, model, load, chunks, (bounds, 0.0))
}

/// The same, but other cuts may change last bits.
pub fn check_nearly(
    name: &str,
    model: &TinyModel,
    load: &dyn Fn() -> Result<LoadedModel, ModelError>,
    chunks: &[usize],
    bounds: Bounds,
) -> Result<(), String> {
    compare(name, model, load, chunks, (bounds, 1e-4))
}

fn compare(
    name: &str,
    model: &TinyModel,
    load: &dyn Fn() -> Result<LoadedModel, ModelError>,
    chunks: &[usize],
    (bounds, apart): (Bounds, f32),
) -> Result<(), String> {
    let same = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= apart);
    let load = || load().map_err(|error| format!("{name}: {error}"));
    let expected = model.logits();
    let mut single =
        SingleSequence::new(load()?.model, BLOCK_SIZE, model.tokens.len()).expect("a small cache fits");
    let given = single.logits(&model.tokens, model.tokens.len()).expect("rill runs");
    for &chunk in chunks {
        assert!(
            same(&single.logits(&model.tokens, chunk).expect("rill runs"), &given),
            "{name}: chunks of {chunk} differ"
        );
    }
    single.rewind(BLOCK_SIZE);
    let width = single.vocab_size();
    let after_hit = single.step(&model.tokens[BLOCK_SIZE..], true).expect("rill runs");
    assert!(same(&after_hit, &given[BLOCK_SIZE * width..]), "{name}: what follows a cached block differs");
    for (number, output) in ragged(load()?, &model.tokens).iter().enumerate() {
        assert!(same(output, &given), "{name}: sequence {number} of a ragged batch differs");
    }
    let size = rms(expected.iter().copied());
    let error = distance(&given, &expected);
    let worst = given.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / size;
    println!("{name:20} error {error:.5}, worst {worst:.4}");
    if error < bounds.root_mean_square && worst < bounds.largest {
        return Ok(());
    }
    Err(format!("{name}: error {error:.5}, worst {worst:.4}"))
}
