//! The next token: a repetition penalty, then greedy, or top-k, then top-p, then min-p, then temperature, then a seeded draw.
//!
//! Truncations look at the untempered probabilities, temperature comes last (llama.cpp's order).
//!
//! Every path gives the same token for the same logits, because nothing depends on an order of summation:
//! a token's weight is the integer `floor(e^(logit - max) * 2^40)`, sums and thresholds are integers, and the
//! ranking is by (logit descending, id ascending). NaN ranks last and weighs nothing.
//! - A penalised logit is the f32 nearest to `x / penalty`, or `x * penalty` where `x` is not above 0: once
//!   for each distinct id among the recent tokens.
//! - top-k keeps the first `k` in rank.
//! - top-p keeps the shortest run of ranks whose weights sum to at least `floor(total * top_p)`, `top_p` in
//!   units of 2^-32 and `total` that of the tokens still kept.
//! - min-p keeps weights of at least `floor(min_p * 2^40)`, the largest weight being 2^40.
//! - Weights are taken again with `(logit - max) / temperature`; with `total` their sum over kept tokens and
//!   `r` 64 random bits, the drawn token is the first in id order at which the running sum exceeds
//!   `floor(r * total / 2^64)`.

mod cpu;
mod oracle;

pub use cpu::cpu;
pub use oracle::oracle;

use crate::error::{Error, Result};
use std::borrow::Cow;

/// Most logits a row, so that sums of weights fit 64 bits.
pub const MAX_VOCAB: usize = 1 << 22;

/// Most recent tokens that a penalty looks at.
pub const MAX_RECENT: usize = 256;

/// How to choose a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy: the largest logit, ties to the lowest id.
    pub temperature: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most probable tokens that together have this probability, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens of at least this fraction of the most probable one's probability, in [0, 1); 0 keeps all.
    pub min_p: f32,
    /// Divides the positive logits of recent tokens and multiplies the others, above 0; 1 is off
    /// (Keskar et al., arXiv:1909.05858).
    pub repeat_penalty: f32,
}

impl Sampling {
    /// The most probable token.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0 };

    /// Whether every field is in its range.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the field.
    pub fn check(&self) -> Result<()> {
        let bad = |field, got: f32, supported| {
            Err(Error::Unsupported { op: "sample", field, got: got.to_string(), supported })
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return bad("temperature", self.temperature, "0 (greedy) or a positive number");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", self.top_p, "above 0, up to 1 (off)");
        }
        if !(self.min_p >= 0.0 && self.min_p < 1.0) {
            return bad("min_p", self.min_p, "0 (off) up to, but not, 1");
        }
        if !(self.repeat_penalty > 0.0 && self.repeat_penalty.is_finite()) {
            return bad("repeat_penalty", self.repeat_penalty, "a positive number; 1 is off");
        }
        Ok(())
    }
}

/// 64 random bits for draw number `step`: output `step + 1` of SplitMix64 started at `seed`.
pub const fn draw(seed: u64, step: i32) -> u64 {
    let count = (step as u64).wrapping_add(1);
    let mut z = seed.wrapping_add(count.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn check(logits: usize, sampling: &Sampling, recent: &[u32]) -> Result<()> {
    sampling.check()?;
    if recent.len() > MAX_RECENT {
        let (got, supported) = (recent.len().to_string(), "up to 256 tokens");
        return Err(Error::Unsupported { op: "sample", field: "recent", got, supported });
    }
    if logits == 0 || logits > MAX_VOCAB {
        let (got, supported) = (logits.to_string(), "1 to 2^22 logits");
        return Err(Error::Unsupported { op: "sample", field: "vocab", got, supported });
    }
    Ok(())
}

/// The logits after the penalty on `recent`; ids outside the vocabulary are ignored.
fn penalised<'a>(logits: &'a [f32], sampling: &Sampling, recent: &[u32]) -> Cow<'a, [f32]> {
    if sampling.repeat_penalty == 1.0 || recent.is_empty() {
        return Cow::Borrowed(logits);
    }
    let mut out = logits.to_vec();
    for &id in recent {
        if let Some(&x) = logits.get(id as usize) {
            let penalty = sampling.repeat_penalty;
            out[id as usize] = if x > 0.0 { x / penalty } else { x * penalty };
        }
    }
    Cow::Owned(out)
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_sample, kvw_sample_params, "sample"
}
