//! Kernels on a GPU against the bounds of docs/cuda-performance.md: what each call must move and compute, how long it
//! took, and what share of the bound that is. `cargo bench -p rill-kernels --bench cuda`; without a GPU it says so.

use rill_kernels::cuda::{CudaBackend, Driver, DriverOptions, Matrix, Rows, Step};
use rill_kernels::{
    Activation, AttentionShape, Backend, CacheShape, Dtype, Form, KvDtype, LogitFinish, Ranking, Rope, StepInput,
    Stored,
};
use std::sync::Arc;
use std::time::Instant;

/// Data-sheet limits: bytes of memory, and products of bf16, tf32 and int8, a second.
struct Limits {
    memory: f64,
    bf16: f64,
    tf32: f64,
    int8: f64,
}

fn limits(name: &str) -> Option<Limits> {
    match name {
        name if name.contains("H100") => {
            Some(Limits { memory: 3.35e12, bf16: 990e12, tf32: 495e12, int8: 1980e12 })
        }
        name if name.contains("H200") => {
            Some(Limits { memory: 4.8e12, bf16: 990e12, tf32: 495e12, int8: 1980e12 })
        }
        name if name.contains("A100") => Some(Limits { memory: 2.0e12, bf16: 312e12, tf32: 156e12, int8: 624e12 }),
        name if name.contains("L4,") => Some(Limits { memory: 300e9, bf16: 121e12, tf32: 60e12, int8: 242e12 }),
        _ => None,
    }
}

/// What one call must do.
struct Work {
    name: String,
    bytes: f64,
    operations: f64,
    product: Product,
}

/// What tensor cores multiply.
#[derive(Clone, Copy, PartialEq)]
enum Product {
    Bf16,
    Tf32,
    Int8,
}

impl Work {
    /// Nothing but bytes that come and go.
    fn moving(name: String, bytes: usize) -> Work {
        Work { name, bytes: bytes as f64, operations: 0.0, product: Product::Bf16 }
    }
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
            let rate = match work.product {
                Product::Bf16 => limits.bf16,
                Product::Tf32 => limits.tf32,
                Product::Int8 => limits.int8,
            };
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
        // What a row's number takes, what multiplies it, and how often.
        let (activation, product, times) = match dtype {
            Dtype::BF16 => (4, Product::Bf16, 1),
            Dtype::F16 => (4, Product::Tf32, 1),
            Dtype::F32 => (4, Product::Tf32, 3),
            _ => (1, Product::Int8, 1),
        };
        let work = Work {
            name: format!("linear {dtype:?} 4096 x 4096, {tokens} rows"),
            bytes: (layer.bytes() + tokens * SIZE * (activation + 4)) as f64,
            operations: (2 * times * tokens * SIZE * SIZE) as f64,
            product,
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
            product: Product::Bf16,
        };
        self.time(&work, |backend| {
            backend.attention(&qkv, heads, input, &mut step, &mut cache, (&mut out, Form::F32));
        });
    }

    /// What is done row by row, `tokens` of them, in the shapes of a Llama-3-8B.
    fn rows(&mut self, tokens: usize) {
        const WIDTH: usize = 4096;
        const INNER: usize = 14_336;
        let weight = self.backend.load_vector(&vec![1.0; WIDTH]);
        let (mut x, mut sum, mut gate_up, mut out) =
            (Matrix::default(), Matrix::default(), Matrix::default(), Rows::default());
        self.backend.clear(&mut x, tokens, WIDTH);
        self.backend.clear(&mut sum, tokens, WIDTH);
        self.backend.clear(&mut gate_up, tokens, 2 * INNER);
        // A byte and its share of scale and sum.
        let rounded = |numbers: usize| numbers * 5 / 4;
        let work = Work::moving(format!("rms_norm {tokens} x {WIDTH}"), tokens * (4 * WIDTH + rounded(WIDTH)));
        self.time(&work, |backend| backend.rms_norm(&x, None, &weight, 1e-5, (&mut out, Form::Q8)));
        let work = Work::moving(format!("activate {tokens} x {INNER}"), tokens * (8 * INNER + rounded(INNER)));
        self.time(&work, |backend| backend.gated(Activation::Silu, &gate_up, (&mut out, Form::Q8)));
        let work = Work::moving(format!("add_scaled {tokens} x {WIDTH}"), 12 * tokens * WIDTH);
        self.time(&work, |backend| backend.add_scaled(&x, 0.5, &mut sum));
        let work = Work::moving(format!("add_bias {tokens} x {WIDTH}"), 8 * tokens * WIDTH);
        self.time(&work, |backend| backend.add_bias(&mut sum, &weight));
    }

    /// Logits of `tokens` rows: a head of so few columns that finishing, ranking and summing them is what takes time.
    fn sampling(&mut self, tokens: usize, count: usize) {
        const VOCAB: usize = 128_256;
        let data = vec![0; 2 * VOCAB];
        let head = self.backend.load_linear(&[Stored { dtype: Dtype::BF16, rows: VOCAB, cols: 1, data: &data }]);
        let head = head.expect("packs");
        let (mut x, mut rows) = (Matrix::default(), Rows::default());
        self.backend.clear(&mut x, tokens, 1);
        self.backend.to_rows(&x, None, (&mut rows, Form::F32));
        let ranking = Ranking { count, rates: vec![1.0; tokens] };
        let finish = LogitFinish { bias: None, scale: 1.0, softcap: Some(30.0) };
        // Written by the head, read and written by the finish, read once more.
        let bytes = head.bytes() + 16 * tokens * VOCAB;
        let work = Work::moving(format!("{count} best of {VOCAB}, {tokens} rows"), bytes);
        self.time(&work, |backend| backend.start_logits(&head, &rows, finish, Some(&ranking)));
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
    for dtype in [Dtype::Q4_0, Dtype::Q8_0, Dtype::BF16, Dtype::F16, Dtype::F32] {
        [1, 8, 64, 512, 2048].into_iter().for_each(|tokens| bench.linear(dtype, tokens));
    }
    for dtype in [KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8, KvDtype::Int8] {
        bench.attention(dtype, 1, 8192, 1);
        bench.attention(dtype, 32, 2048, 1);
        bench.attention(dtype, 1, 2048, 2048);
    }
    [64, 2048].into_iter().for_each(|tokens| bench.rows(tokens));
    [1, 8, 64].into_iter().for_each(|count| bench.sampling(8, count));
}
