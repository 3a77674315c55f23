//! Values as blocks of the types kernels take: 4 and 8 bits for every 32, and bf16; rows in parallel.

use half::{bf16, f16};
use std::sync::Mutex;

/// Values that share a scale.
pub(super) const BLOCK: usize = 32;
/// Rows a thread takes at a time: input-major files hold 16 neighbouring rows in one cache line.
pub(super) const TILE: usize = 16;
/// Bytes of a Q4_1 and of a Q8_0 block.
pub(super) const FOUR_BYTES: usize = 20;
pub(super) const EIGHT_BYTES: usize = 34;
const CODE_MAX: f32 = 15.0;
/// Steps narrower and wider than the range of the values that are tried, in fifths of a code.
const TRIED: std::ops::RangeInclusive<i8> = -10..=4;

/// `rows × row_bytes` bytes, which `fill(first row, its tile's bytes)` writes on all cores, [`TILE`] rows at a time.
pub(super) fn fill_rows(rows: usize, row_bytes: usize, fill: impl Fn(usize, &mut [u8]) + Sync) -> Vec<u8> {
    let mut data = vec![0; rows * row_bytes];
    let tiles = rows.div_ceil(TILE);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(tiles.div_ceil(4)).max(1);
    {
        let left = Mutex::new(data.chunks_mut((TILE * row_bytes).max(1)).enumerate());
        let work = || {
            loop {
                let next = left.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
                let Some((tile, bytes)) = next else { return };
                fill(tile * TILE, bytes);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
    }
    data
}

/// Writes 32 codes of 4 bits, `weight = d · code + m`.
pub(super) fn put_codes4(d: f16, m: f16, codes: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&m.to_le_bytes());
    for (k, byte) in out[4..FOUR_BYTES].iter_mut().enumerate() {
        *byte = codes[k] | (codes[k + 16] << 4);
    }
}

/// Writes 32 codes of 8 bits, `weight = d · (code − 128)`.
pub(super) fn put_codes8(d: f16, codes: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&d.to_le_bytes());
    for (byte, &code) in out[2..EIGHT_BYTES].iter_mut().zip(codes) {
        *byte = code ^ 0x80;
    }
}

/// Writes values as bf16.
pub(super) fn put_bf16(values: &[f32], out: &mut [u8]) {
    for (bytes, &value) in out.chunks_exact_mut(2).zip(values) {
        bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    }
}

/// Writes values to the nearest 8-bit grid, whose end is the largest of each 32.
pub(super) fn put_eight(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks_exact(BLOCK).zip(out.chunks_exact_mut(EIGHT_BYTES)) {
        let largest = values.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let d = f16::from_f32((largest / 127.0).min(f16::MAX.to_f32()));
        let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
        out[..2].copy_from_slice(&d.to_le_bytes());
        for (byte, x) in out[2..].iter_mut().zip(values) {
            *byte = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
        }
    }
}

/// Writes values to 4-bit grids, for each 32 the one of those tried that errs least, large values counting more.
pub(super) fn put_four(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks_exact(BLOCK).zip(out.chunks_exact_mut(FOUR_BYTES)) {
        let values: &[f32; BLOCK] = values.try_into().expect("a block's values");
        let (d, m) = best_grid(values);
        let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
        let codes = values.map(|x| ((x - m.to_f32()) * inverse).round_ties_even().clamp(0.0, CODE_MAX) as u8);
        put_codes4(d, m, &codes, out);
    }
}

