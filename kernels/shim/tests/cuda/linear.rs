//! Linear layers and embeddings: every stored type against its definition, and every tile shape the same bits.

use crate::inputs::{self, BOTH, Numbers, backend, cases, difference, matrix, rows, stored_bytes, too_far};
use half::bf16;
use proptest::prelude::*;
use rill_kernels::cuda::{CudaBackend, Linear, Matrix};
use rill_kernels::{Backend, DTYPES, Dtype, LogitFinish, Stored, reference};

/// Parts of one layer and rows of activations.
#[derive(Debug)]
pub struct Case {
    pub parts: Vec<(Dtype, usize)>,
    pub cols: usize,
    pub tokens: usize,
    pub seed: u64,
}

fn product(backend: &mut CudaBackend, layer: &Linear, x: &[f32], cols: usize) -> Vec<f32> {
    let x = rows(backend, x, cols, BOTH);
    let mut out = Vec::new();
    backend.logits(layer, &x, LogitFinish::default(), &mut out);
    out
}

/// A share of the sum of the terms' absolute values: f32 sums, and how exact the products are.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        // Activations of 11 bits.
        Dtype::F16 => 5e-4,
        Dtype::F32 => 2e-6,
        _ => 1e-6,
    }
}

pub fn check(case: &Case) -> Result<(), String> {
    let mut numbers = Numbers(case.seed);
    let (cols, tokens) = (case.cols, case.tokens);
    let data: Vec<Vec<u8>> =
        case.parts.iter().map(|&(dtype, rows)| stored_bytes(dtype, rows, cols, &mut numbers)).collect();
    let stored: Vec<Stored<'_>> =
        case.parts.iter().zip(&data).map(|(&(dtype, rows), data)| Stored { dtype, rows, cols, data }).collect();
    let width: usize = case.parts.iter().map(|part| part.1).sum();
    let x = numbers.activations(tokens * cols);
    let mut backend = backend(case.seed);
    let layer = backend.load_linear(&stored).map_err(|error| error.to_string())?;
    let given = product(&mut backend, &layer, &x, cols);
    backend.check().map_err(|error| error.to_string())?;

    let mut first = 0;
    for part in &stored {
        let weights = reference::weights(*part);
        for (token, x) in x.chunks_exact(cols).enumerate() {
            let x = match part.dtype {
                Dtype::F32 | Dtype::F16 => x.iter().map(|&x| f64::from(x)).collect(),
                Dtype::BF16 => x.iter().map(|&x| f64::from(bf16::from_f32(x).to_f32())).collect(),
                _ => reference::quantize_row(x),
            };
            let expected = reference::linear(&weights, &x);
            let values: Vec<f64> = expected.iter().map(|sum| sum.value).collect();
            let given = &given[token * width + first..][..part.rows];
            let bound = |i: usize| tolerance(part.dtype) * expected[i].magnitude + 1e-30;
            if let Some(far) = too_far(given, &values, bound) {
                return Err(format!("{:?}, token {token}: {far}", part.dtype));
            }
        }
        first += part.rows;
    }

    // In the tiles for many rows: the same bits.
    let mut staged = inputs::backend(case.seed ^ 1).with_staged_from(1);
    let layer_again = staged.load_linear(&stored).map_err(|error| error.to_string())?;
    let again = product(&mut staged, &layer_again, &x, cols);
    if let Some(different) = difference(&again, &given) {
        return Err(format!("staged: {different}"));
    }

    // Alone, in other company and order, added to a residual: the same bits.
    let alone = numbers.below(tokens);
    let mut company: Vec<usize> = (0..tokens).filter(|_| numbers.below(2) == 0).collect();
    numbers.shuffle(&mut company);
    for chosen in [vec![alone], company] {
        let pick = |of: &[f32], width: usize| -> Vec<f32> {
            chosen.iter().flat_map(|&r| of[r * width..][..width].to_vec()).collect()
        };
        if chosen.is_empty() {
            continue;
        }
        let again = product(&mut backend, &layer, &pick(&x, cols), cols);
        if let Some(different) = difference(&again, &pick(&given, width)) {
            return Err(format!("rows {chosen:?} alone: {different}"));
        }
    }
    let residual: Vec<f32> = (0..tokens * width).map(|_| numbers.normal()).collect();
    let mut out = matrix(&mut backend, &residual, width);
    let x = rows(&mut backend, &x, cols, BOTH);
    backend.linear_add(&layer, &x, &mut out);
    let sum: Vec<f32> = residual.iter().zip(&given).map(|(r, x)| r + x).collect();
    difference(&backend.read(&out, 0..tokens), &sum).map_or(Ok(()), |d| Err(format!("linear_add: {d}")))
}

