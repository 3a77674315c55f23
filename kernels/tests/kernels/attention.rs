//! Paged attention: close to plain softmax attention, and the same bits however the work is cut, batched, spread over
//! threads or computed.

use crate::inputs::{F32, Numbers, backends, cases, describe, difference, identity, isas, load_f32, product};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rill_kernels::{
    AttentionShape, Backend, CacheShape, CpuBackend, Isa, KvCache, KvDtype, Linear, Matrix, Rope, Rows, Step,
    StepInput, reference,
};
use std::cell::RefCell;
use std::ops::Range;

/// Some sequences, all their queries, keys and values, and where their tokens lie in the cache.
struct World {
    heads: AttentionShape,
    rope: Rope,
    cache: CacheShape,
    dtype: KvDtype,
    tables: Vec<Vec<u32>>,
    /// Each sequence's first row in `qkv`, and the number of rows at the end.
    starts: Vec<usize>,
    qkv: Vec<f32>,
    /// `qkv` as an embedding table, with a row of NaN and one of infinities at the end.
    table: Linear,
    identity: Linear,
}

/// The parts of sequences one step computes.
type Batch = Vec<(usize, Range<usize>)>;

#[derive(Debug, Clone)]
struct Shape {
    ratio: usize,
    kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    frequencies: usize,
    lens: Vec<usize>,
    seed: u64,
    window: Option<usize>,
    softcap: Option<f32>,
    dtype: KvDtype,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            ratio: 1,
            kv_heads: 1,
            head_dim: 32,
            block_size: 16,
            frequencies: 16,
            lens: vec![20],
            seed: 0,
            window: None,
            softcap: None,
            dtype: KvDtype::Bf16,
        }
    }
}

impl World {
    fn new(backend: &mut CpuBackend, shape: &Shape) -> World {
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
        let inverse_frequencies =
            (0..shape.frequencies).map(|i| 1e4_f32.powf(-(i as f32) / shape.frequencies as f32)).collect();
        let rope = Rope { inverse_frequencies, factor: [1.0, 1.25][numbers.below(2)] };
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
        let width = heads.qkv_width();
        // Steep scores now and then: a softmax that has to move its maximum.
        let size = [1.0, 1.0, 4.0][numbers.below(3)];
        let mut qkv: Vec<f32> = (0..starts[shape.lens.len()] * width).map(|_| numbers.normal() * size).collect();
        qkv.extend(std::iter::repeat_n(f32::NAN, width));
        qkv.extend(std::iter::repeat_n(f32::INFINITY, width));
        let table = load_f32(backend, &qkv, width);
        let identity = identity(backend, heads.out_width());
        let cache = CacheShape { blocks, block_size: shape.block_size };
        World { heads, rope, cache, dtype: shape.dtype, tables, starts, qkv, table, identity }
    }

    fn len(&self, sequence: usize) -> usize {
        self.starts[sequence + 1] - self.starts[sequence]
    }

    fn width(&self) -> usize {
        self.heads.out_width()
    }

    /// A cache every slot of which holds NaN or infinity, as a careless earlier owner would have left it.
    fn poisoned(&self, backend: &mut CpuBackend) -> KvCache {
        let mut cache = backend.new_kv_cache(self.cache, self.heads);
        let (blocks, size) = (self.cache.blocks, self.cache.block_size);
        let slots: Vec<u32> = (0..(blocks * size) as u32).collect();
        let rows = self.starts[self.starts.len() - 1] as u32;
        let ids: Vec<u32> = slots.iter().map(|slot| rows + slot % 3 % 2).collect();
        let input = StepInput {
            positions: &slots.iter().map(|slot| slot % size as u32).collect::<Vec<u32>>(),
            slot_mapping: &slots,
            query_starts: &(0..=blocks).map(|b| (b * size) as u32).collect::<Vec<u32>>(),
            context_lens: &vec![size as u32; blocks],
            block_tables: &(0..blocks as u32).collect::<Vec<u32>>(),
            block_table_starts: &(0..=blocks as u32).collect::<Vec<u32>>(),
        };
        self.step(backend, input, &ids, &mut cache);
        cache
    }

