//! Choosing tokens one after another: the kernel's rules, with a draw number that advances.

use kvwarp::Result;
use kvwarp::sample::{self, Sampling};

/// A stream of choices fixed by its seed.
pub struct Sampler {
    sampling: Sampling,
    seed: u64,
    step: i32,
}

impl Sampler {
    /// Starts with draw 0.
    pub fn new(sampling: Sampling, seed: u64) -> Self {
        Self { sampling, seed, step: 0 }
    }

    /// The next token from its logits `[vocab]`.
    ///
    /// # Errors
    /// [`kvwarp::Error::Unsupported`] when a field of the sampling is out of range.
    pub fn pick(&mut self, logits: &[f32]) -> Result<u32> {
        let token = sample::cpu(logits, &self.sampling, sample::draw(self.seed, self.step));
        self.step = self.step.wrapping_add(1);
        token
    }
}
