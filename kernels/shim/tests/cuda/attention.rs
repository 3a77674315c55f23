//! Attention over the paged cache: close to its definition, and the same bits however its rows come to be computed.

use crate::inputs::{BOTH, Numbers, cases, difference, load_f32};
use proptest::prelude::*;
use rill_cuda_shim::{Shim, Variant};
use rill_kernels::cuda::{CudaBackend, KvCache, Linear, Matrix, Rows, Step};
use rill_kernels::{AttentionShape, Backend, CacheShape, KvDtype, Rope, StepInput, reference};
use std::ops::Range;
use std::sync::Arc;

/// Sequences and heads of one test.
#[derive(Debug, Clone)]
pub struct Shape {
    pub dtype: KvDtype,
    pub kv_heads: usize,
    pub ratio: usize,
    pub head_dim: usize,
    pub frequencies: usize,
    pub lens: Vec<usize>,
    pub block_size: usize,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    pub seed: u64,
}

/// Some tokens of some sequences in one step.
type Batch = Vec<(usize, Range<usize>)>;

/// Tokens of all sequences, where they go, and what attention makes of them.
pub struct World {
    dtype: KvDtype,
    heads: AttentionShape,
    rope: Rope,
    cache: CacheShape,
    tables: Vec<Vec<u32>>,
    starts: Vec<usize>,
    qkv: Vec<f32>,
}

/// A device with the tokens' rows on it.
struct Gpu {
    backend: CudaBackend,
    table: Linear,
    step: Step,
    cache: KvCache,
}

impl World {
    pub fn new(shape: &Shape) -> World {
        let mut numbers = Numbers(shape.seed);
        let heads = AttentionShape {
            heads: shape.ratio * shape.kv_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            // Every third world has narrower values.
            value_dim: shape.head_dim - if shape.seed % 3 == 2 { shape.head_dim / 3 } else { 0 },
            scale: 1.0 / (shape.head_dim as f32).sqrt(),
            window: shape.window,
            softcap: shape.softcap,
        };
        let frequency = |i: usize| 1e4_f32.powf(-(i as f32) / shape.frequencies as f32);
        let rope = Rope { inverse_frequencies: (0..shape.frequencies).map(frequency).collect(), factor: 1.0 };
        // Blocks in any order, some of them nobody's.
        let needed: Vec<usize> = shape.lens.iter().map(|len| len.div_ceil(shape.block_size)).collect();
        let blocks = needed.iter().sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        numbers.shuffle(&mut free);
        let tables = needed.iter().map(|&count| free.split_off(free.len() - count)).collect();
        let mut starts = vec![0];
        for len in &shape.lens {
            starts.push(starts[starts.len() - 1] + len);
        }
        let size = [1.0, 1.0, 3.0][numbers.below(3)];
        let count = starts[shape.lens.len()] * heads.qkv_width();
        let qkv = (0..count).map(|_| numbers.normal() * size).collect();
        World {
            dtype: shape.dtype,
            heads,
            rope,
            cache: CacheShape { blocks, block_size: shape.block_size },
            tables,
            starts,
            qkv,
        }
    }

    fn len(&self, sequence: usize) -> usize {
        self.starts[sequence + 1] - self.starts[sequence]
    }

    fn width(&self) -> usize {
        self.heads.out_width()
    }

    /// The cache holds NaN wherever nothing was written: the shim poisons fresh memory.
    fn gpu(&self, variant: Variant, seed: u64, graphs: bool) -> Gpu {
        let mut backend = CudaBackend::new(Arc::new(Shim::of(variant, seed)), 1).with_kv_dtype(self.dtype);
        if graphs {
            backend = backend.with_graphs();
        }
        let table = load_f32(&mut backend, &self.qkv, self.heads.qkv_width());
        let cache = backend.new_kv_cache(self.cache, self.heads);
        Gpu { backend, table, step: Step::default(), cache }
    }

