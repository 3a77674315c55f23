//! Packed weights asked for while those before them are multiplied.

use super::super::simd::Simd;
use crate::memory::LINE;

/// Requests that a step's bytes are cut into.
const CUTS: usize = 2;

/// What is asked for: `steps` steps of each of some tiles that are `apart` steps from each other. It may be at any address.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub codes: *const u8,
    pub scales: *const u8,
    pub steps: usize,
    pub apart: usize,
}

impl Wanted {
    const NOTHING: Wanted = Wanted { codes: std::ptr::null(), scales: std::ptr::null(), steps: 0, apart: 0 };
}

/// How weights of `N` tiles are asked for while rows pass over as many before them.
pub(super) trait Ask<const N: usize> {
    /// Rows are about to pass.
    fn pass(&mut self);
    /// They have come to their next step.
    unsafe fn step<S: Simd>(&mut self);
}

/// A step of all tiles at each step of the first pass: for one pass, or few.
pub(super) struct AtOnce<const CODES: usize, const SCALES: usize> {
    wanted: Wanted,
    passes: usize,
}

impl<const CODES: usize, const SCALES: usize> AtOnce<CODES, SCALES> {
    pub(super) fn new(wanted: Option<Wanted>) -> Self {
        AtOnce { wanted: wanted.unwrap_or(Wanted::NOTHING), passes: usize::from(wanted.is_none()) }
    }
}

impl<const CODES: usize, const SCALES: usize, const N: usize> Ask<N> for AtOnce<CODES, SCALES> {
    #[inline(always)]
    fn pass(&mut self) {
        self.passes += 1;
    }

    #[inline(always)]
    unsafe fn step<S: Simd>(&mut self) {
        if self.passes > 1 {
            return;
        }
        let Wanted { codes, scales, apart, .. } = &mut self.wanted;
        for n in 0..N {
            // SAFETY: what is asked for may be at any address.
            unsafe {
                for line in 0..CODES / LINE {
                    S::prefetch(codes.wrapping_add(n * *apart * CODES + line * LINE));
                }
                for line in 0..SCALES.div_ceil(LINE) {
                    S::prefetch(scales.wrapping_add(n * *apart * SCALES + line * LINE));
                }
            }
        }
        (*codes, *scales) = (codes.wrapping_add(CODES), scales.wrapping_add(SCALES));
    }
}

/// Half a step of a tile at a time, evenly over all passes: memory brings lines no faster than it can, a core has only so many
/// under way, and who asks for more at once waits.
pub(super) struct Evenly<const CODES: usize, const SCALES: usize> {
    codes: *const u8,
    scales: *const u8,
    /// Steps that rows pass over from one request to the next, and up to it.
    every: usize,
    left: usize,
    /// Requests a tile, and left of this one.
    a_tile: usize,
    of_tile: usize,
    /// Tiles left, and steps from the end of one's requests to the next.
    tiles: usize,
    between: usize,
}

impl<const CODES: usize, const SCALES: usize> Evenly<CODES, SCALES> {
    /// `wanted` of `tiles` tiles in `passes` passes. Fewer passes than requests a step ask for a part.
    pub(super) fn new(wanted: Option<Wanted>, tiles: usize, passes: usize) -> Self {
        let every = if wanted.is_some() { (passes / (CUTS * tiles)).max(1) } else { usize::MAX };
        let Wanted { codes, scales, steps, apart } = wanted.unwrap_or(Wanted::NOTHING);
        let (a_tile, between) = (steps * CUTS, apart - steps);
        Evenly { codes, scales, every, left: every, a_tile, of_tile: a_tile, tiles, between }
    }
}

impl<const CODES: usize, const SCALES: usize, const N: usize> Ask<N> for Evenly<CODES, SCALES> {
    #[inline(always)]
    fn pass(&mut self) {}

    #[inline(always)]
    unsafe fn step<S: Simd>(&mut self) {
        self.left -= 1;
        if self.left > 0 {
            return;
        }
        self.left = self.every;
        // SAFETY: what is asked for may be at any address.
        unsafe {
            for line in 0..CODES / CUTS / LINE {
                S::prefetch(self.codes.wrapping_add(line * LINE));
            }
            S::prefetch(self.scales);
        }
        self.codes = self.codes.wrapping_add(CODES / CUTS);
        self.scales = self.scales.wrapping_add(SCALES / CUTS);
        self.of_tile -= 1;
        if self.of_tile == 0 {
            self.of_tile = self.a_tile;
            self.codes = self.codes.wrapping_add(self.between * CODES);
            self.scales = self.scales.wrapping_add(self.between * SCALES);
            self.tiles -= 1;
            if self.tiles == 0 {
                self.left = usize::MAX;
            }
        }
    }
}
