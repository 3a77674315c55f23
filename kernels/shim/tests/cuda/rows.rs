//! Operations on rows: norms, activations, forms, sums.

use crate::inputs::{BOTH, Numbers, backend, cases, difference, matrix, too_far};
use proptest::prelude::*;
use rill_kernels::cuda::{CudaBackend, Matrix, Rows};
use rill_kernels::{Activation, Backend, ColumnRuns, reference};

const ACTIVATIONS: [Activation; 5] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ReluSquared];

/// Both forms of rows are near what they should be, and the 8-bit form is the f32 form rounded.
fn check(
    backend: &CudaBackend,
    out: &Rows,
    expected: &[f64],
    width: usize,
    what: &str,
) -> Result<(), TestCaseError> {
    let [Some(values), Some(quantised)] = backend.read_rows(out) else {
        return Err(TestCaseError::fail("both forms were asked for"));
    };
    // GELU is good to 1.5e-7, times what it gates.
    let bound = |i: usize| 2e-6 * expected[i].abs() + 5e-6;
    prop_assert_eq!(too_far(&values, expected, bound), None, "{}", what);
    let rounded: Vec<f32> = values
        .chunks_exact(width)
        .flat_map(|row| reference::quantize_row(row).into_iter().map(|x| x as f32).collect::<Vec<f32>>())
        .collect();
    // Codes have no negative zero.
    let rounded: Vec<f32> = rounded.into_iter().map(|x| if x == 0.0 { 0.0 } else { x }).collect();
    prop_assert_eq!(difference(&quantised, &rounded), None, "{} in 8 bits", what);
    Ok(())
}

/// Norms, activations and forms of random rows, or of those `picked` names, against their definitions.
pub fn check_rows(rows: usize, width: usize, picked: &[usize], seed: u64) -> Result<(), TestCaseError> {
    let mut numbers = Numbers(seed);
    let x: Vec<f32> = (0..rows * width).map(|_| numbers.normal() * 3.0).collect();
    let weight: Vec<f32> = (0..width).map(|_| numbers.normal()).collect();
    let bias: Vec<f32> = (0..width).map(|_| numbers.normal()).collect();
    let mut backend = backend(seed);
    let (on_weight, on_bias) = (backend.load_vector(&weight), backend.load_vector(&bias));
    let mut on_x = matrix(&mut backend, &x, width);
    let mut out = Rows::default();
    let picked: Vec<u32> = picked.iter().map(|r| (r % rows) as u32).collect();
    let select = (!picked.is_empty()).then_some(&picked[..]);
    let chosen: Vec<&[f32]> = match select {
        Some(picked) => picked.iter().map(|&r| &x[r as usize * width..][..width]).collect(),
        None => x.chunks_exact(width).collect(),
    };

    backend.rms_norm(&on_x, select, &on_weight, 1e-5, (&mut out, BOTH));
    let expected: Vec<f64> = chosen.iter().flat_map(|row| reference::rms_norm(row, &weight, 1e-5)).collect();
    check(&backend, &out, &expected, width, "rms_norm")?;

    backend.layer_norm(&on_x, select, (&on_weight, Some(&on_bias)), 1e-5, (&mut out, BOTH));
    let expected: Vec<f64> =
        chosen.iter().flat_map(|row| reference::layer_norm(row, &weight, &bias, 1e-5)).collect();
    check(&backend, &out, &expected, width, "layer_norm")?;

    backend.to_rows(&on_x, select, (&mut out, BOTH));
    let expected: Vec<f64> = chosen.iter().flat_map(|row| row.iter().map(|&x| f64::from(x))).collect();
    check(&backend, &out, &expected, width, "to_rows")?;

    let activation = ACTIVATIONS[numbers.below(5)];
    backend.activate(activation, &on_x, (&mut out, BOTH));
    let expected: Vec<f64> = x.iter().map(|&x| reference::activate(activation, f64::from(x))).collect();
    check(&backend, &out, &expected, width, "activate")?;
    if width.is_multiple_of(2) {
        backend.gated(activation, &on_x, (&mut out, BOTH));
        let expected: Vec<f64> = x.chunks_exact(width).flat_map(|row| reference::gated(activation, row)).collect();
        check(&backend, &out, &expected, width / 2, "gated")?;
    }

    // In place, on parts of a row.
    let head = 1 + numbers.below(width);
    let heads = width / head;
    let on_head = backend.load_vector(&weight[..head]);
    let first = numbers.below(width - heads * head + 1);
    backend.rms_norm_in_place(&mut on_x, first..first + heads * head, &on_head, 1e-5);
    let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    for row in 0..rows {
        for part in 0..heads {
            let at = row * width + first + part * head;
            let normed = reference::rms_norm(&x[at..at + head], &weight[..head], 1e-5);
            expected[at..at + head].copy_from_slice(&normed);
        }
    }
    let given = backend.read(&on_x, 0..rows);
    prop_assert_eq!(too_far(&given, &expected, |i| 2e-6 * expected[i].abs() + 1e-6), None);
    prop_assert!(backend.check().is_ok());
    Ok(())
}

