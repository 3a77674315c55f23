//! Low-rank updates against their plain definition, and against themselves: a row's bits are its own, whatever else is
//! updated and in whatever order threads run.

use crate::inputs::{BOTH, Numbers, backend, cases, difference, matrix, rows, too_far};
use half::{bf16, f16};
use proptest::prelude::*;
use rill_cuda_shim::Shim;
use rill_kernels::cuda::CudaBackend;
use rill_kernels::{Backend, Dtype, LowRank, LowRankMemory, LowRankUpdate, Stored, reference};
use std::sync::Arc;

/// One adapter's part of a layer, before it lies anywhere.
#[derive(Debug, Clone)]
struct Update {
    dtypes: [Dtype; 2],
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    scale: f32,
    rows: Vec<u32>,
    first: usize,
}

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let encode = |&x: &f32| match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(encode).collect()
}

fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

impl Update {
    fn load(&self, memory: &LowRankMemory) -> LowRank {
        let [a, b] = [(self.dtypes[0], &self.a), (self.dtypes[1], &self.b)].map(|(dtype, x)| bytes(dtype, x));
        let (rank, inputs, outputs) = (self.rank, self.a.len() / self.rank, self.b.len() / self.rank);
        LowRank::new(
            Stored { dtype: self.dtypes[0], rows: rank, cols: inputs, data: &a },
            Stored { dtype: self.dtypes[1], rows: outputs, cols: rank, data: &b },
            self.scale,
            |o| o,
            memory,
        )
        .expect("whole rows, and room")
    }
}

/// A step's rows and updates of one layer.
#[derive(Debug, Clone)]
struct World {
    inputs: usize,
    width: usize,
    x: Vec<f32>,
    before: Vec<f32>,
    updates: Vec<Update>,
}

const DTYPES: [[Dtype; 2]; 4] =
    [[Dtype::F32, Dtype::F32], [Dtype::BF16, Dtype::BF16], [Dtype::F16, Dtype::F16], [Dtype::BF16, Dtype::F32]];

impl World {
    /// Rows of up to three adapters and of none, in random company; the second adapter updates later outputs, too.
    fn new(count: usize, inputs: usize, outputs: usize, rank_max: usize, seed: u64) -> World {
        let mut numbers = Numbers(seed);
        let width = 2 * outputs + 3;
        let mut groups: [Vec<u32>; 3] = Default::default();
        for row in 0..count as u32 {
            if let Some(group) = groups.get_mut(numbers.below(4)) {
                group.push(row);
            }
        }
        let [one, two, three] = groups;
        let places = [(one, 0), (two.clone(), 0), (two, outputs), (three, 3)];
        let updates = places.map(|(rows, first)| {
            let (dtypes, rank) = (DTYPES[numbers.below(4)], 1 + numbers.below(rank_max));
            let mut values =
                |dtype, count| (0..count).map(|_| round(dtype, numbers.normal())).collect::<Vec<f32>>();
            let (a, b) = (values(dtypes[0], rank * inputs), values(dtypes[1], outputs * rank));
            Update { dtypes, rank, a, b, scale: [0.5, 2.0, 1.7][rank % 3], rows, first }
        });
        World {
            inputs,
            width,
            x: numbers.activations(count * inputs),
            before: (0..count * width).map(|_| numbers.normal()).collect(),
            updates: updates.into(),
        }
    }

    /// One row of it, and its updates.
    fn alone(&self, row: usize) -> World {
        let own = |update: &&Update| update.rows.contains(&(row as u32));
        World {
            x: self.x[row * self.inputs..][..self.inputs].to_vec(),
            before: self.before[row * self.width..][..self.width].to_vec(),
            updates: self
                .updates
                .iter()
                .filter(own)
                .map(|update| Update { rows: vec![0], ..update.clone() })
                .collect(),
            ..*self
        }
    }

    fn run(&self, backend: &mut CudaBackend) -> Vec<f32> {
        let x = rows(backend, &self.x, self.inputs, BOTH);
        let mut out = matrix(backend, &self.before, self.width);
        let memory = backend.low_rank_memory();
        let loaded: Vec<LowRank> = self.updates.iter().map(|update| update.load(&memory)).collect();
        let updates: Vec<LowRankUpdate<'_>> = self
            .updates
            .iter()
            .zip(&loaded)
            .map(|(update, weights)| LowRankUpdate { weights, rows: &update.rows, first: update.first })
            .collect();
        backend.add_low_rank(&x, &updates, &mut out);
        backend.read(&out, 0..self.before.len() / self.width)
    }

