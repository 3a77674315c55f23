//! NEON, which every 64-bit ARM has: four 128-bit registers a vector; with dot products of bytes where Armv8.2 has them.

use super::portable::EXP2;
use super::{Apart, Simd, dots_in_lanes};
use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;

/// `DOT`: SDOT is there as well.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOT: bool>;

/// Sixteen lanes, ascending.
type Quarters<T> = [T; 4];

#[inline(always)]
unsafe fn exp2_quarter(x: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe {
        let n = vrndnq_f32(x);
        let r = vsubq_f32(x, n);
        let mut p = vdupq_n_f32(EXP2[6]);
        for &c in EXP2[..6].iter().rev() {
            p = vfmaq_f32(vdupq_n_f32(c), p, r);
        }
        let scale = vshlq_n_s32::<23>(vcvtq_s32_f32(n));
        let y = vaddq_s32(vreinterpretq_s32_f32(p), scale);
        let tiny = vcltq_f32(x, vdupq_n_f32(-126.0));
        vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(y), tiny))
    }
}

/// Exact for every half: what is smaller than normal becomes normal in the multiplication.
#[inline(always)]
unsafe fn widen_f16(bits: uint16x4_t) -> float32x4_t {
    // SAFETY: as above.
    unsafe {
        let wide = vmovl_u16(bits);
        let sign = vshlq_n_u32::<16>(vandq_u32(wide, vdupq_n_u32(0x8000)));
        let magnitude = vshlq_n_u32::<13>(vandq_u32(wide, vdupq_n_u32(0x7fff)));
        // The exponent's bias is 15 there and 127 here.
        let value = vmulq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(f32::from_bits((127 + 112) << 23)));
        let special = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00 << 13));
        let infinite = vorrq_u32(magnitude, vdupq_n_u32(0x7f80_0000));
        vreinterpretq_f32_u32(vorrq_u32(sign, vbslq_u32(special, infinite, vreinterpretq_u32_f32(value))))
    }
}

#[inline(always)]
unsafe fn bf16_bits(v: float32x4_t) -> uint16x4_t {
    // SAFETY: as above.
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vmovn_u32(vshrq_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), rounded, quiet)))
    }
}

/// Products of signed bytes, four to a lane. No product of two leaves 16 bits, and no sum of two 32.
#[inline(always)]
unsafe fn dot_plain(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        let low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        let high = vpaddlq_s16(vmull_high_s8(a, b));
        vaddq_s32(acc, vpaddq_s32(low, high))
    }
}

/// The same in one instruction, for which the standard library has no stable name.
#[inline(always)]
unsafe fn dot_sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: callers run where SDOT is available; it touches registers alone.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

#[inline(always)]
unsafe fn signed_dot<const DOT: bool>(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: forwarded.
    unsafe { if DOT { dot_sdot(acc, a, b) } else { dot_plain(acc, a, b) } }
}

// SAFETY: NEON is part of the architecture, and callers run where SDOT is if so named (trait contract); pointers as
// documented.
#[allow(unsafe_op_in_unsafe_fn)]
impl<const DOT: bool> Simd for Neon<DOT> {
    type F = Quarters<float32x4_t>;
    type I = Quarters<int32x4_t>;
    type B = Quarters<uint8x16_t>;
    type Pairs = (Self::F, Self::F);
    type Rounded = f32;
    dots_in_lanes!();
    const TILE_TOKENS: usize = 4;
    const CODE_TOKENS: usize = 2;
    const TILES: usize = 1;
    const TILE_QUERIES: usize = 2;
    const PAIR_QUERIES: usize = 4;

    #[inline(always)]
    fn pair_vectors(rows: usize) -> usize {
        (32 - 4) / (4 * rows + 8)
    }

