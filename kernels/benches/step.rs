//! A step of the default model by operation: its share of the time, what it reads and multiplies a second, and how much of the
//! time the machine would need for that at the limits measured in the same seconds.
//!
//! `cargo bench -p rill-kernels --bench step [-- ROUNDS]` prints a table for each kind of step, medians of all rounds. Weights are
//! random, of the default model's shapes and types, and each layer has its own, so that they come from memory as they do in a
//! server. A limit is the longer one of reading (weights; keys and values) and multiplying (int8; bf16 in attention).

mod default_model;

use default_model::{BLOCK_SIZE, Batch, HEADS, HIDDEN, LAYERS, VOCABULARY, WIDE, weights};
use rill_kernels::limits::{self, Limits};
use rill_kernels::{
    Activation, Backend, CacheShape, CpuBackend, Dtype, Isa, KvCache, KvDtype, Linear, LogitFinish, Matrix,
    Ranking, Rope, Rows, Step, Stored,
};
use std::time::{Duration, Instant};

const ROUNDS: usize = 11;
/// How long each limit is measured in a round.
const LIMIT_TIME: Duration = Duration::from_millis(60);
/// How long a kind of step is repeated in a round.
const STEP_TIME: Duration = Duration::from_millis(200);

/// Sequences, their tokens, and those of them in the step.
const STEPS: [(&str, usize, usize, usize); 5] = [
    ("1 stream at 100 tokens", 1, 100, 1),
    ("16 streams at 100", 16, 100, 1),
    ("32 streams at 100", 32, 100, 1),
    ("a prompt of 80", 1, 80, 80),
    ("256 of a prompt behind 256", 1, 512, 256),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Qkv,
    Attention,
    Output,
    GateUp,
    Down,
    Head,
    Norms,
    Embedding,
}

impl Operation {
    const ALL: [(Operation, &'static str); 8] = [
        (Operation::Qkv, "q, k and v"),
        (Operation::Attention, "attention"),
        (Operation::Output, "attention's output"),
        (Operation::GateUp, "gate and up, activation"),
        (Operation::Down, "down"),
        (Operation::Head, "head, largest logit"),
        (Operation::Norms, "norms"),
        (Operation::Embedding, "embedding, rotations"),
    ];
}

/// Seconds of each operation.
type Seconds = [f64; Operation::ALL.len()];

struct Clock {
    last: Instant,
    spent: Seconds,
}

impl Clock {
    fn start() -> Clock {
        Clock { last: Instant::now(), spent: Seconds::default() }
    }

    fn lap(&mut self, operation: Operation) {
        let now = Instant::now();
        self.spent[operation as usize] += (now - self.last).as_secs_f64();
        self.last = now;
    }
}

struct Layer {
    qkv: Linear,
    output: Linear,
    gate_up: Linear,
    down: Linear,
}

struct Model {
    backend: CpuBackend,
    layers: Vec<Layer>,
    norm: <CpuBackend as Backend>::Vector,
    head: Linear,
    rope: Rope,
    step: Step,
    residual: Matrix,
    rows: Rows,
    gated: Rows,
    wide: Matrix,
}

impl Model {
    fn new(threads: usize) -> Model {
        let mut backend = CpuBackend::new(threads, Isa::detect());
        let mut load = |dtype: Dtype, parts: &[usize], cols: usize| {
            let data: Vec<Vec<u8>> = parts.iter().map(|&rows| weights(dtype, rows, cols)).collect();
            let parts: Vec<Stored<'_>> =
                parts.iter().zip(&data).map(|(&rows, data)| Stored { dtype, rows, cols, data }).collect();
            backend.load_linear(&parts).expect("packs")
        };
        let (queries, keys) = (HEADS.heads * HEADS.head_dim, HEADS.kv_heads * HEADS.head_dim);
        let layers = (0..LAYERS)
            .map(|_| Layer {
                qkv: load(Dtype::Q4_1, &[queries, keys, keys], HIDDEN),
                output: load(Dtype::Q4_1, &[HIDDEN], queries),
                gate_up: load(Dtype::Q4_1, &[WIDE, WIDE], HIDDEN),
                down: load(Dtype::Q4_1, &[HIDDEN], WIDE),
            })
            .collect();
        let head = load(Dtype::Q8_0, &[VOCABULARY], HIDDEN);
        let frequencies = (0..HEADS.head_dim / 2).map(|i| 1e4_f32.powf(-(2.0 * i as f32) / HEADS.head_dim as f32));
        Model {
            norm: backend.load_vector(&[1.0; HIDDEN]),
            rope: Rope { inverse_frequencies: frequencies.collect(), factor: 1.0 },
            backend,
            layers,
            head,
            step: Step::default(),
            residual: Matrix::default(),
            rows: Rows::default(),
            gated: Rows::default(),
            wide: Matrix::default(),
        }
    }

