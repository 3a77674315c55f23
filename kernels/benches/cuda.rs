//! Kernels on a GPU against the bounds of docs/cuda-performance.md: what each call must move and compute, how long it
//! took, and what share of the bound that is. `cargo bench -p rill-kernels --bench cuda`; without a GPU it says so.

use rill_kernels::cuda::{CudaBackend, Driver, DriverOptions, Matrix, Rows, Step};
use rill_kernels::{AttentionShape, Backend, CacheShape, Dtype, KvDtype, Rope, StepInput, Stored};
use std::sync::Arc;
use std::time::Instant;

/// Data-sheet limits: bytes, bf16 operations and int8 operations a second.
struct Limits {
    memory: f64,
    floats: f64,
    bytes: f64,
}

fn limits(name: &str) -> Option<Limits> {
    match name {
        name if name.contains("H100") => Some(Limits { memory: 3.35e12, floats: 990e12, bytes: 1980e12 }),
        name if name.contains("H200") => Some(Limits { memory: 4.8e12, floats: 990e12, bytes: 1980e12 }),
        name if name.contains("A100") => Some(Limits { memory: 2.0e12, floats: 312e12, bytes: 624e12 }),
        name if name.contains("L4,") => Some(Limits { memory: 300e9, floats: 121e12, bytes: 242e12 }),
        _ => None,
    }
}

/// What one call must do.
struct Work {
    name: String,
    bytes: f64,
    operations: f64,
    /// The product is of bytes.
    quantised: bool,
}

struct Bench {
    backend: CudaBackend,
    limits: Option<Limits>,
    /// Something small to read: reading waits for the device.
    mark: Matrix,
}

impl Bench {
    /// Calls until a tenth of a second has passed, twice, and keeps the shorter time.
    fn time(&mut self, work: &Work, mut call: impl FnMut(&mut CudaBackend)) {
        let mark = &self.mark;
        let wait = |backend: &mut CudaBackend| {
            backend.read(mark, 0..1);
            backend.check().expect("the GPU works");
        };
        call(&mut self.backend);
        wait(&mut self.backend);
        let mut best = f64::INFINITY;
        for _ in 0..2 {
            let (start, mut calls) = (Instant::now(), 0);
            while start.elapsed().as_secs_f64() < 0.1 {
                (0..20).for_each(|_| call(&mut self.backend));
                calls += 20;
                wait(&mut self.backend);
            }
            best = best.min(start.elapsed().as_secs_f64() / f64::from(calls));
        }
        let rates = format!("{:8.1} GB/s {:8.2} Top/s", work.bytes / best * 1e-9, work.operations / best * 1e-12);
        let share = self.limits.as_ref().map(|limits| {
            let rate = if work.quantised { limits.bytes } else { limits.floats };
            let bound = (work.bytes / limits.memory).max(work.operations / rate);
            format!("bound {:8.1} us, {:3.0} % of it", bound * 1e6, 100.0 * bound / best)
        });
        println!("{:36} {:9.1} us  {rates}  {}", work.name, best * 1e6, share.unwrap_or_default());
    }

    fn linear(&mut self, dtype: Dtype, tokens: usize) {
        const SIZE: usize = 4096;
        let data = vec![0x11_u8; SIZE * dtype.row_bytes(SIZE).expect("whole blocks")];
        let layer = self.backend.load_linear(&[Stored { dtype, rows: SIZE, cols: SIZE, data: &data }]);
        let layer = layer.expect("packs");
        let form = self.backend.form(&layer);
        let (mut x, mut rows, mut out) = (Matrix::default(), Rows::default(), Matrix::default());
        self.backend.clear(&mut x, tokens, SIZE);
        self.backend.to_rows(&x, None, (&mut rows, form));
        let activation = if dtype == Dtype::BF16 { 4 } else { 1 };
        let work = Work {
            name: format!("linear {dtype:?} 4096 x 4096, {tokens} rows"),
            bytes: (layer.bytes() + tokens * SIZE * (activation + 4)) as f64,
            operations: (2 * tokens * SIZE * SIZE) as f64,
            quantised: dtype != Dtype::BF16,
        };
        self.time(&work, |backend| backend.linear(&layer, &rows, &mut out));
    }

