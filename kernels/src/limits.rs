//! What this machine can do: bytes read from memory and int8 products, a second, over a number of threads. Every
//! figure of a kernel is read against these two.

use crate::cpu::Isa;
use crate::cpu::simd::{LANES, Simd, dispatch};
use crate::memory::Buffer;
use std::time::{Duration, Instant};

/// Read in one pass over all threads: more than any cache holds.
const READ_BYTES: usize = 1 << 30;
/// How far ahead of itself a thread asks for memory, in values: without it some processors keep too little under way.
const AHEAD: usize = 1024;
/// Blocks of operands the dot products walk through: first-level cache.
const OPERAND_BLOCKS: usize = 32;
/// Walks through them between two looks at the clock.
const WALKS: usize = 20_000;

/// Measured rates, of all threads together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes a second that stream from memory into registers.
    pub read_bytes_per_s: f64,
    /// 8-bit multiply-accumulates a second with operands in registers and first-level cache.
    pub int8_macs_per_s: f64,
}

/// Measures both on `threads` threads, each for about `time`: the best pass counts, since whatever else runs on the
/// machine can only take away.
pub fn measure(isa: Isa, threads: usize, time: Duration) -> Limits {
    assert!(isa.available(), "this processor has no {}", isa.name());
    let threads = threads.max(1);
    let share_bytes = (READ_BYTES / threads).clamp(64 << 20, 256 << 20);
    let share_len = share_bytes / size_of::<f32>() / 128 * 128;
    let mut values = Buffer::<f32>::zeroed(threads * share_len);
    // Pages that nobody wrote are all the same page.
    let shares: Vec<&mut [f32]> = values.chunks_exact_mut(share_len).collect();
    std::thread::scope(|scope| {
        for share in shares {
            scope.spawn(|| share.fill(1.0));
        }
    });
    let shares: Vec<&[f32]> = values.chunks_exact(share_len).collect();
    let read_bytes_per_s = best_rate(threads, time, &|thread| {
        // SAFETY: the ISA is available and a share is whole vectors.
        let sum = unsafe { read(isa, shares[thread]) };
        std::hint::black_box(sum);
        size_of_val(shares[thread]) as f64
    });

    let operands: Vec<u8> = (0..OPERAND_BLOCKS * 8 * 64).map(|i| (i % 5) as u8).collect();
    let mut int8_macs_per_s: f64 = 0.0;
    for square in [4, 2] {
        let rate = best_rate(threads, time / 2, &|_| {
            // SAFETY: the ISA is available, and the operands are as many as are read.
            let sum = unsafe {
                match square {
                    4 => multiply_square_of_four(isa, &operands),
                    _ => multiply_square_of_two(isa, &operands),
                }
            };
            std::hint::black_box(sum);
            (WALKS * OPERAND_BLOCKS * square * square * 64) as f64
        });
        int8_macs_per_s = int8_macs_per_s.max(rate);
    }
    Limits { read_bytes_per_s, int8_macs_per_s }
}

/// Starts `threads` together, pass after pass until `time` is over; a pass's rate is the work of all ÷ its time.
fn best_rate(threads: usize, time: Duration, work: &(dyn Fn(usize) -> f64 + Sync)) -> f64 {
    let (start, mut best) = (Instant::now(), 0.0_f64);
    while best == 0.0 || start.elapsed() < time {
        let pass = Instant::now();
        let done: f64 = std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
            started.into_iter().map(|thread| thread.join().expect("a measuring thread does not panic")).sum()
        });
        best = best.max(done / pass.elapsed().as_secs_f64());
    }
    best
}

/// Adds up `values`, whole vectors of them.
///
/// # Safety
/// `isa` is available.
unsafe fn read(isa: Isa, values: &[f32]) -> f32 {
    #[inline(always)]
    unsafe fn add_up<S: Simd>(values: &[f32], total: &mut f32) {
        const UNROLLED: usize = 8;
        // SAFETY: the caller runs where `S` is available; each load stays within its piece of `values`.
        unsafe {
            let mut sums = [S::zero(); UNROLLED];
            for piece in values.chunks_exact(UNROLLED * LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    S::prefetch(piece.as_ptr().wrapping_add(AHEAD + i * LANES).cast());
                    *sum = S::add(*sum, S::load(piece.as_ptr().add(i * LANES)));
                }
            }
            *total = sums.into_iter().map(|sum| S::reduce_add(sum)).sum();
        }
    }
    let mut sum = 0.0;
    let total = &mut sum;
    // SAFETY: passed on to the caller.
    unsafe { dispatch!(isa, fn add_up(values: &[f32], total: &mut f32)) }
    sum
}

