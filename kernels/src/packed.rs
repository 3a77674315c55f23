//! Weight layouts: how a matrix lies in memory for the dot-product kernels, and repacking from ggml's blocks.
//!
//! Rows (outputs) are cut into tiles of 16 and columns (inputs) into groups of 32. One vector register holds four
//! consecutive columns of all 16 rows of a tile, so it meets one broadcast 4-byte piece of an activation row in
//! `vpdpbusd`, and a register of results is 16 consecutive outputs.
//!
//! ```text
//! Grouped codes  [tile][group] 4 × 64 B; byte 64j + 4r + b: low nibble = row r, column 4j + b of the group,
//!                              high nibble = column 16 + 4j + b        weight = d · code + m
//!        scales  [tile][group] 16 × d, 16 × m   (f16)
//! Eight  codes   [tile][group] 8 × 64 B; byte 64j + 4r + b = row r, column 4j + b, plus 128
//!        scales  [tile][group] 16 × d           (f16)                  weight = d · (code − 128)
//! Half,  values  [tile][column] 16 rows         (f16 or f32 bits)
//! Single
//! Brain  values  [tile][pair of columns] 16 × 2 (bf16 bits); an odd number of columns ends in zeros
//! ```
//!
//! The CPU has 4-bit weights in pairs of groups instead (`paired.rs`): they are what a layout's first kind is a parameter for.

use crate::cpu::simd::LANES;
use crate::memory::{Buffer, Shared};
use crate::paired::{self, Paired};
use crate::pool::Pool;
use crate::quants::{Dtype, dequantize_block, k_scale_min, mx_scale};
use half::f16;

/// Rows a tile.
pub const TILE_ROWS: usize = LANES;
/// Columns that share a scale.
pub const GROUP: usize = 32;

/// A stored weight matrix, row-major, or some of its rows.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    pub data: &'a [u8],
}

/// Why a stored matrix cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    #[error("{rows} × {cols} {dtype} weights take {needed} bytes and {given} are there")]
    Size { rows: usize, cols: usize, dtype: &'static str, needed: usize, given: usize },
    #[error("{cols} columns are no multiple of {multiple}, which {dtype} weights need")]
    Columns { cols: usize, multiple: usize, dtype: &'static str },
    #[error("the parts of one layer have {first} and {other} columns")]
    Mixed { first: usize, other: usize },
}

/// One packed matrix, its 4-bit weights as the backend has them.
pub(crate) struct Packed<Four> {
    pub rows: usize,
    pub cols: usize,
    pub layout: Layout<Four>,
}

pub(crate) enum Layout<Four> {
    Four(Four),
    Eight { codes: Buffer<u8>, scales: Buffer<u16> },
    Half(Buffer<u16>),
    Brain(Buffer<u16>),
    Single(Buffer<f32>),
}

/// 4-bit weights of one group after the other.
pub(crate) struct Grouped {
    pub codes: Buffer<u8>,
    pub scales: Buffer<u16>,
}

impl Grouped {
    /// Repacks a checked matrix of 4-bit groups, tiles in parallel.
    pub(crate) fn new(stored: Stored<'_>, pool: &mut Pool) -> Grouped {
        let (codes, scales) = pack_groups(stored, pool, 256, 32);
        Grouped { codes, scales }
    }
}

/// Thirty-two weights of one row on their way into a layout.
pub(crate) enum Group {
    Four { d: f16, m: f16, codes: [u8; GROUP] },
    Eight { d: f16, codes: [i8; GROUP] },
}

impl<'a> Stored<'a> {
    /// Checks the shape against the data.
    pub fn check(&self) -> Result<(), PackError> {
        let dtype = self.dtype.name();
        let quantised = self.dtype.block_len() > 1;
        let multiple = if quantised { self.dtype.block_len() } else { 1 };
        let Some(row) = self.dtype.row_bytes(self.cols) else {
            return Err(PackError::Columns { cols: self.cols, multiple, dtype });
        };
        let needed = row.saturating_mul(self.rows);
        // A tile is packed whole even if it holds one row.
        let packs = self.cols.checked_mul(4 * TILE_ROWS).is_some_and(|tile| {
            self.rows.div_ceil(TILE_ROWS).checked_mul(tile).is_some_and(|bytes| bytes < isize::MAX as usize)
        });
        if needed == self.data.len() && packs {
            Ok(())
        } else {
            Err(PackError::Size { rows: self.rows, cols: self.cols, dtype, needed, given: self.data.len() })
        }
    }

    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.data.len() / self.rows;
        &self.data[row * bytes..(row + 1) * bytes]
    }
}

