//! A matrix of codes with scales and zero points, as quantised checkpoints keep it, on its way to blocks that kernels
//! take: as it is where the grids agree, to the nearest 8-bit grid elsewhere.

use super::encode::{
    BLOCK, EIGHT_BYTES, FOUR_BYTES, TILE, fill_rows, put_bf16, put_codes4, put_codes8, put_eight,
};
use half::f16;
use rill_kernels::Dtype;

/// How the codes of `rows × cols` weights lie in their tensor. Words are little-endian and 32 bits wide.
#[derive(Clone, Copy)]
pub(super) enum Layout {
    /// GPTQ: `[cols / codes a word][rows]`, a word's lowest bits the first column.
    InputWords,
    /// AWQ: `[cols][rows / 8]`, a word's nibbles the rows 0, 2, 4, 6, 1, 3, 5, 7.
    InterleavedWords,
    /// compressed-tensors: `[rows][words]`, a word's lowest bits the first column.
    RowWords,
    /// `[rows][cols]` signed bytes.
    Bytes,
    /// `[rows][cols]` floats of 8 bits, E4M3 without infinities (Micikevicius et al. 2022, arXiv:2209.05433).
    Float8,
}

/// Which nibble of an AWQ word holds the row of this number.
pub(super) const NIBBLE_OF_ROW: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The group a column's scale and zero point belong to.
pub(super) enum Groups {
    /// So many neighbouring columns each.
    Runs(usize),
    /// Named for each column (GPTQ's act-order).
    Listed(Vec<u32>),
}

/// Codes that stand for zero.
pub(super) enum Zeros {
    Same(u8),
    /// `[rows][groups]`.
    Each(Vec<u8>),
}

/// One matrix: `weight = scale · (code − zero)`, or scale times an 8-bit float.
pub(super) struct Coded<'a> {
    pub rows: usize,
    pub cols: usize,
    pub layout: Layout,
    /// 4 or 8.
    pub bits: usize,
    pub codes: &'a [u8],
    /// `[rows][groups]`.
    pub scales: Vec<f32>,
    pub zeros: Zeros,
    pub group_count: usize,
    pub groups: Groups,
}

/// What became of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fate {
    /// The same codes in blocks of 32.
    Kept4,
    Kept8,
    /// To the nearest 8-bit grid.
    Rounded8,
    /// To bf16, since its columns do not fill blocks.
    Rounded16,
}

impl Fate {
    pub(super) fn words(self) -> &'static str {
        match self {
            Fate::Kept4 => "in 4 bits as stored",
            Fate::Kept8 => "in 8 bits as stored",
            Fate::Rounded8 => "rounded to 8 bits",
            Fate::Rounded16 => "rounded to bf16",
        }
    }
}

