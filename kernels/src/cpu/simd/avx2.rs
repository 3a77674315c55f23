//! AVX2 with FMA and F16C: two ymm registers a vector; with AVX-VNNI, whose byte products are one instruction.

use super::portable::EXP2;
use super::{Apart, Simd, apart_for};
use std::arch::asm;
use std::arch::x86_64::*;

/// `VNNI`: AVX-VNNI is there as well.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>;

/// Low and high half.
#[derive(Clone, Copy)]
pub(crate) struct Two<T: Copy>(T, T);

#[inline(always)]
unsafe fn exp2_half(x: __m256) -> __m256 {
    // SAFETY: AVX2 and FMA are available where `Avx2` is used.
    unsafe {
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm256_sub_ps(x, n);
        let mut p = _mm256_set1_ps(EXP2[6]);
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[5]));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[4]));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[3]));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[2]));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[1]));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[0]));
        let scale = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
        let y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), scale));
        _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-126.0)), y)
    }
}

/// The bfloat16 nearest to each lane in the upper half of it.
#[inline(always)]
unsafe fn bf16_bits(v: __m256) -> __m256i {
    // SAFETY: as above.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_set1_epi32(0xffff_0000_u32 as i32))
    }
}

#[inline(always)]
unsafe fn dot_wide(acc: __m256i, u: __m256i, s: __m256i) -> __m256i {
    // VPMADDUBSW saturates, but not where bytes are below 128, nor where they are 0 or 128: -128 times 256 is in range.
    // SAFETY: as above.
    unsafe {
        let top = _mm256_set1_epi8(-128);
        dot_narrow(dot_narrow(acc, _mm256_andnot_si256(top, u), s), _mm256_and_si256(top, u), s)
    }
}

#[inline(always)]
unsafe fn dot_narrow(acc: __m256i, u: __m256i, s: __m256i) -> __m256i {
    // SAFETY: as above. 2 * 127 * 128 fits 16 bits, so nothing saturates while every byte of `u` is below 128.
    unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1))) }
}