/// `SIDE` weights against `SIDE` activations, over and over: `SIDE²` sums that do not wait for one another.
///
/// # Safety
/// Runs where `S` is available; `operands` holds `OPERAND_BLOCKS * 8` vectors of bytes below 128.
#[inline(always)]
unsafe fn multiply<S: Simd, const SIDE: usize>(operands: &[u8]) -> f32 {
    assert!(SIDE <= 4 && operands.len() >= OPERAND_BLOCKS * 8 * 64);
    // SAFETY: every load is within the length just checked.
    unsafe {
        let mut sums = [[S::isplat(0); SIDE]; SIDE];
        for _ in 0..WALKS {
            let operands = std::hint::black_box(operands.as_ptr());
            for block in 0..OPERAND_BLOCKS {
                let at = operands.add(block * 8 * 64);
                let u: [S::B; SIDE] = std::array::from_fn(|i| S::load_b(at.add(i * 64)));
                let s: [S::B; SIDE] = std::array::from_fn(|i| S::load_b(at.add((4 + i) * 64)));
                for (row, u) in sums.iter_mut().zip(u) {
                    for (sum, s) in row.iter_mut().zip(s) {
                        *sum = S::dot_low(*sum, u, s);
                    }
                }
            }
        }
        let mut total = S::zero();
        for sum in sums.into_iter().flatten() {
            total = S::add(total, S::to_f(sum));
        }
        S::reduce_add(total)
    }
}

/// # Safety
/// As `multiply`, and `isa` is available.
unsafe fn multiply_square_of_four(isa: Isa, operands: &[u8]) -> f32 {
    #[inline(always)]
    unsafe fn four<S: Simd>(operands: &[u8], total: &mut f32) {
        // SAFETY: passed on to the caller.
        *total = unsafe { multiply::<S, 4>(operands) };
    }
    let mut sum = 0.0;
    let total = &mut sum;
    // SAFETY: passed on to the caller.
    unsafe { dispatch!(isa, fn four(operands: &[u8], total: &mut f32)) }
    sum
}

/// # Safety
/// As `multiply`, and `isa` is available.
unsafe fn multiply_square_of_two(isa: Isa, operands: &[u8]) -> f32 {
    #[inline(always)]
    unsafe fn two<S: Simd>(operands: &[u8], total: &mut f32) {
        // SAFETY: passed on to the caller.
        *total = unsafe { multiply::<S, 2>(operands) };
    }
    let mut sum = 0.0;
    let total = &mut sum;
    // SAFETY: passed on to the caller.
    unsafe { dispatch!(isa, fn two(operands: &[u8], total: &mut f32)) }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_right_so_the_work_was_done() {
        let operands: Vec<u8> = (0..OPERAND_BLOCKS * 8 * 64).map(|i| (i % 5) as u8).collect();
        let dot = |block: usize, i: usize, j: usize| -> f64 {
            let at = |k: usize| f64::from(operands[block * 8 * 64 + k]);
            (0..64).map(|k| at(i * 64 + k) * at((4 + j) * 64 + k)).sum()
        };
        let expected: f64 = (0..OPERAND_BLOCKS)
            .flat_map(|block| (0..4).map(move |i| (block, i % 2, i / 2)))
            .map(|(block, i, j)| dot(block, i, j))
            .sum::<f64>()
            * WALKS as f64;
        for isa in Isa::ALL.into_iter().filter(|&isa| isa.available() && isa != Isa::Portable) {
            // SAFETY: the ISA is available, and the operands are as many as are read.
            let found = unsafe { multiply_square_of_two(isa, &operands) };
            assert!((f64::from(found) / expected - 1.0).abs() < 1e-5, "{found} is not {expected}");
            // SAFETY: the ISA is available.
            assert_eq!(unsafe { read(isa, &[1.0; 4096]) }, 4096.0);
        }
    }
}
