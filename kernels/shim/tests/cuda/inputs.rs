//! What tests are made of: sound random weights, and ways in and out of device memory.

pub use crate::numbers::Numbers;
use half::{bf16, f16};
use proptest::test_runner::Config;
use rill_cuda_shim::{Shim, Variant};
use rill_kernels::cuda::{CudaBackend, Linear, Matrix, Rows};
use rill_kernels::{Backend, Dtype, Form, Stored};
use std::sync::{Arc, OnceLock};

pub const BOTH: Form = Form::Q8.and(Form::F32);

/// A stored matrix of any type: any codes, scales of either sign.
pub fn stored_bytes(dtype: Dtype, rows: usize, cols: usize, numbers: &mut Numbers) -> Vec<u8> {
    let scales: &[usize] = match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::MXFP4 => &[],
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4_K | Dtype::Q5_K => &[0, 2],
        Dtype::Q2_K => &[80, 82],
        Dtype::Q3_K => &[108],
        Dtype::Q6_K => &[208],
        _ => &[0],
    };
    let mut data = Vec::new();
    for _ in 0..rows * cols / dtype.block_len() {
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
                for at in scales {
                    let size = (-5.0 - 2.0 * (numbers.uniform() + 1.0)).exp2();
                    let scale = f16::from_f32(if numbers.below(2) == 0 { size } else { -size });
                    data[start + at..start + at + 2].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
    }
    data
}

/// What [`backend`] opens instead of the sound kernels, in a process that is for that alone.
pub static VARIANT: OnceLock<Variant> = OnceLock::new();

/// The kernels in an order drawn from `seed`.
pub fn backend(seed: u64) -> CudaBackend {
    let variant = VARIANT.get().copied().unwrap_or(Variant::Sound);
    CudaBackend::new(Arc::new(Shim::of(variant, seed)), 1)
}

/// Proptest's settings: a number of cases, nothing written to disk.
pub fn cases(cases: u32) -> Config {
    Config { cases, failure_persistence: None, max_shrink_iters: 50, ..Config::default() }
}

/// A layer of f32 weights.
pub fn load_f32(backend: &mut CudaBackend, values: &[f32], cols: usize) -> Linear {
    let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let stored = Stored { dtype: Dtype::F32, rows: values.len() / cols, cols, data: &data };
    backend.load_linear(&[stored]).expect("whole rows of f32")
}

/// Host values as a matrix.
pub fn matrix(backend: &mut CudaBackend, values: &[f32], width: usize) -> Matrix {
    let table = load_f32(backend, values, width);
    let ids: Vec<u32> = (0..(values.len() / width) as u32).collect();
    let mut out = Matrix::default();
    backend.embed(&table, &ids, 1.0, &mut out);
    out
}

/// Host values as rows in `form`.
pub fn rows(backend: &mut CudaBackend, values: &[f32], width: usize, form: Form) -> Rows {
    let values = matrix(backend, values, width);
    let mut out = Rows::default();
    backend.to_rows(&values, None, (&mut out, form));
    out
}

/// Where two results first differ in any bit, in words.
pub fn difference(given: &[f32], expected: &[f32]) -> Option<String> {
    if given.len() != expected.len() {
        return Some(format!("{} values instead of {}", given.len(), expected.len()));
    }
    let at = given.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits())?;
    Some(format!("value {at} of {} is {:e}, not {:e}", given.len(), given[at], expected[at]))
}

/// Where values are further from what they should be than `bound` allows, NaN included, in words.
pub fn too_far(given: &[f32], expected: &[f64], bound: impl Fn(usize) -> f64) -> Option<String> {
    if given.len() != expected.len() {
        return Some(format!("{} values instead of {}", given.len(), expected.len()));
    }
    let far = |i: &usize| {
        let error = (f64::from(given[*i]) - expected[*i]).abs();
        error.is_nan() || error > bound(*i)
    };
    let at = (0..given.len()).find(far)?;
    Some(format!("value {at} of {} is {:e}, not {:e}", given.len(), given[at], expected[at]))
}
