//! Whole forward passes of the default model: decode steps of 1 to 32 sequences, and prefill chunks.
//!
//! `cargo bench -p rill-models --bench forward`. Elements are tokens. What a token costs at least: for one sequence its
//! weights read once (97 MB), for many 135 M multiply-adds (106 M where no logits are asked for). The default model is
//! fetched if the cache does not hold it.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rill_models::{DEFAULT_MODEL, ForwardInput, LoadOptions, NoProgress, SourceOptions, load, resolve};

const BLOCK_SIZE: usize = 16;
/// Tokens a sequence may hold.
const TOKENS_MAX: usize = 640;
const SEQUENCES_MAX: usize = 32;

/// `count` sequences, each with tokens `start..end` in this step and logits for the last one.
fn step(count: usize, start: usize, end: usize) -> ForwardInput {
    let mut input = ForwardInput { query_starts: vec![0], block_table_starts: vec![0], ..ForwardInput::default() };
    for sequence in 0..count {
        for position in start..end {
            input.token_ids.push((1000 + 37 * position + 101 * sequence) as u32 % 40_000);
            input.positions.push(position as u32);
            input.slot_mapping.push((sequence * TOKENS_MAX + position) as u32);
        }
        input.query_starts.push(input.token_ids.len() as u32);
        input.context_lens.push(end as u32);
        let first = sequence * TOKENS_MAX / BLOCK_SIZE;
        input.block_tables.extend((first..first + end.div_ceil(BLOCK_SIZE)).map(|block| block as u32));
        input.block_table_starts.push(input.block_tables.len() as u32);
        input.logit_rows.push(input.token_ids.len() as u32 - 1);
    }
    input
}

fn forward(c: &mut Criterion) {
    let files = resolve(DEFAULT_MODEL, &SourceOptions::from_env(), &mut NoProgress).expect("the default model");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut model = load(&files, &LoadOptions::on_cpu(threads)).expect("loads").model;
    model.allocate_kv_cache(SEQUENCES_MAX * TOKENS_MAX / BLOCK_SIZE, BLOCK_SIZE).expect("a KV cache");
    let mut logits = Vec::new();
    let mut group = c.benchmark_group("forward");
    group.sample_size(30);
    for (name, sequences, start, end) in [
        ("decode/1 at 90", 1, 90, 91),
        ("decode/1 at 600", 1, 600, 601),
        ("decode/8 at 90", 8, 90, 91),
        ("decode/16 at 90", 16, 90, 91),
        ("decode/32 at 90", 32, 90, 91),
        ("prefill/60", 1, 0, 60),
        ("prefill/256", 1, 0, 256),
        ("prefill/256 at 256", 1, 256, 512),
    ] {
        for chunk in (0..start).step_by(30) {
            model.forward(&step(sequences, chunk, chunk + 30), &mut logits).expect("fills the cache");
        }
        let input = step(sequences, start, end);
        group.throughput(Throughput::Elements(input.token_ids.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| model.forward(&input, &mut logits).expect("runs"));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().without_plots();
    targets = forward
}
criterion_main!(benches);
