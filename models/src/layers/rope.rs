//! Inverse frequencies of the rotary embedding under every context-extension scheme.

use crate::config::{RopeConfig, RopeScaling};
use rill_kernels::Rope;
use std::f32::consts::PI;

/// The rotation a configuration asks for, in a context of up to `context_len` tokens.
///
/// One rotation serves a model for as long as it runs: keys in the cache stay what they are. So a scheme that changes
/// with the length of the text is settled by the longest text there can be. That makes dynamic NTK scaling plain
/// rotation within the context the model was made for, and lets LongRoPE take its long factors exactly where the
/// context is longer than the original one.
pub(crate) fn rope(config: &RopeConfig, context_len: usize) -> Rope {
    let dim = config.dimension_count as f32;
    let plain = |i: usize| config.base.powf(-2.0 * i as f32 / dim);
    let pairs = 0..config.dimension_count / 2;
    let mut factor = 1.0;
    let inverse_frequencies = match &config.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => pairs.map(plain).collect(),
        RopeScaling::Linear { factor } => pairs.map(|i| plain(i) / factor).collect(),
        RopeScaling::FreqFactors(factors) => pairs.map(|i| plain(i) / factors[i]).collect(),
        // Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let context = *original_context as f32;
            pairs
                .map(|i| {
                    let frequency = plain(i);
                    let wavelength = 2.0 * PI / frequency;
                    if wavelength < context / high_freq_factor {
                        frequency
                    } else if wavelength > context / low_freq_factor {
                        frequency / factor
                    } else {
                        let kept = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - kept) * frequency / factor + kept * frequency
                    }
                })
                .collect()
        }
        // YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over dimensions between kept and interpolated.
        RopeScaling::Yarn { factor: stretch, original_context, attention_factor, beta_fast, beta_slow } => {
            let dimension = |rotations: f32| {
                dim * (*original_context as f32 / (rotations * 2.0 * PI)).ln() / (2.0 * config.base.ln())
            };
            let low = dimension(*beta_fast).floor().max(0.0);
            let high = dimension(*beta_slow).ceil().min(dim - 1.0);
            let width = if high > low { high - low } else { 0.001 };
            factor =
                attention_factor.unwrap_or_else(|| if *stretch > 1.0 { 0.1 * stretch.ln() + 1.0 } else { 1.0 });
            pairs
                .map(|i| {
                    let interpolated = ((i as f32 - low) / width).clamp(0.0, 1.0);
                    plain(i) / stretch * interpolated + plain(i) * (1.0 - interpolated)
                })
                .collect()
        }
        // LongRoPE (Ding et al. 2024, arXiv:2402.13753).
        RopeScaling::LongRope { short_factors, long_factors, original_context, attention_factor, stretch } => {
            factor = attention_factor.unwrap_or_else(|| {
                if *stretch > 1.0 { (1.0 + stretch.ln() / (*original_context as f32).ln()).sqrt() } else { 1.0 }
            });
            let factors = if context_len > *original_context { long_factors } else { short_factors };
            pairs.map(|i| plain(i) / factors[i]).collect()
        }
    };
    Rope { inverse_frequencies, factor }
}
