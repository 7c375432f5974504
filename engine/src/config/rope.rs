//! Constants of the rotary embedding.

pub use kvwarp::rope_select::Scaling;
use kvwarp::rope_select::inv_freq;

use crate::error::{Error, Result};

/// Which two elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pairing {
    /// Elements 2j and 2j+1: GGUF files of the llama architecture.
    Interleaved,
    /// Elements j and j+d/2: safetensors, and GGUF files of qwen2.
    HalfSplit,
}

/// Rotary embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of frequencies.
    pub theta: f32,
    /// Element pairing.
    pub pairing: Pairing,
    /// Context stretching.
    pub scaling: Scaling,
    /// Divisor of each pair's frequency, d/2 of them: GGUF's `rope_freqs.weight`.
    pub factors: Option<Vec<f32>>,
}

impl Rope {
    /// Radians a token for each of the `head_dim / 2` pairs, scaling applied.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let mut all = inv_freq(f64::from(self.theta), head_dim, self.scaling);
        for (frequency, factor) in all.iter_mut().zip(self.factors.iter().flatten()) {
            *frequency /= factor;
        }
        all
    }

    pub(super) fn check(&self, head_dim: usize) -> Result<()> {
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return Err(Error::Config(format!("rope base {} is not above 1", self.theta)));
        }
        match &self.factors {
            Some(f) if f.len() != head_dim / 2 => {
                let (found, need) = (f.len(), head_dim / 2);
                return Err(Error::Config(format!(
                    "rope_freqs.weight has {found} elements, expected {need}"
                )));
            }
            Some(f) if !f.iter().all(|x| x.is_finite() && *x > 0.0) => {
                return Err(Error::Config(
                    "rope_freqs.weight holds a factor that is not above 0".into(),
                ));
            }
            _ => {}
        }
        check_scaling(self.scaling)
    }
}

fn check_scaling(scaling: Scaling) -> Result<()> {
    let valid = |x: f64| x.is_finite() && x > 0.0;
    match scaling {
        Scaling::Linear { factor } | Scaling::Llama3 { factor, .. } if !valid(factor) => Err(
            Error::Config(format!("rope scaling `factor` is {factor}, expected a number above 0")),
        ),
        Scaling::Llama3 { low_freq_factor: low, high_freq_factor: high, .. }
            if !(valid(low) && valid(high) && low < high) =>
        {
            let found = format!("low_freq_factor {low} and high_freq_factor {high}");
            Err(Error::Config(format!("rope scaling {found}: expected 0 < low < high")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.1: theta 500000, d 128, factor 8, low 1, high 4, trained on 8192 tokens.
    #[test]
    fn llama3_keeps_high_divides_low_and_ramps_between() {
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let mut rope = Rope { theta: 5e5, pairing: Pairing::HalfSplit, scaling, factors: None };
        let scaled = rope.frequencies(128);
        rope.scaling = Scaling::None;
        let plain = rope.frequencies(128);
        assert_eq!(scaled[0], 1.0);
        assert_eq!(scaled[28], plain[28], "wavelength 1956 tokens is below 8192 / 4");
        assert_eq!(scaled[63], plain[63] / 8.0);
        // Pair 32: 500000^-0.5 = 0.0014142136, 1.8438 turns in 8192 tokens, kept (1.8438 - 1) / 3 =
        // 0.28127.
        let expected = 0.001_414_213_6 * (0.281_27 + 0.718_73 / 8.0);
        assert!((f64::from(scaled[32]) / expected - 1.0).abs() < 1e-4, "{} {expected}", scaled[32]);
    }

    #[test]
    fn linear_and_factors_divide() {
        let scaling = Scaling::Linear { factor: 4.0 };
        let factors = Some((1..=32).map(|n| n as f32).collect());
        let rope = Rope { theta: 1e4, pairing: Pairing::Interleaved, scaling, factors };
        let f = rope.frequencies(64);
        assert_eq!(f.len(), 32);
        assert_eq!(f[0], 0.25);
        // Pair 16: 10000^-0.5 = 0.01, over 4, over 17.
        assert!((f[16] - 0.01 / 4.0 / 17.0).abs() < 1e-9);
    }
}
