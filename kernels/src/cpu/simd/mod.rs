//! Sixteen-lane vectors: the one vocabulary every CPU kernel is written in, and one implementation an ISA.
//!
//! A kernel is a generic function over [`Simd`], inlined into one entry point an ISA (see `dispatch!`), or into some (see
//! [`Simd::apart`]); nothing is sure to be inlined in a closure, which has no target features. Every
//! method is defined lane by lane, down to rounding and reduction order, so that all ISAs give the same bits.

use crate::packed::GROUP;
use crate::paired::order;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::{Avx512, Narrow, Wide};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

/// Lanes of every vector type here.
pub(crate) const LANES: usize = 16;

/// Which instructions the kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F/BW/VL/DQ with VNNI and BF16 (Zen 4 and later; Sapphire Rapids, whose BF16 products are slow).
    Avx512Bf16,
    /// AVX-512 F/BW/VL/DQ with VNNI (Cascade Lake, Ice Lake and later).
    Avx512,
    /// AVX2 with FMA, F16C and AVX-VNNI (Alder Lake, Sierra Forest and later).
    AvxVnni,
    /// AVX2 with FMA and F16C (Haswell, Zen 1 and later).
    Avx2,
    /// NEON with byte dot products (Armv8.2: Neoverse N1, Apple M1 and later).
    NeonDot,
    /// NEON, on any 64-bit ARM.
    Neon,
    /// Plain Rust, any architecture.
    Portable,
}

impl Isa {
    /// Fastest first, but for what [`Isa::detect`] passes over.
    pub const ALL: [Isa; 7] =
        [Isa::Avx512Bf16, Isa::Avx512, Isa::AvxVnni, Isa::Avx2, Isa::NeonDot, Isa::Neon, Isa::Portable];

    /// The fastest one this processor runs.
    pub fn detect() -> Isa {
        let fast = |isa: &Isa| isa.available() && !(*isa == Isa::Avx512Bf16 && slow_bf16_products());
        Isa::ALL.into_iter().find(fast).unwrap_or(Isa::Portable)
    }

    /// Whether this processor can run it.
    #[cfg(target_arch = "x86_64")]
    pub fn available(self) -> bool {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        match self {
            Isa::Avx512Bf16 => Isa::Avx512.available() && is_x86_feature_detected!("avx512bf16"),
            Isa::Avx512 => {
                avx2 && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Isa::AvxVnni => avx2 && is_x86_feature_detected!("avxvnni"),
            Isa::Avx2 => avx2,
            Isa::NeonDot | Isa::Neon => false,
            Isa::Portable => true,
        }
    }

    /// Whether this processor can run it.
    #[cfg(target_arch = "aarch64")]
    pub fn available(self) -> bool {
        match self {
            Isa::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            Isa::Neon | Isa::Portable => true,
            _ => false,
        }
    }

    /// Whether this processor can run it.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub fn available(self) -> bool {
        self == Isa::Portable
    }

    /// Columns of one group whose codes lie together where those of two groups take turns: a lane's four, if an instruction adds
    /// their products to a lane. Without one, products are added up as words, so that a lane is two columns of both.
    pub(crate) fn piece(self) -> usize {
        if self == Isa::Avx2 { 2 } else { 4 }
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "AVX-512 VNNI/BF16",
            Isa::Avx512 => "AVX-512 VNNI",
            Isa::AvxVnni => "AVX2/FMA with AVX-VNNI",
            Isa::Avx2 => "AVX2/FMA",
            Isa::NeonDot => "NEON with dot products",
            Isa::Neon => "NEON",
            Isa::Portable => "portable",
        }
    }
}

