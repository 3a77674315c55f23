//! The largest logit of each row, looked for by all threads: a row lies in as many caches as threads computed it.

use super::simd::{Isa, LANES, Simd, dispatch};
use crate::backend::BestLogits;
use crate::memory::{Buffer, Shared};
use crate::pool::{Pool, share};

/// Columns that are looked through for one that exceeds all before.
const BLOCK: usize = 1024;
/// Rounds in which a thread takes its share of the columns.
const ROUNDS: usize = 3;
/// Maxima that do not wait for one another.
const ABREAST: usize = 4;

/// Rows of logits, and the largest of each.
#[derive(Default)]
pub(super) struct Ranked {
    pub(super) logits: Vec<f32>,
    width: usize,
    /// `[part][row]`, parts in the order of their columns; NaN where a logit is NaN or plus infinity.
    values: Buffer<f32>,
    columns: Buffer<i32>,
    parts: usize,
}

/// The largest value of some columns of a row, and the first column that has it; NaN if one is NaN or plus infinity.
#[inline(always)]
unsafe fn largest<S: Simd>(x: &[f32], found: &mut (f32, usize)) {
    let mut best = (f32::NEG_INFINITY, 0);
    for (number, block) in x.chunks(BLOCK).enumerate() {
        let (vectors, rest) = block.as_chunks::<LANES>();
        // SAFETY: every vector is sixteen values.
        let (max, spread) = unsafe {
            let mut maxima = [S::splat(f32::NEG_INFINITY); ABREAST];
            // Zero but for what is not finite.
            let mut spread = S::zero();
            for some in vectors.chunks(ABREAST) {
                for (max, vector) in maxima.iter_mut().zip(some) {
                    let v = S::load(vector.as_ptr());
                    *max = S::max(v, *max);
                    spread = S::add(spread, S::sub(v, v));
                }
            }
            let max = S::max(S::max(maxima[0], maxima[1]), S::max(maxima[2], maxima[3]));
            (S::reduce_max(max), S::reduce_add(spread))
        };
        if !(spread == 0.0 && rest.iter().all(|x| x.is_finite()))
            && block.iter().any(|&x| x.is_nan() || x == f32::INFINITY)
        {
            *found = (f32::NAN, 0);
            return;
        }
        let max = rest.iter().fold(max, |max, &x| max.max(x));
        if max > best.0 {
            best = (max, number);
        }
    }
    let first = best.1 * BLOCK;
    let place = x.iter().skip(first).position(|&x| x == best.0).unwrap_or_default();
    *found = (best.0, first + place);
}

impl Ranked {
    /// Looks through the logits, rows of `width`.
    pub(super) fn rank(&mut self, isa: Isa, pool: &mut Pool, width: usize) {
        let rows = self.logits.len() / width;
        let shares = (ROUNDS, pool.threads());
        (self.width, self.parts) = (width, shares.0 * shares.1);
        self.values.reserve(rows * self.parts);
        self.columns.reserve(rows * self.parts);
        let (values, columns) = (Shared::new(&mut self.values), Shared::new(&mut self.columns));
        let logits = &self.logits;
        pool.run(self.parts, &|chunk| {
            let range = share(width, shares, chunk);
            let number = chunk % shares.1 * shares.0 + chunk / shares.1;
            for (row, x) in logits.chunks_exact(width).enumerate() {
                let (x, mut best) = (&x[range.clone()], (0.0, 0));
                let found = &mut best;
                // SAFETY: the ISA is available; each part has a place of its own for each row.
                unsafe {
                    dispatch!(isa, fn largest(x: &[f32], found: &mut (f32, usize)));
                    *values.at(number * rows + row) = best.0;
                    *columns.at(number * rows + row) = (range.start + best.1) as i32;
                }
            }
        });
    }

    /// What was ranked last.
    pub(super) fn best(&self) -> Vec<BestLogits> {
        let rows = self.logits.len() / self.width.max(1);
        (0..rows)
            .map(|row| {
                let places = (0..self.parts).map(|part| part * rows + row);
                let mut best = (f32::NEG_INFINITY, 0);
                let mut finite = true;
                for (value, column) in places.map(|place| (self.values[place], self.columns[place])) {
                    finite &= !value.is_nan();
                    best = if value > best.0 { (value, column) } else { best };
                }
                let there = best.0 > f32::NEG_INFINITY;
                let ranked = there.then_some((best.1 as u32, best.0)).into_iter().collect();
                BestLogits { ranked, finite, mass: 0.0 }
            })
            .collect()
    }

    pub(super) fn row(&self, row: usize) -> Vec<f32> {
        self.logits[row * self.width..][..self.width].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers, so that the largest is there several times.
    fn logits(rows: usize, width: usize) -> Vec<f32> {
        let mut state = 1_u64;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        (0..rows * width)
            .map(|_| if next() % 7 == 0 { f32::NEG_INFINITY } else { (next() % 50) as f32 - 60.0 })
            .collect()
    }

    fn expected(row: &[f32]) -> BestLogits {
        let finite = row.iter().all(|&x| !x.is_nan() && x < f32::INFINITY);
        let first = |best: Option<(u32, f32)>, (id, &x): (usize, &f32)| match best {
            Some((_, largest)) if x <= largest => best,
            _ if x == f32::NEG_INFINITY => best,
            _ => Some((id as u32, x)),
        };
        BestLogits { ranked: row.iter().enumerate().fold(None, first).into_iter().collect(), finite, mass: 0.0 }
    }

    #[test]
    fn the_first_of_the_largest_is_found() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (threads, width) in
                [1, 2, 3].into_iter().flat_map(|t| [1, 15, 16, 77, 1024, 5000, 9999].map(|w| (t, w)))
            {
                let mut pool = Pool::new(threads);
                let mut ranked = Ranked { logits: logits(4, width), ..Ranked::default() };
                ranked.logits[width..2 * width].fill(f32::NEG_INFINITY);
                ranked.rank(isa, &mut pool, width);
                let rows: Vec<BestLogits> = ranked.logits.chunks_exact(width).map(expected).collect();
                assert_eq!(ranked.best(), rows, "{isa:?}, {threads} threads, {width} columns");
                assert_eq!(ranked.row(2), ranked.logits[2 * width..3 * width]);
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_seen_wherever_it_is() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let mut pool = Pool::new(2);
            for (bad, place) in
                [f32::NAN, f32::INFINITY].into_iter().flat_map(|b| [0, 1023, 1500, 3002].map(|p| (b, p)))
            {
                let mut ranked = Ranked { logits: logits(3, 3003), ..Ranked::default() };
                ranked.logits[3003 + place] = bad;
                ranked.rank(isa, &mut pool, 3003);
                let finite: Vec<bool> = ranked.best().iter().map(|best| best.finite).collect();
                assert_eq!(finite, [true, false, true], "{isa:?}: {bad} at {place}");
            }
        }
    }
}
