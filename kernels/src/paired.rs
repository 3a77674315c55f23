//! 4-bit weights as the CPU multiplies them: groups two by two, scales as whole numbers.
//!
//! Two groups' dot products of one output are neighbouring lanes, so their sums are two 16-bit words of one register lane, which
//! `vpdpwssd` multiplies with both scales and adds up. Codes are taken less 8, or the sums would not fit a word.
//!
//! ```text
//! codes  [tile][two groups] 8 × 64 B; byte 64i + 4l + b, with l = 4 ⌊r / 4⌋ + 2 (r mod 2) + h: column 4j + b of group h, where
//!                           i = 2 (j mod 4) + ⌊j / 4⌋ as rows lie, low nibble row r for r mod 4 < 2, high nibble for others
//!                           in pieces of two (`Isa::piece`) byte 64i + 4r + 2h + b mod 2, high nibble for b > 1
//! scales [tile][two groups] 2 × 16 rows × 2 words: scale, and value of code 8, of both groups
//! units  [tile]             2 × 16 (f32): what 2^15 scale words are, and in those units what a word of the values is
//! ```
//!
//! weight = units₀ · (scale / 2^15 · (code − 8) + units₁ · value). Units are powers of two and the largest word of a row is 2^14 or
//! more, so an f16 scale is kept exactly where it is a sixteenth of the row's largest or more.

use crate::memory::{Buffer, Shared};
use crate::packed::{GROUP, Group, Stored, TILE_ROWS, for_each_group};
use crate::pool::Pool;

/// Groups whose products are added up as whole numbers.
pub(crate) const SPAN: usize = 8;
/// The largest word of the activations' scales and sums.
pub(crate) const WORD_MAX: f32 = 16_384.0;
/// The most that a span's words of them add up to, but for rounding. So a group's sum, at most 32 · 127 · 8, times the product of both
/// scales stays below 2^31 for all groups of a span together, and so do sums times values below 2^15.
pub(crate) const WORDS_MAX: f32 = 65_536.0;

/// Bytes of two groups' codes.
pub(crate) const CODE_BYTES: usize = 512;
/// Words of two groups' scales and values.
pub(crate) const SCALES: usize = 4 * TILE_ROWS;
/// What codes are less.
const MIDDLE: u8 = 8;
/// Units of a tile.
pub(crate) const UNITS: usize = 2 * TILE_ROWS;
/// 2^15 scale words are one unit.
const SCALE_ONE: f32 = 32_768.0;

/// See the module.
pub(crate) struct Paired {
    /// Columns of one group that lie together: see `Isa::piece`.
    pub piece: usize,
    pub codes: Buffer<u8>,
    pub scales: Buffer<i16>,
    pub units: Buffer<f32>,
}

/// Bytes that `cols` columns of a row take.
pub(crate) fn row_bytes(cols: usize) -> usize {
    cols.div_ceil(2 * GROUP) * (CODE_BYTES + 2 * SCALES) / TILE_ROWS + 4 * UNITS / TILE_ROWS
}

/// The power of two of which words up to `largest` have 15 bits.
fn unit(largest: f32) -> f32 {
    if !largest.is_finite() {
        return f32::NAN;
    }
    if largest == 0.0 {
        return 1.0;
    }
    let power = f32::from_bits(largest.to_bits() & 0x7f80_0000);
    power * 2.0 / SCALE_ONE
}

fn word(value: f32, unit: f32) -> i16 {
    (value / unit).round_ties_even().clamp(-32_767.0, 32_767.0) as i16
}

/// Where in a pair's quad of columns the four of row `r` of its group `half` lie: byte, and bits to shift.
fn place(piece: usize, r: usize, half: usize) -> [(usize, u32); 4] {
    std::array::from_fn(|b| match piece {
        2 => (4 * r + 2 * half + b % 2, if b < 2 { 0 } else { 4 }),
        _ => (4 * (r / 4 * 4 + r % 2 * 2 + half) + b, if r % 4 < 2 { 0 } else { 4 }),
    })
}

/// The how-manieth quad `j` is met: rows are written sooner in this order.
pub(crate) fn order(j: usize) -> usize {
    j % 4 * 2 + j / 4
}

