//! Kernels on a GPU against the bounds of docs/cuda-performance.md: what each call must move and compute, how long it
//! took, and what share of the bound that is. `cargo bench -p rill-kernels --bench cuda`; without a GPU it says so.

use rill_kernels::cuda::{CudaBackend, Driver, DriverOptions, Matrix, Rows, Step};
use rill_kernels::{
    Activation, AttentionShape, Backend, CacheShape, ColumnRuns, Dtype, Form, KvDtype, LogitFinish, LowRank,
    LowRankUpdate, Ranking, Rope, StepInput, Stored,
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
    /// The row of docs/cuda-performance.md it belongs to, by its first column; a test holds the two together.
    row: &'static str,
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
    fn moving(row: &'static str, name: String, bytes: usize) -> Work {
        Work { row, name, bytes: bytes as f64, operations: 0.0, product: Product::Bf16 }
    }
}

/// Linear layers of 4096 × 4096 for so many rows.
fn linear_row(dtype: Dtype, tokens: usize) -> &'static str {
    match (dtype, tokens) {
        (_, 9..=64) => "linear_*_2x4, 8 < R ≤ 32 or few outputs",
        (Dtype::BF16 | Dtype::F16, ..=8) => "linear_brain_1x1, linear_half_1x1, R ≤ 8",
        (Dtype::F32, ..=8) => "linear_single_1x1, R ≤ 8",
        (Dtype::Q4_0, ..=8) => "linear_four_1x1, R ≤ 8",
        (_, ..=8) => "linear_eight_1x1, R ≤ 8",
        (Dtype::BF16, _) => "linear_brain_staged, R = 2048",
        (Dtype::F16, _) => "linear_half_staged, R = 2048",
        (Dtype::F32, _) => "linear_single_staged, R = 2048",
        _ => "linear_four_staged, linear_eight_staged, R = 2048",
    }
}

fn attention_row(dtype: KvDtype, tokens: usize) -> &'static str {
    match (dtype, tokens) {
        (KvDtype::Bf16 | KvDtype::F16, 1) => "attend_split_bf16_*, attend_split_f16_*, decode",
        (KvDtype::Fp8, 1) => "attend_split_fp8_*",
        (KvDtype::Int8, 1) => "attend_split_int8_*",
        _ => "attend_shared_*, prefill, R = 2048",
    }
}

/// Heads of a Llama-3-8B and its rotations.
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;

fn heads() -> AttentionShape {
    AttentionShape::full(HEADS, KV_HEADS, HEAD_DIM, 0.088)
}