/// Bytes a matrix takes once the CPU has packed it: what `Packed::bytes` says of it.
pub fn packed_bytes(dtype: Dtype, rows: usize, cols: usize) -> u64 {
    let row = match dtype {
        Dtype::F32 => 4 * cols,
        Dtype::F16 => 2 * cols,
        Dtype::BF16 => 2 * cols.next_multiple_of(2),
        Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q4_K => paired::row_bytes(cols),
        _ => cols / GROUP * 34,
    };
    rows.next_multiple_of(TILE_ROWS) as u64 * row as u64
}

/// Address of one of equally large tiles, and bytes of `step` of its numbers.
fn run<T>(data: &[T], (tile, tiles): (usize, usize), step: usize) -> (usize, usize) {
    (data[data.len() / tiles * tile..].as_ptr().addr(), step * size_of::<T>())
}

impl<Four> Packed<Four> {
    /// Repacks a checked matrix, tiles in parallel; `four` does it where it is of 4 bits.
    pub(crate) fn new(
        stored: Stored<'_>,
        pool: &mut Pool,
        four: impl FnOnce(Stored<'_>, &mut Pool) -> Four,
    ) -> Packed<Four> {
        let (rows, cols) = (stored.rows, stored.cols);
        let tiles = rows.div_ceil(TILE_ROWS);
        let layout = match stored.dtype {
            Dtype::F32 => {
                let mut values = Buffer::zeroed(tiles * cols * TILE_ROWS);
                let out = Shared::new(&mut values);
                interleave(stored, pool, 1, |at, bytes| {
                    let value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    // SAFETY: `at` is inside the buffer, and each place belongs to one row, so to one chunk.
                    unsafe { *out.at(at) = value }
                });
                Layout::Single(values)
            }
            Dtype::F16 => {
                let mut values = Buffer::zeroed(tiles * cols * TILE_ROWS);
                let out = Shared::new(&mut values);
                interleave(stored, pool, 1, |at, bytes| {
                    // SAFETY: as above.
                    unsafe { *out.at(at) = u16::from_le_bytes([bytes[0], bytes[1]]) }
                });
                Layout::Half(values)
            }
            Dtype::BF16 => {
                let mut values = Buffer::zeroed(tiles * cols.next_multiple_of(2) * TILE_ROWS);
                let out = Shared::new(&mut values);
                interleave(stored, pool, 2, |at, bytes| {
                    // SAFETY: as above.
                    unsafe { *out.at(at) = u16::from_le_bytes([bytes[0], bytes[1]]) }
                });
                Layout::Brain(values)
            }
            Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q4_K => Layout::Four(four(stored, pool)),
            _ => {
                let (codes, scales) = pack_groups(stored, pool, 512, 16);
                Layout::Eight { codes, scales }
            }
        };
        Packed { rows, cols, layout }
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }
}

impl Packed<Paired> {
    /// Bytes the matrix takes.
    pub(crate) fn bytes(&self) -> usize {
        match &self.layout {
            Layout::Four(paired) => paired.bytes(),
            Layout::Eight { codes, scales } => codes.len() + 2 * scales.len(),
            Layout::Half(values) | Layout::Brain(values) => 2 * values.len(),
            Layout::Single(values) => 4 * values.len(),
        }
    }

    /// Where tile `tile` begins, and bytes of it that lie side by side: codes and scales of a group or two, or 32 columns.
    pub(crate) fn runs(&self, tile: usize) -> [(usize, usize); 2] {
        let tiles = self.tiles();
        let floats = GROUP * TILE_ROWS;
        match &self.layout {
            Layout::Four(Paired { codes, scales, .. }) => {
                [run(codes, (tile, tiles), paired::CODE_BYTES), run(scales, (tile, tiles), paired::SCALES)]
            }
            Layout::Eight { codes, scales } => [run(codes, (tile, tiles), 512), run(scales, (tile, tiles), 16)],
            Layout::Half(values) | Layout::Brain(values) => [run(values, (tile, tiles), floats), (0, 0)],
            Layout::Single(values) => [run(values, (tile, tiles), floats), (0, 0)],
        }
    }

