//! The plain definition of every operation: one loop a sum, in f64 wherever the kernels are free to round. Slow, for
//! tests and doubts only.
//!
//! Where the kernels round on purpose (8-bit activations, bf16 queries, keys and values, repacked weights), so does
//! this: what remains between the two is f32 arithmetic, and can be held to a tight bound.

use crate::backend::{Activation, Rope};
use crate::packed::{GROUP, Stored};
use crate::quants::{Dtype, dequantize, k_scale_min};
use half::{bf16, f16};

/// A value, and the sum of the absolute values of all terms it is made of: rounding errors are a share of that.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    pub value: f64,
    pub magnitude: f64,
}

/// Every weight of a stored matrix, row-major, as the packed layouts hold it: exact for float types and for those with
/// one scale a group of 32, scales and minima rounded to f16 for Q4_K, the nearest 8-bit grid a group for the rest.
///
/// # Panics
/// If the data is shorter than the shape.
pub fn weights(stored: Stored<'_>) -> Vec<Sum> {
    let mut values = vec![0.0; stored.rows * stored.cols];
    dequantize(stored.dtype, stored.data, &mut values);
    let exact = |x: f32| Sum { value: f64::from(x), magnitude: f64::from(x).abs() };
    match stored.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::Q8_0 | Dtype::Q5_0 | Dtype::IQ4_NL | Dtype::MXFP4 => {
            values.into_iter().map(exact).collect()
        }
        Dtype::Q4_0 | Dtype::Q4_1 => with_minimum(stored, &values),
        Dtype::Q4_K => q4_k(stored),
        _ => values.chunks_exact(GROUP).flat_map(nearest_grid).map(exact).collect(),
    }
}

/// d · code + m: both terms count, for they may cancel.
fn with_minimum(stored: Stored<'_>, values: &[f32]) -> Vec<Sum> {
    let minima = scales_and_minima(stored);
    let sum = |(i, &x): (usize, &f32)| {
        let (value, m) = (f64::from(x), minima[i / GROUP * 2 + 1]);
        Sum { value, magnitude: (value - m).abs() + m.abs() }
    };
    values.iter().enumerate().map(sum).collect()
}

fn q4_k(stored: Stored<'_>) -> Vec<Sum> {
    let grid = scales_and_minima(stored);
    let mut out = Vec::with_capacity(grid.len() / 2 * GROUP);
    for block in stored.data.chunks_exact(Dtype::Q4_K.block_bytes()) {
        for i in 0..256 {
            let at = out.len() / GROUP * 2;
            let (d, m) = (grid[at], grid[at + 1]);
            let byte = block[16 + i / 64 * 32 + i % 32];
            let code = f64::from(if i / 32 % 2 == 0 { byte & 15 } else { byte >> 4 });
            out.push(Sum { value: d * code + m, magnitude: (d * code).abs() + m.abs() });
        }
    }
    out
}

