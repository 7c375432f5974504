//! One decode step of attention: the newest token of each sequence, or its newest 16 at most, over its slabs, in
//! whatever formats they are.
//!
//! Query head `h * G + g` reads kv head `h` (G from 1 to 16). Slabs come through the page table and then from
//! the f16 ring ([`crate::pages::HeadView`]); holes are skipped as if their tokens did not exist, and a row
//! that sees no tokens gives zeros and a log-sum-exp of minus infinity.

mod cpu;
mod halves;
mod keys;
mod oracle;
pub(crate) mod plain;
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

/// How a score comes about: `q . k` of a rotated query, times `scale` and a token's norm, softened, masked; and
/// what else takes part in the softmax. The default is plain attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scores<'a> {
    /// `[D, D]` row major, R: a query is replaced by R q.
    pub rotation: Option<&'a [f32]>,
    /// 0 = `1 / sqrt(D)`.
    pub scale: f32,
    /// `[H, N]` for slots below N: multiplies the scores of a token.
    pub k_norm: Option<&'a [f32]>,
    /// A score x becomes `softcap * tanh(x / softcap)`; 0 = off.
    pub softcap: f32,
    /// Which tokens a row sees of those up to its own.
    pub mask: Mask,
    /// `[H * G]`: the score of a token without value that every row sees.
    pub sinks: Option<&'a [f32]>,
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_paged_attn, kvw_paged_attn_params, "paged_attn"
}
