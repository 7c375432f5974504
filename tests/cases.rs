//! Inputs and comparisons that every family uses.

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
}

/// Same NaN and infinity positions, then each element within `abs + rel * |want|`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f64], abs: f64, rel: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        if !w.is_finite() || !g.is_finite() {
            let same = w.is_nan() == g.is_nan() && (w.is_nan() || w == f64::from(g));
            assert!(same, "{what}[{i}] = {g}, want {w}");
            continue;
        }
        let off = (f64::from(g) - w).abs();
        assert!(off <= abs + rel * w.abs(), "{what}[{i}] = {g}, want {w}, off by {off:.2e}");
    }
}
