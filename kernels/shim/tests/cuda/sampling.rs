//! Logits finished, their largest ranked and their mass summed on the device: what the definition and a sort of the whole row say.

use crate::inputs::{Numbers, backend, cases, difference, rows};
use half::bf16;
use proptest::prelude::*;
use rill_kernels::cuda::{CudaBackend, Linear};
use rill_kernels::{Backend, BestLogits, Dtype, Form, LogitFinish, Ranking, Stored};

/// A head of one column: row `i` of logits is a multiple of it.
fn head(backend: &mut CudaBackend, weights: &[f32]) -> Linear {
    let data: Vec<u8> = weights.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect();
    let stored = Stored { dtype: Dtype::BF16, rows: weights.len(), cols: 1, data: &data };
    backend.load_linear(&[stored]).expect("a column of bf16")
}

/// By definition, of a row that is finished.
fn sorted(row: &[f32], count: usize) -> (Vec<(u32, f32)>, bool) {
    let finite = row.iter().all(|x| !x.is_nan() && *x != f32::INFINITY);
    let mut ranked: Vec<(u32, f32)> =
        (0..).zip(row.iter().copied()).filter(|(_, x)| !x.is_nan() && *x != f32::NEG_INFINITY).collect();
    ranked.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("no NaN").then(a.0.cmp(&b.0)));
    ranked.truncate(count);
    (ranked, finite)
}

/// Sum of e^((x - largest) * rate), in f64.
fn mass(row: &[f32], rate: f32) -> f64 {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().map(|&x| (f64::from(x - most) * f64::from(rate)).exp()).sum()
}

/// Few different values, so that there are ties; some minus infinity; now and then what spoils a row.
fn weights(vocab: usize, spoilt: bool, numbers: &mut Numbers) -> Vec<f32> {
    let mut out: Vec<f32> = (0..vocab)
        .map(|_| match numbers.below(20) {
            0 => -3e38,
            1 => 0.0,
            2 => -0.0,
            _ => (numbers.normal() * 8.0).round() / 8.0,
        })
        .collect();
    if spoilt {
        out[numbers.below(vocab)] = if numbers.below(2) == 0 { f32::NAN } else { 3e38 };
    }
    out
}

/// Ten times the largest weight is infinite, once it is not.
const FACTORS: [f32; 4] = [10.0, 1.0, -1.0, 0.25];

/// One row of logits, finished by definition.
fn finish(row: &[f32], bias: Option<&[f32]>, scale: f32, softcap: Option<f32>) -> Vec<f32> {
    let value = |(id, &x): (usize, &f32)| {
        let x = (x + bias.map_or(0.0, |bias| bias[id])) * scale;
        softcap.map_or(x, |cap| cap * (x / cap).tanh())
    };
    row.iter().enumerate().map(value).collect()
}

pub fn check(vocab: usize, count: usize, tokens: usize, spoilt: bool, seed: u64) -> Result<(), String> {
    let mut numbers = Numbers(seed);
    let mut backend = backend(seed);
    let layer = head(&mut backend, &weights(vocab, spoilt, &mut numbers));
    let factors: Vec<f32> = (0..tokens).map(|_| FACTORS[numbers.below(4)]).collect();
    let x = rows(&mut backend, &factors, 1, Form::F32);
    let mut plain = Vec::new();
    backend.logits(&layer, &x, LogitFinish::default(), &mut plain);
    let scale = if numbers.below(2) == 0 { 1.0 } else { 0.37 };
    let softcap = (numbers.below(2) == 0).then_some(4.0);
    let bias: Option<Vec<f32>> = (numbers.below(2) == 0).then(|| (0..vocab).map(|_| numbers.normal()).collect());
    let on_device = bias.as_ref().map(|bias| backend.load_vector(bias));
    let rates: Vec<f32> = match numbers.below(3) {
        0 => Vec::new(),
        _ => (0..tokens).map(|_| [0.0, 0.5, 1.0, 3.0][numbers.below(4)]).collect(),
    };
    let count = count.min(backend.best_logits_max(&layer));
    let asked = LogitFinish { bias: on_device.as_ref(), scale, softcap };
    backend.start_logits(&layer, &x, asked, Some(&Ranking { count, rates: rates.clone() }));
    let best = backend.wait_best();
    let mut logits = Vec::new();
    backend.wait_logits(&mut logits);
    backend.check().map_err(|error| error.to_string())?;
    for (row, (given, logits)) in best.iter().zip(logits.chunks_exact(vocab)).enumerate() {
        let expected = finish(&plain[row * vocab..(row + 1) * vocab], bias.as_deref(), scale, softcap);
        let near = |(a, b): (&f32, &f32)| {
            a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0) || (a.is_nan() && b.is_nan())
        };
        if !logits.iter().zip(&expected).all(near) {
            return Err(format!("row {row} is not finished as it should be"));
        }
        let (ranked, finite) = sorted(logits, count);
        // One zero is as good as the other.
        if given.ranked != ranked || given.finite != finite {
            return Err(format!("row {row}: {given:?}, not {ranked:?}, {finite}"));
        }
        let rate = rates.get(row).copied().unwrap_or(0.0);
        let expected = if rate == 0.0 || ranked.is_empty() { 0.0 } else { mass(logits, rate) };
        let off = (f64::from(given.mass) - expected).abs();
        // Whoever compares NaN with a bound compares nothing.
        let close = off <= expected * BestLogits::MASS_ERROR;
        if finite && !close {
            return Err(format!("row {row}: a mass of {}, not {expected}", given.mass));
        }
    }
    let same = |(row, expected): (usize, &[f32])| difference(&backend.ranked_row(row), expected).is_none();
    if !logits.chunks_exact(vocab).enumerate().all(same) {
        return Err("a row is not what was ranked".to_owned());
    }
    if best.len() == tokens { Ok(()) } else { Err(format!("{} rows", best.len())) }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn the_best_are_those_a_sort_finds(
        vocab in prop_oneof![1_usize..300, 4000_usize..4200, 8000_usize..13_000],
        count in prop_oneof![Just(1_usize), 1_usize..=64],
        tokens in 1_usize..5,
        spoilt in any::<bool>(),
        seed in any::<u64>(),
    ) {
        check(vocab, count, tokens, spoilt, seed).map_err(TestCaseError::fail)?;
    }
}

#[test]
fn the_order_of_threads_changes_nothing() {
    (0..8).for_each(|seed| check(9000, 30, 3, seed % 2 == 1, seed).expect("sound"));
}

#[test]
fn a_vocabulary_too_large_to_merge_ranks_fewer() {
    let mut backend = backend(0);
    for (vocab, most) in [(1, 64), (128_256, 64), (262_144, 64), (262_145, 63)] {
        // The number of outputs alone counts.
        let data = vec![0; 2 * vocab];
        let stored = Stored { dtype: Dtype::BF16, rows: vocab, cols: 1, data: &data };
        let layer = backend.load_linear(&[stored]).expect("a column of bf16");
        assert_eq!(backend.best_logits_max(&layer), most, "{vocab}");
    }
}
