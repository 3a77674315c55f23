//! ggml's tensor types as they lie in files: block sizes and the plain decoding of every type rill loads.
//!
//! Layouts are those of ggml's `ggml-common.h`; values are defined by its `dequantize_row_*`.

use half::{bf16, f16};

/// Element type of a stored weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// Every type there is, for tests and error messages.
pub const DTYPES: [Dtype; 16] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Q8_0,
    Dtype::Q2_K,
    Dtype::Q3_K,
    Dtype::Q4_K,
    Dtype::Q5_K,
    Dtype::Q6_K,
    Dtype::IQ4_NL,
    Dtype::IQ4_XS,
    Dtype::MXFP4,
];

/// The sixteen values of IQ4_NL and IQ4_XS.
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl Dtype {
    /// ggml's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::Q4_0 => "Q4_0",
            Dtype::Q4_1 => "Q4_1",
            Dtype::Q5_0 => "Q5_0",
            Dtype::Q5_1 => "Q5_1",
            Dtype::Q8_0 => "Q8_0",
            Dtype::Q2_K => "Q2_K",
            Dtype::Q3_K => "Q3_K",
            Dtype::Q4_K => "Q4_K",
            Dtype::Q5_K => "Q5_K",
            Dtype::Q6_K => "Q6_K",
            Dtype::IQ4_NL => "IQ4_NL",
            Dtype::IQ4_XS => "IQ4_XS",
            Dtype::MXFP4 => "MXFP4",
        }
    }

    /// The type ggml calls `name`.
    pub fn from_name(name: &str) -> Option<Dtype> {
        DTYPES.into_iter().find(|d| d.name() == name)
    }

    /// Elements a block.
    pub fn block_len(self) -> usize {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => 1,
            Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 | Dtype::Q8_0 | Dtype::IQ4_NL | Dtype::MXFP4 => {
                32
            }
            _ => 256,
        }
    }

    /// Bytes a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::Q4_0 | Dtype::IQ4_NL => 18,
            Dtype::Q4_1 => 20,
            Dtype::Q5_0 => 22,
            Dtype::Q5_1 => 24,
            Dtype::Q8_0 => 34,
            Dtype::Q2_K => 84,
            Dtype::Q3_K => 110,
            Dtype::Q4_K => 144,
            Dtype::Q5_K => 176,
            Dtype::Q6_K => 210,
            Dtype::IQ4_XS => 136,
            Dtype::MXFP4 => 17,
        }
    }

    /// Bytes of a row of `cols` elements; `None` if that is no whole number of blocks, or more than there can be.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let blocks = cols.is_multiple_of(self.block_len()).then_some(cols / self.block_len())?;
        blocks.checked_mul(self.block_bytes())
    }
}

/// Twice the sixteen values of a 4-bit float, E2M1 (OCP Microscaling Formats, 2023).
const MX_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The power of two an MXFP4 block's first byte stands for, halved as the values are doubled.
pub(crate) fn mx_scale(exponent: u8) -> f32 {
    (f64::from(exponent) - 128.0).exp2() as f32
}

fn half_at(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

/// Scale and minimum `j` (of 8) packed in twelve 6-bit-coded bytes of Q4_K and Q5_K.
pub(crate) fn k_scale_min(j: usize, s: &[u8]) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    }
}

/// Scale `j` (of 16) of Q3_K, −32..32, packed in twelve bytes: low four bits in the first eight, high two in the rest.
fn q3_scale(j: usize, s: &[u8]) -> i32 {
    let low = if j < 8 { s[j] & 15 } else { s[j - 8] >> 4 };
    let high = (s[8 + j % 4] >> (2 * (j / 4))) & 3;
    i32::from(low | (high << 4)) - 32
}

