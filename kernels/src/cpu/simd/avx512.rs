//! AVX-512 with VNNI: one zmm register a vector; with BF16, whose products are one instruction.

use super::portable::EXP2;
use super::{Apart, LANES, Simd, apart_for, dots_in_lanes};
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// `P`: how bfloat16 are multiplied.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<P>(PhantomData<P>);

/// The `..pairs` operations of [`Simd`].
pub(crate) trait PairProducts: Copy + 'static {
    type Pairs: Copy;
    type Rounded: Copy + Default;
    const QUERIES: usize;
    /// Registers a vector of them takes.
    const REGISTERS: usize;
    /// See [`Simd::apart`].
    unsafe fn apart<A: Apart>(part: A) -> A::Out;
    unsafe fn pairs(v: __m512i) -> Self::Pairs;
    fn rounded(bits: u16) -> Self::Rounded;
    /// The bfloat16 nearest to each lane in the upper half of it.
    unsafe fn bf16_bits(v: __m512) -> __m512i;
    unsafe fn store_bf16(p: *mut u16, v: __m512);
    unsafe fn store_rounded(p: *mut Self::Rounded, v: __m512);
    unsafe fn splat_pair(p: *const Self::Rounded) -> Self::Pairs;
    unsafe fn dot_pairs(acc: __m512, a: Self::Pairs, b: Self::Pairs) -> __m512;
}

/// `vdpbf16ps`.
#[derive(Clone, Copy)]
pub(crate) struct Narrow;

/// Two multiply-adds of f32.
#[derive(Clone, Copy)]
pub(crate) struct Wide;

#[inline(always)]
unsafe fn widen(v: __m512i) -> (__m512, __m512) {
    // SAFETY: AVX-512 F is available where `Avx512` is used.
    unsafe {
        let odd = _mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)), _mm512_castsi512_ps(odd))
    }
}

// SAFETY: callers run where AVX-512 F and BF16 are available; pointers as documented.
#[allow(unsafe_op_in_unsafe_fn)]
impl PairProducts for Narrow {
    type Pairs = __m512i;
    type Rounded = u16;
    const QUERIES: usize = 6;
    const REGISTERS: usize = 1;

    #[inline(always)]
    unsafe fn apart<A: Apart>(part: A) -> A::Out {
        apart_for!(Avx512Bf16, Avx512<Narrow>, part)
    }
    #[inline(always)]
    unsafe fn pairs(v: __m512i) -> Self::Pairs {
        v
    }
    #[inline(always)]
    fn rounded(bits: u16) -> Self::Rounded {
        bits
    }
    #[inline(always)]
    unsafe fn bf16_bits(v: __m512) -> __m512i {
        // SAFETY: same size, any bit pattern is valid.
        let bits = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m512) {
        // SAFETY: same size, any bit pattern is valid.
        _mm256_storeu_si256(p.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)))
    }
    #[inline(always)]
    unsafe fn store_rounded(p: *mut Self::Rounded, v: __m512) {
        Self::store_bf16(p, v);
    }
    #[inline(always)]
    unsafe fn splat_pair(p: *const Self::Rounded) -> Self::Pairs {
        _mm512_set1_epi32(p.cast::<i32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m512, a: Self::Pairs, b: Self::Pairs) -> __m512 {
        // SAFETY: same size, any bit pattern is valid.
        _mm512_dpbf16_ps(
            acc,
            std::mem::transmute::<__m512i, __m512bh>(a),
            std::mem::transmute::<__m512i, __m512bh>(b),
        )
    }
}

// SAFETY: callers run where AVX-512 F is available; pointers as documented.
#[allow(unsafe_op_in_unsafe_fn)]
impl PairProducts for Wide {
    type Pairs = (__m512, __m512);
    type Rounded = f32;
    const QUERIES: usize = 12;
    const REGISTERS: usize = 2;

