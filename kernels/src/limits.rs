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
/// Bytes of a block: two vectors of codes, and eight of each row.
const BLOCK_BYTES: usize = 192;
/// Rows that meet them together.
const FEW_ROWS: usize = 2;
const MOST_ROWS: usize = 8;
/// Queries that meet keys together.
const FEW_QUERIES: usize = 4;
const MOST_QUERIES: usize = 12;
/// Walks through them before sums of 16 bits are full.
const WALKS: usize = 10;
/// Times that between two looks at the clock.
const REPEATS: usize = 2_000;

/// Measured rates, of all threads together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes a second that stream from memory into registers.
    pub read_bytes_per_s: f64,
    /// 8-bit multiply-accumulates a second with operands in registers and first-level cache, one side's below 16: without
    /// VNNI larger ones take twice as long.
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

    let operands = operands();
    let mut int8_macs_per_s: f64 = 0.0;
    for rows in [FEW_ROWS, MOST_ROWS] {
        let rate = best_rate(threads, time / 2, &|_| {
            // SAFETY: the ISA is available, and the operands are as many as are read.
            let sum = unsafe { multiply_rows(isa, &operands, rows) };
            std::hint::black_box(sum);
            (REPEATS * WALKS * OPERAND_BLOCKS * rows * 128) as f64
        });
        int8_macs_per_s = int8_macs_per_s.max(rate);
    }
    Limits { read_bytes_per_s, int8_macs_per_s }
}

fn operands() -> Buffer<u8> {
    let mut operands = Buffer::zeroed(OPERAND_BLOCKS * BLOCK_BYTES);
    operands.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 5) as u8);
    operands
}

/// Multiply-accumulates of bf16 a second, of all threads together, as attention takes cached keys and values: one side in the
/// first-level cache, the other one repeated in all lanes. The best pass of about `time` counts.
pub fn bf16_macs_per_s(isa: Isa, threads: usize, time: Duration) -> f64 {
    assert!(isa.available(), "this processor has no {}", isa.name());
    let keys = keys();
    let rate = |rows: usize| {
        best_rate(threads.max(1), time / 2, &|_| {
            // SAFETY: the ISA is available, and the keys are as many as are read.
            let sum = unsafe { multiply_pair_rows(isa, &keys, rows) };
            std::hint::black_box(sum);
            (REPEATS * WALKS * OPERAND_BLOCKS * rows * 2 * LANES) as f64
        })
    };
    rate(FEW_QUERIES).max(rate(MOST_QUERIES))
}

/// Ones in bf16.
fn keys() -> Buffer<u16> {
    let mut keys = Buffer::zeroed(OPERAND_BLOCKS * 2 * LANES);
    keys.fill(0x3f80);
    keys
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

/// Two vectors of codes against `ROWS` rows, over and over, in the form 4-bit weights are multiplied in: sums that do not wait for
/// one another.
///
/// # Safety
/// Runs where `S` is available; `operands` holds `OPERAND_BLOCKS * BLOCK_BYTES` bytes below 5: then the sums of `WALKS` fit.
#[inline(always)]
unsafe fn multiply<S: Simd, const ROWS: usize>(operands: &[u8]) -> f32 {
    assert!(ROWS <= MOST_ROWS && operands.len() >= OPERAND_BLOCKS * BLOCK_BYTES);
    let (zeros, ones) = ([0_i32; 2], [1_i16; 2 * LANES]);
    // SAFETY: every load is within the length just checked, or one of the arrays.
    unsafe {
        let mut sums = [S::isplat(0); ROWS];
        for _ in 0..REPEATS {
            let mut dots = [S::dots(zeros.as_ptr()); ROWS];
            for _ in 0..WALKS {
                let operands = std::hint::black_box(operands.as_ptr());
                for block in 0..OPERAND_BLOCKS {
                    let at = operands.add(block * BLOCK_BYTES);
                    let codes = [S::load_b(at), S::load_b(at.add(64))];
                    for (row, dots) in dots.iter_mut().enumerate() {
                        *dots = S::dot_codes(*dots, codes, S::splat_quads(at.add(128 + 8 * row)));
                    }
                }
            }
            for (sum, dots) in sums.iter_mut().zip(dots) {
                *sum = S::dot_words(*sum, S::group_words(dots), S::load_b(ones.as_ptr().cast()));
            }
        }
        let mut total = S::zero();
        for sum in sums {
            total = S::add(total, S::to_f(sum));
        }
        S::reduce_add(total)
    }
}

/// [`multiply`] with as many rows as are named; as many as registers hold sums of, which is more in some ISAs than in others.
///
/// # Safety
/// As `multiply`, and `isa` is available.
unsafe fn multiply_rows(isa: Isa, operands: &[u8], rows: usize) -> f32 {
    #[inline(always)]
    unsafe fn some<S: Simd>(operands: &[u8], rows: usize, total: &mut f32) {
        // SAFETY: passed on to the caller.
        *total = unsafe {
            match rows {
                MOST_ROWS => multiply::<S, MOST_ROWS>(operands),
                _ => multiply::<S, FEW_ROWS>(operands),
            }
        };
    }
    let mut sum = 0.0;
    let total = &mut sum;
    // SAFETY: passed on to the caller.
    unsafe { dispatch!(isa, fn some(operands: &[u8], rows: usize, total: &mut f32)) }
    sum
}

/// Keys, a vector of pairs at a time, against `ROWS` queries, over and over.
///
/// # Safety
/// Runs where `S` is available; `keys` holds `OPERAND_BLOCKS` vectors.
#[inline(always)]
unsafe fn multiply_pairs<S: Simd, const ROWS: usize>(keys: &[u16]) -> f32 {
    assert!(keys.len() >= OPERAND_BLOCKS * 2 * LANES);
    let queries = [S::rounded(0x3f80); 2 * OPERAND_BLOCKS * MOST_QUERIES];
    // SAFETY: every load is within the length just checked, or the array.
    unsafe {
        let mut sums = [S::zero(); ROWS];
        for _ in 0..REPEATS * WALKS {
            let (keys, queries) = std::hint::black_box((keys.as_ptr(), queries.as_ptr()));
            for block in 0..OPERAND_BLOCKS {
                let key = S::pairs(S::load_b(keys.add(block * 2 * LANES).cast()));
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = S::dot_pairs(*sum, key, S::splat_pair(queries.add((row * OPERAND_BLOCKS + block) * 2)));
                }
            }
        }
        let mut total = S::zero();
        for sum in sums {
            total = S::add(total, sum);
        }
        S::reduce_add(total)
    }
}