/// Biases, sums and scattered rows are the operations they are defined by.
pub fn check_sums(rows: usize, width: usize, seed: u64) -> Result<(), TestCaseError> {
    let mut numbers = Numbers(seed);
    let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| numbers.normal()).collect() };
    let (x, y, bias, scales) = (values(rows * width), values(rows * width), values(width), values(rows));
    let mut backend = backend(seed);
    let mut out = matrix(&mut backend, &x, width);
    let on_y = matrix(&mut backend, &y, width);
    let on_bias = backend.load_vector(&bias);
    backend.add_bias(&mut out, &on_bias);
    backend.add_scaled(&on_y, 0.75, &mut out);
    let mut order: Vec<u32> = (0..rows as u32).collect();
    Numbers(seed).shuffle(&mut order);
    backend.scatter_add(&on_y, &order, &scales, &mut out);
    let mut expected: Vec<f32> = (0..rows * width).map(|i| (x[i] + bias[i % width]) + 0.75 * y[i]).collect();
    for (source, &row) in order.iter().enumerate() {
        for i in 0..width {
            expected[row as usize * width + i] += scales[source] * y[source * width + i];
        }
    }
    prop_assert_eq!(difference(&backend.read(&out, 0..rows), &expected), None);
    backend.clear(&mut out, rows, width);
    prop_assert_eq!(backend.read(&out, 0..rows), vec![0.0; rows * width]);
    Ok(())
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn norms_activations_and_forms(
        rows in 1_usize..6,
        width in 1_usize..700,
        picked in prop::collection::vec(0_usize..6, 0..5),
        seed in any::<u64>(),
    ) {
        check_rows(rows, width, &picked, seed)?;
    }

    #[test]
    fn columns_are_copied(
        rows in 1_usize..5,
        (count, width) in (0_usize..6, 1_usize..90),
        (from, to, gap, repeated) in (0_usize..40, 0_usize..40, 0_usize..9, any::<bool>()),
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let step = width + gap;
        let (from_width, to_width) = (from + count.max(1) * step, to + count.max(1) * step);
        let x: Vec<f32> = (0..rows * from_width).map(|_| numbers.normal()).collect();
        let mut expected: Vec<f32> = (0..rows * to_width).map(|_| numbers.normal()).collect();
        let mut backend = backend(seed);
        let on_x = matrix(&mut backend, &x, from_width);
        let mut out = matrix(&mut backend, &expected, to_width);
        let runs = ColumnRuns { count, width, from: (from, if repeated { 0 } else { step }), to: (to, step) };
        backend.copy_columns(&on_x, runs, &mut out);
        for row in 0..rows {
            for run in 0..count {
                let source = row * from_width + from + run * runs.from.1;
                expected[row * to_width + to + run * step..][..width].copy_from_slice(&x[source..][..width]);
            }
        }
        prop_assert_eq!(difference(&backend.read(&out, 0..rows), &expected), None);
    }

    #[test]
    fn sums_are_exact(rows in 1_usize..6, width in 1_usize..600, seed in any::<u64>()) {
        check_sums(rows, width, seed)?;
    }
}

/// An exhausted device is an error that stays, and no panic.
#[test]
fn the_order_of_threads_changes_nothing() {
    for seed in 0..8 {
        check_rows(3, 333, &[2, 0], seed).expect("sound");
        check_sums(3, 333, seed).expect("sound");
    }
}

#[test]
fn running_out_of_memory_is_said_once_and_stays() {
    let shim = rill_cuda_shim::Shim::new(0).with_memory(1 << 16);
    let mut backend = CudaBackend::new(std::sync::Arc::new(shim), 1);
    let vector = backend.load_vector(&vec![1.0; 1 << 12]);
    assert!(backend.check().is_ok());
    let mut out = Matrix::default();
    backend.clear(&mut out, 1 << 10, 1 << 12);
    let error = backend.check().expect_err("16 MiB are not there").to_string();
    assert!(error.contains("out of memory") && error.contains("16777216"), "{error}");
    backend.add_bias(&mut out, &vector);
    assert_eq!(backend.read(&out, 0..1).len(), 1 << 12);
    assert_eq!(backend.check().expect_err("still").to_string(), error);
}