/// One row times a matrix of 4-bit weights as the CPU multiplies them: scales and values of code 8 as words of 15 bits in units
/// of their weight row, activations' scales and sums as words of 14 bits that add up to 2^16 at most in units of eight groups, and
/// the product of both scales rounded to a word. All sums are exact.
///
/// # Panics
/// If the type has no 4-bit grid.
pub fn linear_four(stored: Stored<'_>, x: &[f32]) -> Vec<Sum> {
    let unit = |largest: f64| if largest > 0.0 { largest.log2().floor().exp2() / 16_384.0 } else { 1.0 };
    let word = |x: f64, unit: f64| (x / unit).round_ties_even().clamp(-32_767.0, 32_767.0);
    let groups: Vec<(Vec<f64>, f32, f32)> = x.chunks(GROUP).map(whole_group).collect();
    let row = |weights: &[Sum], minima: &[f64]| {
        let (mut total, mut magnitude) = (0.0, 0.0);
        let grid: Vec<(f64, f64)> = minima.chunks(2).map(|dm| (dm[0], 8.0_f64.mul_add(dm[0], dm[1]))).collect();
        let scale_unit = unit(grid.iter().fold(0.0, |most, g| most.max(g.0.abs())));
        let value_unit = unit(grid.iter().fold(0.0, |most, g| most.max(g.1.abs())));
        for (span, some) in groups.chunks(8).enumerate() {
            let largest = some.iter().fold(1e-33_f32, |most, g| most.max(g.1));
            let scale_step = (largest / 16_384.0).max(some.iter().fold(1e-33_f32, |all, g| all + g.1) / 65_536.0);
            let highest = some.iter().fold(1e-33_f32, |most, g| most.max(g.2.abs()));
            let higher = some.iter().fold(1e-33_f32, |all, g| all + g.2.abs()) * (1.0 + 1.0 / 4096.0);
            let power = |x: f32| f64::from(x).log2().floor().exp2();
            let sum_unit = (power(highest) / 8192.0).max(power(higher) / 32_768.0);
            for (i, (codes, scale, sum)) in some.iter().enumerate() {
                let g = 8 * span + i;
                let (d, m) = (word(grid[g].0, scale_unit), word(grid[g].1, value_unit));
                let s = f64::from((scale * (1.0 / scale_step)).round_ties_even());
                let both = (d * s / 32_768.0 + 0.5).floor() * scale_unit * 32_768.0 * f64::from(scale_step);
                for (code, w) in codes.iter().zip(&weights[g * GROUP..]) {
                    // The code less 8, from the weight it stands for.
                    let less = if grid[g].0 == 0.0 { 0.0 } else { ((w.value - grid[g].1) / grid[g].0).round() };
                    total += both * less * code;
                    magnitude += (both * less * code).abs();
                }
                let value = m * value_unit * (f64::from(*sum) / sum_unit).round_ties_even() * sum_unit;
                (total, magnitude) = (total + value, magnitude + value.abs());
            }
        }
        Sum { value: total, magnitude }
    };
    let (weights, minima) = (weights(stored), scales_and_minima(stored));
    let each = x.len() / GROUP * 2;
    weights.chunks_exact(x.len()).zip(minima.chunks_exact(each)).map(|(w, m)| row(w, m)).collect()
}

/// Codes, scale and scaled sum of a group of 8-bit activations.
fn whole_group(x: &[f32]) -> (Vec<f64>, f32, f32) {
    let amax = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let amax = if amax < 1e-30 { 0.0 } else { amax };
    let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
    let codes: Vec<f32> = x.iter().map(|x| (x * inverse).round_ties_even()).collect();
    let scale = amax / 127.0;
    (codes.iter().map(|&c| f64::from(c)).collect(), scale, scale * codes.iter().sum::<f32>())
}

/// d and m of every group: weight = d · code + m.
fn scales_and_minima(stored: Stored<'_>) -> Vec<f64> {
    let half = |b: &[u8], at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let round = |x: f32| f64::from(f16::from_f32(x).to_f32());
    let blocks = stored.data.chunks_exact(stored.dtype.block_bytes());
    match stored.dtype {
        Dtype::Q4_0 => blocks.flat_map(|b| [f64::from(half(b, 0)), -8.0 * f64::from(half(b, 0))]).collect(),
        Dtype::Q4_1 => blocks.flat_map(|b| [0, 2].map(|at| f64::from(half(b, at)))).collect(),
        Dtype::Q4_K => blocks
            .flat_map(|b| {
                (0..8).flat_map(move |i| {
                    let (scale, min) = k_scale_min(i, &b[4..16]);
                    [round(half(b, 0) * f32::from(scale)), round(-half(b, 2) * f32::from(min))]
                })
            })
            .collect(),
        other => panic!("{} is no 4-bit grid", other.name()),
    }
}