    fn caches(&mut self, blocks: usize) -> Vec<KvCache> {
        let shape = CacheShape { blocks, block_size: BLOCK_SIZE };
        (0..LAYERS).map(|_| self.backend.new_kv_cache(shape, HEADS)).collect()
    }

    fn run(&mut self, batch: &Batch, caches: &mut [KvCache]) -> Seconds {
        const EPS: f32 = 1e-5;
        let Model { backend, layers, norm, head, rope, step, residual, rows, gated, wide } = self;
        let (input, last_rows) = (batch.input(), batch.last_rows());
        let ids: Vec<u32> = (0..batch.rows()).map(|row| (row * 7919 % VOCABULARY) as u32).collect();
        let mut clock = Clock::start();
        backend.prepare(input, rope, HEADS, step);
        backend.embed(head, &ids, 1.0, residual);
        clock.lap(Operation::Embedding);
        for (layer, cache) in layers.iter().zip(caches) {
            backend.rms_norm(residual, None, norm, EPS, (rows, backend.form(&layer.qkv)));
            clock.lap(Operation::Norms);
            backend.linear(&layer.qkv, rows, wide);
            clock.lap(Operation::Qkv);
            backend.attention(wide, HEADS, input, step, cache, (rows, backend.form(&layer.output)));
            clock.lap(Operation::Attention);
            backend.linear_add(&layer.output, rows, residual);
            clock.lap(Operation::Output);
            backend.rms_norm(residual, None, norm, EPS, (rows, backend.form(&layer.gate_up)));
            clock.lap(Operation::Norms);
            let out = (&mut *gated, backend.form(&layer.down));
            backend.linear_gated(&layer.gate_up, Activation::Silu, rows, wide, out);
            clock.lap(Operation::GateUp);
            backend.linear_add(&layer.down, gated, residual);
            clock.lap(Operation::Down);
        }
        backend.rms_norm(residual, Some(&last_rows), norm, EPS, (rows, backend.form(head)));
        clock.lap(Operation::Norms);
        let largest = Ranking { count: 1, rates: Vec::new() };
        backend.start_logits(head, rows, LogitFinish::default(), Some(&largest));
        std::hint::black_box(backend.wait_best());
        clock.lap(Operation::Head);
        clock.spent
    }
}

/// What an operation moves and multiplies in a step, in all layers.
#[derive(Clone, Copy, Default)]
struct Cost {
    bytes: f64,
    macs: f64,
}

impl Cost {
    fn linear(layers: usize, layer: &Linear, cols: usize, rows: usize) -> Cost {
        Cost { bytes: (layers * layer.bytes()) as f64, macs: (layers * rows * layer.rows() * cols) as f64 }
    }