    #[inline(always)]
    unsafe fn apart<A: Apart>(part: A) -> A::Out {
        apart_for!(Avx512, Avx512<Wide>, part)
    }
    #[inline(always)]
    unsafe fn pairs(v: __m512i) -> Self::Pairs {
        widen(v)
    }
    #[inline(always)]
    fn rounded(bits: u16) -> Self::Rounded {
        f32::from_bits(u32::from(bits) << 16)
    }
    #[inline(always)]
    unsafe fn bf16_bits(v: __m512) -> __m512i {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
        _mm512_and_si512(quiet, _mm512_set1_epi32(0xffff_0000_u32 as i32))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m512) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(Self::bf16_bits(v))))
    }
    #[inline(always)]
    unsafe fn store_rounded(p: *mut Self::Rounded, v: __m512) {
        _mm512_storeu_si512(p.cast(), Self::bf16_bits(v))
    }
    #[inline(always)]
    unsafe fn splat_pair(p: *const Self::Rounded) -> Self::Pairs {
        (_mm512_set1_ps(*p), _mm512_set1_ps(*p.add(1)))
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m512, a: Self::Pairs, b: Self::Pairs) -> __m512 {
        _mm512_fmadd_ps(a.0, b.0, _mm512_fmadd_ps(a.1, b.1, acc))
    }
}