fn nearest_grid(group: &[f32]) -> Vec<f32> {
    let largest = group.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let d = f16::from_f32(largest / 127.0).to_f32();
    let code = |x: f32| if d > 0.0 { (x * (1.0 / d)).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
    group.iter().map(|&x| code(x) * d).collect()
}

/// A row after 8-bit quantisation in groups of 32: whole multiples of amax / 127; groups below 1e-30 are zeros.
pub fn quantize_row(x: &[f32]) -> Vec<f64> {
    let quantize = |group: &[f32]| {
        let (codes, scale, _) = whole_group(group);
        codes.into_iter().map(move |code| code * f64::from(scale))
    };
    x.chunks(GROUP).flat_map(quantize).collect()
}

/// A row after shifted 8-bit quantisation in groups of 32: whole multiples of a 253rd of the range, zero included; groups
/// of a range below 1e-30 are zeros.
pub fn shift_row(x: &[f32]) -> Vec<f64> {
    let quantize = |group: &[f32]| {
        let most = group.iter().fold(0.0_f32, |m, &x| m.max(x));
        let least = group.iter().fold(0.0_f32, |m, &x| m.min(x));
        let range = if most - least < 1e-30 { 0.0 } else { most - least };
        let inverse = if range > 0.0 { 253.0 / range } else { 0.0 };
        let scale = f64::from(range / 253.0);
        group.iter().map(|x| f64::from((x * inverse).round_ties_even()) * scale).collect::<Vec<f64>>()
    };
    x.chunks(GROUP).flat_map(quantize).collect()
}

/// One row times a matrix of `x.len()` columns.
pub fn linear(weights: &[Sum], x: &[f64]) -> Vec<Sum> {
    let output = |w: &[Sum]| {
        w.iter().zip(x).fold(Sum::default(), |sum, (w, x)| Sum {
            value: sum.value + w.value * x,
            magnitude: sum.magnitude + w.magnitude * x.abs(),
        })
    };
    weights.chunks_exact(x.len()).map(output).collect()
}

/// scale · (x · Aᵀ) · Bᵀ of one row; `a` is rank × inputs, `b` outputs × rank.
pub fn low_rank(x: &[f32], a: &[f32], b: &[f32], scale: f32) -> Vec<Sum> {
    let exact = |values: &[f32]| {
        let exact = |&x: &f32| Sum { value: f64::from(x), magnitude: f64::from(x).abs() };
        values.iter().map(exact).collect::<Vec<Sum>>()
    };
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let inner = linear(&exact(a), &x);
    let scale = f64::from(scale);
    b.chunks_exact(inner.len())
        .map(|b| {
            b.iter().zip(&inner).fold(Sum::default(), |sum, (&b, inner)| Sum {
                value: sum.value + scale * f64::from(b) * inner.value,
                magnitude: sum.magnitude + (scale * f64::from(b)).abs() * inner.magnitude,
            })
        })
        .collect()
}

/// x / √(mean of squares + eps) · weight.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * factor * f64::from(w)).collect()
}

/// (x - mean) / √(variance + eps) · weight + bias.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f64> {
    let len = x.len() as f64;
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / len;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / len;
    let factor = 1.0 / (variance + f64::from(eps)).sqrt();
    let affine = weight.iter().zip(bias);
    x.iter()
        .zip(affine)
        .map(|(&x, (&w, &b))| (f64::from(x) - mean) * factor * f64::from(w) + f64::from(b))
        .collect()
}

/// silu(gate) · up of a row that holds the gate's values, then up's.
pub fn silu_mul(gate_up: &[f32]) -> Vec<f64> {
    gated(Activation::Silu, gate_up)
}

/// activation(gate) · up of a row that holds the gate's values, then up's.
pub fn gated(activation: Activation, gate_up: &[f32]) -> Vec<f64> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter().zip(up).map(|(&g, &u)| activate(activation, f64::from(g)) * f64::from(u)).collect()
}

/// The nonlinearity of one value.
pub fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * normal_below(x),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::ReluSquared => x.max(0.0).powi(2),
    }
}

