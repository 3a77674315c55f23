//! Every ISA's vector operations against the portable definition, bit for bit.

use super::{Isa, LANES, Portable, Simd};

fn available() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

/// A small generator, so that failures repeat.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn float(&mut self) -> f32 {
        (self.next() as f32 / 2e9 - 0.5) * 8.0
    }
}

type Operands<'a> = (&'a [f32; 64], &'a [u8; 64], &'a [u8; 64], &'a mut Vec<u32>);

/// Runs every operation and appends the bits of every result.
#[inline(always)]
unsafe fn everything<S: Simd>(operands: Operands<'_>) {
    let (x, u, s, out) = operands;
    // SAFETY: the arrays are large enough for every read; the ISA is available.
    unsafe {
        let mut bits = |v: S::F| {
            let mut lanes = [0.0_f32; LANES];
            S::store(lanes.as_mut_ptr(), v);
            out.extend(lanes.map(f32::to_bits));
        };
        let (a, b, c) = (S::load(x.as_ptr()), S::load(x.as_ptr().add(16)), S::load(x.as_ptr().add(32)));
        bits(S::add(a, b));
        bits(S::sub(a, b));
        bits(S::mul(a, b));
        bits(S::div(a, b));
        bits(S::max(a, b));
        bits(S::min(a, b));
        bits(S::abs(a));
        bits(S::round(a));
        bits(S::fma(a, b, c));
        bits(S::exp2(S::mul(a, S::splat(30.0))));
        for (lo, hi) in [(0, 16), (0, 0), (3, 11), (7, 16), (9, 9)] {
            bits(S::mask_range(a, lo, hi));
        }
        bits(S::splat(S::reduce_add(a)));
        bits(S::splat(S::reduce_max(a)));
        let sixteen: [S::F; LANES] = std::array::from_fn(|i| S::load(x.as_ptr().add(3 * i)));
        bits(S::maxima(sixteen));
        bits(S::totals(sixteen.map(|v| S::round(v))));
        let s_first = s[0];
        let (u, w) = (S::load_b(u.as_ptr()), S::load_b(s.as_ptr()));
        bits(S::to_f(S::dot(S::isplat(7), u, w)));
        bits(S::to_f(S::dot(S::isplat(-9), u, S::splat_b(s.as_ptr().add(5)))));
        bits(S::to_f(S::dot_low(S::isplat(3), S::low_nibbles(u), w)));
        bits(S::to_f(S::dot_low(S::isplat(3), S::high_nibbles(u), w)));
        let (counts, shifts) =
            (S::dot(S::isplat(0), u, S::splat_b([1; 4].as_ptr())), S::isplat(-(i32::from(s_first))));
        let mut lanes = [0_i32; LANES];
        S::store_i(lanes.as_mut_ptr(), S::mul_add_i16(counts, shifts, S::isplat(77)));
        bits(S::to_f(S::load_i(lanes.as_ptr())));
        bits(S::to_f(S::dot(S::isplat_two(x.as_ptr().cast()), u, w)));
        let (mut shifted, shift) = ([0_i8; 64], S::splat(9.0));
        let codes = [S::round(S::mul(a, S::splat(20.0))), S::round(S::mul(b, S::splat(-20.0)))];
        S::store_shifted(shifted.as_mut_ptr(), codes, shift);
        let ones = S::splat_b([1; 4].as_ptr());
        S::store_i(lanes.as_mut_ptr(), S::dot(S::dot(S::isplat(0), u, ones), u, ones));
        let mut all = S::start_shifted(lanes.as_ptr(), 9, -77);
        for quad in [7, 2] {
            all = S::dot_shifted(all, u, S::splat_shifted(shifted.as_ptr(), quad));
        }
        bits(S::to_f(all));
        bits(S::power(a));
        let mut words = [0_i16; 64];
        S::store_words(words.as_mut_ptr(), S::mul(a, S::splat(900.0)), S::mul(b, S::splat(-900.0)));
        S::store_words(words.as_mut_ptr().add(32), b, S::mul(c, S::splat(5000.0)));
        let [v, w] = [0, 32].map(|i| S::load_b(words.as_ptr().add(i).cast()));
        bits(S::to_f(S::dot_words(S::isplat(-5), v, w)));
        bits(S::to_f(S::dot_words(S::isplat(6), S::mul_words(w, v), v)));
        let small = |v: S::B| S::dot(S::isplat(0), S::splat_b([1; 4].as_ptr()), v);
        bits(S::to_f(S::dot_words(S::isplat(0), S::words(small(w), small(v)), S::splat_b([1, 0, 2, 0].as_ptr()))));
        let mut halves = [7_i8; 192];
        let [v, w] = [[a, b], [c, a]].map(|v| v.map(|v| S::mul(v, S::splat(20.0))));
        S::store_half(halves.as_mut_ptr(), v, 0);
        S::store_half(halves.as_mut_ptr().add(64), w, 1);
        S::store_pair(halves.as_mut_ptr().add(128), v, w);
        for (quad, half) in [(128, 0), (136, 1), (184, 1)] {
            bits(S::to_f(S::dot(S::isplat(0), u, S::splat_quad(halves.as_ptr().add(quad).cast(), half))));
        }
        if S::PIECE == 2 {
            // As others lie.
            for quad in halves.as_chunks_mut::<8>().0 {
                let [a, b, c, d, e, f, g, h] = *quad;
                *quad = [a, b, e, f, c, d, g, h];
            }
        }
        halves.as_chunks::<LANES>().0.iter().for_each(|bytes| bits(S::load(bytes.map(f32::from).as_ptr())));
        let mut apart = [7_u16; 64];
        S::store_bf16_apart(apart.as_mut_ptr(), a, false);
        S::store_bf16_apart(apart.as_mut_ptr().add(32), b, true);
        apart.chunks_exact(LANES).for_each(|words| bits(S::load_bf16(words.as_ptr())));
        let mut words = [0_u16; 32];
        S::store_bf16(words.as_mut_ptr(), a);
        S::store_bf16(words.as_mut_ptr().add(16), b);
        bits(S::load_bf16(words.as_ptr()));
        bits(S::load_f16(words.as_ptr()));
        let mut bytes = [0_i8; 16];
        S::store_i8(bytes.as_mut_ptr(), S::mul(a, S::splat(20.0)));
        bits(S::load(bytes.map(f32::from).as_ptr()));
        let mut bytes = [0_u8; 16];
        S::store_u8(bytes.as_mut_ptr(), S::mul(S::abs(a), S::splat(50.0)));
        bits(S::load(bytes.map(f32::from).as_ptr()));
    }
}

