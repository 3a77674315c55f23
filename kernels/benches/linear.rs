//! Linear layers of the default model, one row to a prefill chunk, against what the machine can do, which is printed first.
//!
//! `cargo bench -p rill-kernels --bench linear`. For one row the limit is memory, and the figure is bytes of weights a
//! second (small layers stay in caches); for more it is products: elements are multiply-adds.

mod default_model;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use default_model::weights;
use rill_kernels::{Backend, CpuBackend, Dtype, Isa, Matrix, Rows, Stored, limits};
use std::time::Duration;

fn linear(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let limits = limits::measure(Isa::detect(), threads, Duration::from_secs(1));
    println!(
        "limits: {:.1} GB/s read, {:.0} GMAC/s int8",
        limits.read_bytes_per_s / 1e9,
        limits.int8_macs_per_s / 1e9
    );
    let mut backend = CpuBackend::new(threads, Isa::detect());
    for (name, dtype, rows, cols) in [
        ("gate_up", Dtype::Q4_1, 3072, 576),
        ("down", Dtype::Q4_1, 576, 1536),
        ("qkv", Dtype::Q4_1, 960, 576),
        ("head", Dtype::Q8_0, 49152, 576),
        ("gate_up_bf16", Dtype::BF16, 3072, 576),
        ("head_bf16", Dtype::BF16, 49152, 576),
        ("gate_up_f16", Dtype::F16, 3072, 576),
    ] {
        let data = weights(dtype, rows, cols);
        let layer = backend.load_linear(&[Stored { dtype, rows, cols, data: &data }]).expect("packs");
        let table: Vec<u8> = (0..600 * cols).flat_map(|i| ((i % 97) as f32 - 48.0).to_le_bytes()).collect();
        let table = Stored { dtype: Dtype::F32, rows: 600, cols, data: &table };
        let table = backend.load_linear(&[table]).expect("packs");
        let norm = backend.load_vector(&vec![1.0; cols]);
        let mut group = c.benchmark_group(format!("linear/{name}"));
        for tokens in [1, 4, 16, 32, 256] {
            let (mut x, mut input, mut out) = (Matrix::default(), Rows::default(), Matrix::default());
            backend.embed(&table, &(0..tokens as u32).collect::<Vec<_>>(), 1.0, &mut x);
            let form = backend.form(&layer);
            backend.rms_norm(&x, None, &norm, 1e-5, (&mut input, form));
            group.throughput(match tokens {
                1 => Throughput::Bytes(layer.bytes() as u64),
                _ => Throughput::Elements((tokens * rows * cols) as u64),
            });
            group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
                b.iter(|| backend.linear(&layer, &input, &mut out));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    targets = linear
}
criterion_main!(benches);