    /// One step over rows `ids` of the table; returns attention's output.
    fn step(&self, backend: &mut CpuBackend, input: StepInput<'_>, ids: &[u32], cache: &mut KvCache) -> Rows {
        let (mut qkv, mut step, mut out) = (Matrix::default(), Step::default(), Rows::default());
        backend.embed(&self.table, ids, 1.0, &mut qkv);
        backend.prepare(input, &self.rope, self.heads, &mut step);
        backend.attention(&qkv, self.heads, input, &mut step, cache, (&mut out, F32));
        out
    }

    /// Runs one batch after another; returns the outputs of all tokens, in the order of `qkv`.
    fn run(&self, backend: &mut CpuBackend, schedule: &[Batch]) -> Vec<f32> {
        let mut cache = self.poisoned(backend);
        let mut outputs = vec![f32::NAN; self.starts[self.starts.len() - 1] * self.width()];
        for batch in schedule {
            self.run_batch(backend, batch, &mut cache, &mut outputs);
        }
        outputs
    }

    fn run_batch(&self, backend: &mut CpuBackend, batch: &Batch, cache: &mut KvCache, outputs: &mut [f32]) {
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
        let out = self.step(backend, input, &ids, cache);
        let width = self.width();
        for (row, id) in product(backend, &self.identity, &out).chunks_exact(width).zip(ids) {
            outputs[id as usize * width..][..width].copy_from_slice(row);
        }
    }

    /// Every sequence whole, all in one step.
    fn at_once(&self) -> Vec<Batch> {
        vec![(0..self.tables.len()).map(|s| (s, 0..self.len(s))).collect()]
    }

    /// Every sequence in a step of its own.
    fn alone(&self) -> Vec<Batch> {
        (0..self.tables.len()).map(|s| vec![(s, 0..self.len(s))]).collect()
    }

    /// All but the last `steps` tokens of each sequence at once, then a token of each at a time.
    fn decoded(&self, steps: usize) -> Vec<Batch> {
        let sequences = 0..self.tables.len();
        let step = |step: usize| sequences.clone().filter_map(move |s| Some((s, self.len(s).checked_sub(step)?)));
        let first = step(steps).filter(|(_, end)| *end > 0).map(|(s, end)| (s, 0..end)).collect();
        let others = (1..=steps).rev().map(|left| step(left).map(|(s, at)| (s, at..at + 1)).collect());
        std::iter::once(first).chain(others).filter(|batch: &Batch| !batch.is_empty()).collect()
    }

    /// Steps of chunks of 1..=`longest` tokens of some sequences in any order, until all are done.
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

