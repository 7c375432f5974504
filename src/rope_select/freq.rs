//! Frequencies of the pairs, and how models that were stretched to longer contexts change them.

use std::f64::consts::TAU;

/// How a model's frequencies differ from `theta^(-2 i / D)`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Scaling {
    /// Not at all.
    #[default]
    None,
    /// All divided by `factor` (position interpolation).
    Linear {
        /// How many times longer the context is, > 0.
        factor: f64,
    },
    /// Llama 3.1: long waves divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// Divisor of the long waves, > 0.
        factor: f64,
        /// Waves longer than `original_context / low_freq_factor` positions are long.
        low_freq_factor: f64,
        /// Waves shorter than `original_context / high_freq_factor` positions are short.
        high_freq_factor: f64,
        /// Positions that the model was first trained on.
        original_context: f64,
    },
}

impl Scaling {
    fn apply(self, freq: f64) -> f64 {
        match self {
            Scaling::None => freq,
            Scaling::Linear { factor } => freq / factor,
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let waves = original_context * freq / TAU;
                if waves < low_freq_factor {
                    freq / factor
                } else if waves > high_freq_factor {
                    freq
                } else {
                    let kept = (waves - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    kept * freq + (1.0 - kept) * freq / factor
                }
            }
        }
    }
}

/// Radians a position of each pair, `[d / 2]`: `theta^(-2 i / d)` with `scaling` applied, computed in f64.
pub fn inv_freq(theta: f64, d: usize, scaling: Scaling) -> Vec<f32> {
    let freq = |i: usize| theta.powf(-((2 * i) as f64) / d as f64);
    (0..d / 2).map(|i| scaling.apply(freq(i)) as f32).collect()
}