    /// Decodes row `row` into `out`, exactly as the kernels see it. For embeddings, and the reference.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (tile, r) = (row / TILE_ROWS, row % TILE_ROWS);
        let groups = self.cols / GROUP;
        let scale = |bits: u16| f16::from_bits(bits).to_f32();
        match &self.layout {
            Layout::Four(paired) => paired.read_row(tile, r, &mut out[..self.cols]),
            Layout::Eight { codes, scales } => {
                for (g, out) in out[..self.cols].chunks_exact_mut(GROUP).enumerate() {
                    let at = tile * groups + g;
                    let d = scale(scales[at * 16 + r]);
                    for (k, x) in out.iter_mut().enumerate() {
                        let code = i32::from(codes[at * 512 + 64 * (k / 4) + 4 * r + k % 4]) - 128;
                        *x = code as f32 * d;
                    }
                }
            }
            Layout::Half(values) => {
                for (k, x) in out[..self.cols].iter_mut().enumerate() {
                    *x = scale(values[(tile * self.cols + k) * TILE_ROWS + r]);
                }
            }
            Layout::Brain(values) => {
                for (k, x) in out[..self.cols].iter_mut().enumerate() {
                    let pair = tile * self.cols.div_ceil(2) + k / 2;
                    *x = f32::from_bits(u32::from(values[(pair * TILE_ROWS + r) * 2 + k % 2]) << 16);
                }
            }
            Layout::Single(values) => {
                for (k, x) in out[..self.cols].iter_mut().enumerate() {
                    *x = values[(tile * self.cols + k) * TILE_ROWS + r];
                }
            }
        }
    }
}

/// Calls `put(index in [tile][columns, `together` at a time][row][column of those], element bytes)` for every element.
fn interleave(stored: Stored<'_>, pool: &mut Pool, together: usize, put: impl Fn(usize, &[u8]) + Sync) {
    let width = stored.dtype.block_bytes();
    pool.run(stored.rows.div_ceil(TILE_ROWS), &|tile| {
        for row in tile * TILE_ROWS..((tile + 1) * TILE_ROWS).min(stored.rows) {
            for (col, bytes) in stored.row(row).chunks_exact(width).enumerate() {
                let columns = tile * stored.cols.div_ceil(together) + col / together;
                put((columns * TILE_ROWS + row % TILE_ROWS) * together + col % together, bytes);
            }
        }
    });
}

fn pack_groups(
    stored: Stored<'_>,
    pool: &mut Pool,
    code_bytes: usize,
    scale_count: usize,
) -> (Buffer<u8>, Buffer<u16>) {
    let groups = stored.cols / GROUP;
    let tiles = stored.rows.div_ceil(TILE_ROWS);
    let mut codes = Buffer::zeroed(tiles * groups * code_bytes);
    let mut scales = Buffer::zeroed(tiles * groups * scale_count);
    let (codes_out, scales_out) = (Shared::new(&mut codes), Shared::new(&mut scales));
    pool.run(tiles, &|tile| {
        // SAFETY: tiles are disjoint parts of both buffers, and each tile is one chunk.
        let (codes, scales) = unsafe {
            (
                std::slice::from_raw_parts_mut(codes_out.at(tile * groups * code_bytes), groups * code_bytes),
                std::slice::from_raw_parts_mut(scales_out.at(tile * groups * scale_count), groups * scale_count),
            )
        };
        for row in tile * TILE_ROWS..((tile + 1) * TILE_ROWS).min(stored.rows) {
            let r = row % TILE_ROWS;
            for_each_group(stored.dtype, stored.row(row), |g, group| match group {
                Group::Four { d, m, codes: four } => {
                    let codes = &mut codes[g * code_bytes..];
                    for (k, &code) in four.iter().enumerate() {
                        codes[64 * (k % 16 / 4) + 4 * r + k % 4] |= code << if k < 16 { 0 } else { 4 };
                    }
                    scales[g * scale_count + r] = d.to_bits();
                    scales[g * scale_count + 16 + r] = m.to_bits();
                }
                Group::Eight { d, codes: eight } => {
                    let codes = &mut codes[g * code_bytes..];
                    for (k, &code) in eight.iter().enumerate() {
                        codes[64 * (k / 4) + 4 * r + k % 4] = (i16::from(code) + 128) as u8;
                    }
                    scales[g * scale_count + r] = d.to_bits();
                }
            });
        }
    });
    (codes, scales)
}

