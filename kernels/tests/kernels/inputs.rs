//! What tests are made of: sound random weights, and ways in and out of backend memory.

pub use crate::numbers::Numbers;
use half::{bf16, f16};
use proptest::test_runner::Config;
use rill_kernels::{Backend, CpuBackend, Dtype, Form, Isa, Linear, LogitFinish, Matrix, RowDtype, Rows, Stored};

/// All forms of rows at once.
pub const ALL: Form = Form::Q8.and(Form::SHIFTED).and(Form::F32).and(Form::BF16);
pub const F32: Form = Form::F32;

/// Where a block's half-precision scales lie.
pub fn scale_offsets(dtype: Dtype) -> &'static [usize] {
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::MXFP4 => &[],
        Dtype::Q4_0 | Dtype::Q5_0 | Dtype::Q8_0 | Dtype::IQ4_NL | Dtype::IQ4_XS => &[0],
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4_K | Dtype::Q5_K => &[0, 2],
        Dtype::Q2_K => &[80, 82],
        Dtype::Q3_K => &[108],
        Dtype::Q6_K => &[208],
    }
}

/// A stored matrix of any type: any codes, scales of either sign from 2^-9 to 2^-5 and now and then zero.
pub fn stored_bytes(dtype: Dtype, rows: usize, cols: usize, numbers: &mut Numbers) -> Vec<u8> {
    let blocks = rows * cols / dtype.block_len();
    let mut data = Vec::with_capacity(blocks * dtype.block_bytes());
    for _ in 0..blocks {
        match dtype {
            Dtype::F32 => data.extend(numbers.normal().to_le_bytes()),
            Dtype::F16 => data.extend(f16::from_f32(numbers.normal()).to_le_bytes()),
            Dtype::BF16 => data.extend(bf16::from_f32(numbers.normal()).to_le_bytes()),
            _ => {
                let start = data.len();
                data.extend((0..dtype.block_bytes()).map(|_| numbers.next() as u8));
                if dtype == Dtype::MXFP4 {
                    data[start] = 119 + numbers.below(5) as u8;
                }
                for at in scale_offsets(dtype) {
                    let size = (-5.0 - 2.0 * (numbers.uniform() + 1.0)).exp2();
                    let scale = match numbers.below(40) {
                        0 => 0.0,
                        n if n % 2 == 0 => size,
                        _ => -size,
                    };
                    let bytes = f16::from_f32(scale).to_le_bytes();
                    data[start + at..start + at + 2].copy_from_slice(&bytes);
                }
            }
        }
    }
    data
}

/// ISAs this machine runs, fastest first.
pub fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

/// The fastest ISA on one, two and five threads, then every other ISA.
pub fn backends() -> Vec<CpuBackend> {
    let isas = isas();
    let fastest = [1, 2, 5].map(|threads| CpuBackend::new(threads, isas[0]));
    fastest.into_iter().chain(isas[1..].iter().map(|&isa| CpuBackend::new(2, isa))).collect()
}

/// The same with activations rounded for bf16 weights, or not.
pub fn backends_with(dtype: RowDtype) -> Vec<CpuBackend> {
    backends().into_iter().map(|backend| backend.with_row_dtype(dtype)).collect()
}

pub fn describe(backend: &CpuBackend) -> String {
    format!("{}, {} threads", backend.isa().name(), backend.threads())
}

/// Proptest's settings: a number of cases, nothing written to disk.
pub fn cases(cases: u32) -> Config {
    Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() }
}

/// A layer of f32 weights.
pub fn load_f32(backend: &mut CpuBackend, values: &[f32], cols: usize) -> Linear {
    let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let stored = Stored { dtype: Dtype::F32, rows: values.len() / cols, cols, data: &data };
    backend.load_linear(&[stored]).expect("whole rows of f32")
}

/// The identity: a layer whose outputs are its inputs, exactly while all are finite.
pub fn identity(backend: &mut CpuBackend, width: usize) -> Linear {
    let mut values = vec![0.0; width * width];
    values.iter_mut().step_by(width + 1).for_each(|x| *x = 1.0);
    load_f32(backend, &values, width)
}

/// Host values as a matrix.
pub fn matrix(backend: &mut CpuBackend, values: &[f32], width: usize) -> Matrix {
    let table = load_f32(backend, values, width);
    let ids: Vec<u32> = (0..(values.len() / width) as u32).collect();
    let mut out = Matrix::default();
    backend.embed(&table, &ids, 1.0, &mut out);
    out
}

/// Host values as rows of all forms that layers of this backend read, through the gated activation: silu(64) is 64 in f32, and so 64 · x/64 is x.
pub fn rows(backend: &mut CpuBackend, values: &[f32], width: usize) -> Rows {
    let gate_up: Vec<f32> = values
        .chunks_exact(width)
        .flat_map(|x| std::iter::repeat_n(64.0, width).chain(x.iter().map(|x| x / 64.0)))
        .collect();
    let gate_up = matrix(backend, &gate_up, 2 * width);
    let mut out = Rows::default();
    let form =
        if backend.row_dtype() == RowDtype::Bf16 { ALL } else { Form::Q8.and(Form::SHIFTED).and(Form::F32) };
    backend.silu_mul(&gate_up, (&mut out, form));
    out
}

/// All of `layer` · `x`.
pub fn product(backend: &mut CpuBackend, layer: &Linear, x: &Rows) -> Vec<f32> {
    let mut out = Vec::new();
    backend.logits(layer, x, LogitFinish::default(), &mut out);
    out
}

/// The f32 form of rows.
pub fn read(backend: &mut CpuBackend, x: &Rows, width: usize) -> Vec<f32> {
    let identity = identity(backend, width);
    product(backend, &identity, x)
}

/// Where two results first differ in any bit, in words.
pub fn difference(given: &[f32], expected: &[f32]) -> Option<String> {
    if given.len() != expected.len() {
        return Some(format!("{} values instead of {}", given.len(), expected.len()));
    }
    let at = given.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits())?;
    let count = given.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    Some(format!(
        "{count} of {} values differ, first at {at}: {:e}, not {:e}",
        given.len(),
        given[at],
        expected[at]
    ))
}
