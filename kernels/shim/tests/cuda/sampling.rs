//! The largest logits of each row: what a sort of the whole row says.

use crate::inputs::{Numbers, backend, cases, difference, rows};
use half::bf16;
use proptest::prelude::*;
use rill_kernels::cuda::{CudaBackend, Linear};
use rill_kernels::{Backend, BestLogits, Dtype, Form, Stored};

/// A head of one column: row `i` of logits is a multiple of it.
fn head(backend: &mut CudaBackend, weights: &[f32]) -> Linear {
    let data: Vec<u8> = weights.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect();
    let stored = Stored { dtype: Dtype::BF16, rows: weights.len(), cols: 1, data: &data };
    backend.load_linear(&[stored]).expect("a column of bf16")
}

/// By definition.
fn sorted(row: &[f32], scale: f32, count: usize) -> BestLogits {
    let row: Vec<f32> = row.iter().map(|x| if scale == 1.0 { *x } else { x * scale }).collect();
    let finite = row.iter().all(|x| !x.is_nan() && *x != f32::INFINITY);
    let mut ranked: Vec<(u32, f32)> =
        (0..).zip(row).filter(|(_, x)| !x.is_nan() && *x != f32::NEG_INFINITY).collect();
    ranked.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("no NaN").then(a.0.cmp(&b.0)));
    ranked.truncate(count);
    BestLogits { ranked, finite }
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

pub fn check(vocab: usize, count: usize, tokens: usize, spoilt: bool, seed: u64) -> Result<(), String> {
    let mut numbers = Numbers(seed);
    let mut backend = backend(seed);
    let layer = head(&mut backend, &weights(vocab, spoilt, &mut numbers));
    let factors: Vec<f32> = (0..tokens).map(|_| FACTORS[numbers.below(4)]).collect();
    let x = rows(&mut backend, &factors, 1, Form::F32);
    let mut logits = Vec::new();
    backend.logits(&layer, &x, &mut logits);
    let scale = if numbers.below(2) == 0 { 1.0 } else { 0.37 };
    let count = count.min(backend.best_logits_max(&layer));
    let best = backend.best_logits(&layer, &x, scale, count).ok_or("nothing is ranked")?;
    backend.check().map_err(|error| error.to_string())?;
    for (row, (given, logits)) in best.iter().zip(logits.chunks_exact(vocab)).enumerate() {
        let expected = sorted(logits, scale, count);
        // One zero is as good as the other.
        if *given != expected {
            return Err(format!("row {row}: {given:?}, not {expected:?}"));
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
