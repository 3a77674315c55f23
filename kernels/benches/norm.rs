//! Row operations of the default model: norm and gated activation, each fused with quantising; GB/s of f32 read.
//!
//! `cargo bench -p rill-kernels --bench norm`. Rows are read once from the cache the operation before left them in, so
//! the limit is the second-level cache's, not memory's.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rill_kernels::{Backend, CpuBackend, Dtype, Form, Isa, Matrix, Rows, Stored};

const FORM: Form = Form::Q8;

/// `rows × width` ordinary values.
fn matrix(backend: &mut CpuBackend, rows: usize, width: usize) -> Matrix {
    let data: Vec<u8> =
        (0..rows * width).flat_map(|i| ((i * 31 % 97) as f32 / 24.0 - 2.0).to_le_bytes()).collect();
    let table =
        backend.load_linear(&[Stored { dtype: Dtype::F32, rows, cols: width, data: &data }]).expect("packs");
    let mut out = Matrix::default();
    backend.embed(&table, &(0..rows as u32).collect::<Vec<_>>(), 1.0, &mut out);
    out
}

fn norm(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut backend = CpuBackend::new(threads, Isa::detect());
    let mut out = Rows::default();
    let mut group = c.benchmark_group("rms_norm/576");
    let weight = backend.load_vector(&[1.1; 576]);
    for rows in [1, 16, 256] {
        let x = matrix(&mut backend, rows, 576);
        group.throughput(Throughput::Bytes((rows * 576 * 4) as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |b| {
            b.iter(|| backend.rms_norm(&x, None, &weight, 1e-5, (&mut out, FORM)));
        });
    }
    group.finish();
    let mut group = c.benchmark_group("silu_mul/1536");
    for rows in [1, 16, 256] {
        let x = matrix(&mut backend, rows, 3072);
        group.throughput(Throughput::Bytes((rows * 3072 * 4) as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |b| {
            b.iter(|| backend.silu_mul(&x, (&mut out, FORM)));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(1)).warm_up_time(std::time::Duration::from_millis(300));
    targets = norm
}
criterion_main!(benches);
