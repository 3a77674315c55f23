//! Launches replayed as graphs: the same bits, and nothing out of order.

use crate::inputs::{Numbers, cases, difference, matrix};
use proptest::prelude::*;
use rill_cuda_shim::Shim;
use rill_kernels::Backend;
use rill_kernels::cuda::{CudaBackend, Matrix};
use std::sync::Arc;

/// Steps of a few kinds, each of them launches, uploads, fresh memory and reads in an order of its own.
fn run(backend: &mut CudaBackend, kinds: &[usize], seed: u64) -> Vec<f32> {
    const WIDTH: usize = 24;
    let mut numbers = Numbers(seed);
    let mut values = |rows: usize| -> Vec<f32> { (0..rows * WIDTH).map(|_| numbers.normal()).collect() };
    let tables: Vec<Matrix> = (1..=3).map(|rows| matrix(backend, &values(rows), WIDTH)).collect();
    let bias = backend.load_vector(&values(1));
    let mut out = Vec::new();
    let mut sums: Vec<Matrix> = (1..=3).map(|rows| matrix(backend, &values(rows), WIDTH)).collect();
    for (step, &kind) in kinds.iter().enumerate() {
        let (x, sum) = (&tables[kind], &mut sums[kind]);
        for i in 0..7 {
            backend.add_bias(sum, &bias);
            backend.add_scaled(x, [0.5, -0.25][i % 2], sum);
        }
        // An upload in the midst, other bytes each time.
        let mut order: Vec<u32> = (0..=kind as u32).collect();
        Numbers(seed ^ step as u64).shuffle(&mut order);
        let scales: Vec<f32> = order.iter().map(|&row| row as f32 + step as f32 * 0.125).collect();
        backend.scatter_add(x, &order, &scales, sum);
        if step % 3 == 1 {
            // Memory that is given back while launches wait.
            let mut passing = Matrix::default();
            backend.clear(&mut passing, kind + 1, WIDTH);
            backend.add_scaled(sum, 2.0, &mut passing);
            backend.add_scaled(&passing, 0.125, sum);
        }
        if step % 2 == 0 {
            out.extend(backend.read(sum, 0..kind + 1));
        }
    }
    for (kind, sum) in sums.iter().enumerate() {
        out.extend(backend.read(sum, 0..kind + 1));
    }
    out
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn replaying_changes_nothing(kinds in prop::collection::vec(0_usize..3, 6..30), seed in any::<u64>()) {
        let expected = run(&mut CudaBackend::new(Arc::new(Shim::new(seed)), 1), &kinds, seed);
        let shim = Arc::new(Shim::new(seed ^ 1));
        let mut backend = CudaBackend::new(shim.clone(), 1).with_graphs();
        let given = run(&mut backend, &kinds, seed);
        prop_assert!(backend.check().is_ok());
        prop_assert_eq!(difference(&given, &expected), None);
        prop_assert!(kinds.len() < 12 || shim.replays() > 0, "nothing was replayed");
    }
}