impl Coded<'_> {
    /// Where its codes can stay as they are.
    fn fate(&self) -> Fate {
        let whole = self.cols.is_multiple_of(BLOCK);
        let aligned = match self.groups {
            Groups::Runs(size) => self.group_count == 1 || size.is_multiple_of(BLOCK),
            Groups::Listed(_) => false,
        };
        let centred = match &self.zeros {
            Zeros::Same(zero) => *zero == 128,
            Zeros::Each(zeros) => zeros.iter().all(|&zero| zero == 128),
        };
        match self.layout {
            _ if !whole => Fate::Rounded16,
            Layout::Float8 => Fate::Rounded8,
            _ if aligned && self.bits == 4 => Fate::Kept4,
            _ if aligned && centred => Fate::Kept8,
            _ => Fate::Rounded8,
        }
    }

    /// The matrix in blocks.
    pub(super) fn encode(&self) -> (Dtype, Vec<u8>, Fate) {
        let fate = self.fate();
        let dtype = match fate {
            Fate::Kept4 => Dtype::Q4_1,
            Fate::Kept8 | Fate::Rounded8 => Dtype::Q8_0,
            Fate::Rounded16 => Dtype::BF16,
        };
        let row_bytes = dtype.row_bytes(self.cols).expect("columns fill blocks");
        let floats = (0..=255).map(float8).collect::<Vec<f32>>();
        let data = fill_rows(self.rows, row_bytes, |first, bytes| {
            let mut codes = vec![0; TILE * self.cols];
            let mut values = vec![0.0; self.cols];
            self.unpack(first, &mut codes);
            for (r, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                let (row, codes) = (first + r, &codes[r * self.cols..][..self.cols]);
                match fate {
                    Fate::Kept4 => {
                        for (b, out) in out.chunks_exact_mut(FOUR_BYTES).enumerate() {
                            let (scale, zero) = self.at(row, b * BLOCK);
                            let d = f16::from_f32(scale);
                            // Of the rounded scale, so that the zero point's code comes out as zero or next to it.
                            let m = f16::from_f32(-d.to_f32() * f32::from(zero));
                            put_codes4(d, m, &codes[b * BLOCK..][..BLOCK], out);
                        }
                    }
                    Fate::Kept8 => {
                        for (b, out) in out.chunks_exact_mut(EIGHT_BYTES).enumerate() {
                            let (scale, _) = self.at(row, b * BLOCK);
                            put_codes8(f16::from_f32(scale), &codes[b * BLOCK..][..BLOCK], out);
                        }
                    }
                    Fate::Rounded8 | Fate::Rounded16 => {
                        for (k, value) in values.iter_mut().enumerate() {
                            let (scale, zero) = self.at(row, k);
                            *value = match self.layout {
                                Layout::Float8 => scale * floats[usize::from(codes[k])],
                                _ => scale * (f32::from(codes[k]) - f32::from(zero)),
                            };
                        }
                        if fate == Fate::Rounded8 { put_eight(&values, out) } else { put_bf16(&values, out) }
                    }
                }
            }
        });
        (dtype, data, fate)
    }

    /// Scale and zero point of a weight.
    fn at(&self, row: usize, col: usize) -> (f32, u8) {
        let group = match &self.groups {
            Groups::Runs(size) => col / size,
            Groups::Listed(groups) => groups[col] as usize,
        };
        let index = row * self.group_count + group;
        let zero = match &self.zeros {
            Zeros::Same(zero) => *zero,
            Zeros::Each(zeros) => zeros[index],
        };
        (self.scales[index], zero)
    }

    fn word(&self, index: usize) -> u32 {
        let bytes = &self.codes[4 * index..4 * index + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    /// Codes of the rows from `first` on, as many as fit `out` or are there, unsigned: signed bytes gain 128.
    fn unpack(&self, first: usize, out: &mut [u8]) {
        let (cols, bits) = (self.cols, self.bits as u32);
        let rows = TILE.min(self.rows - first);
        let (a_word, mask) = (32 / self.bits, (1_u32 << bits) - 1);
        match self.layout {
            Layout::InputWords => {
                for k in (0..cols).step_by(a_word) {
                    for r in 0..rows {
                        let word = self.word(k / a_word * self.rows + first + r);
                        for i in 0..a_word.min(cols - k) {
                            out[r * cols + k + i] = ((word >> (bits * i as u32)) & mask) as u8;
                        }
                    }
                }
            }
            Layout::InterleavedWords => {
                for k in 0..cols {
                    for r in 0..rows {
                        let row = first + r;
                        let word = self.word(k * (self.rows / 8) + row / 8);
                        out[r * cols + k] = ((word >> (4 * NIBBLE_OF_ROW[row % 8])) & 15) as u8;
                    }
                }
            }
            Layout::RowWords => {
                let width = cols.div_ceil(a_word);
                for r in 0..rows {
                    for k in 0..cols {
                        let word = self.word((first + r) * width + k / a_word);
                        out[r * cols + k] = ((word >> (bits * (k % a_word) as u32)) & mask) as u8;
                    }
                }
            }
            Layout::Bytes | Layout::Float8 => {
                let flip = if matches!(self.layout, Layout::Bytes) { 0x80 } else { 0 };
                let codes = &self.codes[first * cols..(first + rows) * cols];
                for (code, byte) in out.iter_mut().zip(codes) {
                    *code = byte ^ flip;
                }
            }
        }
    }
}

/// E4M3: sign, four bits of exponent, three of mantissa; all ones is no number.
fn float8(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3) & 15, f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2_f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2_f32.powi(i32::from(exponent) - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_are_those_of_the_paper() {
        let check = |code, value: f32| assert_eq!(float8(code), value, "{code:#x}");
        check(0, 0.0);
        check(1, 2_f32.powi(-9));
        check(7, 7.0 * 2_f32.powi(-9));
        check(8, 2_f32.powi(-6));
        check(0x38, 1.0);
        check(0x7e, 448.0);
        check(0xfe, -448.0);
        assert!(float8(0x7f).is_nan() && float8(0xff).is_nan());
    }

    #[test]
    fn nibbles_of_an_awq_word_are_rows_in_their_order() {
        // Row 0 in the lowest nibble, row 2 next to it.
        let word = 0x7531_6420_u32.to_le_bytes();
        let coded = Coded {
            rows: 8,
            cols: 1,
            layout: Layout::InterleavedWords,
            bits: 4,
            codes: &word,
            scales: vec![1.0; 8],
            zeros: Zeros::Same(0),
            group_count: 1,
            groups: Groups::Runs(1),
        };
        let mut codes = vec![0; TILE];
        coded.unpack(0, &mut codes);
        assert_eq!(codes[..8], [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
