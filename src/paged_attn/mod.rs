//! One decode step of attention: one query row a sequence over its slabs, in whatever formats they are.
//!
//! Query head `h * G + g` reads kv head `h` (G from 1 to 16). Slabs come through the page table and then from
//! the f16 ring ([`crate::pages::HeadView`]); holes are skipped as if their tokens did not exist, and a head
//! without tokens gives zeros and a log-sum-exp of minus infinity.

mod cpu;
mod halves;
mod keys;
mod oracle;
pub(crate) mod slabs;
mod task;
mod values;

pub(crate) use cpu::{MAX_GROUP, check_head};
pub use cpu::{Scratch, cpu};
pub use oracle::oracle;
pub(crate) use oracle::{Keys, attend};

/// Which of the tokens held a query may see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mask {
    /// Only the newest so many tokens, the query's own included; `None` = all.
    pub sliding_window: Option<usize>,
}

impl Mask {
    /// First visible token of a query that sees tokens before `end`.
    pub const fn first(self, end: usize) -> usize {
        match self.sliding_window {
            Some(w) => end.saturating_sub(w),
            None => 0,
        }
    }
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernels on `stream`: one, and a second that merges where there are several splits.
    kvw_paged_attn, kvw_paged_attn_params, "paged_attn"
}