    /// Holds chosen positions of every sequence against plain attention.
    fn against_reference(&self, outputs: &[f32], positions: impl Fn(usize) -> bool) -> Result<(), String> {
        let (dim, group) = (self.heads.head_dim, self.heads.heads / self.heads.kv_heads);
        let width = self.heads.qkv_width();
        for sequence in 0..self.tables.len() {
            let row = |position: usize| &self.qkv[(self.starts[sequence] + position) * width..][..width];
            let turned = |position: usize, head: usize| {
                reference::rotate(&row(position)[head * dim..][..dim], position as u32, &self.rope)
            };
            let query = |position: usize, head: usize| match self.dtype {
                KvDtype::Bf16 => reference::round_bf16(&turned(position, head)),
                KvDtype::Int8 => reference::round_int8(&turned(position, head), false),
                KvDtype::F16 | KvDtype::Fp8 => unreachable!("no such cache on the CPU"),
            };
            let kept = |x: &[f32]| match self.dtype {
                KvDtype::Bf16 => reference::round_bf16(x),
                KvDtype::Int8 => reference::round_int8(x, true),
                KvDtype::F16 | KvDtype::Fp8 => unreachable!("no such cache on the CPU"),
            };
            for kv_head in 0..self.heads.kv_heads {
                let keys: Vec<Vec<f32>> =
                    (0..self.len(sequence)).map(|p| kept(&turned(p, self.heads.heads + kv_head))).collect();
                let wide = self.heads.value_dim;
                let at = (self.heads.heads + self.heads.kv_heads) * dim + kv_head * wide;
                let values: Vec<Vec<f32>> = (0..self.len(sequence)).map(|p| kept(&row(p)[at..][..wide])).collect();
                let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
                let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
                for position in (0..self.len(sequence)).filter(|&p| positions(p) || p + 1 == self.len(sequence)) {
                    for head in kv_head * group..(kv_head + 1) * group {
                        let query = query(position, head);
                        let first = (position + 1).saturating_sub(self.heads.window.unwrap_or(usize::MAX));
                        let (keys, values) = (&keys[first..=position], &values[first..=position]);
                        let score = (self.heads.scale, self.heads.softcap);
                        let (expected, steepest) = reference::attend(&query, keys, values, score);
                        let at = (self.starts[sequence] + position) * self.width() + head * wide;
                        let given = &outputs[at..][..wide];
                        // The softmax weights are rounded to bf16 (half a unit: up to 2^-8 of each) before they meet
                        // the values, but not in the sum they are divided by; scores carry f32 rounding.
                        let share = 2_f64.powi(-8) + 1e-5 + 1e-6 * steepest;
                        // In 8 bits weights are off by up to a 510th of the largest of their span, which can be much for
                        // one dimension: the whole head is judged.
                        let spread = match self.dtype {
                            KvDtype::Bf16 => 0.0,
                            KvDtype::Int8 => {
                                let squares: f64 = expected.iter().map(|sum| sum.magnitude.powi(2)).sum();
                                0.03 * (squares / wide as f64).sqrt()
                            }
                            KvDtype::F16 | KvDtype::Fp8 => unreachable!("no such cache on the CPU"),
                        };
                        for (d, (x, sum)) in given.iter().zip(expected).enumerate() {
                            let error = (f64::from(*x) - sum.value).abs();
                            if error.is_nan() || error > share * sum.magnitude + spread {
                                return Err(format!(
                                    "sequence {sequence}, position {position}, head {head}, dimension {d}: {x:e}, not {sum:?}"
                                ));
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn same(given: &[f32], expected: &[f32], what: &str) -> Result<(), String> {
    difference(given, expected).map_or(Ok(()), |d| Err(format!("{what}: {d}")))
}

/// Everything that must hold of one world.
fn check(backends: &mut [CpuBackend], shape: &Shape, sampled: impl Fn(usize) -> bool) -> Result<(), String> {
    let mut numbers = Numbers(!shape.seed);
    let world = World::new(&mut backends[1], shape);
    let expected = world.run(&mut backends[1], &world.at_once());
    world.against_reference(&expected, sampled)?;
    for longest in [1, 7, 100] {
        let schedule = world.chunked(longest, &mut numbers);
        same(&world.run(&mut backends[1], &schedule), &expected, &format!("chunks of up to {longest}"))?;
    }
    for backend in backends {
        let who = describe(backend);
        same(&world.run(backend, &world.at_once()), &expected, &format!("{who}, at once"))?;
        if backend.isa() != Isa::Portable {
            same(&world.run(backend, &world.alone()), &expected, &format!("{who}, alone"))?;
            same(&world.run(backend, &world.decoded(2)), &expected, &format!("{who}, decoded"))?;
        }
    }
    Ok(())
}

#[test]
fn every_head_shape_is_close_to_its_definition_and_the_same_everywhere() {
    let mut backends = backends();
    for (index, head_dim) in [32, 64, 96, 128, 256, 80, 112, 20, 192].into_iter().enumerate() {
        for ratio in [1, 2, 3, 4, 8] {
            let kv_heads = if ratio * head_dim > 256 { 1 } else { 2 };
            let block_size = [16, 32, 64][(index + ratio) % 3];
            let lens = vec![33, 2, 67 + 16 * index];
            let frequencies = [head_dim / 2, head_dim / 4, head_dim / 2 - 3, 5, 0][(index + ratio) % 5];
            let shape = Shape {
                ratio,
                kv_heads,
                head_dim,
                block_size,
                frequencies,
                lens,
                seed: (index * 10 + ratio) as u64,
                ..Shape::default()
            };
            check(&mut backends, &shape, |p| p % 9 == 0).unwrap_or_else(|e| panic!("{shape:?}: {e}"));
        }
    }
}

#[test]
fn any_batch_in_any_chunks_gives_the_same_bits() {
    let heads = (prop::sample::select(vec![1_usize, 2, 3, 4, 8]), 1_usize..=2);
    let cache = prop::sample::select(vec![16_usize, 32, 48, 64]);
    let lens = prop::collection::vec(1_usize..=180, 1..=4);
    let dim = prop::sample::select(vec![32_usize, 64, 96]);
    let strategy = (heads, dim, cache, lens, 0_usize..=48, any::<u64>()).prop_map(
        |((ratio, kv_heads), head_dim, block_size, lens, frequencies, seed)| Shape {
            ratio,
            kv_heads: if ratio == 8 { 1 } else { kv_heads },
            head_dim,
            block_size,
            frequencies: frequencies.min(head_dim / 2),
            lens,
            seed,
            ..Shape::default()
        },
    );
    let backends = RefCell::new(backends());
    let result = TestRunner::new(cases(12)).run(&strategy, |shape| {
        check(&mut backends.borrow_mut(), &shape, |p| p % 31 == 0).map_err(TestCaseError::fail)
    });
    result.unwrap_or_else(|e| panic!("{e}"));
}

/// Windows from one token to all, around spans of 64 and partitions of 256, with and without capped scores.
#[test]
fn windows_and_caps_are_their_definitions_however_cut() {
    let mut backends = backends();
    for (index, window) in [1, 2, 16, 63, 64, 65, 200, 255, 256, 257, 4000].into_iter().enumerate() {
        let shape = Shape {
            ratio: [1, 2, 4][index % 3],
            head_dim: [32, 64, 80][index % 3],
            block_size: [16, 32][index % 2],
            lens: vec![[70, 130, 330, 600][index % 4], 33],
            seed: index as u64,
            window: Some(window),
            softcap: [None, Some(30.0), Some(0.8)][index / 2 % 3],
            ..Shape::default()
        };
        let world = World::new(&mut backends[1], &shape);
        let expected = world.run(&mut backends[1], &world.at_once());
        world.against_reference(&expected, |p| p % 13 == 0).unwrap_or_else(|e| panic!("{shape:?}: {e}"));
        let mut numbers = Numbers(index as u64 + 50);
        for longest in [1, 40] {
            let given = world.run(&mut backends[0], &world.chunked(longest, &mut numbers));
            same(&given, &expected, "chunks").unwrap_or_else(|e| panic!("{shape:?}, {longest}: {e}"));
        }
        for backend in backends.iter_mut().filter(|_| shape.lens[0] < 200) {
            let who = describe(backend);
            same(&world.run(backend, &world.alone()), &expected, &who)
                .unwrap_or_else(|e| panic!("{shape:?}: {e}"));
        }
    }
}

/// A cache of bytes: its definition, and the same bits however the work is cut.
#[test]
fn eight_bit_caches_are_their_definition() {
    let mut backends: Vec<CpuBackend> =
        backends().into_iter().map(|backend| backend.with_kv_dtype(KvDtype::Int8)).collect();
    for (index, head_dim) in [64, 32, 128, 80, 96].into_iter().enumerate() {
        let shape = Shape {
            ratio: [3, 1, 4, 2, 7][index],
            kv_heads: [2, 1, 1, 2, 1][index],
            head_dim,
            block_size: [16, 32, 64][index % 3],
            frequencies: head_dim / 2,
            lens: vec![[130, 300, 90, 70, 65][index], 33, 1],
            seed: index as u64 + 900,
            window: [None, Some(100), None, None, Some(7)][index],
            dtype: KvDtype::Int8,
            ..Shape::default()
        };
        check(&mut backends, &shape, |p| p % 7 == 0).unwrap_or_else(|e| panic!("{shape:?}: {e}"));
    }
}

/// Contexts of several partitions of 256 tokens, their edges included.
#[test]
fn long_contexts_are_merged_alike() {
    let backend = &mut CpuBackend::new(2, isas()[0]);
    let edges = [0, 1, 63, 64, 65, 254, 255, 256, 257, 319, 320, 511, 512, 513, 699];
    for (ratio, head_dim, block_size) in [(3, 64, 16), (4, 32, 64), (1, 128, 32)] {
        let lens = vec![700, 256, 257, 513, 1, 64];
        let shape = Shape {
            ratio,
            kv_heads: 1,
            head_dim,
            block_size,
            frequencies: head_dim / 2,
            lens,
            seed: 77,
            ..Shape::default()
        };
        let world = World::new(backend, &shape);
        let expected = world.run(backend, &world.at_once());
        world.against_reference(&expected, |p| edges.contains(&p)).unwrap_or_else(|e| panic!("{shape:?}: {e}"));
        let mut numbers = Numbers(78);
        for longest in [1, 300] {
            let given = world.run(backend, &world.chunked(longest, &mut numbers));
            same(&given, &expected, "chunks").unwrap_or_else(|e| panic!("{shape:?}, {longest}: {e}"));
        }
        let given = world.run(backend, &world.alone());
        same(&given, &expected, "alone").unwrap_or_else(|e| panic!("{shape:?}: {e}"));
        // Other ISAs compute the last tokens over the fast one's cache: a whole prefill would take them seconds.
        for isa in isas() {
            let mut outputs = vec![f32::NAN; expected.len()];
            let mut cache = world.poisoned(backend);
            let (first, last): (Batch, Batch) = (0..world.tables.len())
                .map(|s| ((s, 0..world.len(s) - 1), (s, world.len(s) - 1..world.len(s))))
                .unzip();
            world.run_batch(backend, &first, &mut cache, &mut outputs);
            world.run_batch(&mut CpuBackend::new(1, isa), &last, &mut cache, &mut outputs);
            same(&outputs, &expected, "decode").unwrap_or_else(|e| panic!("{shape:?}, {isa:?}: {e}"));
        }
    }
}

/// What lies in slots and blocks beyond a sequence must not matter, whatever it is: poisoned and fresh caches agree.
#[test]
fn stale_slots_do_not_leak() {
    for backend in &mut backends() {
        let lens = (1..=35).collect();
        let shape = Shape {
            ratio: 2,
            kv_heads: 1,
            head_dim: 32,
            block_size: 16,
            frequencies: 16,
            lens,
            seed: 5,
            ..Shape::default()
        };
        let world = World::new(backend, &shape);
        for schedule in [world.at_once(), world.chunked(1, &mut Numbers(6)), world.chunked(9, &mut Numbers(7))] {
            let poisoned = world.run(backend, &schedule);
            assert!(poisoned.iter().all(|x| x.is_finite()), "{}", describe(backend));
            let mut cache = backend.new_kv_cache(world.cache, world.heads);
            let mut fresh = vec![f32::NAN; poisoned.len()];
            for batch in &schedule {
                world.run_batch(backend, batch, &mut cache, &mut fresh);
            }
            assert_eq!(difference(&poisoned, &fresh), None, "{}", describe(backend));
        }
    }
}

/// Tokens of one sequence never see another's, even where they share blocks of a common beginning.
#[test]
fn shared_blocks_serve_both_sequences() {
    let backend = &mut CpuBackend::new(2, isas()[0]);
    let lens = vec![90, 90];
    let shape = Shape {
        ratio: 3,
        kv_heads: 1,
        head_dim: 64,
        block_size: 32,
        frequencies: 32,
        lens,
        seed: 9,
        ..Shape::default()
    };
    let mut world = World::new(backend, &shape);
    // The second sequence begins with the first's 64 tokens: the same rows, then the same blocks.
    let width = world.heads.qkv_width();
    world.qkv.copy_within(0..64 * width, 90 * width);
    world.table = load_f32(backend, &world.qkv, width);
    let expected = world.run(backend, &world.at_once());
    let (mine, theirs) = world.tables.split_at_mut(1);
    theirs[0][..2].copy_from_slice(&mine[0][..2]);
    let given = world.run(backend, &[vec![(0, 0..90)], vec![(1, 64..90)]]);
    let out = world.width();
    assert_eq!(difference(&given[..90 * out], &expected[..90 * out]), None);
    assert_eq!(difference(&given[154 * out..], &expected[154 * out..]), None);
    assert_eq!(difference(&expected[90 * out..154 * out], &expected[..64 * out]), None);
}

/// Rows in the 8-bit form are the f32 form quantised, heads that are no whole groups of 32 included.
#[test]
fn outputs_in_both_forms_agree() {
    for (index, backend) in backends().iter_mut().enumerate() {
        let (ratio, head_dim) = [(2, 32), (4, 16)][index % 2];
        let shape = Shape { ratio, kv_heads: 2, head_dim, frequencies: 7, seed: 4, ..Shape::default() };
        let world = World::new(backend, &shape);
        let expected = world.run(backend, &world.at_once());
        let mut ones = Vec::new();
        for row in 0..128 {
            for group in 0..4 {
                ones.extend(0x3c00_u16.to_le_bytes());
                ones.extend((0..32).map(|i| u8::from(group * 32 + i == row)));
            }
        }
        let stored = rill_kernels::Stored { dtype: rill_kernels::Dtype::Q8_0, rows: 128, cols: 128, data: &ones };
        let eight = backend.load_linear(&[stored]).expect("sound weights");
        let (mut qkv, mut step, mut out) = (Matrix::default(), Step::default(), Rows::default());
        let ids: Vec<u32> = (0..20).collect();
        let slots: Vec<u32> = ids.iter().map(|p| world.tables[0][*p as usize / 16] * 16 + p % 16).collect();
        let input = StepInput {
            positions: &ids,
            slot_mapping: &slots,
            query_starts: &[0, 20],
            context_lens: &[20],
            block_tables: &world.tables[0],
            block_table_starts: &[0, 2],
        };
        let mut cache = backend.new_kv_cache(world.cache, world.heads);
        backend.embed(&world.table, &ids, 1.0, &mut qkv);
        backend.prepare(input, &world.rope, world.heads, &mut step);
        backend.attention(&qkv, world.heads, input, &mut step, &mut cache, (&mut out, crate::inputs::ALL));
        let given = product(backend, &eight, &out);
        let expected: Vec<f32> =
            expected.chunks_exact(128).flat_map(reference::shift_row).map(|x| x as f32).collect();
        assert_eq!(given, expected, "{}", describe(backend));
    }
}

/// One score that dwarfs the rest, late or early, and scores far below any exponent's reach.
#[test]
fn steep_scores_pick_one_value() {
    for backend in &mut backends() {
        let lens = vec![130];
        let shape = Shape {
            ratio: 1,
            kv_heads: 1,
            head_dim: 32,
            block_size: 16,
            frequencies: 0,
            lens,
            seed: 3,
            ..Shape::default()
        };
        for peak in [0, 17, 64, 129] {
            let mut world = World::new(backend, &shape);
            let width = world.heads.qkv_width();
            for (position, row) in world.qkv[..130 * width].chunks_exact_mut(width).enumerate() {
                row[..32].fill(100.0);
                row[32..64].fill(if position == peak { 100.0 } else { -100.0 });
                row[64..].fill(position as f32 + 1.0);
            }
            world.table = load_f32(backend, &world.qkv, width);
            let out = world.run(backend, &world.at_once());
            for (position, row) in out.chunks_exact(32).enumerate() {
                let mean = (1..=position + 1).sum::<usize>() as f32 / (position + 1) as f32;
                let expected = if position < peak { mean } else { peak as f32 + 1.0 };
                let right = row.iter().all(|x| (x - expected).abs() <= 0.002 * expected);
                assert!(right, "position {position}: {row:?}, not {expected}, {}", describe(backend));
            }
        }
    }
}

/// bf16 instructions of AVX-512 take denormals for zero, other ISAs do not: nothing else may differ, and no more than
/// a denormal's size.
#[test]
fn denormals_differ_by_no_more_than_their_size() {
    let shape = Shape {
        ratio: 2,
        kv_heads: 1,
        head_dim: 32,
        block_size: 16,
        frequencies: 16,
        lens: vec![70],
        seed: 8,
        ..Shape::default()
    };
    let mut expected: Option<Vec<f32>> = None;
    for backend in &mut backends() {
        let mut world = World::new(backend, &shape);
        let width = world.heads.qkv_width();
        for row in world.qkv[..70 * width].chunks_exact_mut(width) {
            row[96..].iter_mut().for_each(|x| *x *= 1e-38);
        }
        world.table = load_f32(backend, &world.qkv, width);
        let out = world.run(backend, &world.at_once());
        for (a, b) in out.iter().zip(expected.get_or_insert(out.clone())) {
            assert!((a - *b).abs() < 2e-38, "{a:e}, not {b:e}, {}", describe(backend));
        }
    }
}