/// Decodes one block into `out`, which holds `dtype.block_len()` values.
pub fn dequantize_block(dtype: Dtype, block: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
        Dtype::F16 => out[0] = half_at(block, 0),
        Dtype::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        Dtype::Q4_0 => {
            let d = half_at(block, 0);
            for (i, &b) in block[2..18].iter().enumerate() {
                out[i] = d * (f32::from(b & 15) - 8.0);
                out[i + 16] = d * (f32::from(b >> 4) - 8.0);
            }
        }
        Dtype::Q4_1 => {
            let (d, m) = (half_at(block, 0), half_at(block, 2));
            for (i, &b) in block[4..20].iter().enumerate() {
                out[i] = d * f32::from(b & 15) + m;
                out[i + 16] = d * f32::from(b >> 4) + m;
            }
        }
        Dtype::Q5_0 | Dtype::Q5_1 => {
            let min = usize::from(dtype == Dtype::Q5_1);
            let d = half_at(block, 0);
            let m = if min == 1 { half_at(block, 2) } else { -16.0 * d };
            let at = 2 + 2 * min;
            let high = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
            for (i, &b) in block[at + 4..at + 20].iter().enumerate() {
                let bit = |j: usize| ((high >> j) & 1) << 4;
                out[i] = d * (u32::from(b & 15) | bit(i)) as f32 + m;
                out[i + 16] = d * (u32::from(b >> 4) | bit(i + 16)) as f32 + m;
            }
        }
        Dtype::Q8_0 => {
            let d = half_at(block, 0);
            for (x, &q) in out.iter_mut().zip(&block[2..34]) {
                *x = d * f32::from(q as i8);
            }
        }
        Dtype::Q2_K => {
            let (scales, q) = (&block[..16], &block[16..80]);
            let (d, min) = (half_at(block, 80), half_at(block, 82));
            for (i, x) in out.iter_mut().enumerate() {
                let (part, shift, at) = (i / 128, i % 128 / 32, i % 32);
                let code = (q[32 * part + at] >> (2 * shift)) & 3;
                let s = scales[i / 16];
                *x = d * f32::from(s & 15) * f32::from(code) - min * f32::from(s >> 4);
            }
        }
        Dtype::Q3_K => {
            let (high, q, scales) = (&block[..32], &block[32..96], &block[96..108]);
            let d = half_at(block, 108);
            for (i, x) in out.iter_mut().enumerate() {
                let (part, shift, at) = (i / 128, i % 128 / 32, i % 32);
                let low = i32::from((q[32 * part + at] >> (2 * shift)) & 3);
                let bit = i32::from((high[at] >> (4 * part + shift)) & 1);
                *x = d * q3_scale(i / 16, scales) as f32 * (low + 4 * bit - 4) as f32;
            }
        }
        Dtype::Q4_K => {
            let (d, min) = (half_at(block, 0), half_at(block, 2));
            for (i, x) in out.iter_mut().enumerate() {
                let (s, m) = k_scale_min(i / 32, &block[4..16]);
                let b = block[16 + 32 * (i / 64) + i % 32];
                let code = if i % 64 < 32 { b & 15 } else { b >> 4 };
                *x = d * f32::from(s) * f32::from(code) - min * f32::from(m);
            }
        }
        Dtype::Q5_K => {
            let (d, min) = (half_at(block, 0), half_at(block, 2));
            for (i, x) in out.iter_mut().enumerate() {
                let (s, m) = k_scale_min(i / 32, &block[4..16]);
                let b = block[48 + 32 * (i / 64) + i % 32];
                let low = if i % 64 < 32 { b & 15 } else { b >> 4 };
                let code = low | (((block[16 + i % 32] >> (i / 32)) & 1) << 4);
                *x = d * f32::from(s) * f32::from(code) - min * f32::from(m);
            }
        }
        Dtype::Q6_K => {
            let d = half_at(block, 208);
            for (i, x) in out.iter_mut().enumerate() {
                let (part, quarter, at) = (i / 128, i % 128 / 32, i % 32);
                let b = block[64 * part + 32 * (quarter % 2) + at];
                let low = if quarter < 2 { b & 15 } else { b >> 4 };
                let high = (block[128 + 32 * part + at] >> (2 * quarter)) & 3;
                let s = block[192 + i / 16] as i8;
                *x = d * f32::from(s) * f32::from((low | (high << 4)) as i8 - 32);
            }
        }
        Dtype::IQ4_NL => {
            let d = half_at(block, 0);
            for (i, &b) in block[2..18].iter().enumerate() {
                out[i] = d * f32::from(IQ4_VALUES[usize::from(b & 15)]);
                out[i + 16] = d * f32::from(IQ4_VALUES[usize::from(b >> 4)]);
            }
        }
        Dtype::IQ4_XS => {
            let d = half_at(block, 0);
            let high = u16::from_le_bytes([block[2], block[3]]);
            for (g, group) in out.chunks_exact_mut(32).enumerate() {
                let low = (block[4 + g / 2] >> (4 * (g % 2))) & 15;
                let s = i32::from(low) | (i32::from((high >> (2 * g)) & 3) << 4);
                let scale = d * (s - 32) as f32;
                for (i, &b) in block[8 + 16 * g..24 + 16 * g].iter().enumerate() {
                    group[i] = scale * f32::from(IQ4_VALUES[usize::from(b & 15)]);
                    group[i + 16] = scale * f32::from(IQ4_VALUES[usize::from(b >> 4)]);
                }
            }
        }
        Dtype::MXFP4 => {
            let scale = mx_scale(block[0]);
            for (i, &b) in block[1..17].iter().enumerate() {
                out[i] = scale * f32::from(MX_VALUES[usize::from(b & 15)]);
                out[i + 16] = scale * f32::from(MX_VALUES[usize::from(b >> 4)]);
            }
        }
    }
}

/// Decodes whole rows: `out.len()` values from `data`.
///
/// # Panics
/// If `data` holds fewer blocks than `out` asks for.
pub fn dequantize(dtype: Dtype, data: &[u8], out: &mut [f32]) {
    let blocks = data.chunks_exact(dtype.block_bytes());
    assert!(blocks.len() * dtype.block_len() >= out.len(), "weights shorter than their shape");
    for (block, out) in blocks.zip(out.chunks_exact_mut(dtype.block_len())) {
        dequantize_block(dtype, block, out);
    }
}
