//! Which tokens stay: scores pooled over neighbours and summed over heads, and the best of them by exact selection.
//!
//! One order holds everywhere: the larger score first, ties to the lower index, NaN last. Scores are f32, because in
//! fewer bits most of them tie. Selected indices come in ascending order, so that what is gathered by them keeps its
//! order.

mod cpu;
mod oracle;

pub use cpu::{above, kth, pool, top_k};
pub use oracle::{oracle_pool, oracle_top_k};

/// How neighbours share a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// The mean of a window; what lies outside counts as 0 and is divided by too.
    Avg,
    /// The largest of a window; what lies outside is ignored, and so is NaN unless there is nothing else.
    Max,
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_token_select, kvw_token_select_params, "token_select"
}
