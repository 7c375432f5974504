//! What attention gives to tokens: sums and maxima over the columns of `exp(scale q . k - lse)`.
//!
//! The `n` query rows are the newest `n` tokens of every head: row `i` of a head of `len` tokens is slot
//! `len - n + i` and sees the slots up to its own. A column is a slot; where a row does not see it, or it is a hole,
//! its share is 0. The log-sum-exps are an input, so that nothing is normalised twice: those that `prefill_attn` leaves
//! (SnapKV, FastKV arXiv:2502.01068: the sum over the last rows; H2O, PrefixKV arXiv:2412.03409: over all of them),
//! or those over a subset of slots that [`lse`] gives (KVzip, arXiv:2505.23416: the maximum).

mod cpu;
mod oracle;
mod subset;

pub use cpu::{Scratch, cpu};
pub use oracle::{oracle, oracle_lse};
pub use subset::lse;

/// How the shares of a column become its score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    /// Summed over rows, a score for each query head.
    Sum,
    /// The largest over rows and the query heads of a kv head, a score for each kv head.
    Max,
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_token_score, kvw_token_score_params, "token_score"
}
