//! Scores of tokens without attention, and representatives of those that are not kept.
//!
//! - [`lag`]: LagKV (arXiv:2504.04704). A partition of `lag` tokens is scored against the one after it: each channel is
//!   scaled by its smallest and largest element there, a token's deviation is the standard deviation (unbiased) over its
//!   scaled channels, and its score the softmax of deviations over the partition, of K and of V apart, added up.
//!   Channels that are constant in the reference take no part. NaN takes no part in a channel's extremes, and a token
//!   that has one, or lies in a hole, scores NaN and leaves the others' scores alone.
//! - [`key_norms`]: the lengths of keys.
//! - [`bits`] and [`representatives`]: KVCrush (arXiv:2503.00022). A token's bits say which heads would keep it; those
//!   that are evicted are represented by a few, evenly spaced in the order of their distance to an anchor.
//!
//! Keys are scored as they lie in the cache: rotated.

mod channels;
mod crush;
mod lag;
mod norms;
pub mod oracle;

pub use crush::{Anchor, bits, representatives};
pub use lag::{lag, lag_at};
pub use norms::{key_norms, key_norms_at};

use crate::error::{Error, Result};

const OP: &str = "sim_evict";

fn unsupported<T>(field: &'static str, got: usize, supported: &'static str) -> Result<T> {
    Err(Error::Unsupported { op: OP, field, got: got.to_string(), supported })
}

fn check_len(need: usize, got: usize) -> Result<()> {
    if got == need { Ok(()) } else { Err(Error::Len { op: OP, buffer: "out", need, got }) }
}

/// Most tokens a partition.
pub const MAX_LAG: usize = 1024;

/// Which tokens LagKV scores, against what.
#[derive(Debug, Clone, Copy)]
pub struct Lag {
    /// First slot that is scored.
    pub first: usize,
    /// Tokens a partition: a multiple of 16, at most [`MAX_LAG`].
    pub lag: usize,
    /// Partitions that are scored; one more is there.
    pub partitions: usize,
    /// Of V's softmax; K's has weight 1.
    pub v_weight: f32,
    /// Where the extremes of K's channels come from.
    pub reference: Reference,
}

/// Where the extremes of K's channels in a reference partition come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reference {
    /// Its elements.
    #[default]
    Elements,
    /// The scales and minima of groups that lie in it whole: what their codes can say, from the smallest minimum to the
    /// largest minimum plus range. Elements where there are none.
    Metadata,
}

/// Tokens that LagKV leaves of a prompt of `tokens`: the first `sink` stay, then `keep_of_lag` of each partition of `lag`
/// but the last, which stays whole with what is after it. All of a prompt that has no two partitions.
pub const fn kept(tokens: usize, sink: usize, lag: usize, keep_of_lag: usize) -> usize {
    if lag == 0 || tokens < sink + 2 * lag {
        return tokens;
    }
    let scored = (tokens - sink) / lag - 1;
    tokens - scored * lag.saturating_sub(keep_of_lag)
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_sim_evict, kvw_sim_evict_params, "sim_evict"
}