impl Paired {
    /// Repacks a checked matrix of 4-bit groups, tiles in parallel.
    pub(crate) fn new(stored: Stored<'_>, piece: usize, pool: &mut Pool) -> Paired {
        let groups = stored.cols / GROUP;
        let (pairs, tiles) = (groups.div_ceil(2), stored.rows.div_ceil(TILE_ROWS));
        let mut codes = Buffer::zeroed(tiles * pairs * CODE_BYTES);
        let mut scales = Buffer::zeroed(tiles * pairs * SCALES);
        let mut units = Buffer::zeroed(tiles * UNITS);
        let (codes_out, scales_out) = (Shared::new(&mut codes), Shared::new(&mut scales));
        let units_out = Shared::new(&mut units);
        pool.run(tiles, &|tile| {
            // SAFETY: tiles are disjoint parts of the buffers, and each tile is one chunk.
            let (codes, scales, units) = unsafe {
                (
                    std::slice::from_raw_parts_mut(codes_out.at(tile * pairs * CODE_BYTES), pairs * CODE_BYTES),
                    std::slice::from_raw_parts_mut(scales_out.at(tile * pairs * SCALES), pairs * SCALES),
                    std::slice::from_raw_parts_mut(units_out.at(tile * UNITS), UNITS),
                )
            };
            let mut grid = vec![(0.0, 0.0); groups];
            for r in 0..TILE_ROWS {
                grid.fill((0.0, 0.0));
                let row = tile * TILE_ROWS + r;
                if row < stored.rows {
                    for_each_group(stored.dtype, stored.row(row), |g, group| {
                        let Group::Four { d, m, codes: four } = group else {
                            unreachable!("{} is no grid of 4 bits", stored.dtype.name())
                        };
                        let (d, m) = (d.to_f32(), m.to_f32());
                        grid[g] = (d, d.mul_add(f32::from(MIDDLE), m));
                        let places = place(piece, r, g % 2);
                        for (j, quad) in four.as_chunks::<4>().0.iter().enumerate() {
                            let codes = &mut codes[g / 2 * CODE_BYTES + 64 * order(j)..][..64];
                            quad.iter().zip(places).for_each(|(code, (at, shift))| codes[at] |= code << shift);
                        }
                    });
                }
                let largest = grid.iter().fold((0.0, 0.0), |(d, m), g| {
                    // NaN stays so, which the larger of two numbers does not.
                    let larger = |a: f32, b: f32| if a.is_nan() || b.abs() <= a { a } else { b.abs() };
                    (larger(d, g.0), larger(m, g.1))
                });
                let (scale, value) = (unit(largest.0), unit(largest.1));
                for (g, &(d, m)) in grid.iter().enumerate() {
                    let at = g / 2 * SCALES + 2 * r + g % 2;
                    (scales[at], scales[at + 2 * TILE_ROWS]) = (word(d, scale), word(m, value));
                }
                units[r] = scale * SCALE_ONE;
                units[TILE_ROWS + r] = value / units[r];
            }
        });
        Paired { piece, codes, scales, units }
    }

    /// Decodes row `r` of tile `tile`.
    pub(crate) fn read_row(&self, tile: usize, r: usize, out: &mut [f32]) {
        let groups = out.len() / GROUP;
        let units = &self.units[tile * UNITS..];
        for (g, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let pair = tile * groups.div_ceil(2) + g / 2;
            let at = pair * SCALES + 2 * r + g % 2;
            let d = f32::from(self.scales[at]) * (units[r] / SCALE_ONE);
            let m = f32::from(self.scales[at + 2 * TILE_ROWS]) * (units[TILE_ROWS + r] * units[r]);
            let places = place(self.piece, r, g % 2);
            for (k, x) in out.iter_mut().enumerate() {
                let (at, shift) = places[k % 4];
                let code = self.codes[pair * CODE_BYTES + 64 * order(k / 4) + at] >> shift & 15;
                *x = (f32::from(code) - f32::from(MIDDLE)).mul_add(d, m);
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.codes.len() + 2 * self.scales.len() + 4 * self.units.len()
    }
}