#[test]
fn every_isa_gives_the_portable_bits() {
    let mut numbers = Numbers(1);
    for _ in 0..500 {
        let x: [f32; 64] = std::array::from_fn(|_| numbers.float());
        let u: [u8; 64] = std::array::from_fn(|_| numbers.next() as u8);
        let s: [u8; 64] = std::array::from_fn(|_| numbers.next() as u8);
        let mut expected = Vec::new();
        // SAFETY: the portable operations need nothing.
        unsafe { everything::<Portable>((&x, &u, &s, &mut expected)) };
        for isa in available() {
            let mut given = Vec::new();
            let operands: Operands<'_> = (&x, &u, &s, &mut given);
            // SAFETY: only available ISAs are tried.
            unsafe { dispatch!(isa, fn everything(operands: Operands<'_>)) };
            assert_eq!(given, expected, "{isa:?}");
        }
    }
}

/// Products of bfloat16: with a vector's own, and with pairs that lanes share, kept by the vector and one by one.
#[inline(always)]
unsafe fn bf16_dot<S: Simd>(a: &[u16; 32], b: &[u16; 32], out: &mut [f32; LANES]) {
    // SAFETY: sizes fit, the ISA is available.
    unsafe {
        let wide =
            |first: usize| std::array::from_fn::<f32, LANES, _>(|i| half::bf16::from_bits(b[first + i]).to_f32());
        let mut shared = [S::Rounded::default(); 2 * LANES];
        S::store_rounded(shared.as_mut_ptr(), S::load(wide(0).as_ptr()));
        S::store_rounded(shared.as_mut_ptr().add(LANES), S::load(wide(LANES).as_ptr()));
        let a = S::pairs(S::load_b(a.as_ptr().cast()));
        let mut acc = S::dot_pairs(S::load(out.as_ptr()), a, S::pairs(S::load_b(b.as_ptr().cast())));
        for (i, &bits) in b.iter().enumerate().step_by(2) {
            acc = S::dot_pairs(acc, a, S::splat_pair(shared.as_ptr().add(i)));
            let pair = [S::rounded(bits), S::rounded(b[i + 1])];
            acc = S::dot_pairs(acc, a, S::splat_pair(pair.as_ptr()));
        }
        S::store(out.as_mut_ptr(), acc);
    }
}

#[test]
fn bf16_dots_agree() {
    let mut numbers = Numbers(2);
    for _ in 0..2000 {
        let brain = |x: f32| half::bf16::from_f32(x).to_bits();
        let a: [u16; 32] = std::array::from_fn(|_| brain(numbers.float()));
        let b: [u16; 32] = std::array::from_fn(|_| brain(numbers.float()));
        let acc: [f32; LANES] = std::array::from_fn(|_| numbers.float());
        let mut expected = acc;
        // SAFETY: the portable operations need nothing.
        unsafe { bf16_dot::<Portable>(&a, &b, &mut expected) };
        for isa in available() {
            let mut given = acc;
            let (a, b, out) = (&a, &b, &mut given);
            // SAFETY: only available ISAs are tried.
            unsafe { dispatch!(isa, fn bf16_dot(a: &[u16; 32], b: &[u16; 32], out: &mut [f32; LANES])) };
            assert_eq!(given.map(f32::to_bits), expected.map(f32::to_bits), "{isa:?}");
        }
    }
}

#[test]
fn exp2_is_accurate() {
    let mut worst = 0.0_f64;
    for i in -126_000..126_000 {
        let x = i as f32 / 1000.0;
        // SAFETY: the portable operations need nothing.
        let y = f64::from(unsafe { Portable::exp2(Portable::splat(x)) }[0]);
        worst = worst.max((y / f64::from(x).exp2() - 1.0).abs());
    }
    assert!(worst < 2e-7, "relative error {worst}");
    // SAFETY: as above.
    unsafe {
        assert_eq!(Portable::exp2(Portable::splat(0.0))[0], 1.0);
        assert_eq!(Portable::exp2(Portable::splat(f32::NEG_INFINITY))[0], 0.0);
    }
}