    /// What it should be, and how far off each value may be: bf16 factors meet 16 bits of what they multiply, twice; f32
    /// ones products of 21 bits.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let mut expected: Vec<f64> = self.before.iter().map(|&x| f64::from(x)).collect();
        let mut bounds: Vec<f64> = expected.iter().map(|x| 3e-7 * x.abs()).collect();
        for update in &self.updates {
            let share = if update.dtypes == [Dtype::BF16; 2] { 2e-5 } else { 5e-6 };
            for &row in &update.rows {
                let x = &self.x[row as usize * self.inputs..][..self.inputs];
                let sums = reference::low_rank(x, &update.a, &update.b, update.scale);
                let at = row as usize * self.width + update.first;
                for (i, sum) in sums.into_iter().enumerate() {
                    expected[at + i] += sum.value;
                    bounds[at + i] += share * sum.magnitude;
                }
            }
        }
        (expected, bounds)
    }
}

/// `world` is its definition, under every seed the same bits, and every row alone has the bits it has in company.
fn check(world: &World, seeds: std::ops::Range<u64>) -> Result<(), String> {
    let mut first: Option<Vec<f32>> = None;
    for seed in seeds {
        let given = world.run(&mut backend(seed));
        let (expected, bounds) = world.expected();
        if let Some(far) = too_far(&given, &expected, |i| bounds[i]) {
            return Err(format!("seed {seed}: {far}"));
        }
        let first = first.get_or_insert_with(|| given.clone());
        if let Some(difference) = difference(&given, first) {
            return Err(format!("seed {seed}: {difference}"));
        }
    }
    let first = first.expect("a seed at least");
    for (row, expected) in first.chunks_exact(world.width).enumerate() {
        if let Some(difference) = difference(&world.alone(row).run(&mut backend(row as u64)), expected) {
            return Err(format!("row {row} alone: {difference}"));
        }
    }
    Ok(())
}

/// A step with ranks beyond what lies in shared memory at once, and inputs that end within the last of several slices.
pub fn check_small(seed: u64) -> Result<(), String> {
    check(&World::new(11, 1050, 300, 70, seed), seed..seed + 1)
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn updates_are_the_definition_and_a_rows_bits_are_its_own(
        seed: u64,
        count in 1_usize..41,
        inputs in 1_usize..700,
        outputs in 1_usize..300,
        rank_max in 1_usize..40,
    ) {
        let world = World::new(count, inputs, outputs, rank_max, seed);
        prop_assert_eq!(check(&world, 0..3), Ok(()));
    }
}

#[test]
fn the_order_of_threads_changes_nothing() {
    check(&World::new(11, 1050, 300, 70, 5), 0..8).expect("sound");
}

#[test]
fn outputs_come_in_the_order_asked_for() {
    let mut backend = backend(1);
    let (a, b) = (bytes(Dtype::F32, &[1.0, 0.0]), bytes(Dtype::F32, &[10.0, 20.0, 30.0]));
    let a = Stored { dtype: Dtype::F32, rows: 1, cols: 2, data: &a };
    let b = Stored { dtype: Dtype::F32, rows: 3, cols: 1, data: &b };
    let weights = LowRank::new(a, b, 2.0, |o| 2 - o, &backend.low_rank_memory()).expect("sound");
    let x = rows(&mut backend, &[5.0, 7.0, 0.5, 9.0], 2, BOTH);
    let mut out = matrix(&mut backend, &[1.0; 8], 4);
    backend.add_low_rank(&x, &[LowRankUpdate { weights: &weights, rows: &[1], first: 1 }], &mut out);
    assert_eq!(backend.read(&out, 0..2), [1.0, 1.0, 1.0, 1.0, 1.0, 31.0, 21.0, 11.0]);
}

/// What an update takes on the device is what it says, and comes back; one that finds no room is refused and nothing else
/// is.
#[test]
fn memory_is_counted_and_given_back() {
    let shim = Arc::new(Shim::new(0).with_memory(1 << 20));
    let backend = CudaBackend::new(shim, 1);
    let free = || backend.memory_free().expect("a device's own");
    let data = vec![0; 4 * 128 * 2048];
    let stored =
        |rows: usize, cols: usize| Stored { dtype: Dtype::F32, rows, cols, data: &data[..4 * rows * cols] };
    let load =
        |rank: usize| LowRank::new(stored(rank, 2048), stored(300, rank), 1.0, |o| o, &backend.low_rank_memory());
    let before = free();
    let update = load(20).expect("room");
    // Two tiles of ranks; ranks and outputs in whole tiles.
    assert_eq!(update.bytes(), 4 * (32 * 2048 + 304 * 32));
    assert_eq!(free(), before - update.bytes());
    let error = load(128).map(|_| ()).expect_err("no room").to_string();
    assert!(error.contains("out of memory"), "{error}");
    assert_eq!(free(), before - update.bytes(), "what did not fit left nothing");
    drop(update);
    assert_eq!(free(), before);
    assert!(backend.check().is_ok(), "the backend goes on");
}