/// Whether `vdpbf16ps` takes longer than what it stands for. Intel's processors begin one in two cycles, and in that time four
/// multiply-adds of f32, so two of either's products (Emerald Rapids: 1.6 and 6.6 thousand million a second).
#[cfg(target_arch = "x86_64")]
fn slow_bf16_products() -> bool {
    let maker = std::arch::x86_64::__cpuid(0);
    [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn slow_bf16_products() -> bool {
    false
}

/// A part of a kernel that is a function of its own, see [`Simd::apart`].
pub(crate) trait Apart {
    type Out;
    /// # Safety
    /// `S`'s instructions are available; the rest is the implementation's. It must be `#[inline(always)]`.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// Sixteen f32 (`F`), sixteen i32 (`I`), or sixty-four bytes as sixteen lanes of four (`B`).
///
/// # Safety
/// Every method may only be called where the ISA's instructions are available; pointer methods also require the
/// stated number of readable (writable) bytes, with no alignment.
pub(crate) trait Simd: Copy + 'static {
    type F: Copy;
    type I: Copy;
    type B: Copy;
    /// Two bfloat16 a lane, as products take them.
    type Pairs: Copy;
    /// A bfloat16 that all lanes are to meet: its bits, or the f32 it is where that is what products take.
    type Rounded: Copy + Default;
    /// Dot products of two groups under way.
    type Dots: Copy;
    /// Columns of one group whose codes lie together where those of two groups take turns, see `paired.rs`; as [`Isa::piece`].
    const PIECE: usize;
    /// Whether the shifted form is words, which include the shift.
    const WIDE: bool = false;
    /// Bytes of a group in that form.
    const SHIFTED_BYTES: usize = if Self::WIDE { 2 * GROUP } else { GROUP };
    /// Tokens a linear kernel keeps in registers at once.
    const TILE_TOKENS: usize;
    /// Tokens whose [`Simd::Dots`] it keeps there.
    const CODE_TOKENS: usize;
    /// Tiles of weights that meet them together.
    const TILES: usize;
    /// Query rows an attention kernel over an 8-bit cache keeps in registers at once.
    const TILE_QUERIES: usize;
    /// The same over a bf16 cache.
    const PAIR_QUERIES: usize;

    /// Vectors of pairs that fit the registers beside their sums with `rows` rows.
    fn pair_vectors(rows: usize) -> usize;

    /// Runs `part` as a function of its own, compiled for this ISA. A kernel in one piece takes the compiler minutes: some of its
    /// passes take the square of a function's size.
    unsafe fn apart<A: Apart>(part: A) -> A::Out;

    unsafe fn zero() -> Self::F;
    unsafe fn splat(x: f32) -> Self::F;
    /// Reads 16 f32.
    unsafe fn load(p: *const f32) -> Self::F;
    /// Writes 16 f32.
    unsafe fn store(p: *mut f32, v: Self::F);
    /// Reads 16 IEEE half floats.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// Reads 16 bfloat16.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    /// Writes 16 bfloat16, rounded to nearest even; denormals may become zero.
    unsafe fn store_bf16(p: *mut u16, v: Self::F);
    /// Writes 16 bfloat16, rounded as [`Simd::store_bf16`] does, to every other one of 32 places: the even ones, or the odd
    /// ones. The rest is left alone.
    #[inline(always)]
    unsafe fn store_bf16_apart(p: *mut u16, v: Self::F, odd: bool) {
        let mut bits = [0; LANES];
        // SAFETY: sixteen numbers, and as many places.
        unsafe {
            Self::store_bf16(bits.as_mut_ptr(), v);
            for (i, bits) in bits.into_iter().enumerate() {
                *p.add(2 * i + usize::from(odd)) = bits;
            }
        }
    }
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest whole number, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// 2 to the power of each lane, by a degree-6 polynomial on [-0.5, 0.5]; relative error below 2e-7, and 2^0 is 1.
    /// Below -126 the result is 0.
    unsafe fn exp2(x: Self::F) -> Self::F;
    /// Lanes whose index is in `lo..hi` from `v`, negative infinity elsewhere.
    unsafe fn mask_range(v: Self::F, lo: usize, hi: usize) -> Self::F;
    /// Sum in the fixed order ((i + i+8) + (.. +4)) + ….
    unsafe fn reduce_add(v: Self::F) -> f32;
    unsafe fn reduce_max(v: Self::F) -> f32;
    /// The largest lane of each of sixteen vectors.
    #[inline(always)]
    unsafe fn maxima(v: [Self::F; LANES]) -> Self::F {
        let mut largest = [0.0; LANES];
        for i in 0..LANES {
            // SAFETY: forwarded.
            largest[i] = unsafe { Self::reduce_max(v[i]) };
        }
        // SAFETY: sixteen values.
        unsafe { Self::load(largest.as_ptr()) }
    }
    /// The sum of each of sixteen vectors, in any order: of whole numbers, and those below 2^24.
    #[inline(always)]
    unsafe fn totals(v: [Self::F; LANES]) -> Self::F {
        let mut sums = [0.0; LANES];
        for i in 0..LANES {
            // SAFETY: forwarded.
            sums[i] = unsafe { Self::reduce_add(v[i]) };
        }
        // SAFETY: sixteen values.
        unsafe { Self::load(sums.as_ptr()) }
    }
    /// Rounds to nearest even and writes 16 signed bytes; lanes must be within [-128, 127].
    unsafe fn store_i8(p: *mut i8, v: Self::F);
    /// Rounds to nearest even and writes 16 unsigned bytes; lanes must be within [0, 255].
    unsafe fn store_u8(p: *mut u8, v: Self::F);

    /// Writes two groups of 32 signed bytes as [`Simd::store_i8`] does, in quads 0, 4, 1, 5, 2, 6, 3 and 7; in each of them
    /// [`Simd::PIECE`] of `a`, as many of `b`, and so on.
    #[inline(always)]
    unsafe fn store_pair(p: *mut i8, a: [Self::F; 2], b: [Self::F; 2]) {
        // SAFETY: forwarded.
        unsafe {
            Self::store_half(p, a, 0);
            Self::store_half(p, b, 1);
        }
    }
    /// The same of one of the two; the other's bytes are left alone.
    #[inline(always)]
    unsafe fn store_half(p: *mut i8, v: [Self::F; 2], half: usize) {
        let mut bytes = [0; 2 * LANES];
        // SAFETY: 32 bytes, and as many places.
        unsafe {
            Self::store_i8(bytes.as_mut_ptr(), v[0]);
            Self::store_i8(bytes.as_mut_ptr().add(LANES), v[1]);
            for (i, byte) in bytes.into_iter().enumerate() {
                let (quad, piece) = (i / 4, i % 4 / Self::PIECE);
                let first = 8 * order(quad) + Self::PIECE * (2 * piece + half);
                *p.add(first + i % Self::PIECE) = byte;
            }
        }
    }
    /// Rounds to nearest even and writes 16 pairs of words, of an even lane and an odd one; all must be within [-2^15, 2^15).
    unsafe fn store_words(p: *mut i16, even: Self::F, odd: Self::F);
    /// The power of two at or below the size of every lane; 0 for what is smaller than normal.
    unsafe fn power(v: Self::F) -> Self::F;

    unsafe fn isplat(x: i32) -> Self::I;
    /// Reads two i32 into every two lanes.
    unsafe fn isplat_two(p: *const i32) -> Self::I;
    /// Reads 16 i32.
    unsafe fn load_i(p: *const i32) -> Self::I;
    /// Writes 16 i32.
    unsafe fn store_i(p: *mut i32, v: Self::I);
    /// `a * b + c` where lanes of `a` are within [0, 2^15) and those of `b` within [-2^15, 2^15).
    unsafe fn mul_add_i16(a: Self::I, b: Self::I, c: Self::I) -> Self::I;
    unsafe fn to_f(v: Self::I) -> Self::F;
    /// Lanes of `a` and `b` as 16-bit words, four of `a` and then the same four of `b`; all must be within [-2^15, 2^15).
    unsafe fn words(a: Self::I, b: Self::I) -> Self::B;
    /// Per word, the product over 2^15, rounded to nearest, halves up; words of `b` must not be -2^15.
    unsafe fn mul_words(a: Self::B, b: Self::B) -> Self::B;
    /// Per lane, `acc` plus the dot product of two words of `a` and two of `b`.
    unsafe fn dot_words(acc: Self::I, a: Self::B, b: Self::B) -> Self::I;

    /// Has the line at `p`, which may be any address, brought near.
    unsafe fn prefetch(p: *const u8);
    /// Reads 64 bytes.
    unsafe fn load_b(p: *const u8) -> Self::B;
    /// Writes 64 bytes.
    unsafe fn store_b(p: *mut u8, v: Self::B);
    /// Reads 4 bytes into every lane.
    unsafe fn splat_b(p: *const u8) -> Self::B;
    /// Reads a quad of two groups, 8 bytes as [`Simd::store_pair`] leaves them, as [`Simd::dot_codes`] takes it.
    unsafe fn splat_quads(p: *const u8) -> Self::B;
    /// Reads the same quad of one of the groups into every lane.
    #[inline(always)]
    unsafe fn splat_quad(p: *const u8, half: usize) -> Self::B {
        // SAFETY: 8 bytes are there.
        unsafe {
            if Self::PIECE == 4 {
                return Self::splat_b(p.add(4 * half));
            }
            let two = |at: usize| *p.add(at + 2 * half).cast::<[u8; 2]>();
            Self::splat_b([two(0), two(4)].as_flattened().as_ptr())
        }
    }
    /// Low four bits of every byte.
    unsafe fn low_nibbles(v: Self::B) -> Self::B;
    /// High four bits of every byte, shifted down.
    unsafe fn high_nibbles(v: Self::B) -> Self::B;
    /// Per lane, `acc` plus the dot product of four unsigned bytes of `u` and four signed ones of `s`.
    unsafe fn dot(acc: Self::I, u: Self::B, s: Self::B) -> Self::I;
    /// The same where every byte of `u` is below 128.
    unsafe fn dot_low(acc: Self::I, u: Self::B, s: Self::B) -> Self::I;
    /// Begins with the two numbers at `p`, one a group, for every output: -8 times a sum of 32 signed bytes.
    unsafe fn dots(p: *const i32) -> Self::Dots;
    /// Adds the dot products of a quad of columns: codes below 16 of two groups and sixteen outputs, two nibbles of 64 bytes each.
    unsafe fn dot_codes(dots: Self::Dots, codes: [Self::B; 2], s: Self::B) -> Self::Dots;
    /// Two words an output, one a group; what all eight quads add up to must be within [-2^15, 2^15).
    unsafe fn group_words(dots: Self::Dots) -> Self::B;
    /// Writes a group's codes in the shifted form: 32 columns as signed bytes of `codes`, or as words of `codes` plus `shift`. Those
    /// sums are within [-253, 253].
    #[inline(always)]
    unsafe fn store_shifted(p: *mut i8, codes: [Self::F; 2], shift: Self::F) {
        let _ = shift;
        // SAFETY: forwarded.
        unsafe {
            Self::store_i8(p, codes[0]);
            Self::store_i8(p.add(LANES), codes[1]);
        }
    }
    /// Reads a quad of columns of a group in that form, for every lane.
    #[inline(always)]
    unsafe fn splat_shifted(p: *const i8, quad: usize) -> Self::B {
        // SAFETY: forwarded.
        unsafe { Self::splat_b(p.add(4 * quad).cast()) }
    }
    /// What the dot products of a group begin with: `bias`, and the sums of its codes at `sums` times `shift` where the form does not
    /// include it.
    #[inline(always)]
    unsafe fn start_shifted(sums: *const i32, shift: i32, bias: i32) -> Self::I {
        // SAFETY: forwarded.
        unsafe { Self::mul_add_i16(Self::load_i(sums), Self::isplat(shift), Self::isplat(bias)) }
    }
    /// Per lane, `acc` plus the dot product of four unsigned bytes of `u` and a quad in that form.
    #[inline(always)]
    unsafe fn dot_shifted(acc: Self::I, u: Self::B, s: Self::B) -> Self::I {
        // SAFETY: forwarded.
        unsafe { Self::dot(acc, u, s) }
    }
    /// The even and the odd bfloat16 of every lane, as f32.
    unsafe fn widen_bf16(v: Self::B) -> (Self::F, Self::F);
    unsafe fn pairs(v: Self::B) -> Self::Pairs;
    /// `bits` of a bfloat16.
    fn rounded(bits: u16) -> Self::Rounded;
    /// Rounds 16 f32 to bfloat16 as [`Simd::store_bf16`] does.
    unsafe fn store_rounded(p: *mut Self::Rounded, v: Self::F);
    /// Reads two numbers into every lane.
    unsafe fn splat_pair(p: *const Self::Rounded) -> Self::Pairs;
    /// Per lane, `acc` plus the dot product of two bfloat16 of `a` and two of `b`, odd element first.
    unsafe fn dot_pairs(acc: Self::F, a: Self::Pairs, b: Self::Pairs) -> Self::F;
}

/// A function compiled for an ISA of x86: the one place that says which instructions each takes.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_for {
    (Avx512Bf16, $($function:tt)*) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
        $($function)*
    };
    (Avx512, $($function:tt)*) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
        $($function)*
    };
    (AvxVnni, $($function:tt)*) => {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        $($function)*
    };
    (Avx2, $($function:tt)*) => {
        #[target_feature(enable = "avx2,fma,f16c")]
        $($function)*
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use compiled_for;

/// [`Simd::apart`] in a function compiled for an ISA of x86, whose vectors are of the type given.
#[cfg(target_arch = "x86_64")]
macro_rules! apart_for {
    ($isa:ident, $vectors:ty, $part:ident) => {{
        $crate::cpu::simd::compiled_for! { $isa,
            #[inline(never)]
            unsafe fn run<A: Apart>(part: A) -> A::Out {
                // SAFETY: forwarded to the caller of `apart`.
                unsafe { part.run::<$vectors>() }
            }
        }
        run($part)
    }};
}
#[cfg(target_arch = "x86_64")]
use apart_for;

/// Runs a generic kernel in the entry point compiled for `isa`.
///
/// `dispatch!(isa, kernel(args…))` calls `kernel::<S>(args…)`; the kernel must be `#[inline(always)]` and unsafe.
macro_rules! dispatch {
    ($isa:expr, fn $name:ident $(<$(const $g:ident : $gt:ty),+>)? ($($arg:ident : $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        $crate::cpu::simd::compiled_for! { Avx512Bf16,
            unsafe fn avx512_bf16($($arg: $ty),*) {
                // SAFETY: forwarded to the caller of `dispatch!`; the ISA was checked when the `Isa` was chosen.
                unsafe { $name::<$crate::cpu::simd::Avx512<$crate::cpu::simd::Narrow>>($($arg),*) }
            }
        }
        #[cfg(target_arch = "x86_64")]
        $crate::cpu::simd::compiled_for! { Avx512,
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { $name::<$crate::cpu::simd::Avx512<$crate::cpu::simd::Wide>>($($arg),*) }
            }
        }
        #[cfg(target_arch = "x86_64")]
        $crate::cpu::simd::compiled_for! { Avx2,
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { $name::<$crate::cpu::simd::Avx2<false>>($($arg),*) }
            }
        }
        #[cfg(target_arch = "x86_64")]
        $crate::cpu::simd::compiled_for! { AvxVnni,
            unsafe fn avx_vnni($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { $name::<$crate::cpu::simd::Avx2<true>>($($arg),*) }
            }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::simd::Isa::Avx512Bf16 => avx512_bf16($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::simd::Isa::Avx512 => avx512($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::simd::Isa::AvxVnni => avx_vnni($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::simd::Isa::Avx2 => avx2($($arg),*),
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::simd::Isa::NeonDot => $name::<$crate::cpu::simd::Neon<true>>($($arg),*),
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::simd::Isa::Neon => $name::<$crate::cpu::simd::Neon<false>>($($arg),*),
            _ => $name::<$crate::cpu::simd::Portable>($($arg),*),
        }
    }};
}
pub(crate) use dispatch;

/// Dot products where an instruction adds four of bytes to a lane.
macro_rules! dots_in_lanes {
    () => {
        type Dots = [Self::I; 2];
        const PIECE: usize = 4;

        #[inline(always)]
        unsafe fn dots(p: *const i32) -> Self::Dots {
            // SAFETY: forwarded.
            unsafe { [Self::isplat_two(p); 2] }
        }
        #[inline(always)]
        unsafe fn dot_codes(dots: Self::Dots, codes: [Self::B; 2], s: Self::B) -> Self::Dots {
            // SAFETY: forwarded.
            unsafe { [Self::dot_low(dots[0], codes[0], s), Self::dot_low(dots[1], codes[1], s)] }
        }
        #[inline(always)]
        unsafe fn group_words(dots: Self::Dots) -> Self::B {
            // SAFETY: forwarded.
            unsafe { Self::words(dots[0], dots[1]) }
        }
    };
}
use dots_in_lanes;

#[cfg(test)]
mod tests;
