//! Estimates with their 95 % confidence intervals.
//!
//! Shares have Wilson's interval, which stays within 0 and 1 and means something at 0 of n; means have Student's, over
//! samples that are independent, such as windows of a text: tokens of one window are not.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, Normal, StudentsT};

/// Probability that an interval covers what it estimates.
pub const CONFIDENCE: f64 = 0.95;

/// A share of trials.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    /// Trials that succeeded.
    pub hits: usize,
    /// Trials.
    pub n: usize,
    /// `hits / n`; NaN without trials.
    pub share: f64,
    /// Wilson's interval; 0 to 1 without trials.
    pub low: f64,
    /// See [`Share::low`].
    pub high: f64,
}

impl Share {
    /// Of `n` trials.
    pub fn new(hits: usize, n: usize) -> Self {
        let share = hits as f64 / n as f64;
        let (low, high) = if n == 0 { (0.0, 1.0) } else { wilson(share, n as f64) };
        Self { hits, n, share, low, high }
    }

    /// Of these trials.
    pub fn of(trials: impl Iterator<Item = bool>) -> Self {
        let (hits, n) = trials.fold((0, 0), |(hits, n), hit| (hits + usize::from(hit), n + 1));
        Self::new(hits, n)
    }
}

/// Wilson's score interval of a share `p` of `n` (Wilson, 1927).
fn wilson(p: f64, n: f64) -> (f64, f64) {
    let z = Normal::standard().inverse_cdf(f64::midpoint(CONFIDENCE, 1.0));
    let (middle, half) =
        (p + z * z / (2.0 * n), z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt());
    let scale = 1.0 + z * z / n;
    (((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0))
}

/// A mean of samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    /// Samples.
    pub n: usize,
    /// Their mean; NaN without samples.
    pub mean: f64,
    /// Student's interval; `None` of fewer than two samples.
    pub low: Option<f64>,
    /// See [`Mean::low`].
    pub high: Option<f64>,
}

impl Mean {
    /// Of independent samples.
    pub fn of(samples: &[f64]) -> Self {
        let n = samples.len();
        let mean = samples.iter().sum::<f64>() / n as f64;
        let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
        let freedom = n.saturating_sub(1) as f64;
        let half = StudentsT::new(0.0, 1.0, freedom).ok().map(|student| {
            let t = student.inverse_cdf(f64::midpoint(CONFIDENCE, 1.0));
            t * (squares / freedom / n as f64).sqrt()
        });
        Self { n, mean, low: half.map(|half| mean - half), high: half.map(|half| mean + half) }
    }
}

/// The middle one of some samples, the lower of two; NaN of none.
pub fn median(samples: impl IntoIterator<Item = f64>) -> f64 {
    let mut samples: Vec<_> = samples.into_iter().collect();
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}
