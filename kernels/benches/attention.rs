//! Paged attention of the default model's shape (9 query heads on 3 KV heads of 64): decode at growing contexts and
//! prefill chunks behind cached contexts.
//!
//! `cargo bench -p rill-kernels --bench attention`. Decode is bound by reading the cache: GB/s of keys and values,
//! against the machine's read bandwidth (or its cache's, while a layer's context fits). Prefill is bound by
//! products of bf16 (`vdpbf16ps`, or twice as many of f32): elements are multiply-accumulates, 2 · heads · head_dim for every (query, visible token).

mod default_model;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use default_model::{BLOCK_SIZE, Batch, HEADS};
use rill_kernels::{
    Backend, CacheShape, CpuBackend, Dtype, Isa, KvCache, KvDtype, Matrix, Rope, Rows, Step, Stored,
};

/// A backend, a cache and inputs; every part of the cache is written before it is measured.
struct Bench {
    backend: CpuBackend,
    rope: Rope,
    cache: KvCache,
    qkv: Matrix,
    step: Step,
    out: Rows,
}

impl Bench {
    fn new(sequences: usize, context: usize, tokens: usize) -> Bench {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut backend = CpuBackend::new(threads, Isa::detect());
        let width = HEADS.qkv_width();
        let rows = 512;
        let values: Vec<u8> =
            (0..rows * width).flat_map(|i| ((i * 7919 % 193) as f32 / 96.0 - 1.0).to_le_bytes()).collect();
        let table = Stored { dtype: Dtype::F32, rows, cols: width, data: &values };
        let table = backend.load_linear(&[table]).expect("packs");
        let blocks = Batch::blocks(sequences, context);
        let cache = backend.new_kv_cache(CacheShape { blocks, block_size: BLOCK_SIZE }, HEADS);
        let inverse_frequencies = (0..32).map(|i| 1e4_f32.powf(-(i as f32) / 32.0)).collect();
        let rope = Rope { inverse_frequencies, factor: 1.0 };
        let mut bench =
            Bench { backend, rope, cache, qkv: Matrix::default(), step: Step::default(), out: Rows::default() };
        let fill = |batch: &Batch, bench: &mut Bench| {
            let ids: Vec<u32> = (0..batch.rows()).map(|i| (i % rows) as u32).collect();
            bench.backend.embed(&table, &ids, 1.0, &mut bench.qkv);
            bench.prepare(batch);
        };
        for end in (BLOCK_SIZE..=context).step_by(BLOCK_SIZE) {
            // Blocks of a sequence lie the same way whatever its length, so a prefix fills its slots.
            fill(&Batch::new(sequences, end, BLOCK_SIZE), &mut bench);
            bench.run(&Batch::new(sequences, end, BLOCK_SIZE));
        }
        fill(&Batch::new(sequences, context, tokens), &mut bench);
        bench
    }

    fn prepare(&mut self, batch: &Batch) {
        self.backend.prepare(batch.input(), &self.rope, HEADS, &mut self.step);
    }

    fn run(&mut self, batch: &Batch) {
        let form = rill_kernels::Form::Q8;
        let out = (&mut self.out, form);
        self.backend.attention(&self.qkv, HEADS, batch.input(), &mut self.step, &mut self.cache, out);
    }
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention/decode");
    for (sequences, context) in [(1, 128), (1, 1024), (1, 8192), (16, 128), (16, 1024)] {
        let batch = Batch::new(sequences, context, 1);
        let mut bench = Bench::new(sequences, context, 1);
        group.throughput(Throughput::Bytes(
            (sequences * context * KvCache::bytes_per_token(HEADS, KvDtype::Bf16)) as u64,
        ));
        group.bench_function(BenchmarkId::new(format!("{sequences} sequences"), context), |b| {
            b.iter(|| bench.run(&batch));
        });
    }
    group.finish();
    let mut group = c.benchmark_group("attention/prefill 256");
    for cached in [0, 600, 4096] {
        let batch = Batch::new(1, cached + 256, 256);
        let mut bench = Bench::new(1, cached + 256, 256);
        let visible: usize = (cached + 1..=cached + 256).sum();
        group.throughput(Throughput::Elements((visible * 2 * HEADS.heads * HEADS.head_dim) as u64));
        group.bench_function(BenchmarkId::new("behind", cached), |b| b.iter(|| bench.run(&batch)));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(1)).warm_up_time(std::time::Duration::from_millis(300));
    targets = attention
}
criterion_main!(benches);