    fn run_batch(&self, gpu: &mut Gpu, batch: &Batch, outputs: &mut [f32]) {
        let size = self.cache.block_size;
        let (mut positions, mut slots, mut ids, mut lens) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut starts, mut tables, mut table_starts) = (vec![0], Vec::new(), vec![0]);
        for (sequence, range) in batch {
            for position in range.clone() {
                positions.push(position as u32);
                slots.push(self.tables[*sequence][position / size] * size as u32 + (position % size) as u32);
                ids.push((self.starts[*sequence] + position) as u32);
            }
            starts.push(positions.len() as u32);
            lens.push(range.end as u32);
            // Nobody looks at what every row's window has passed by.
            let passed = self.heads.reach().map_or(0, |reach| range.start.saturating_sub(reach) / size);
            tables.extend(std::iter::repeat_n(u32::MAX, passed));
            tables.extend(&self.tables[*sequence][passed..]);
            table_starts.push(tables.len() as u32);
        }
        let input = StepInput {
            positions: &positions,
            slot_mapping: &slots,
            query_starts: &starts,
            context_lens: &lens,
            block_tables: &tables,
            block_table_starts: &table_starts,
        };
        let (mut qkv, mut out) = (Matrix::default(), Rows::default());
        let backend = &mut gpu.backend;
        backend.embed(&gpu.table, &ids, 1.0, &mut qkv);
        backend.prepare(input, &self.rope, self.heads, &mut gpu.step);
        backend.attention(&qkv, self.heads, input, &mut gpu.step, &mut gpu.cache, (&mut out, BOTH));
        backend.check().expect("the shim has memory");
        let [Some(values), _] = backend.read_rows(&out) else { panic!("f32 was asked for") };
        for (row, id) in values.chunks_exact(self.width()).zip(ids) {
            outputs[id as usize * self.width()..][..self.width()].copy_from_slice(row);
        }
    }

    /// Runs one batch after another; returns the outputs of all tokens.
    fn run(&self, variant: Variant, seed: u64, schedule: &[Batch]) -> Vec<f32> {
        self.run_as(variant, seed, schedule, false)
    }

    fn run_as(&self, variant: Variant, seed: u64, schedule: &[Batch], graphs: bool) -> Vec<f32> {
        let mut gpu = self.gpu(variant, seed, graphs);
        let mut outputs = vec![f32::NAN; self.starts[self.starts.len() - 1] * self.width()];
        for batch in schedule {
            self.run_batch(&mut gpu, batch, &mut outputs);
        }
        outputs
    }

    /// Every sequence whole, all in one step.
    fn at_once(&self) -> Vec<Batch> {
        vec![(0..self.tables.len()).map(|s| (s, 0..self.len(s))).collect()]
    }

    /// Long beginnings in a step of their own, then one token of every sequence at a time.
    fn decoded(&self, last: usize) -> Vec<Batch> {
        let begun = |s: usize| self.len(s).saturating_sub(last);
        let mut schedule: Vec<Batch> =
            (0..self.tables.len()).filter(|&s| begun(s) > 0).map(|s| vec![(s, 0..begun(s))]).collect();
        for i in 0..last {
            let batch: Batch = (0..self.tables.len())
                .filter(|&s| begun(s) + i < self.len(s))
                .map(|s| (s, begun(s) + i..begun(s) + i + 1))
                .collect();
            schedule.extend((!batch.is_empty()).then_some(batch));
        }
        schedule
    }

    /// Chunks of 1..=`longest` tokens of some sequences in any order, until all are done.
    fn chunked(&self, longest: usize, numbers: &mut Numbers) -> Vec<Batch> {
        let mut done = vec![0; self.tables.len()];
        let mut schedule = Vec::new();
        loop {
            let mut open: Vec<usize> = (0..done.len()).filter(|&s| done[s] < self.len(s)).collect();
            if open.is_empty() {
                return schedule;
            }
            numbers.shuffle(&mut open);
            open.truncate(1 + numbers.below(open.len()));
            let mut chunk = |s: usize| {
                let end = self.len(s).min(done[s] + 1 + numbers.below(longest));
                (s, std::mem::replace(&mut done[s], end)..end)
            };
            schedule.push(open.into_iter().map(&mut chunk).collect());
        }
    }

    /// As the cache keeps a key or a value.
    fn kept(&self, x: &[f32]) -> Vec<f32> {
        match self.dtype {
            KvDtype::Bf16 => reference::round_bf16(x),
            KvDtype::F16 => reference::round_f16(x),
            KvDtype::Fp8 => reference::round_e4m3(x),
            KvDtype::Int8 => reference::round_int8(x, true),
        }
    }

    /// As the tensor core takes a query.
    fn asked(&self, x: &[f32]) -> Vec<f32> {
        match self.dtype {
            KvDtype::Bf16 | KvDtype::Int8 => reference::round_bf16(x),
            KvDtype::F16 | KvDtype::Fp8 => reference::round_f16(x),
        }
    }

    /// How far one number can be off when it is rounded the other way, as a share of its size.
    fn a_step(&self) -> f64 {
        match self.dtype {
            KvDtype::Bf16 | KvDtype::F16 => 0.0,
            KvDtype::Int8 => 1.0 / 127.0,
            KvDtype::Fp8 => 1.0 / 8.0,
        }
    }

    /// Compares the outputs of the last few and a few other tokens of every sequence with the definition.
    fn against_reference(&self, outputs: &[f32], numbers: &mut Numbers) -> Result<(), String> {
        let (heads, dim, wide) = (self.heads, self.heads.head_dim, self.heads.value_dim);
        let head = |row: usize, h: usize| &self.qkv[row * heads.qkv_width() + h * dim..][..dim];
        let value = |row: usize, kv: usize| {
            let first = (heads.heads + heads.kv_heads) * dim + kv * wide;
            &self.qkv[row * heads.qkv_width() + first..][..wide]
        };
        for s in 0..self.tables.len() {
            let len = self.len(s);
            let picked: Vec<usize> = (0..3).map(|_| numbers.below(len)).chain([len - 1]).collect();
            for position in picked {
                let row = self.starts[s] + position;
                let first = heads.window.map_or(0, |w| (position + 1).saturating_sub(w));
                for h in 0..heads.heads {
                    let kv = h / (heads.heads / heads.kv_heads);
                    let turn = |row: usize, h: usize, position: usize| {
                        reference::rotate(head(row, h), position as u32, &self.rope)
                    };
                    let key = |p: usize| self.kept(&turn(self.starts[s] + p, heads.heads + kv, p));
                    let keys: Vec<Vec<f32>> = (first..=position).map(key).collect();
                    let values: Vec<Vec<f32>> =
                        (first..=position).map(|p| self.kept(value(self.starts[s] + p, kv))).collect();
                    let keys: Vec<&[f32]> = keys.iter().map(|k| &k[..]).collect();
                    let values: Vec<&[f32]> = values.iter().map(|v| &v[..]).collect();
                    let query = self.asked(&turn(row, h, position));
                    let (expected, steepest) =
                        reference::attend(&query, &keys, &values, (heads.scale, heads.softcap));
                    let given = &outputs[row * self.width() + h * wide..][..wide];
                    // Weights are rounded to bf16; a query or key may round the other way.
                    let other_way = self.a_step() * steepest / dim as f64;
                    let share = 6e-3 + 4e-3 * steepest.min(8.0) / 8.0 + 2.0 * other_way.min(0.5);
                    for (d, (&given, expected)) in given.iter().zip(&expected).enumerate() {
                        let error = (f64::from(given) - expected.value).abs();
                        if error.is_nan() || error > share * expected.magnitude + 1e-3 {
                            return Err(format!(
                                "sequence {s}, position {position}, head {h}, dimension {d}: {given:e}, not {:e}",
                                expected.value
                            ));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// What must hold of the kernels in one order of threads.
    pub fn check(&self, variant: Variant, seed: u64) -> Result<(), String> {
        let mut numbers = Numbers(seed);
        let whole = self.run(variant, seed, &self.at_once());
        self.against_reference(&whole, &mut numbers)?;
        let schedules = [self.decoded(2), self.chunked(40, &mut numbers)];
        for (name, schedule) in ["token by token", "in chunks"].into_iter().zip(schedules) {
            // Work lists filled up, as for graphs, in one of them.
            let again = self.run_as(variant, seed + 1, &schedule, name == "token by token");
            if let Some(different) = difference(&again, &whole) {
                return Err(format!("{name}: {different}"));
            }
        }
        Ok(())
    }
}

pub const DTYPES: [KvDtype; 4] = [KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8, KvDtype::Int8];

fn shapes() -> impl Strategy<Value = Shape> {
    let heads = (1_usize..=2, 1_usize..=5, prop::sample::select(vec![8_usize, 32, 64, 80, 96, 128, 160, 256]));
    let tokens = (prop::collection::vec(1_usize..150, 1..=3), prop::sample::select(vec![16_usize, 32]));
    let masks = (prop::option::of(1_usize..100), prop::option::of(Just(20.0_f32)), any::<bool>());
    (prop::sample::select(DTYPES.to_vec()), heads, tokens, masks, any::<u64>()).prop_map(
        |(dtype, (kv_heads, ratio, head_dim), (lens, block_size), (window, softcap, whole), seed)| Shape {
            dtype,
            kv_heads,
            ratio,
            head_dim,
            frequencies: if whole { head_dim / 2 } else { head_dim / 4 },
            lens,
            block_size,
            window,
            softcap,
            seed: seed >> 1,
        },
    )
}

proptest! {
    #![proptest_config(cases(20))]

    #[test]
    fn any_shape_in_any_order(shape in shapes()) {
        let world = World::new(&shape);
        world.check(Variant::Sound, shape.seed).map_err(|e| TestCaseError::fail(format!("{shape:?}: {e}")))?;
    }
}

/// Longer than two partitions, so that split and shared kernels merge, on every width of head and kind of cache there are
/// kernels for.
#[test]
fn long_contexts_merge_alike() {
    for (seed, head_dim) in [32, 64, 96, 128, 256].into_iter().enumerate() {
        for (number, dtype) in DTYPES.into_iter().enumerate() {
            let shape = Shape {
                dtype,
                kv_heads: 1,
                ratio: 3,
                head_dim,
                frequencies: head_dim / 2,
                lens: vec![530, 257],
                block_size: 16,
                window: [None, Some(300)][(seed + number) % 2],
                softcap: None,
                seed: seed as u64,
            };
            let world = World::new(&shape);
            let whole = world.run(Variant::Sound, 1, &world.at_once());
            world.against_reference(&whole, &mut Numbers(3)).unwrap_or_else(|e| panic!("{shape:?}: {e}"));
            let again = world.run(Variant::Sound, 2, &world.decoded(1));
            assert_eq!(difference(&again, &whole), None, "{shape:?}");
        }
    }
}

/// The same bits whatever the order in which threads run.
#[test]
fn the_order_of_threads_changes_nothing() {
    for dtype in DTYPES {
        let world = small(dtype);
        let first = world.run(Variant::Sound, 0, &world.at_once());
        for seed in 1..8 {
            let again = world.run(Variant::Sound, seed, &world.at_once());
            assert_eq!(difference(&again, &first), None, "{dtype:?}, seed {seed}");
        }
    }
}

/// A few sequences that take little time.
pub fn small(dtype: KvDtype) -> World {
    World::new(&Shape {
        dtype,
        kv_heads: 2,
        ratio: 4,
        head_dim: 64,
        frequencies: 32,
        lens: vec![90, 33, 7],
        block_size: 16,
        window: None,
        softcap: None,
        seed: 11,
    })
}

/// One that is longer than a partition.
pub fn merging() -> World {
    World::new(&Shape {
        dtype: KvDtype::Int8,
        kv_heads: 1,
        ratio: 3,
        head_dim: 256,
        frequencies: 128,
        lens: vec![270],
        block_size: 16,
        window: None,
        softcap: Some(20.0),
        seed: 12,
    })
}