#[test]
fn every_type_is_close_to_its_definition() {
    for (index, dtype) in DTYPES.into_iter().enumerate() {
        for (rows, tokens, cols) in [(16, 1, 256), (31, 23, 512), (50, 40, 768)] {
            let case = Case { parts: vec![(dtype, rows)], cols, tokens, seed: index as u64 };
            check(&case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        }
    }
}

/// Both tiles and the pipeline of every kind of weights, in eight orders of threads.
#[test]
fn the_order_of_threads_changes_nothing() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::Q4_0, Dtype::Q8_0] {
        for seed in 0..8 {
            let case = Case { parts: vec![(dtype, 37)], cols: 320, tokens: 33, seed };
            check(&case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        }
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn layers_of_any_shape_and_mixture(
        parts in prop::collection::vec((0..DTYPES.len(), 1_usize..=70), 1..=3),
        groups in 1_usize..=12,
        tokens in 1_usize..=45,
        seed in any::<u64>(),
    ) {
        let parts: Vec<(Dtype, usize)> = parts.into_iter().map(|(dtype, rows)| (DTYPES[dtype], rows)).collect();
        let wide = parts.iter().any(|part| part.0.block_len() == 256);
        let cols = if wide { groups.div_ceil(8) * 256 } else { groups * 32 };
        let case = Case { parts, cols, tokens, seed };
        check(&case).map_err(|e| TestCaseError::fail(format!("{case:?}: {e}")))?;
    }

    #[test]
    fn columns_of_any_number(kind in 0..3_usize, cols in 1_usize..100, rows in 1_usize..40, tokens in 1_usize..20, seed in any::<u64>()) {
        let dtype = [Dtype::F32, Dtype::F16, Dtype::BF16][kind];
        let case = Case { parts: vec![(dtype, rows)], cols, tokens, seed };
        check(&case).map_err(|e| TestCaseError::fail(format!("{case:?}: {e}")))?;
    }
}

#[test]
fn embeddings_are_the_weights_themselves() {
    check_embeddings();
}

pub fn check_embeddings() {
    for (index, dtype) in DTYPES.into_iter().enumerate() {
        let mut numbers = Numbers(index as u64);
        let (rows, cols) = (37, 256);
        let data = stored_bytes(dtype, rows, cols, &mut numbers);
        let stored = Stored { dtype, rows, cols, data: &data };
        let mut backend = backend(7);
        let table = backend.load_linear(&[stored]).expect("a whole matrix");
        let ids = [36, 0, 15, 16, 16, 8, 24];
        let mut out = Matrix::default();
        backend.embed(&table, &ids, 2.0, &mut out);
        let weights = reference::weights(stored);
        let expected: Vec<f64> = ids
            .iter()
            .flat_map(|&id| weights[id as usize * cols..][..cols].iter().map(|w| 2.0 * w.value))
            .collect();
        let sizes: Vec<f64> =
            ids.iter().flat_map(|&id| weights[id as usize * cols..][..cols].iter().map(|w| w.magnitude)).collect();
        let given = backend.read(&out, 0..ids.len());
        if let Some(far) = too_far(&given, &expected, |i| 3e-7 * sizes[i]) {
            panic!("{dtype:?}: {far}");
        }
    }
}
