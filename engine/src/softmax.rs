//! Exponentials and sums over a logits row: in a fixed order, without libm, so equal on every machine.

/// e^x for x <= 0, to about 2 units in the last place; 0 below -87. Branch-free, so that loops over it vectorise.
pub(crate) fn exp_nonpositive(x: f32) -> f32 {
    /// Adding and subtracting it rounds to the nearest integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let exponent = shifted - ROUND;
    // ln 2 in two parts (Cody and Waite): the first has few bits, so its product with the exponent is exact.
    let r = clamped - exponent * 0.693_359_4 - exponent * -2.121_944_4e-4;
    // Minimax polynomial of Cephes' expf on [-ln 2 / 2, ln 2 / 2].
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_3e-1;
    p = p * r * r + r + 1.0;
    let biased = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127);
    let scale = f32::from_bits((biased as u32) << 23);
    if x < -87.0 { 0.0 } else { p * scale }
}

/// The largest value of a row and the lowest id that has it; `Err` tells why there is none to choose.
pub(crate) fn maximum(row: &[f32]) -> Result<(f32, u32), RowError> {
    const LANES: usize = 16;
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut nans = [0u32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let value = chunk[lane];
            nans[lane] += u32::from(value.is_nan());
            largest[lane] = if value > largest[lane] { value } else { largest[lane] };
        }
    }
    let max = largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    if nans.iter().any(|&count| count > 0) || rest.iter().any(|value| value.is_nan()) || max == f32::INFINITY {
        return Err(RowError::NotFinite);
    }
    if max == f32::NEG_INFINITY {
        return Err(RowError::AllMasked);
    }
    let id = row.iter().position(|&value| value == max).unwrap_or_default();
    Ok((max, id as u32))
}

/// Sum over `values` in a fixed order: eight partial sums, then their sum.
pub(crate) fn sum(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += f64::from(chunk[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(value)).sum::<f64>()
}

/// Natural logarithm of the sum of `e^(value - max)` over the row.
pub(crate) fn log_sum_exp_less(row: &[f32], max: f32) -> f64 {
    const BLOCK: usize = 256;
    let mut exponentials = [0f32; BLOCK];
    let mut total = 0f64;
    for block in row.chunks(BLOCK) {
        // First all exponentials, then their sum: each loop vectorises, together they would not.
        for (exponential, &value) in exponentials.iter_mut().zip(block) {
            *exponential = exp_nonpositive(value - max);
        }
        total += sum(&exponentials[..block.len()]);
    }
    total.ln()
}

/// No token can be chosen from a logits row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    #[error("the model produced logits that are not numbers or infinite")]
    NotFinite,
    #[error("every token is ruled out: all logits are minus infinity")]
    AllMasked,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_close_everywhere() {
        let mut worst = 0f64;
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp_nonpositive(x)) - want).abs() / want);
        }
        assert!(worst < 3e-7, "relative error {worst:e}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive(-88.0), 0.0);
    }

    #[test]
    fn the_lowest_id_wins_a_tie() {
        let mut row = vec![0.5f32; 100];
        row[37] = 2.0;
        row[71] = 2.0;
        assert_eq!(maximum(&row), Ok((2.0, 37)));
        assert_eq!(maximum(&[f32::NEG_INFINITY, -1.0]), Ok((-1.0, 1)));
    }

    #[test]
    fn rows_without_a_maximum() {
        for place in [0, 15, 16, 33] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut row = vec![0.0; 34];
                row[place] = bad;
                assert_eq!(maximum(&row), Err(RowError::NotFinite), "{bad} at {place}");
            }
        }
        assert_eq!(maximum(&[f32::NEG_INFINITY; 20]), Err(RowError::AllMasked));
        assert_eq!(maximum(&[]), Err(RowError::AllMasked));
    }

    #[test]
    fn probabilities_sum_to_one() {
        let row: Vec<f32> = (0..1003).map(|i| ((i * 7919) % 541) as f32 * 0.05 - 9.0).collect();
        let (max, _) = maximum(&row).unwrap();
        let log_sum = log_sum_exp_less(&row, max);
        let total: f64 = row.iter().map(|&v| (f64::from(v) - f64::from(max) - log_sum).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6, "{total}");
    }
}