    /// Seconds at the limits.
    fn bound(self, operation: Operation, (limits, bf16): (Limits, f64)) -> f64 {
        let macs_per_s = if operation == Operation::Attention { bf16 } else { limits.int8_macs_per_s };
        (self.bytes / limits.read_bytes_per_s).max(self.macs / macs_per_s)
    }
}

fn costs(model: &Model, (sequences, context, tokens): (usize, usize, usize)) -> [Cost; Operation::ALL.len()] {
    let rows = sequences * tokens;
    let layer = &model.layers[0];
    let seen = sequences * (context - tokens + 1..=context).sum::<usize>();
    let attention = Cost {
        bytes: (LAYERS * sequences * context * KvCache::bytes_per_token(HEADS, KvDtype::Bf16)) as f64,
        macs: (LAYERS * seen * 2 * HEADS.heads * HEADS.head_dim) as f64,
    };
    Operation::ALL.map(|(operation, _)| match operation {
        Operation::Qkv => Cost::linear(LAYERS, &layer.qkv, HIDDEN, rows),
        Operation::Attention => attention,
        Operation::Output => Cost::linear(LAYERS, &layer.output, HEADS.heads * HEADS.head_dim, rows),
        Operation::GateUp => Cost::linear(LAYERS, &layer.gate_up, HIDDEN, rows),
        Operation::Down => Cost::linear(LAYERS, &layer.down, WIDE, rows),
        Operation::Head => Cost::linear(1, &model.head, HIDDEN, sequences),
        Operation::Norms | Operation::Embedding => Cost::default(),
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A round's limits, and the seconds of a step in it.
type Round = ((Limits, f64), Seconds);

fn print(name: &str, rows: usize, costs: &[Cost], rounds: &[Round]) {
    let whole = |seconds: &Seconds| seconds.iter().sum::<f64>();
    println!("\n{name}\n\n| operation | share | ms | GB/s | GMAC/s | of its limit |\n|---|---|---|---|---|---|");
    for (operation, label) in Operation::ALL {
        let (at, cost) = (operation as usize, costs[operation as usize]);
        let share = median(rounds.iter().map(|(_, seconds)| seconds[at] / whole(seconds)));
        let time = median(rounds.iter().map(|(_, seconds)| seconds[at]));
        let of_limit = median(rounds.iter().map(|(limits, seconds)| cost.bound(operation, *limits) / seconds[at]));
        let figures = match cost.bytes > 0.0 {
            true => {
                let (read, products) = (cost.bytes / time / 1e9, cost.macs / time / 1e9);
                format!("{read:.1} | {products:.0} | {:.0} %", 100.0 * of_limit)
            }
            false => " | | ".to_owned(),
        };
        println!("| {label} | {:.0} % | {:.2} | {figures} |", 100.0 * share, 1e3 * time);
    }
    let bound = |limits: (Limits, f64)| -> f64 {
        Operation::ALL.iter().map(|(operation, _)| costs[*operation as usize].bound(*operation, limits)).sum()
    };
    let time = median(rounds.iter().map(|(_, seconds)| whole(seconds)));
    let at_limits = median(rounds.iter().map(|(limits, _)| bound(*limits)));
    let of_limits = median(rounds.iter().map(|(limits, seconds)| bound(*limits) / whole(seconds)));
    println!(
        "| all | | {:.2} | | | {:.0} % |\n\n{:.0} tokens/s; {:.2} ms and {:.0} tokens/s at the limits",
        1e3 * time,
        100.0 * of_limits,
        rows as f64 / time,
        1e3 * at_limits,
        rows as f64 / at_limits
    );
}

fn main() {
    let rounds = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(ROUNDS).max(1);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::detect();
    let mut model = Model::new(threads);
    let mut kinds: Vec<_> = STEPS
        .iter()
        .map(|&(_, sequences, context, tokens)| {
            let mut caches = model.caches(Batch::blocks(sequences, context));
            for end in (BLOCK_SIZE..=context).step_by(BLOCK_SIZE) {
                // Blocks of a sequence lie the same way whatever its length, so a prefix fills its slots.
                model.run(&Batch::new(sequences, end, BLOCK_SIZE), &mut caches);
            }
            (Batch::new(sequences, context, tokens), caches, Vec::<Round>::new())
        })
        .collect();
    for _ in 0..rounds {
        for (batch, caches, found) in &mut kinds {
            let bf16 = limits::bf16_macs_per_s(isa, threads, LIMIT_TIME);
            let limits = limits::measure(isa, threads, LIMIT_TIME);
            let (start, mut steps, mut sum) = (Instant::now(), 0.0, Seconds::default());
            model.run(batch, caches);
            while steps == 0.0 || start.elapsed() < STEP_TIME {
                sum.iter_mut().zip(model.run(batch, caches)).for_each(|(sum, seconds)| *sum += seconds);
                steps += 1.0;
            }
            found.push(((limits, bf16), sum.map(|seconds| seconds / steps)));
        }
    }
    let all: Vec<_> = kinds.iter().flat_map(|(_, _, rounds)| rounds.iter().map(|(limits, _)| *limits)).collect();
    println!(
        "{}, {threads} threads; {rounds} rounds; limits: {:.1} GB/s read, {:.0} GMAC/s int8, {:.0} GMAC/s bf16",
        isa.name(),
        median(all.iter().map(|(limits, _)| limits.read_bytes_per_s)) / 1e9,
        median(all.iter().map(|(limits, _)| limits.int8_macs_per_s)) / 1e9,
        median(all.iter().map(|(_, bf16)| *bf16)) / 1e9,
    );
    for (&(name, sequences, context, tokens), (batch, _, found)) in STEPS.iter().zip(&kinds) {
        print(name, batch.rows(), &costs(&model, (sequences, context, tokens)), found);
    }
}
