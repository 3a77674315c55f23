//! The counter-based random number generator: a number is a pure function of (seed, counter).

/// 32-bit multiplier and key-schedule constants of Philox4x32.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
        }
        let wide = |lane: usize| u64::from(MULTIPLIERS[lane / 2]) * u64::from(counter[lane]);
        let (first, second) = (wide(0), wide(2));
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
    }
    counter
}

/// Uniform in [0, 1), 53 bits: the draw for the generated token number `index` of a request with this `seed`.
pub(crate) fn uniform(seed: u64, index: u64) -> f64 {
    let [low, high, ..] =
        philox4x32([index as u32, (index >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(high) << 32 | u64::from(low);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the authors' Random123 library.
    #[test]
    fn known_answers() {
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32(counter, key), want);
        }
    }

    #[test]
    fn draws_are_uniform_enough() {
        let n = 20_000;
        for seed in [0, 1, u64::MAX] {
            let draws: Vec<f64> = (0..n).map(|i| uniform(seed, i)).collect();
            assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
            let mean = draws.iter().sum::<f64>() / n as f64;
            assert!((mean - 0.5).abs() < 0.01, "seed {seed}: mean {mean}");
        }
    }
}
