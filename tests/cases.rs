//! Inputs and comparisons that every family uses.

use half::f16;

/// SplitMix64: the same inputs on every machine.
pub struct Noise(pub u64);

impl Noise {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// About normal, with an outlier of twenty times the size once in a hundred.
    pub fn value(&mut self) -> f32 {
        let x = self.unit() + self.unit() + self.unit();
        if self.below(100) == 0 { 20.0 * x } else { x }
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    pub fn halves(&mut self, n: usize) -> Vec<f16> {
        (0..n).map(|_| f16::from_f32(self.value())).collect()
    }
}

/// Same NaN and infinity positions, then each element within `abs + rel * |want|`.
pub fn close(what: &str, got: &[f32], want: &[f64], abs: f64, rel: f64) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{what}: {} elements, want {}", got.len(), want.len()));
    }
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let special = !w.is_finite() || !g.is_finite();
        let same = w.is_nan() == g.is_nan() && (w.is_nan() || w == f64::from(g));
        let off = (f64::from(g) - w).abs();
        if if special { !same } else { off > abs + rel * w.abs() } {
            return Err(format!("{what}[{i}] = {g}, want {w}, off by {off:.2e}"));
        }
    }
    Ok(())
}

#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f64], abs: f64, rel: f64) {
    close(what, got, want, abs, rel).unwrap_or_else(|e| panic!("{e}"));
}

pub fn widen(x: &[f16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

pub fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

/// A device address that is never followed.
pub fn somewhere<T>() -> *mut T {
    4096 as *mut T
}

/// Length of the difference over the length of `want`; 0 where both are zero.
pub fn relative_l2(got: &[f32], want: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(&g, w)| square(f64::from(g) - w)).sum();
    let whole: f64 = want.iter().map(|&w| square(w)).sum();
    if off == 0.0 { 0.0 } else { (off / whole).sqrt() }
}