/// [`multiply_pairs`] with as many rows as are named.
///
/// # Safety
/// As `multiply_pairs`, and `isa` is available.
unsafe fn multiply_pair_rows(isa: Isa, keys: &[u16], rows: usize) -> f32 {
    #[inline(always)]
    unsafe fn some<S: Simd>(keys: &[u16], rows: usize, total: &mut f32) {
        // SAFETY: passed on to the caller.
        *total = unsafe {
            match rows {
                MOST_QUERIES => multiply_pairs::<S, MOST_QUERIES>(keys),
                _ => multiply_pairs::<S, FEW_QUERIES>(keys),
            }
        };
    }
    let mut sum = 0.0;
    let total = &mut sum;
    // SAFETY: passed on to the caller.
    unsafe { dispatch!(isa, fn some(keys: &[u16], rows: usize, total: &mut f32)) }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_right_so_the_work_was_done() {
        let operands = operands();
        for rows in [FEW_ROWS, MOST_ROWS] {
            for isa in Isa::ALL.into_iter().filter(|&isa| isa.available() && isa != Isa::Portable) {
                let times = |at: usize| match isa.piece() {
                    2 => at / 64 * 4 + at % 4,
                    _ => at % 8,
                };
                let dot = |block: &[u8], row: usize| -> f64 {
                    (0..128).map(|k| f64::from(block[k]) * f64::from(block[128 + 8 * row + times(k)])).sum()
                };
                let blocks = operands.chunks_exact(BLOCK_BYTES);
                let once: f64 = blocks.flat_map(|block| (0..rows).map(move |row| dot(block, row))).sum();
                let expected = once * (WALKS * REPEATS) as f64;
                // SAFETY: the ISA is available, and the operands are as many as are read.
                let found = unsafe { multiply_rows(isa, &operands, rows) };
                assert!((f64::from(found) / expected - 1.0).abs() < 1e-5, "{found} is not {expected}");
            }
        }
    }

    #[test]
    fn all_keys_meet_all_queries() {
        for rows in [FEW_QUERIES, MOST_QUERIES] {
            for isa in Isa::ALL.into_iter().filter(|&isa| isa.available() && isa != Isa::Portable) {
                let expected = (REPEATS * WALKS * OPERAND_BLOCKS * rows * 2 * LANES) as f32;
                // SAFETY: the ISA is available, and the keys are as many as are read.
                let found = unsafe { multiply_pair_rows(isa, &keys(), rows) };
                assert!((found / expected - 1.0).abs() < 1e-5, "{found} is not {expected}");
            }
        }
    }

    #[test]
    fn all_of_the_memory_is_read() {
        for isa in Isa::ALL.into_iter().filter(|&isa| isa.available()) {
            // SAFETY: the ISA is available.
            assert_eq!(unsafe { read(isa, &[1.0; 4096]) }, 4096.0);
        }
    }
}
