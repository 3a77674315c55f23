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

    /// Codes `[row][col]` as `layout` keeps them, each put in its place by the format's own description.
    fn packed(codes: &[u8], (rows, cols): (usize, usize), bits: usize, layout: Layout) -> Vec<u8> {
        let a_word = 32 / bits;
        let words = match layout {
            Layout::InputWords => cols.div_ceil(a_word) * rows,
            Layout::InterleavedWords => cols * rows / 8,
            Layout::RowWords => rows * cols.div_ceil(a_word),
            Layout::Bytes | Layout::Float8 => return codes.iter().map(|code| code ^ 0x80).collect(),
        };
        let mut out = vec![0_u32; words];
        for (index, &code) in codes.iter().enumerate() {
            let (row, col) = (index / cols, index % cols);
            let (word, place) = match layout {
                Layout::InputWords => (col / a_word * rows + row, col % a_word),
                Layout::InterleavedWords => {
                    let order = [0, 2, 4, 6, 1, 3, 5, 7];
                    (col * rows / 8 + row / 8, order.iter().position(|&r| r == row % 8).expect("one of eight"))
                }
                _ => (row * cols.div_ceil(a_word) + col / a_word, col % a_word),
            };
            out[word] |= u32::from(code) << (bits * place);
        }
        out.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Every way of keeping codes against `scale · (code − zero)` in f32: what stays in its bits is that but for a half's
    /// rounding, the rest is within half a step of the grid it is rounded to.
    #[test]
    fn weights_are_their_definition_whatever_the_layout_and_the_groups() {
        let (rows, cols) = (24_usize, 96_usize);
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let runs = |size: usize| (cols.div_ceil(size), None);
        // Act-order: columns of a group lie anywhere.
        let listed =
            (3, Some((0..cols).map(|col| (col * 37 + 11) % cols / 32).map(|g| g as u32).collect::<Vec<_>>()));
        let mut fates = std::collections::BTreeSet::new();
        for layout in [Layout::InputWords, Layout::InterleavedWords, Layout::RowWords, Layout::Bytes] {
            for (size, (group_count, order)) in
                [(32, runs(32)), (cols, runs(cols)), (16, runs(16)), (0, listed.clone())]
            {
                for (bits, centred) in [(4, false), (8, false), (8, true)] {
                    let fits = match layout {
                        Layout::Bytes => bits == 8,
                        Layout::InterleavedWords => bits == 4,
                        _ => true,
                    };
                    if !fits {
                        continue;
                    }
                    let codes: Vec<u8> = (0..rows * cols).map(|_| random(1 << bits) as u8).collect();
                    let count = rows * group_count;
                    // Halves, so that keeping them loses nothing.
                    let scales: Vec<f32> =
                        (0..count).map(|_| f16::from_f32(0.001 + random(1000) as f32 * 1e-5).to_f32()).collect();
                    let zeros: Vec<u8> =
                        (0..count).map(|_| if centred { 128 } else { random(1 << bits) as u8 }).collect();
                    let group = |col: usize| order.as_ref().map_or(col / size.max(1), |order| order[col] as usize);
                    let weight = |row: usize, col: usize| {
                        let at = row * group_count + group(col);
                        scales[at] * (f32::from(codes[row * cols + col]) - f32::from(zeros[at]))
                    };
                    let coded = Coded {
                        rows,
                        cols,
                        layout,
                        bits,
                        codes: &packed(&codes, (rows, cols), bits, layout),
                        scales: scales.clone(),
                        zeros: Zeros::Each(zeros.clone()),
                        group_count,
                        groups: order.clone().map_or(Groups::Runs(size), Groups::Listed),
                    };
                    let (dtype, data, fate) = coded.encode();
                    fates.insert(fate);
                    let mut decoded = vec![0.0; rows * cols];
                    rill_kernels::dequantize(dtype, &data, &mut decoded);
                    for (row, given) in decoded.chunks_exact(cols).enumerate() {
                        for (block, given) in given.chunks_exact(BLOCK).enumerate() {
                            let expected: Vec<f32> = (0..BLOCK).map(|k| weight(row, block * BLOCK + k)).collect();
                            let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                            let allowed = match fate {
                                // The code of zero is at most 15 steps off.
                                Fate::Kept4 => scales[row * group_count + group(block * BLOCK)] * 2_f32.powi(-7),
                                Fate::Kept8 => 0.0,
                                // Half a step, whose size is a half itself.
                                _ => largest / 127.0 * 0.505 + largest * 2_f32.powi(-11),
                            };
                            for (k, (given, expected)) in given.iter().zip(&expected).enumerate() {
                                let error = (given - expected).abs();
                                assert!(
                                    error <= allowed,
                                    "{fate:?}, row {row}, {block}, {k}: {given}, not {expected}"
                                );
                            }
                        }
                    }
                }
            }
        }
        assert_eq!(fates.into_iter().collect::<Vec<_>>(), [Fate::Kept4, Fate::Kept8, Fate::Rounded8]);
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