    /// `tokens` new ones of each of `sequences` contexts.
    fn attention(&mut self, dtype: KvDtype, sequences: usize, context: usize, tokens: usize) {
        const BLOCK: usize = 16;
        let heads = AttentionShape::full(32, 8, 128, 0.088);
        let rope =
            Rope { inverse_frequencies: (0..64).map(|i| 1e4_f32.powf(-(i as f32) / 64.0)).collect(), factor: 1.0 };
        let blocks = context.div_ceil(BLOCK);
        self.backend.set_kv_dtype(dtype);
        let backend = &mut self.backend;
        let shape = CacheShape { blocks: sequences * blocks, block_size: BLOCK };
        let mut cache = backend.new_kv_cache(shape, heads);
        let block = |s: usize, i: usize| (s * blocks + i) as u32;
        let tables: Vec<u32> = (0..sequences).flat_map(|s| (0..blocks).map(move |i| block(s, i))).collect();
        let starts = |each: usize| -> Vec<u32> { (0..=sequences).map(|s| (s * each) as u32).collect() };
        let new = || (0..sequences).flat_map(move |s| (context - tokens..context).map(move |p| (s, p)));
        let positions: Vec<u32> = new().map(|(_, p)| p as u32).collect();
        let slots: Vec<u32> =
            new().map(|(s, p)| block(s, p / BLOCK) * BLOCK as u32 + (p % BLOCK) as u32).collect();
        let (lens, query_starts, table_starts) = (vec![context as u32; sequences], starts(tokens), starts(blocks));
        let input = StepInput {
            positions: &positions,
            slot_mapping: &slots,
            query_starts: &query_starts,
            context_lens: &lens,
            block_tables: &tables,
            block_table_starts: &table_starts,
        };
        let (mut qkv, mut out, mut step) = (Matrix::default(), Rows::default(), Step::default());
        backend.clear(&mut qkv, positions.len(), heads.qkv_width());
        backend.prepare(input, &rope, heads, &mut step);
        let per_token = self.backend.kv_bytes_per_token(heads);
        // A token among the new ones sees half of them.
        let seen = sequences * tokens * (context - tokens / 2);
        let work = Work {
            name: format!("attention {dtype:?}, {sequences} x {tokens} of {context}"),
            bytes: (sequences * context * per_token + 2 * positions.len() * 32 * 128 * 4) as f64,
            operations: (4 * seen * 32 * 128) as f64,
            quantised: false,
        };
        let form = rill_kernels::Form::F32;
        self.time(&work, |backend| backend.attention(&qkv, heads, input, &mut step, &mut cache, (&mut out, form)));
    }

    fn rows(&mut self) {
        let weight = self.backend.load_vector(&vec![1.0; 4096]);
        let (mut x, mut out) = (Matrix::default(), Rows::default());
        self.backend.clear(&mut x, 64, 4096);
        let work = Work {
            name: "rms_norm 64 x 4096".into(),
            bytes: 64.0 * 4096.0 * 8.0,
            operations: 0.0,
            quantised: false,
        };
        let form = rill_kernels::Form::F32;
        self.time(&work, |backend| backend.rms_norm(&x, None, &weight, 1e-5, (&mut out, form)));
    }
}

fn main() {
    let driver = match Driver::open(DriverOptions { ordinal: 0, memory_utilization: 0.5 }) {
        Ok(driver) => driver,
        Err(error) => {
            println!("no GPU, so nothing is measured: {error}");
            return;
        }
    };
    let mut backend =
        CudaBackend::new(Arc::new(driver), std::thread::available_parallelism().map_or(1, usize::from));
    let name = backend.name();
    let mut mark = Matrix::default();
    backend.clear(&mut mark, 1, 1);
    let limits = limits(&name);
    println!("{name}{}", if limits.is_some() { "" } else { ": its limits are not known here" });
    let mut bench = Bench { backend, limits, mark };
    for dtype in [Dtype::Q4_0, Dtype::Q8_0, Dtype::BF16] {
        [1, 8, 64, 512, 2048].into_iter().for_each(|tokens| bench.linear(dtype, tokens));
    }
    for dtype in [KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8, KvDtype::Int8] {
        bench.attention(dtype, 1, 8192, 1);
        bench.attention(dtype, 32, 2048, 1);
        bench.attention(dtype, 1, 2048, 2048);
    }
    bench.rows();
}
