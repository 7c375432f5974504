//! Attention of the newest rows of sequences, in the types of the C ABI.

use super::memory::{Halves, Shared};
use super::team::team;
use super::{Checked, Refusal};
use crate::paged_attn::Mask;
use crate::pages::HeadView;
use crate::prefill_attn::{self, LseRows, Scratch};
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Queries and where their results go.
pub(super) struct Rows<'a> {
    /// `[T, H * G, D]`
    pub q: Halves<'a>,
    pub out: Halves<'a>,
    /// Of the newest rows of each sequence, `[S, lse_rows, H * G]`.
    pub lse: Option<Shared<'a, f32>>,
    pub lse_rows: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub mask: Mask,
}

/// `sliding_window` of params, where 0 is all.
pub(super) fn mask(sliding_window: i32) -> Mask {
    Mask { sliding_window: (sliding_window > 0).then_some(sliding_window as usize) }
}

impl Rows<'_> {
    /// Rows `tokens` of q, the newest ones of sequence `seq`; `heads` `[S, H]`.
    ///
    /// # Safety
    /// The rows are there, and those of the results are this call's alone.
    pub(super) unsafe fn attend(
        &self,
        heads: &[HeadView<'_>],
        seq: usize,
        tokens: Range<usize>,
    ) -> Checked<()> {
        let of_seq = &heads[seq * self.kv_heads..][..self.kv_heads];
        let n = tokens.len();
        if of_seq.iter().all(|head| head.len >= n) {
            // SAFETY: the caller's promise.
            return unsafe { self.some(of_seq, seq, 0, tokens, n) };
        }
        for (h, head) in of_seq.iter().enumerate() {
            // SAFETY: as above; heads have results of their own.
            unsafe {
                self.some(std::slice::from_ref(head), seq, h, tokens.clone(), head.len.min(n))?
            };
        }
        Ok(())
    }

    /// Of some heads from `first` on, all of which hold at least `n` of the tokens: rows before those see nothing.
    ///
    /// # Safety
    /// As [`Rows::attend`].
    unsafe fn some(
        &self,
        heads: &[HeadView<'_>],
        seq: usize,
        first: usize,
        tokens: Range<usize>,
        n: usize,
    ) -> Checked<()> {
        let (d, total) = (self.head_dim, tokens.len());
        let group = self.q_heads / self.kv_heads;
        let (columns, column) = (heads.len() * group, first * group);
        let at = |row: usize| ((tokens.start + row) * self.q_heads + column) * d;
        let (mut q, mut out) = (vec![0.0; n * columns * d], vec![0.0; total * columns * d]);
        let mut lse = vec![f32::NEG_INFINITY; total * columns];
        for (row, q) in (total - n..).zip(q.chunks_exact_mut(columns * d)) {
            // SAFETY: the caller's promise.
            unsafe { self.q.get(at(row), q) };
        }
        let rows = LseRows { out: &mut lse[(total - n) * columns..], rows: n };
        let (out_rows, lse_rows) = (&mut out[(total - n) * columns * d..], self.lse.map(|_| rows));
        SCRATCH.with_borrow_mut(|scratch| {
            prefill_attn::cpu(
                team(),
                &q,
                n,
                heads,
                self.scale,
                self.mask,
                out_rows,
                lse_rows,
                scratch,
            )
        })?;
        for (row, out) in out.chunks_exact(columns * d).enumerate() {
            // SAFETY: as above.
            unsafe { self.out.put(at(row), out) };
        }
        let Some(to) = self.lse else { return Ok(()) };
        let kept = self.lse_rows.min(total);
        for (i, row) in lse.chunks_exact(columns).skip(total - kept).enumerate() {
            let at = (seq * self.lse_rows + self.lse_rows - kept + i) * self.q_heads + column;
            // SAFETY: as above.
            unsafe { to.take(at, columns) }.copy_from_slice(row);
        }
        Ok(())
    }
}

/// First rows of sequences, as `cu_tokens` has them, within `tokens` rows.
pub(super) fn check_starts(starts: &[i32], tokens: i32) -> Checked<()> {
    let inside = |pair: &[i32]| 0 <= pair[0] && pair[0] <= pair[1] && pair[1] <= tokens;
    if starts.windows(2).all(inside) { Ok(()) } else { Err(Refusal::shape("cu_tokens")) }
}
