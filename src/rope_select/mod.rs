//! Rotary position embedding of queries or keys. Every pair selected is plain RoPE.
//!
//! Pair `i` of a head, channels `(a, b)`, is turned by `angle = position * inv_freq[i]`, one f32 product:
//! `(a cos - b sin, a sin + b cos)`. Which channels form pair `i` is the model's [`Pairing`].

mod cpu;
mod elite;
mod freq;
mod oracle;

pub use cpu::{Angles, cpu};
pub use elite::Elite;
pub use freq::{Scaling, inv_freq};
pub use oracle::oracle;

use crate::error::{Error, Result};

/// Which channels of a head turn together. The discriminant is `KVW_ROPE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Pairing {
    /// Pair `i` is channels `(2 i, 2 i + 1)`: llama tensors of GGUF files.
    Interleaved = 0,
    /// Pair `i` is channels `(i, i + D / 2)`: Hugging Face, and qwen2 tensors of GGUF files.
    Half = 1,
}

impl Pairing {
    /// Channels of pair `i` of a head of `d` channels.
    pub const fn channels(self, i: usize, d: usize) -> (usize, usize) {
        match self {
            Pairing::Interleaved => (2 * i, 2 * i + 1),
            Pairing::Half => (i, i + d / 2),
        }
    }
}

/// Pairs that turn, where not all do (EliteKV, arXiv:2503.01586); the others stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection<'a> {
    /// `[kv_heads, each]`, below `D / 2`.
    pub pairs: &'a [u8],
    /// Pairs of a kv head, at least 1.
    pub each: usize,
}

/// `x` must hold one row of `heads * d` a position.
fn check(x: usize, heads: usize, d: usize, positions: usize, inv_freq: usize) -> Result<()> {
    let op = "rope_select";
    if inv_freq * 2 != d {
        return Err(Error::Len { op, buffer: "inv_freq", need: d / 2, got: inv_freq });
    }
    if x != heads * d * positions {
        return Err(Error::Len { op, buffer: "x", need: heads * d * positions, got: x });
    }
    Ok(())
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_rope_select, kvw_rope_select_params, "rope_select"
}