/// Step and minimum: for each width tried, the codes nearest to the values, then the step and minimum that fit these
/// codes best (weighted least squares, as ggml's k-quants are made).
fn best_grid(values: &[f32; BLOCK]) -> (f16, f16) {
    let (low, high) = values.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x)));
    let half = |x: f32| f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
    if high - low <= f32::MIN_POSITIVE {
        return (f16::ZERO, half(low));
    }
    let size = (values.iter().map(|x| x * x).sum::<f32>() / BLOCK as f32).sqrt();
    let weights = values.map(|x| size + x.abs());
    let (total, first) = values.iter().zip(&weights).fold((0.0, 0.0), |(t, f), (x, w)| (t + w, f + w * x));
    let mut best = (f32::MAX, (high - low) / CODE_MAX, low);
    for step in TRIED {
        let inverse = (CODE_MAX + 0.2 * f32::from(step)) / (high - low);
        let codes = values.map(|x| ((x - low) * inverse).round_ties_even().clamp(0.0, CODE_MAX));
        let (mut codes_sum, mut squares, mut products) = (0.0, 0.0, 0.0);
        for ((weight, code), value) in weights.iter().zip(&codes).zip(values) {
            let weighted = weight * code;
            codes_sum += weighted;
            squares += weighted * code;
            products += weighted * value;
        }
        let determinant = total * squares - codes_sum * codes_sum;
        if determinant <= 0.0 {
            continue;
        }
        let d = (total * products - first * codes_sum) / determinant;
        let m = (squares * first - codes_sum * products) / determinant;
        let error: f32 = (0..BLOCK)
            .map(|k| {
                let difference = d * codes[k] + m - values[k];
                weights[k] * difference * difference
            })
            .sum();
        if error < best.0 {
            best = (error, d, m);
        }
    }
    (half(best.1), half(best.2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rill_kernels::{Dtype, dequantize};

    fn normal(count: usize) -> Vec<f32> {
        // Sums of uniform numbers, which look like weights.
        let mut state = 1_u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..6).map(|_| uniform()).sum()).collect()
    }

    fn error_of(dtype: Dtype, values: &[f32], put: impl Fn(&[f32], &mut [u8])) -> f32 {
        let mut bytes = vec![0; dtype.row_bytes(values.len()).expect("whole blocks")];
        put(values, &mut bytes);
        let mut decoded = vec![0.0; values.len()];
        dequantize(dtype, &bytes, &mut decoded);
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
        let error = squares(&mut decoded.iter().zip(values).map(|(a, b)| a - b));
        (error / squares(&mut values.iter().copied())).sqrt()
    }

    #[test]
    fn four_and_eight_bits_lose_what_they_must() {
        let values = normal(32 * 200);
        let eight = error_of(Dtype::Q8_0, &values, put_eight);
        assert!(eight < 0.006, "{eight}");
        // The range alone, without the search.
        let plain = error_of(Dtype::Q4_1, &values, |values, out| {
            for (values, out) in values.chunks(BLOCK).zip(out.chunks_mut(FOUR_BYTES)) {
                let (low, high) = values.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x)));
                let d = (high - low) / CODE_MAX;
                let codes: Vec<u8> = values.iter().map(|x| ((x - low) / d).round() as u8).collect();
                put_codes4(f16::from_f32(d), f16::from_f32(low), &codes, out);
            }
        });
        let four = error_of(Dtype::Q4_1, &values, put_four);
        assert!(four < 0.97 * plain && four < 0.085, "{four}, without the search {plain}");
        let sixteen = error_of(Dtype::BF16, &values, put_bf16);
        assert!(sixteen < 0.002, "{sixteen}");
    }

    #[test]
    fn blocks_that_are_grids_already_and_constant_ones_are_exact() {
        let grid: Vec<f32> = (0..32).map(|k| (k % 16) as f32 * 0.25 - 1.5).collect();
        assert!(error_of(Dtype::Q4_1, &grid, put_four) < 1e-6);
        let constant = [0.75; 32];
        assert!(error_of(Dtype::Q4_1, &constant, put_four) < 1e-6);
        let mut zeros = [1_u8; FOUR_BYTES];
        put_four(&[0.0; 32], &mut zeros);
        assert_eq!(zeros, [0; FOUR_BYTES]);
        let mut large = [0_u8; EIGHT_BYTES];
        put_eight(&[1e30; 32], &mut large);
        assert_eq!(large[..2], f16::MAX.to_le_bytes());
    }

    #[test]
    fn every_row_is_filled_once() {
        let data = fill_rows(100, 3, |first, bytes| {
            for (r, row) in bytes.chunks_exact_mut(3).enumerate() {
                row.iter_mut().for_each(|b| *b += (first + r) as u8);
            }
        });
        assert!(data.chunks_exact(3).enumerate().all(|(r, row)| row == [r as u8; 3]));
    }
}