    #[inline(never)]
    unsafe fn apart<A: Apart>(part: A) -> A::Out {
        part.run::<Self>()
    }

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        [vdupq_n_f32(0.0); 4]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [vdupq_n_f32(x); 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        from_fn(|i| vld1q_f32(p.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        for (i, v) in v.into_iter().enumerate() {
            vst1q_f32(p.add(4 * i), v);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        from_fn(|i| widen_f16(vld1_u16(p.add(4 * i))))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        from_fn(|i| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(4 * i)))))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::F) {
        for (i, v) in v.into_iter().enumerate() {
            vst1_u16(p.add(4 * i), bf16_bits(v));
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // x86's rule: the second operand where they are equal or unordered.
        from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        from_fn(|i| vrndnq_f32(a[i]))
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        from_fn(|i| vabsq_f32(a[i]))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        from_fn(|i| vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn exp2(x: Self::F) -> Self::F {
        from_fn(|i| exp2_quarter(x[i]))
    }
    #[inline(always)]
    unsafe fn mask_range(v: Self::F, lo: usize, hi: usize) -> Self::F {
        let lanes = vld1q_u32([0, 1, 2, 3].as_ptr());
        let (lo, hi) = (vdupq_n_u32(lo as u32), vdupq_n_u32(hi as u32));
        from_fn(|i| {
            let lane = vaddq_u32(lanes, vdupq_n_u32(4 * i as u32));
            let inside = vandq_u32(vcgeq_u32(lane, lo), vcltq_u32(lane, hi));
            vbslq_f32(inside, v[i], vdupq_n_f32(f32::NEG_INFINITY))
        })
    }
    #[inline(always)]
    unsafe fn reduce_add(v: Self::F) -> f32 {
        let b = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
        let c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
        vget_lane_f32::<0>(c) + vget_lane_f32::<1>(c)
    }
    #[inline(always)]
    unsafe fn reduce_max(v: Self::F) -> f32 {
        let max = |a: float32x4_t, b: float32x4_t| vbslq_f32(vcgtq_f32(a, b), a, b);
        let a = max(max(v[0], v[2]), max(v[1], v[3]));
        let b = max(a, vextq_f32::<2>(a, a));
        let c = max(b, vextq_f32::<1>(b, b));
        vgetq_lane_f32::<0>(c)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::F) {
        let words: [int16x4_t; 4] = from_fn(|i| vmovn_s32(vcvtnq_s32_f32(v[i])));
        let (low, high) = (vcombine_s16(words[0], words[1]), vcombine_s16(words[2], words[3]));
        vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, v: Self::F) {
        // SAFETY: the lanes' low bytes are the same.
        Self::store_i8(p.cast(), v);
    }
    #[inline(always)]
    unsafe fn store_words(p: *mut i16, even: Self::F, odd: Self::F) {
        for i in 0..4 {
            let odd = vshlq_n_s32::<16>(vcvtnq_s32_f32(odd[i]));
            let mask = vdupq_n_u32(0xffff_0000);
            vst1q_s32(p.add(8 * i).cast(), vbslq_s32(mask, odd, vcvtnq_s32_f32(even[i])));
        }
    }
    #[inline(always)]
    unsafe fn power(v: Self::F) -> Self::F {
        let exponent = vdupq_n_u32(0x7f80_0000);
        from_fn(|i| vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v[i]), exponent)))
    }
    #[inline(always)]
    unsafe fn isplat_two(p: *const i32) -> Self::I {
        [vreinterpretq_s32_s64(vdupq_n_s64(p.cast::<i64>().read_unaligned())); 4]
    }
    #[inline(always)]
    unsafe fn isplat(x: i32) -> Self::I {
        [vdupq_n_s32(x); 4]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> Self::I {
        from_fn(|i| vld1q_s32(p.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut i32, v: Self::I) {
        for (i, v) in v.into_iter().enumerate() {
            vst1q_s32(p.add(4 * i), v);
        }
    }
    #[inline(always)]
    unsafe fn mul_add_i16(a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        from_fn(|i| vmlaq_s32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        from_fn(|i| vcvtq_f32_s32(v[i]))
    }
    #[inline(always)]
    unsafe fn words(a: Self::I, b: Self::I) -> Self::B {
        from_fn(|i| vreinterpretq_u8_s16(vcombine_s16(vmovn_s32(a[i]), vmovn_s32(b[i]))))
    }
    #[inline(always)]
    unsafe fn mul_words(a: Self::B, b: Self::B) -> Self::B {
        from_fn(|i| {
            let (a, b) = (vreinterpretq_s16_u8(a[i]), vreinterpretq_s16_u8(b[i]));
            vreinterpretq_u8_s16(vqrdmulhq_s16(a, b))
        })
    }
    #[inline(always)]
    unsafe fn dot_words(acc: Self::I, a: Self::B, b: Self::B) -> Self::I {
        from_fn(|i| {
            let (a, b) = (vreinterpretq_s16_u8(a[i]), vreinterpretq_s16_u8(b[i]));
            let (low, high) = (vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
            vaddq_s32(acc[i], vpaddq_s32(low, high))
        })
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> Self::B {
        from_fn(|i| vld1q_u8(p.add(16 * i)))
    }
    #[inline(always)]
    unsafe fn store_b(p: *mut u8, v: Self::B) {
        for (i, v) in v.into_iter().enumerate() {
            vst1q_u8(p.add(16 * i), v);
        }
    }
    #[inline(always)]
    unsafe fn splat_b(p: *const u8) -> Self::B {
        [vreinterpretq_u8_u32(vdupq_n_u32(p.cast::<u32>().read_unaligned())); 4]
    }
    #[inline(always)]
    unsafe fn splat_quads(p: *const u8) -> Self::B {
        [vreinterpretq_u8_u64(vdupq_n_u64(p.cast::<u64>().read_unaligned())); 4]
    }
    #[inline(always)]
    unsafe fn low_nibbles(v: Self::B) -> Self::B {
        from_fn(|i| vandq_u8(v[i], vdupq_n_u8(15)))
    }
    #[inline(always)]
    unsafe fn high_nibbles(v: Self::B) -> Self::B {
        from_fn(|i| vshrq_n_u8::<4>(v[i]))
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        // There are no products of unsigned and signed bytes: (u − 128) · s, less −128 · s.
        from_fn(|i| {
            let s = vreinterpretq_s8_u8(s[i]);
            let centred = vreinterpretq_s8_u8(veorq_u8(u[i], vdupq_n_u8(128)));
            let less = signed_dot::<DOT>(vdupq_n_s32(0), s, vdupq_n_s8(-128));
            vsubq_s32(signed_dot::<DOT>(acc[i], centred, s), less)
        })
    }
    #[inline(always)]
    unsafe fn dot_low(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        from_fn(|i| signed_dot::<DOT>(acc[i], vreinterpretq_s8_u8(u[i]), vreinterpretq_s8_u8(s[i])))
    }
    #[inline(always)]
    unsafe fn widen_bf16(v: Self::B) -> (Self::F, Self::F) {
        let high = vdupq_n_u32(0xffff_0000);
        let bits: [uint32x4_t; 4] = from_fn(|i| vreinterpretq_u32_u8(v[i]));
        (
            from_fn(|i| vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits[i]))),
            from_fn(|i| vreinterpretq_f32_u32(vandq_u32(bits[i], high))),
        )
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
        for (i, v) in v.into_iter().enumerate() {
            vst1q_u32(p.add(4 * i).cast(), vshll_n_u16::<16>(bf16_bits(v)));
        }
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