/// Cuts a row into groups: exactly where the type is a 4- or 8-bit grid per 32, to the nearest 8-bit grid elsewhere.
pub(crate) fn for_each_group(dtype: Dtype, row: &[u8], mut put: impl FnMut(usize, Group)) {
    let half = |b: &[u8], at: usize| f16::from_le_bytes([b[at], b[at + 1]]);
    let mut values = [0.0; 256];
    for (index, block) in row.chunks_exact(dtype.block_bytes()).enumerate() {
        match dtype {
            Dtype::Q4_0 | Dtype::Q4_1 => {
                let d = half(block, 0);
                let (m, at) =
                    if dtype == Dtype::Q4_1 { (half(block, 2), 4) } else { (f16::from_f32(-8.0 * d.to_f32()), 2) };
                let codes = std::array::from_fn(|k| {
                    let byte = block[at + k % 16];
                    if k < 16 { byte & 15 } else { byte >> 4 }
                });
                put(index, Group::Four { d, m, codes });
            }
            Dtype::Q4_K => {
                let (d, min) = (half(block, 0).to_f32(), half(block, 2).to_f32());
                for g in 0..8 {
                    let (s, m) = k_scale_min(g, &block[4..16]);
                    let codes = std::array::from_fn(|k| {
                        let byte = block[16 + 32 * (g / 2) + k];
                        if g % 2 == 0 { byte & 15 } else { byte >> 4 }
                    });
                    let (d, m) = (f16::from_f32(d * f32::from(s)), f16::from_f32(-min * f32::from(m)));
                    put(index * 8 + g, Group::Four { d, m, codes });
                }
            }
            Dtype::Q8_0 => {
                let codes = std::array::from_fn(|k| block[2 + k] as i8);
                put(index, Group::Eight { d: half(block, 0), codes });
            }
            Dtype::Q5_0 | Dtype::IQ4_NL => {
                let d = half(block, 0);
                dequantize_block(dtype, block, &mut values[..GROUP]);
                put(index, exact_eight(d, &values[..GROUP]));
            }
            Dtype::MXFP4 => {
                let (scale, values) = (mx_scale(block[0]), &mut values[..GROUP]);
                dequantize_block(dtype, block, values);
                let d = f16::from_f32(scale);
                put(index, if d.to_f32() == scale { exact_eight(d, values) } else { nearest_eight(values) });
            }
            _ => {
                let len = dtype.block_len();
                dequantize_block(dtype, block, &mut values[..len]);
                for (g, values) in values[..len].chunks_exact(GROUP).enumerate() {
                    put(index * (len / GROUP) + g, nearest_eight(values));
                }
            }
        }
    }
}

/// Values that are whole multiples of `d` already.
fn exact_eight(d: f16, values: &[f32]) -> Group {
    let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
    Group::Eight { d, codes: std::array::from_fn(|k| (values[k] * inverse).round_ties_even() as i8) }
}

/// The 8-bit grid whose largest value is the group's largest.
fn nearest_eight(values: &[f32]) -> Group {
    let amax = values.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let d = f16::from_f32(amax / 127.0);
    let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
    let codes = std::array::from_fn(|k| (values[k] * inverse).round_ties_even().clamp(-127.0, 127.0) as i8);
    Group::Eight { d, codes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quants::DTYPES;

    #[test]
    fn bytes_are_known_beforehand() {
        let mut pool = Pool::new(1);
        for dtype in DTYPES {
            for (rows, cols) in [(1, 256), (16, 512), (45, 768)] {
                let data = vec![0; rows * dtype.row_bytes(cols).expect("whole blocks")];
                let stored = Stored { dtype, rows, cols, data: &data };
                let packed = Packed::new(stored, &mut pool, |stored, pool| Paired::new(stored, 4, pool));
                assert_eq!(packed_bytes(dtype, rows, cols), packed.bytes() as u64, "{dtype:?} {rows} × {cols}");
            }
        }
        assert_eq!(packed_bytes(Dtype::BF16, 1, 5), 16 * 6 * 2);
    }
}
