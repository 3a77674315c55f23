//! Packed weights as the tensor cores take them: kernels/cuda/linear_quantised.cu and linear_float.cu draw the layouts.
//!
//! They are made from the CPU's packed layouts, so that both backends hold the very same numbers.

use super::memory::{Bytes, Device, DeviceBuffer};
use crate::memory::Buffer;
use crate::packed::{GROUP, Grouped, Layout, TILE_ROWS};

/// Columns a step of the float kernels.
const STEP: usize = 16;
const LANES: usize = 32;

/// Numbered as the kernels number them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Four = 0,
    Eight = 1,
    Brain = 2,
    Half = 3,
    Single = 4,
}

impl Kind {
    pub(super) fn quantised(self) -> bool {
        matches!(self, Kind::Four | Kind::Eight)
    }

    /// For a few rows, for more, and for many rows and outputs.
    pub(super) fn kernels(self) -> [&'static str; 3] {
        match self {
            Kind::Four => ["linear_four_1x1", "linear_four_2x4", "linear_four_staged"],
            Kind::Eight => ["linear_eight_1x1", "linear_eight_2x4", "linear_eight_staged"],
            Kind::Brain => ["linear_brain_1x1", "linear_brain_2x4", "linear_brain_staged"],
            Kind::Half => ["linear_half_1x1", "linear_half_2x4", "linear_half_staged"],
            Kind::Single => ["linear_single_1x1", "linear_single_2x4", "linear_single_staged"],
        }
    }

    fn of(layout: &Layout<Grouped>) -> Kind {
        match layout {
            Layout::Four(_) => Kind::Four,
            Layout::Eight { .. } => Kind::Eight,
            Layout::Half(_) => Kind::Half,
            Layout::Brain(_) => Kind::Brain,
            Layout::Single(_) => Kind::Single,
        }
    }
}

/// A matrix packed on the host.
pub(super) type Packed = crate::packed::Packed<Grouped>;

/// One matrix, or several of one kind whose tiles follow each other.
pub(super) struct Weights {
    pub kind: Kind,
    pub rows: usize,
    pub cols: usize,
    /// Groups of 32 columns, or steps of 16.
    pub steps: usize,
    pub tiles: usize,
    pub codes: DeviceBuffer,
    pub scales: DeviceBuffer,
    pub bytes: usize,
}

/// Uploads matrices whose outputs lie side by side, as few as possible: neighbours of one kind become one, where no
/// tile is cut in between.
pub(super) fn upload(device: &Device, matrices: &[Packed]) -> Vec<Weights> {
    let mut all = Vec::new();
    let mut rest = matrices;
    while let Some(first) = rest.first() {
        let kind = Kind::of(&first.layout);
        let more = rest
            .windows(2)
            .take_while(|pair| pair[0].rows.is_multiple_of(TILE_ROWS) && Kind::of(&pair[1].layout) == kind);
        let count = 1 + more.count();
        all.push(upload_one(device, kind, &rest[..count]));
        rest = &rest[count..];
    }
    all
}

fn upload_one(device: &Device, kind: Kind, parts: &[Packed]) -> Weights {
    let (mut codes, mut scales): (Vec<u32>, Vec<u16>) = (Vec::new(), Vec::new());
    let cols = parts[0].cols;
    for part in parts {
        match &part.layout {
            Layout::Four(Grouped { codes: from, scales: of }) => {
                codes.extend(fragments(from, 4, 0));
                // A row's scale and minimum side by side.
                for group in of.chunks_exact(2 * TILE_ROWS) {
                    scales.extend((0..TILE_ROWS).flat_map(|r| [group[r], group[TILE_ROWS + r]]));
                }
            }
            Layout::Eight { codes: from, scales: of } => {
                // Stored plus 128; signed here.
                codes.extend(fragments(from, 8, 0x8080_8080));
                scales.extend_from_slice(of);
            }
            Layout::Brain(values) => codes.extend(brain(values, cols)),
            Layout::Half(values) => codes.extend(half(values, cols)),
            Layout::Single(values) => codes.extend(single(values, cols)),
        }
    }
    Weights {
        kind,
        rows: parts.iter().map(|p| p.rows).sum(),
        cols,
        steps: if kind.quantised() { cols / GROUP } else { cols.div_ceil(STEP) },
        tiles: parts.iter().map(Packed::tiles).sum(),
        bytes: 4 * codes.len() + 2 * scales.len(),
        codes: device.upload_new(codes.bytes()),
        scales: device.upload_new(scales.bytes()),
    }
}

/// Words of groups of `quads` × 64 bytes, lane by lane: word 16 j + r of a group is row r, columns 4 j.. of it.
fn fragments(codes: &[u8], quads: usize, flip: u32) -> impl Iterator<Item = u32> + '_ {
    codes.chunks_exact(64 * quads).flat_map(move |group| {
        let word = move |j: usize, r: usize| {
            let at = 64 * j + 4 * r;
            u32::from_le_bytes([group[at], group[at + 1], group[at + 2], group[at + 3]]) ^ flip
        };
        (0..LANES).flat_map(move |lane| {
            let (g, t) = (lane / 4, lane % 4);
            (0..quads / 4).flat_map(move |half| [word(4 * half + t, g), word(4 * half + t, g + 8)])
        })
    })
}

/// Calls `put` for every lane of every step of every tile with a way to read (column of the step, row) there. Columns
/// are stored `together` at a time, row by row (rill_kernels::packed).
fn each_lane<T: crate::memory::Number + Default>(
    values: &Buffer<T>,
    (cols, together): (usize, usize),
    mut put: impl FnMut(usize, usize, &dyn Fn(usize, usize) -> T),
) {
    for tile in values.chunks_exact(cols.next_multiple_of(together) * TILE_ROWS) {
        for step in 0..cols.div_ceil(STEP) {
            let read = |k: usize, r: usize| {
                let col = step * STEP + k;
                let at = (col / together * TILE_ROWS + r) * together + col % together;
                if col < cols { tile[at] } else { T::default() }
            };
            for lane in 0..LANES {
                put(lane / 4, lane % 4, &read);
            }
        }
    }
}

fn pair(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

fn brain(values: &Buffer<u16>, cols: usize) -> Vec<u32> {
    let mut words = Vec::new();
    each_lane(values, (cols, 2), |g, t, read| {
        for (k, r) in [(0, g), (0, g + 8), (8, g), (8, g + 8)] {
            words.push(pair(read(k + 2 * t, r), read(k + 2 * t + 1, r)));
        }
    });
    words
}

fn half(values: &Buffer<u16>, cols: usize) -> Vec<u32> {
    let mut words = Vec::new();
    each_lane(values, (cols, 1), |g, t, read| {
        for k in [0, 4, 8, 12] {
            words.push(pair(read(k + t, g), read(k + t, g + 8)));
        }
    });
    words
}

fn single(values: &Buffer<f32>, cols: usize) -> Vec<u32> {
    let mut words = Vec::new();
    each_lane(values, (cols, 1), |g, t, read| {
        for k in [0, 4, 8, 12] {
            words.extend([read(k + t, g).to_bits(), read(k + t, g + 8).to_bits()]);
        }
    });
    words
}
