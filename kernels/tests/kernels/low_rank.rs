//! Low-rank updates against their plain definition, and against themselves: a row's bits are its own, whatever else is updated.

use crate::inputs::{F32, Numbers, backends, cases, describe, difference, matrix};
use half::{bf16, f16};
use proptest::prelude::*;
use rill_kernels::{
    Backend, CpuBackend, Dtype, Isa, LowRank, LowRankMemory, LowRankUpdate, Rows, Stored, reference,
};
use std::sync::Arc;

/// One adapter's part of a layer.
#[derive(Clone)]
struct Update {
    weights: Arc<LowRank>,
    a: Vec<f32>,
    b: Vec<f32>,
    scale: f32,
    rows: Vec<u32>,
    first: usize,
}

fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let encode = |&x: &f32| match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(encode).collect()
}

fn update(
    numbers: &mut Numbers,
    dtypes: [Dtype; 2],
    (rank, inputs, outputs): (usize, usize, usize),
    (rows, first): (Vec<u32>, usize),
) -> Update {
    let mut values = |dtype, count| (0..count).map(|_| round(dtype, numbers.normal())).collect::<Vec<f32>>();
    let (a, b) = (values(dtypes[0], rank * inputs), values(dtypes[1], outputs * rank));
    let (a_bytes, b_bytes) = (bytes(dtypes[0], &a), bytes(dtypes[1], &b));
    let scale = [0.5, 2.0, 1.7][rank % 3];
    let weights = LowRank::new(
        Stored { dtype: dtypes[0], rows: rank, cols: inputs, data: &a_bytes },
        Stored { dtype: dtypes[1], rows: outputs, cols: rank, data: &b_bytes },
        scale,
        |o| o,
        &LowRankMemory::Host,
    );
    Update { weights: Arc::new(weights.expect("whole rows")), a, b, scale, rows, first }
}

/// `out` after all updates of `x`.
fn run(
    backend: &mut CpuBackend,
    (x, inputs): (&[f32], usize),
    (out, width): (&[f32], usize),
    updates: &[&Update],
) -> Vec<f32> {
    let values = matrix(backend, x, inputs);
    let mut x = Rows::default();
    backend.to_rows(&values, None, (&mut x, F32));
    let count = out.len() / width;
    let mut out = matrix(backend, out, width);
    let updates: Vec<LowRankUpdate<'_>> = updates
        .iter()
        .map(|update| LowRankUpdate { weights: &update.weights, rows: &update.rows, first: update.first })
        .collect();
    backend.add_low_rank(&x, &updates, &mut out);
    backend.read(&out, 0..count)
}

/// Two groups of rows, with an update of the first outputs each, and one more of later outputs for the second group.
fn updates(numbers: &mut Numbers, dtypes: [Dtype; 2], count: usize, inputs: usize, outputs: usize) -> Vec<Update> {
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for row in 0..count as u32 {
        match numbers.below(3) {
            0 => one.push(row),
            1 => two.push(row),
            _ => {}
        }
    }
    let ranks: [usize; 3] = std::array::from_fn(|_| 1 + numbers.below(19));
    let places = [(one, 0), (two.clone(), 0), (two, outputs)];
    places
        .into_iter()
        .zip(ranks)
        .map(|(place, rank)| update(numbers, dtypes, (rank, inputs, outputs), place))
        .collect()
}

const DTYPES: [[Dtype; 2]; 4] =
    [[Dtype::F32, Dtype::F32], [Dtype::BF16, Dtype::BF16], [Dtype::F16, Dtype::F16], [Dtype::BF16, Dtype::F32]];

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn updates_are_the_definition_and_a_rows_bits_are_its_own(
        seed: u64,
        dtypes in prop::sample::select(&DTYPES[..]),
        count in 1_usize..41,
        inputs in 1_usize..200,
        outputs in 1_usize..300,
    ) {
        let mut numbers = Numbers(seed);
        let updates = updates(&mut numbers, dtypes, count, inputs, outputs);
        let width = 2 * outputs + 3;
        let x = numbers.activations(count * inputs);
        let before: Vec<f32> = (0..count * width).map(|_| numbers.normal()).collect();
        let all: Vec<&Update> = updates.iter().collect();
        let mut first = None;
        for backend in &mut backends() {
            let given = run(backend, (&x, inputs), (&before, width), &all);
            let mut expected: Vec<(f64, f64)> = before.iter().map(|&x| (f64::from(x), f64::from(x).abs())).collect();
            for update in &updates {
                for &row in &update.rows {
                    let x = &x[row as usize * inputs..][..inputs];
                    let sums = reference::low_rank(x, &update.a, &update.b, update.scale);
                    let at = row as usize * width + update.first;
                    for (to, sum) in expected[at..].iter_mut().zip(sums) {
                        *to = (to.0 + sum.value, to.1 + sum.magnitude);
                    }
                }
            }
            for (i, (&given, (value, magnitude))) in given.iter().zip(&expected).enumerate() {
                let error = (f64::from(given) - value).abs();
                prop_assert!(error <= magnitude * 3e-6, "value {i}: {given:e}, not {value:e}, {}", describe(backend));
            }
            let first = first.get_or_insert_with(|| given.clone());
            prop_assert_eq!(difference(&given, first), None, "{}", describe(backend));
            // Each row alone, and with an update less.
            for row in 0..count {
                let part = &x[row * inputs..][..inputs];
                let alone: Vec<Update> = updates
                    .iter()
                    .filter(|update| update.rows.contains(&(row as u32)))
                    .map(|update| Update { rows: vec![0], ..update.clone() })
                    .collect();
                let out = &before[row * width..][..width];
                let given = run(backend, (part, inputs), (out, width), &alone.iter().collect::<Vec<_>>());
                prop_assert_eq!(difference(&given, &first[row * width..][..width]), None, "row {}", row);
            }
        }
    }
}

#[test]
fn outputs_come_in_the_order_asked_for() {
    let mut backend = CpuBackend::new(1, Isa::detect());
    let a = bytes(Dtype::F32, &[1.0, 0.0]);
    let b = bytes(Dtype::F32, &[10.0, 20.0, 30.0]);
    let a = Stored { dtype: Dtype::F32, rows: 1, cols: 2, data: &a };
    let b = Stored { dtype: Dtype::F32, rows: 3, cols: 1, data: &b };
    let weights = LowRank::new(a, b, 2.0, |o| 2 - o, &LowRankMemory::Host).expect("sound");
    assert_eq!((weights.rank(), weights.bytes()), (1, (4 * 16 + 16) * 4));
    let update = Update { weights: Arc::new(weights), a: vec![], b: vec![], scale: 2.0, rows: vec![1], first: 1 };
    let out = run(&mut backend, (&[5.0, 7.0, 0.5, 9.0], 2), (&[1.0; 8], 4), &[&update]);
    assert_eq!(out, [1.0, 1.0, 1.0, 1.0, 1.0, 31.0, 21.0, 11.0]);
}

#[test]
fn factors_that_are_cut_short_are_refused() {
    let data = [0; 16];
    let sound = Stored { dtype: Dtype::F32, rows: 2, cols: 2, data: &data };
    let short = Stored { data: &data[..12], ..sound };
    let load = |a, b| LowRank::new(a, b, 1.0, |o| o, &LowRankMemory::Host);
    assert!(load(sound, sound).is_ok());
    assert!(load(short, sound).is_err());
    assert!(load(sound, short).is_err());
}