/// The chance that a standard normal variable is below `x`: 1/2 plus the density's integral, by Simpson's rule.
fn normal_below(x: f64) -> f64 {
    const STEPS: usize = 2000;
    let (end, density) = (x.clamp(-40.0, 40.0), |t: f64| (-0.5 * t * t).exp());
    let step = end / STEPS as f64;
    let weight = |i: usize| if i == 0 || i == STEPS { 1.0 } else { [2.0, 4.0][i % 2] };
    let sum: f64 = (0..=STEPS).map(|i| weight(i) * density(i as f64 * step)).sum();
    0.5 + sum * step / 3.0 / (2.0 * std::f64::consts::PI).sqrt()
}

/// One head turned to `position`: pairs (i, i + n) of the first 2 n dimensions. In f32, operation by operation as the
/// kernels do it, because the result is rounded to bf16 next and a last bit would become a whole bf16 step.
pub fn rotate(head: &[f32], position: u32, rope: &Rope) -> Vec<f32> {
    let n = rope.inverse_frequencies.len();
    let mut out = head.to_vec();
    for (i, frequency) in rope.inverse_frequencies.iter().enumerate() {
        let (sin, cos) = (position as f32 * frequency).sin_cos();
        let (sin, cos) = (sin * rope.factor, cos * rope.factor);
        let (a, b) = (head[i], head[i + n]);
        out[i] = a * cos - b * sin;
        out[i + n] = b.mul_add(cos, a * sin);
    }
    out
}

/// The nearest bf16 of every value.
pub fn round_bf16(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

/// The nearest f16 of every value.
pub fn round_f16(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| f16::from_f32(x).to_f32()).collect()
}

/// The nearest e4m3 of every value (Micikevicius et al. 2022, arXiv:2209.05433), even at ties, at most 448 in size.
pub fn round_e4m3(x: &[f32]) -> Vec<f32> {
    let round = |x: f32| {
        let size = f64::from(x.abs()).min(448.0);
        // Steps of an eighth of the power of two below; 2^-9 is the least there is.
        let step = size.max(0.015_625).log2().floor().exp2() / 8.0;
        ((size / step).round_ties_even() * step) as f32 * x.signum()
    };
    x.iter().map(|&x| round(x)).collect()
}

/// Every value after 8-bit quantisation in groups of 32, with the scale a bf16 where `bf16_scale`.
pub fn round_int8(x: &[f32], bf16_scale: bool) -> Vec<f32> {
    let round = |group: &[f32]| {
        let amax = group.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let scale = if bf16_scale { bf16::from_f32(amax / 127.0).to_f32() } else { amax / 127.0 };
        let inverse = if bf16_scale { 1.0 / scale } else { 127.0 / amax };
        let inverse = if scale > 0.0 { inverse } else { 0.0 };
        group.iter().map(|x| (x * inverse).round_ties_even() * scale).collect::<Vec<f32>>()
    };
    x.chunks(GROUP).flat_map(round).collect()
}

/// Softmax attention of one query over all keys given: the output, and the largest absolute score's terms added up.
/// `softcap`: scores become cap · tanh(score / cap).
pub fn attend(
    query: &[f32],
    keys: &[&[f32]],
    values: &[&[f32]],
    (scale, softcap): (f32, Option<f32>),
) -> (Vec<Sum>, f64) {
    let mut steepest = 0.0_f64;
    let mut scores = Vec::with_capacity(keys.len());
    for key in keys {
        let products = query.iter().zip(*key).map(|(&q, &k)| f64::from(q) * f64::from(k) * f64::from(scale));
        steepest = steepest.max(products.clone().map(f64::abs).sum());
        let score = products.sum::<f64>();
        scores.push(softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()));
    }
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![Sum::default(); query.len()];
    for (weight, value) in weights.iter().zip(values) {
        for (sum, &v) in out.iter_mut().zip(*value) {
            sum.value += weight / total * f64::from(v);
            sum.magnitude += weight / total * f64::from(v).abs();
        }
    }
    (out, steepest)
}