/// Adds products two by two to sums. The compiler would add products to one another first, and then keep them and the sums in
/// memory, for want of registers.
macro_rules! add_products {
    ($name:ident, $multiply:literal, $add:literal) => {
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn $name(sums: Two<__m256i>, u: Two<__m256i>, s: __m256i) -> Two<__m256i> {
            let Two(mut low, mut high) = sums;
            // SAFETY: AVX2 is available where `Avx2` is used; only the named registers are touched.
            unsafe {
                asm!(
                    concat!($multiply, " {p}, {u}, {s}"), concat!($multiply, " {q}, {v}, {s}"),
                    concat!($add, " {low}, {low}, {p}"), concat!($add, " {high}, {high}, {q}"),
                    p = out(ymm_reg) _, q = out(ymm_reg) _, low = inout(ymm_reg) low, high = inout(ymm_reg) high,
                    u = in(ymm_reg) u.0, v = in(ymm_reg) u.1, s = in(ymm_reg) s,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            Two(low, high)
        }
    };
}
// Of bytes, to words; and of words, to sums of 32 bits.
add_products!(add_words, "vpmaddubsw", "vpaddw");
add_products!(add_doubles, "vpmaddwd", "vpaddd");

macro_rules! both {
    ($f:ident($a:expr)) => {
        Two($f($a.0), $f($a.1))
    };
    ($f:ident($a:expr, $b:expr)) => {
        Two($f($a.0, $b.0), $f($a.1, $b.1))
    };
    ($f:ident($a:expr, $b:expr, $c:expr)) => {
        Two($f($a.0, $b.0, $c.0), $f($a.1, $b.1, $c.1))
    };
}

// SAFETY: callers run where AVX2, FMA and F16C, and AVX-VNNI if so named, are available (trait contract); pointers as
// documented.
#[allow(unsafe_op_in_unsafe_fn)]
impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = Two<__m256>;
    type I = Two<__m256i>;
    type B = Two<__m256i>;
    type Pairs = (Self::F, Self::F);
    type Rounded = f32;
    type Dots = [Two<__m256i>; 2];
    const PIECE: usize = if VNNI { 4 } else { 2 };
    const WIDE: bool = !VNNI;
    const TILE_TOKENS: usize = 4;
    const CODE_TOKENS: usize = if VNNI { 2 } else { 4 };
    const TILES: usize = 1;
    const TILE_QUERIES: usize = 2;
    const PAIR_QUERIES: usize = 4;

    #[inline(always)]
    fn pair_vectors(rows: usize) -> usize {
        (16 - 2) / (2 * rows + 4)
    }

    #[inline(always)]
    unsafe fn apart<A: Apart>(part: A) -> A::Out {
        if VNNI { apart_for!(AvxVnni, Avx2<true>, part) } else { apart_for!(Avx2, Avx2<false>, part) }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        Two(_mm256_setzero_ps(), _mm256_setzero_ps())
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        Two(_mm256_set1_ps(x), _mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        Two(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        _mm256_storeu_ps(p, v.0);
        _mm256_storeu_ps(p.add(8), v.1);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        Two(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        let wide = |q: *const u16| {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(q.cast()))))
        };
        Two(wide(p), wide(p.add(8)))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::F) {
        let low = |v| _mm256_srli_epi32::<16>(bf16_bits(v));
        let packed = _mm256_packus_epi32(low(v.0), low(v.1));
        _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        Two(_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1))
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        let sign = _mm256_set1_ps(-0.0);
        Two(_mm256_andnot_ps(sign, a.0), _mm256_andnot_ps(sign, a.1))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    unsafe fn exp2(x: Self::F) -> Self::F {
        both!(exp2_half(x))
    }
    #[inline(always)]
    unsafe fn mask_range(v: Self::F, lo: usize, hi: usize) -> Self::F {
        let lo = _mm256_set1_epi32(lo as i32);
        let hi = _mm256_set1_epi32(hi as i32);
        let keep = |v: __m256, first: i32| {
            let lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
            let inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(lo, lane), _mm256_cmpgt_epi32(hi, lane));
            _mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), v, _mm256_castsi256_ps(inside))
        };
        Two(keep(v.0, 0), keep(v.1, 8))
    }
    #[inline(always)]
    unsafe fn reduce_add(v: Self::F) -> f32 {
        let a = _mm256_add_ps(v.0, v.1);
        let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
        _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps::<1>(c, c)))
    }
    #[inline(always)]
    unsafe fn reduce_max(v: Self::F) -> f32 {
        let a = _mm256_max_ps(v.0, v.1);
        let b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let c = _mm_max_ps(b, _mm_movehl_ps(b, b));
        _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps::<1>(c, c)))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::F) {
        let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
        let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_storeu_si128(p.cast(), bytes);
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, v: Self::F) {
        let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
        let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_storeu_si128(p.cast(), bytes);
    }
    #[inline(always)]
    unsafe fn store_pair(p: *mut i8, a: [Self::F; 2], b: [Self::F; 2]) {
        let both = |a, b| _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
        let low = _mm256_packs_epi16(both(a[0].0, b[0].0), both(a[1].0, b[1].0));
        let high = _mm256_packs_epi16(both(a[0].1, b[0].1), both(a[1].1, b[1].1));
        if VNNI {
            return Self::store_b(p.cast(), Two(low, high));
        }
        let turns =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
        Self::store_b(p.cast(), Two(_mm256_shuffle_epi8(low, turns), _mm256_shuffle_epi8(high, turns)))
    }
    #[inline(always)]
    unsafe fn store_words(p: *mut i16, even: Self::F, odd: Self::F) {
        let one = |even, odd| {
            let odd = _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(odd));
            _mm256_blend_epi16::<0xaa>(_mm256_cvtps_epi32(even), odd)
        };
        Self::store_b(p.cast(), Two(one(even.0, odd.0), one(even.1, odd.1)))
    }
    #[inline(always)]
    unsafe fn power(v: Self::F) -> Self::F {
        let exponent = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f80_0000));
        Two(_mm256_and_ps(v.0, exponent), _mm256_and_ps(v.1, exponent))
    }
    #[inline(always)]
    unsafe fn isplat_two(p: *const i32) -> Self::I {
        let two = _mm256_set1_epi64x(p.cast::<i64>().read_unaligned());
        Two(two, two)
    }
    #[inline(always)]
    unsafe fn isplat(x: i32) -> Self::I {
        Two(_mm256_set1_epi32(x), _mm256_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> Self::I {
        Two(_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()))
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut i32, v: Self::I) {
        _mm256_storeu_si256(p.cast(), v.0);
        _mm256_storeu_si256(p.add(8).cast(), v.1);
    }
    #[inline(always)]
    unsafe fn mul_add_i16(a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        // The upper half of every lane of `a` is zero.
        let one = |a, b, c| _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
        Two(one(a.0, b.0, c.0), one(a.1, b.1, c.1))
    }
    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        both!(_mm256_cvtepi32_ps(v))
    }
    #[inline(always)]
    unsafe fn words(a: Self::I, b: Self::I) -> Self::B {
        both!(_mm256_packs_epi32(a, b))
    }
    #[inline(always)]
    unsafe fn mul_words(a: Self::B, b: Self::B) -> Self::B {
        both!(_mm256_mulhrs_epi16(a, b))
    }
    #[inline(always)]
    unsafe fn dot_words(acc: Self::I, a: Self::B, b: Self::B) -> Self::I {
        let one = |acc, a, b| _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
        Two(one(acc.0, a.0, b.0), one(acc.1, a.1, b.1))
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> Self::B {
        Two(_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()))
    }
    #[inline(always)]
    unsafe fn store_b(p: *mut u8, v: Self::B) {
        _mm256_storeu_si256(p.cast(), v.0);
        _mm256_storeu_si256(p.add(32).cast(), v.1);
    }
    #[inline(always)]
    unsafe fn splat_b(p: *const u8) -> Self::B {
        let four = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
        Two(four, four)
    }
    #[inline(always)]
    unsafe fn splat_quads(p: *const u8) -> Self::B {
        if VNNI {
            return Self::isplat_two(p.cast());
        }
        let lane = |at: usize| _mm256_set1_epi32(p.add(at).cast::<i32>().read_unaligned());
        Two(lane(0), lane(4))
    }
    #[inline(always)]
    unsafe fn low_nibbles(v: Self::B) -> Self::B {
        let mask = _mm256_set1_epi8(15);
        Two(_mm256_and_si256(v.0, mask), _mm256_and_si256(v.1, mask))
    }
    #[inline(always)]
    unsafe fn high_nibbles(v: Self::B) -> Self::B {
        let down = |v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15));
        Two(down(v.0), down(v.1))
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        if VNNI { both!(_mm256_dpbusd_avx_epi32(acc, u, s)) } else { both!(dot_wide(acc, u, s)) }
    }
    #[inline(always)]
    unsafe fn dot_low(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        if VNNI { both!(_mm256_dpbusd_avx_epi32(acc, u, s)) } else { both!(dot_narrow(acc, u, s)) }
    }
    // Without VNNI sums are kept as words, which VPMADDUBSW and VPADDW add to: two instructions for 32 products, where widening each
    // sum to 32 bits takes three, two of them on the multipliers. Words may wrap on the way; 32 codes less 8 times signed bytes fit at
    // the end.
    #[inline(always)]
    unsafe fn dots(p: *const i32) -> Self::Dots {
        let start = Self::isplat_two(p);
        if VNNI {
            return [start; 2];
        }
        let words = _mm256_shuffle_epi8(start.0, _mm256_set1_epi32(0x0504_0100));
        [Two(words, words); 2]
    }
    #[inline(always)]
    unsafe fn dot_codes(dots: Self::Dots, codes: [Self::B; 2], s: Self::B) -> Self::Dots {
        if VNNI {
            return [Self::dot_low(dots[0], codes[0], s), Self::dot_low(dots[1], codes[1], s)];
        }
        [add_words(add_words(dots[0], codes[0], s.0), codes[1], s.1); 2]
    }
    #[inline(always)]
    unsafe fn group_words(dots: Self::Dots) -> Self::B {
        if VNNI { Self::words(dots[0], dots[1]) } else { dots[0] }
    }
    // Bytes of 8 bits times such bytes leave 16 bits already, so that the other side is words, two products a lane.
    #[inline(always)]
    unsafe fn store_shifted(p: *mut i8, codes: [Self::F; 2], shift: Self::F) {
        for (i, codes) in codes.into_iter().enumerate() {
            if VNNI {
                Self::store_i8(p.add(16 * i), codes);
            } else {
                let whole = Self::add(codes, shift);
                let words = _mm256_packs_epi32(_mm256_cvtps_epi32(whole.0), _mm256_cvtps_epi32(whole.1));
                _mm256_storeu_si256(p.add(32 * i).cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(words));
            }
        }
    }
    #[inline(always)]
    unsafe fn splat_shifted(p: *const i8, quad: usize) -> Self::B {
        if VNNI {
            return Self::splat_b(p.add(4 * quad).cast());
        }
        let two = |at: usize| _mm256_set1_epi32(p.add(8 * quad + at).cast::<i32>().read_unaligned());
        Two(two(0), two(4))
    }
    #[inline(always)]
    unsafe fn start_shifted(sums: *const i32, shift: i32, bias: i32) -> Self::I {
        let bias = Self::isplat(bias);
        if VNNI { Self::mul_add_i16(Self::load_i(sums), Self::isplat(shift), bias) } else { bias }
    }
    #[inline(always)]
    unsafe fn dot_shifted(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        if VNNI {
            return Self::dot(acc, u, s);
        }
        let each = |a: i8, b: i8| {
            _mm256_broadcastsi128_si256(_mm_setr_epi8(
                a,
                -1,
                b,
                -1,
                a + 4,
                -1,
                b + 4,
                -1,
                a + 8,
                -1,
                b + 8,
                -1,
                a + 12,
                -1,
                b + 12,
                -1,
            ))
        };
        let (even, odd) = (each(0, 1), each(2, 3));
        let even = Two(_mm256_shuffle_epi8(u.0, even), _mm256_shuffle_epi8(u.1, even));
        let odd = Two(_mm256_shuffle_epi8(u.0, odd), _mm256_shuffle_epi8(u.1, odd));
        add_doubles(add_doubles(acc, even, s.0), odd, s.1)
    }
    #[inline(always)]
    unsafe fn widen_bf16(v: Self::B) -> (Self::F, Self::F) {
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        let odd = |v| _mm256_castsi256_ps(_mm256_and_si256(v, high));
        let even = |v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v));
        (Two(even(v.0), even(v.1)), Two(odd(v.0), odd(v.1)))
    }
    #[inline(always)]
    unsafe fn pairs(v: Self::B) -> Self::Pairs {
        Self::widen_bf16(v)
    }
    #[inline(always)]
    fn rounded(bits: u16) -> Self::Rounded {
        f32::from_bits(u32::from(bits) << 16)
    }
    #[inline(always)]
    unsafe fn store_rounded(p: *mut Self::Rounded, v: Self::F) {
        _mm256_storeu_si256(p.cast(), bf16_bits(v.0));
        _mm256_storeu_si256(p.add(8).cast(), bf16_bits(v.1));
    }
    #[inline(always)]
    unsafe fn splat_pair(p: *const Self::Rounded) -> Self::Pairs {
        (Self::splat(*p), Self::splat(*p.add(1)))
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pairs) -> Self::F {
        Self::fma(a.0, b.0, Self::fma(a.1, b.1, acc))
    }
}