/// `vpdpwssd`, which the compiler makes two instructions of where it is free to.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_words(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    let mut sum = acc;
    // SAFETY: AVX-512 VNNI is available where `Avx512` is used; only the named registers are touched.
    unsafe {
        asm!("vpdpwssd {sum}, {a}, {b}", sum = inout(zmm_reg) sum, a = in(zmm_reg) a, b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Lane `i` of the result is what `op` makes of all lanes of `v[i]`. Macros and not closures: those are compiled without the
/// ISA's features.
macro_rules! across {
    ($op:ident, $v:ident) => {{
        // Halves of two vectors side by side, then quarters of four, then lanes.
        macro_rules! halves {
            ($a:expr, $b:expr) => {
                $op(_mm512_shuffle_f32x4::<0x44>($a, $b), _mm512_shuffle_f32x4::<0xee>($a, $b))
            };
        }
        macro_rules! quarters {
            ($i:literal) => {{
                let (a, b) = (halves!($v[$i], $v[$i + 4]), halves!($v[$i + 8], $v[$i + 12]));
                $op(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
            }};
        }
        macro_rules! pairs {
            ($a:expr, $b:expr) => {{
                let (a, b) = ($a, $b);
                _mm512_castps_pd($op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)))
            }};
        }
        let (a, b) = (pairs!(quarters!(0), quarters!(1)), pairs!(quarters!(2), quarters!(3)));
        $op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
    }};
}

// SAFETY: callers run where AVX-512 F/BW/VL/DQ/VNNI, and what `P` takes, are available (trait contract); pointers as
// documented.
#[allow(unsafe_op_in_unsafe_fn)]
impl<P: PairProducts> Simd for Avx512<P> {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type Pairs = P::Pairs;
    type Rounded = P::Rounded;
    dots_in_lanes!();
    const TILE_TOKENS: usize = 8;
    const CODE_TOKENS: usize = 8;
    const TILES: usize = 2;
    const TILE_QUERIES: usize = 6;
    const PAIR_QUERIES: usize = P::QUERIES;

    #[inline(always)]
    fn pair_vectors(rows: usize) -> usize {
        (32 - P::REGISTERS) / (rows + P::REGISTERS)
    }

    #[inline(always)]
    unsafe fn apart<A: Apart>(part: A) -> A::Out {
        P::apart(part)
    }

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        _mm512_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::F) {
        P::store_bf16(p, v)
    }
    #[inline(always)]
    unsafe fn store_bf16_apart(p: *mut u16, v: Self::F, odd: bool) {
        let bits = P::bf16_bits(v);
        if odd {
            _mm512_mask_storeu_epi16(p.cast(), 0xaaaa_aaaa, bits)
        } else {
            _mm512_mask_storeu_epi16(p.cast(), 0x5555_5555, _mm512_srli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn exp2(x: Self::F) -> Self::F {
        // Adding a number this large rounds to whole ones, and leaves them in the lowest bits.
        let large = _mm512_set1_ps(12_582_912.0);
        let whole = _mm512_add_ps(x, large);
        let r = _mm512_sub_ps(x, _mm512_sub_ps(whole, large));
        let mut p = _mm512_set1_ps(EXP2[6]);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[5]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[4]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[3]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[2]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[1]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[0]));
        let scale = _mm512_slli_epi32::<23>(_mm512_castps_si512(whole));
        let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
        _mm512_castsi512_ps(_mm512_maskz_add_epi32(normal, _mm512_castps_si512(p), scale))
    }
    #[inline(always)]
    unsafe fn mask_range(v: Self::F, lo: usize, hi: usize) -> Self::F {
        let below = |n: usize| ((1u32 << n.min(16)) - 1) as u16;
        _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), below(hi) & !below(lo), v)
    }
    #[inline(always)]
    unsafe fn reduce_add(v: Self::F) -> f32 {
        let a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
        _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps::<1>(c, c)))
    }
    #[inline(always)]
    unsafe fn reduce_max(v: Self::F) -> f32 {
        let a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let c = _mm_max_ps(b, _mm_movehl_ps(b, b));
        _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps::<1>(c, c)))
    }
    #[inline(always)]
    unsafe fn maxima(v: [Self::F; LANES]) -> Self::F {
        across!(_mm512_max_ps, v)
    }
    #[inline(always)]
    unsafe fn totals(v: [Self::F; LANES]) -> Self::F {
        across!(_mm512_add_ps, v)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::F) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)))
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, v: Self::F) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)))
    }
    #[inline(always)]
    unsafe fn store_pair(p: *mut i8, a: [Self::F; 2], b: [Self::F; 2]) {
        let both = |i: usize| _mm512_packs_epi32(_mm512_cvtps_epi32(a[i]), _mm512_cvtps_epi32(b[i]));
        _mm512_storeu_si512(p.cast(), _mm512_packs_epi16(both(0), both(1)))
    }
    #[inline(always)]
    unsafe fn store_half(p: *mut i8, v: [Self::F; 2], half: usize) {
        let twice = |i: usize| {
            let words = _mm512_cvtps_epi32(v[i]);
            _mm512_packs_epi32(words, words)
        };
        _mm512_mask_storeu_epi32(p.cast(), 0x5555 << half, _mm512_packs_epi16(twice(0), twice(1)))
    }
    #[inline(always)]
    unsafe fn store_words(p: *mut i16, even: Self::F, odd: Self::F) {
        let odd = _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(odd));
        _mm512_storeu_si512(p.cast(), _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_cvtps_epi32(even), odd))
    }
    #[inline(always)]
    unsafe fn power(v: Self::F) -> Self::F {
        _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f80_0000)))
    }
    #[inline(always)]
    unsafe fn isplat(x: i32) -> Self::I {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn isplat_two(p: *const i32) -> Self::I {
        _mm512_set1_epi64(p.cast::<i64>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> Self::I {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut i32, v: Self::I) {
        _mm512_storeu_si512(p.cast(), v);
    }
    #[inline(always)]
    unsafe fn mul_add_i16(a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        // The upper half of every lane of `a` is zero.
        dot_words(c, a, b)
    }
    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        _mm512_cvtepi32_ps(v)
    }
    #[inline(always)]
    unsafe fn words(a: Self::I, b: Self::I) -> Self::B {
        _mm512_packs_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn mul_words(a: Self::B, b: Self::B) -> Self::B {
        _mm512_mulhrs_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn dot_words(acc: Self::I, a: Self::B, b: Self::B) -> Self::I {
        dot_words(acc, a, b)
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> Self::B {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn store_b(p: *mut u8, v: Self::B) {
        _mm512_storeu_si512(p.cast(), v);
    }
    #[inline(always)]
    unsafe fn splat_b(p: *const u8) -> Self::B {
        _mm512_set1_epi32(p.cast::<i32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn splat_quads(p: *const u8) -> Self::B {
        _mm512_set1_epi64(p.cast::<i64>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn low_nibbles(v: Self::B) -> Self::B {
        _mm512_and_si512(v, _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn high_nibbles(v: Self::B) -> Self::B {
        _mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        _mm512_dpbusd_epi32(acc, u, s)
    }
    #[inline(always)]
    unsafe fn dot_low(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        _mm512_dpbusd_epi32(acc, u, s)
    }
    #[inline(always)]
    unsafe fn widen_bf16(v: Self::B) -> (Self::F, Self::F) {
        widen(v)
    }
    #[inline(always)]
    unsafe fn pairs(v: Self::B) -> Self::Pairs {
        P::pairs(v)
    }
    #[inline(always)]
    fn rounded(bits: u16) -> Self::Rounded {
        P::rounded(bits)
    }
    #[inline(always)]
    unsafe fn store_rounded(p: *mut Self::Rounded, v: Self::F) {
        P::store_rounded(p, v)
    }
    #[inline(always)]
    unsafe fn splat_pair(p: *const Self::Rounded) -> Self::Pairs {
        P::splat_pair(p)
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pairs) -> Self::F {
        P::dot_pairs(acc, a, b)
    }
}
