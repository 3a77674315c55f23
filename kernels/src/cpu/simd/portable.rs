//! Plain Rust: the definition of every vector operation, and what runs where there is nothing better.

use super::{Apart, LANES, Simd, dots_in_lanes};
use half::{bf16, f16};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

fn map(a: [f32; LANES], f: impl Fn(f32) -> f32) -> [f32; LANES] {
    a.map(f)
}

fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

fn to_words(v: [u8; 64]) -> [i16; 2 * LANES] {
    std::array::from_fn(|i| i16::from_le_bytes([v[2 * i], v[2 * i + 1]]))
}

fn to_bytes(v: [i16; 2 * LANES]) -> [u8; 64] {
    std::array::from_fn(|i| v[i / 2].to_le_bytes()[i % 2])
}

/// See [`Simd::exp2`]: minimax coefficients of 2^x on [-0.5, 0.5] (Lawson's iteration, relative error 2e-9 before
/// rounding). The first is exactly 1, so that 2^0 is: attention relies on it.
pub(super) const EXP2: [f32; 7] =
    [1.0, std::f32::consts::LN_2, 0.240_226_47, 0.055_503_29, 0.009_618_489, 0.001_339_993_1, 0.000_153_458_12];

// SAFETY: no instruction requirement; pointer contracts are the trait's.
impl Simd for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 64];
    type Pairs = (Self::F, Self::F);
    type Rounded = f32;
    dots_in_lanes!();
    const TILE_TOKENS: usize = 4;
    const CODE_TOKENS: usize = 2;
    const TILES: usize = 1;
    const TILE_QUERIES: usize = 2;
    const PAIR_QUERIES: usize = 4;

    fn pair_vectors(rows: usize) -> usize {
        (16 - 2) / (2 * rows + 4)
    }

    #[inline(never)]
    unsafe fn apart<A: Apart>(part: A) -> A::Out {
        // SAFETY: forwarded.
        unsafe { part.run::<Self>() }
    }

    unsafe fn zero() -> Self::F {
        [0.0; LANES]
    }
    unsafe fn splat(x: f32) -> Self::F {
        [x; LANES]
    }
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: the caller gives 16 readable f32.
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }
    unsafe fn store(p: *mut f32, v: Self::F) {
        // SAFETY: the caller gives 16 writable f32.
        unsafe { p.cast::<Self::F>().write_unaligned(v) }
    }
    unsafe fn load_f16(p: *const u16) -> Self::F {
        // SAFETY: the caller gives 16 readable halves.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    unsafe fn prefetch(_: *const u8) {}
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        // SAFETY: the caller gives 16 readable bfloat16.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| bf16::from_bits(b).to_f32())
    }
    unsafe fn store_bf16(p: *mut u16, v: Self::F) {
        // SAFETY: the caller gives 16 writable bfloat16.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(v.map(|x| bf16::from_f32(x).to_bits())) }
    }
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x + y)
    }
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x - y)
    }
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x * y)
    }
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x / y)
    }
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // x86's rule: the second operand where they are equal or unordered.
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    unsafe fn round(a: Self::F) -> Self::F {
        map(a, f32::round_ties_even)
    }
    unsafe fn abs(a: Self::F) -> Self::F {
        map(a, f32::abs)
    }
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    unsafe fn exp2(x: Self::F) -> Self::F {
        map(x, |x| {
            let n = x.round_ties_even();
            let r = x - n;
            let p = EXP2[..6].iter().rev().fold(EXP2[6], |p, &c| p.mul_add(r, c));
            if x < -126.0 { 0.0 } else { f32::from_bits(p.to_bits().wrapping_add(((n as i32) << 23) as u32)) }
        })
    }
    unsafe fn mask_range(v: Self::F, lo: usize, hi: usize) -> Self::F {
        std::array::from_fn(|i| if i >= lo && i < hi { v[i] } else { f32::NEG_INFINITY })
    }
    unsafe fn reduce_add(v: Self::F) -> f32 {
        let a: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }
    unsafe fn reduce_max(v: Self::F) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
    unsafe fn store_i8(p: *mut i8, v: Self::F) {
        // SAFETY: the caller gives 16 writable bytes.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(v.map(|x| x.round_ties_even() as i8)) }
    }
    unsafe fn store_u8(p: *mut u8, v: Self::F) {
        // SAFETY: the caller gives 16 writable bytes.
        unsafe { p.cast::<[u8; LANES]>().write_unaligned(v.map(|x| x.round_ties_even() as u8)) }
    }
    unsafe fn store_words(p: *mut i16, even: Self::F, odd: Self::F) {
        let words = std::array::from_fn(|i| [even[i], odd[i]].map(|x| x.round_ties_even() as i16));
        // SAFETY: the caller gives 32 writable words.
        unsafe { p.cast::<[[i16; 2]; LANES]>().write_unaligned(words) }
    }
    unsafe fn power(v: Self::F) -> Self::F {
        map(v, |x| f32::from_bits(x.to_bits() & 0x7f80_0000))
    }
    unsafe fn isplat_two(p: *const i32) -> Self::I {
        // SAFETY: the caller gives two readable i32.
        let two = unsafe { p.cast::<[i32; 2]>().read_unaligned() };
        std::array::from_fn(|i| two[i % 2])
    }
    unsafe fn isplat(x: i32) -> Self::I {
        [x; LANES]
    }
    unsafe fn load_i(p: *const i32) -> Self::I {
        // SAFETY: the caller gives 16 readable i32.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    unsafe fn store_i(p: *mut i32, v: Self::I) {
        // SAFETY: the caller gives 16 writable i32.
        unsafe { p.cast::<Self::I>().write_unaligned(v) }
    }
    unsafe fn mul_add_i16(a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    unsafe fn to_f(v: Self::I) -> Self::F {
        v.map(|x| x as f32)
    }
    unsafe fn words(a: Self::I, b: Self::I) -> Self::B {
        let word = |i: usize| if i % 8 < 4 { a[i / 8 * 4 + i % 8] } else { b[i / 8 * 4 + i % 8 - 4] };
        to_bytes(std::array::from_fn(|i| word(i) as i16))
    }
    unsafe fn mul_words(a: Self::B, b: Self::B) -> Self::B {
        let (a, b) = (to_words(a), to_words(b));
        to_bytes(std::array::from_fn(|i| ((i32::from(a[i]) * i32::from(b[i]) + (1 << 14)) >> 15) as i16))
    }
    unsafe fn dot_words(acc: Self::I, a: Self::B, b: Self::B) -> Self::I {
        let (a, b) = (to_words(a), to_words(b));
        let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
        std::array::from_fn(|i| acc[i] + product(2 * i) + product(2 * i + 1))
    }
    unsafe fn load_b(p: *const u8) -> Self::B {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { p.cast::<Self::B>().read_unaligned() }
    }
    unsafe fn store_b(p: *mut u8, v: Self::B) {
        // SAFETY: the caller gives 64 writable bytes.
        unsafe { p.cast::<Self::B>().write_unaligned(v) }
    }
    unsafe fn splat_b(p: *const u8) -> Self::B {
        // SAFETY: the caller gives 4 readable bytes.
        let four = unsafe { p.cast::<[u8; 4]>().read_unaligned() };
        std::array::from_fn(|i| four[i % 4])
    }
    unsafe fn splat_quads(p: *const u8) -> Self::B {
        // SAFETY: the caller gives 8 readable bytes.
        let eight = unsafe { p.cast::<[u8; 8]>().read_unaligned() };
        std::array::from_fn(|i| eight[i % 8])
    }
    unsafe fn low_nibbles(v: Self::B) -> Self::B {
        v.map(|b| b & 15)
    }
    unsafe fn high_nibbles(v: Self::B) -> Self::B {
        v.map(|b| b >> 4)
    }
    unsafe fn dot(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        std::array::from_fn(|i| {
            (0..4).fold(acc[i], |a, j| a + i32::from(u[4 * i + j]) * i32::from(s[4 * i + j] as i8))
        })
    }
    unsafe fn dot_low(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        // SAFETY: no requirement.
        unsafe { Self::dot(acc, u, s) }
    }
    unsafe fn widen_bf16(v: Self::B) -> (Self::F, Self::F) {
        let at = |i: usize| bf16::from_le_bytes([v[i], v[i + 1]]).to_f32();
        (std::array::from_fn(|i| at(4 * i)), std::array::from_fn(|i| at(4 * i + 2)))
    }
    unsafe fn pairs(v: Self::B) -> Self::Pairs {
        // SAFETY: needs no instructions.
        unsafe { Self::widen_bf16(v) }
    }
    fn rounded(bits: u16) -> Self::Rounded {
        bf16::from_bits(bits).to_f32()
    }
    unsafe fn store_rounded(p: *mut Self::Rounded, v: Self::F) {
        // SAFETY: the caller gives 16 writable f32.
        unsafe { p.cast::<Self::F>().write_unaligned(v.map(|x| bf16::from_f32(x).to_f32())) }
    }
    unsafe fn splat_pair(p: *const Self::Rounded) -> Self::Pairs {
        // SAFETY: the caller gives two readable numbers.
        unsafe { ([*p; LANES], [*p.add(1); LANES]) }
    }
    unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pairs) -> Self::F {
        std::array::from_fn(|i| a.0[i].mul_add(b.0[i], a.1[i].mul_add(b.1[i], acc[i])))
    }
}