fn rope() -> Rope {
    Rope { inverse_frequencies: (0..64).map(|i| 1e4_f32.powf(-(i as f32) / 64.0)).collect(), factor: 1.0 }
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
        let (name, row, share) = (&work.name, work.row, share.unwrap_or_default());
        println!("{name:40} {:9.1} us  {rates}  {share}  [{row}]", best * 1e6);
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
            row: linear_row(dtype, tokens),
            name: format!("linear {dtype:?} 4096 x 4096, {tokens} rows"),
            bytes: (layer.bytes() + tokens * SIZE * (activation + 4)) as f64,
            operations: (2 * times * tokens * SIZE * SIZE) as f64,
            product,
        };
        self.time(&work, |backend| backend.linear(&layer, &rows, &mut out));
    }

    /// `tokens` new ones of each of `sequences` contexts, and what writes and merges them. With a window, which is chosen
    /// to lie over the end of a partition, merging has as much to do as attending.
    fn attention(
        &mut self,
        dtype: KvDtype,
        (sequences, context): (usize, usize),
        tokens: usize,
        window: Option<usize>,
    ) {
        const BLOCK: usize = 16;
        let (heads, rope) = (AttentionShape { window, ..heads() }, rope());
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
        let read = window.unwrap_or(context);
        // A token among the new ones sees half of them.
        let seen = sequences * tokens * (read - tokens / 2);
        // Queries and outputs; where it is two partitions that merge, their outputs, maxima and sums.
        let merged = window.map_or(0, |_| 2 * 4 * HEADS * (HEAD_DIM + 2) * 2);
        let work = Work {
            row: window.map_or(attention_row(dtype, tokens), |_| "merge_partitions"),
            name: format!("attention {dtype:?}, {sequences} x {tokens} of {read}"),
            bytes: (sequences * read * per_token + positions.len() * (2 * HEADS * HEAD_DIM * 4 + merged)) as f64,
            operations: (4 * seen * HEADS * HEAD_DIM) as f64,
            product: Product::Bf16,
        };
        self.time(&work, |backend| {
            backend.attention(&qkv, heads, input, &mut step, &mut cache, (&mut out, Form::F32));
        });
    }

    /// Angles of `tokens` rows, their upload included; their keys and values written to a cache, for rows that no sequence
    /// attends for; and blocks of it copied.
    fn cache(&mut self, dtype: KvDtype, tokens: usize) {
        const BLOCK: usize = 16;
        let (heads, rope) = (heads(), rope());
        self.backend.set_kv_dtype(dtype);
        let backend = &mut self.backend;
        let blocks = tokens.div_ceil(BLOCK);
        let mut cache = backend.new_kv_cache(CacheShape { blocks: 2 * blocks, block_size: BLOCK }, heads);
        let slots: Vec<u32> = (0..tokens as u32).collect();
        let input = StepInput {
            positions: &slots,
            slot_mapping: &slots,
            query_starts: &[0],
            context_lens: &[],
            block_tables: &[],
            block_table_starts: &[0],
        };
        let (mut qkv, mut out, mut step) = (Matrix::default(), Rows::default(), Step::default());
        backend.clear(&mut qkv, tokens, heads.qkv_width());
        let angles = Work::moving("rope_table", format!("angles of {tokens} rows"), tokens * (4 + 4 * HEAD_DIM));
        self.time(&angles, |backend| backend.prepare(input, &rope, heads, &mut step));
        let per_token = self.backend.kv_bytes_per_token(heads);
        // Read, turned queries written, and what to_rows, which follows, reads and writes.
        let numbers = 4 * heads.qkv_width() + 2 * HEADS * HEAD_DIM + 8 * HEADS * HEAD_DIM;
        let write = Work::moving(
            "rope_write_*",
            format!("{dtype:?} cache, {tokens} rows written"),
            tokens * (numbers + per_token),
        );
        self.time(&write, |backend| {
            backend.attention(&qkv, heads, input, &mut step, &mut cache, (&mut out, Form::F32));
        });
        let pairs: Vec<(u32, u32)> = (0..blocks as u32).map(|block| (block, block + blocks as u32)).collect();
        let copy = Work::moving(
            "blocks of a cache, copied",
            format!("{dtype:?} cache, {blocks} blocks copied"),
            2 * blocks * BLOCK * per_token,
        );
        self.time(&copy, |backend| backend.copy_blocks(&mut cache, &pairs));
    }

    /// Token embeddings, `tokens` of them.
    fn embed(&mut self, dtype: Dtype, tokens: usize) {
        const VOCAB: usize = 16_384;
        const WIDTH: usize = 4096;
        let row = dtype.row_bytes(WIDTH).expect("whole blocks");
        let data = vec![0x11_u8; VOCAB * row];
        let table = self.backend.load_linear(&[Stored { dtype, rows: VOCAB, cols: WIDTH, data: &data }]);
        let table = table.expect("packs");
        // No two of them in one tile of 16 rows, as far as there are tiles.
        let ids: Vec<u32> = (0..tokens as u32).map(|token| token * 17 % VOCAB as u32).collect();
        let mut out = Matrix::default();
        let work =
            Work::moving("embed", format!("embed {dtype:?} {tokens} x {WIDTH}"), tokens * (row + 4 * WIDTH));
        self.time(&work, |backend| backend.embed(&table, &ids, 1.0, &mut out));
    }

    /// Updates of a linear layer of 4096 × 4096 for `tokens` rows that run with `adapters` adapters.
    fn low_rank(&mut self, dtype: Dtype, tokens: usize, adapters: usize, rank: usize) {
        const SIZE: usize = 4096;
        let data = vec![0; rank * dtype.row_bytes(SIZE).expect("plain numbers")];
        let memory = self.backend.low_rank_memory();
        let weights: Vec<LowRank> = (0..adapters)
            .map(|_| {
                let a = Stored { dtype, rows: rank, cols: SIZE, data: &data };
                let b = Stored { dtype, rows: SIZE, cols: rank, data: &data };
                LowRank::new(a, b, 1.0, |o| o, &memory).expect("room")
            })
            .collect();
        let rows: Vec<Vec<u32>> = (0..adapters)
            .map(|adapter| (adapter as u32..tokens as u32).step_by(adapters).collect::<Vec<u32>>())
            .collect();
        let updates: Vec<LowRankUpdate<'_>> =
            weights.iter().zip(&rows).map(|(weights, rows)| LowRankUpdate { weights, rows, first: 0 }).collect();
        let (mut x, mut given, mut out) = (Matrix::default(), Rows::default(), Matrix::default());
        self.backend.clear(&mut x, tokens, SIZE);
        self.backend.to_rows(&x, None, (&mut given, Form::F32));
        self.backend.clear(&mut out, tokens, SIZE);
        let bytes: usize = weights.iter().map(LowRank::bytes).sum();
        let (product, times) = if dtype == Dtype::BF16 { (Product::Bf16, 2) } else { (Product::Tf32, 3) };
        let work = Work {
            row: "low_rank_shrink, low_rank_grow, a layer's adapters",
            name: format!("{adapters} adapters {dtype:?}, rank {rank}, {tokens} rows"),
            bytes: (bytes + tokens * SIZE * (4 + 8)) as f64,
            operations: (2 * times * tokens * rank * 2 * SIZE) as f64,
            product,
        };
        // As many lists of jobs as the backend remembers are uploaded in the first tenth of a second, and none in the
        // second: as while the same sequences decode.
        self.time(&work, |backend| backend.add_low_rank(&given, &updates, &mut out));
    }

    /// What is done row by row, `tokens` of them, in the shapes of a Llama-3-8B.
    fn rows(&mut self, tokens: usize) {
        const WIDTH: usize = 4096;
        const INNER: usize = 14_336;
        let weight = self.backend.load_vector(&vec![1.0; WIDTH]);
        let head = self.backend.load_vector(&vec![1.0; HEAD_DIM]);
        let (mut x, mut sum, mut gate_up, mut out) =
            (Matrix::default(), Matrix::default(), Matrix::default(), Rows::default());
        self.backend.clear(&mut x, tokens, WIDTH);
        self.backend.clear(&mut sum, tokens, WIDTH);
        self.backend.clear(&mut gate_up, tokens, 2 * INNER);
        // A byte and its share of scale and sum.
        let rounded = |numbers: usize| numbers * 5 / 4;
        let normed = tokens * (4 * WIDTH + rounded(WIDTH));
        const NORMS: &str = "rms_norm, layer_norm, to_rows";
        let work = Work::moving(NORMS, format!("rms_norm {tokens} x {WIDTH}"), normed);
        self.time(&work, |backend| backend.rms_norm(&x, None, &weight, 1e-5, (&mut out, Form::Q8)));
        let work = Work::moving(NORMS, format!("layer_norm {tokens} x {WIDTH}"), normed);
        self.time(&work, |backend| backend.layer_norm(&x, None, (&weight, None), 1e-5, (&mut out, Form::Q8)));
        let work = Work::moving(NORMS, format!("to_rows {tokens} x {WIDTH}"), normed);
        self.time(&work, |backend| backend.to_rows(&x, None, (&mut out, Form::Q8)));
        let work = Work::moving(
            "activate",
            format!("activate {tokens} x {INNER}"),
            tokens * (8 * INNER + rounded(INNER)),
        );
        self.time(&work, |backend| backend.gated(Activation::Silu, &gate_up, (&mut out, Form::Q8)));
        const SUMS: &str = "add_scaled, scatter_add";
        let work = Work::moving(SUMS, format!("add_scaled {tokens} x {WIDTH}"), 12 * tokens * WIDTH);
        self.time(&work, |backend| backend.add_scaled(&x, 0.5, &mut sum));
        let (order, scales): (Vec<u32>, Vec<f32>) = ((0..tokens as u32).rev().collect(), vec![0.5; tokens]);
        let work = Work::moving(SUMS, format!("scatter_add {tokens} x {WIDTH}"), 12 * tokens * WIDTH);
        self.time(&work, |backend| backend.scatter_add(&x, &order, &scales, &mut sum));
        const IN_PLACE: &str = "rms_norm_in_place, add_bias, copy_columns";
        let work = Work::moving(IN_PLACE, format!("rms_norm_in_place {tokens} x {WIDTH}"), 8 * tokens * WIDTH);
        self.time(&work, |backend| backend.rms_norm_in_place(&mut sum, 0..WIDTH, &head, 1e-5));
        let work = Work::moving(IN_PLACE, format!("add_bias {tokens} x {WIDTH}"), 8 * tokens * WIDTH);
        self.time(&work, |backend| backend.add_bias(&mut sum, &weight));
        let work = Work::moving(IN_PLACE, format!("copy_columns {tokens} x {WIDTH}"), 8 * tokens * WIDTH);
        let runs = ColumnRuns { count: HEADS, width: HEAD_DIM, from: (0, HEAD_DIM), to: (0, HEAD_DIM) };
        self.time(&work, |backend| backend.copy_columns(&x, runs, &mut sum));
    }

    /// Logits of `tokens` rows, a head of so few columns that finishing, or ranking and summing, is what takes time.
    fn sampling(&mut self, tokens: usize, count: Option<usize>) {
        const VOCAB: usize = 128_256;
        let data = vec![0; 2 * VOCAB];
        let head = self.backend.load_linear(&[Stored { dtype: Dtype::BF16, rows: VOCAB, cols: 1, data: &data }]);
        let head = head.expect("packs");
        let (mut x, mut rows) = (Matrix::default(), Rows::default());
        self.backend.clear(&mut x, tokens, 1);
        self.backend.to_rows(&x, None, (&mut rows, Form::F32));
        let ranking = count.map(|count| Ranking { count, rates: vec![1.0; tokens] });
        let softcap = if ranking.is_none() { Some(30.0) } else { None };
        let finish = LogitFinish { bias: None, scale: 1.0, softcap };
        // Written by the head; then read and written by the finish, or read once.
        let written = head.bytes() + 4 * tokens * VOCAB;
        let work = match count {
            None => Work::moving(
                "finish_logits",
                format!("{VOCAB} logits capped, {tokens} rows"),
                written + 8 * tokens * VOCAB,
            ),
            Some(count) => Work::moving(
                "rank_chunks, merge_chunks",
                format!("{count} best of {VOCAB}, {tokens} rows"),
                written + 4 * tokens * VOCAB,
            ),
        };
        self.time(&work, |backend| backend.start_logits(&head, &rows, finish, ranking.as_ref()));
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
        bench.attention(dtype, (1, 8192), 1, None);
        bench.attention(dtype, (32, 2048), 1, None);
        bench.attention(dtype, (1, 2048), 2048, None);
        [64, 2048].into_iter().for_each(|tokens| bench.cache(dtype, tokens));
    }
    // Of 264 tokens the last 32: some in the first partition of 256, some in the second.
    bench.attention(KvDtype::Bf16, (64, 264), 1, Some(32));
    for (tokens, adapters, rank) in
        [(1, 1, 16), (64, 1, 16), (64, 8, 16), (64, 64, 64), (2048, 1, 16), (2048, 8, 64)]
    {
        [Dtype::BF16, Dtype::F32].into_iter().for_each(|dtype| bench.low_rank(dtype, tokens, adapters, rank));
    }
    for dtype in [Dtype::Q4_0, Dtype::Q8_0, Dtype::BF16, Dtype::F16, Dtype::F32] {
        [64, 2048].into_iter().for_each(|tokens| bench.embed(dtype, tokens));
    }
    [64, 2048].into_iter().for_each(|tokens| bench.rows(tokens));
    [None, Some(1), Some(8), Some(64)].into_iter().for_each(|count| bench.sampling(8, count));
}
