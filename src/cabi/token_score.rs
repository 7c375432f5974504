//! `kvw_token_score_cpu`: sums and maxima of a head's columns, and log-sum-exps of its rows.

use super::cache::Views;
use super::memory::{Given, Halves, Shared, slice};
use super::rows::check_starts;
use super::team::team;
use super::{Checked, Refusal, entry};
use crate::ffi::{self, kvw_status, kvw_token_score_params as Params};
use crate::pages::HeadView;
use crate::token_score::{Reduce, Scratch, cpu, lse};
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_token_score_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, ffi::kvw_token_score_check, |p| run(p)) }
}

/// One kv head of one sequence: the rows that take part and hold a token of it.
struct Task<'a> {
    p: Given<'a, Params>,
    head: HeadView<'a>,
    /// Its place among all, `[S, H]`.
    at: usize,
    group: usize,
    /// Slot of column 0.
    first: usize,
    /// Of the newest tokens, `[rows, G, D]`.
    q: Vec<f32>,
    rows: usize,
    /// Rows before those, whose tokens the head does not hold.
    early: usize,
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    // SAFETY: the caller's promise.
    let (views, starts) =
        unsafe { (Views::new(Given(&p.cache))?, slice(p.cu_tokens, p.cache.seqs as usize + 1)) };
    check_starts(starts, p.tokens)?;
    let by_row = p.op == ffi::KVW_SCORE_LSE;
    let mut seen = Vec::new();
    for s in 0..starts.len() - 1 {
        // SAFETY: as above.
        seen.push(if by_row { unsafe { ranges(p, s)? } } else { Vec::new() });
    }
    let mut firsts = Vec::new();
    for place in views.places() {
        // SAFETY: as above.
        let first = if p.first.is_null() { 0 } else { unsafe { *p.first.add(place.at) } };
        firsts.push(usize::try_from(first).map_err(|_| Refusal::shape("first"))?);
    }
    for (at, head) in views.heads().into_iter().enumerate() {
        let s = at / p.cache.kv_heads as usize;
        // SAFETY: as above.
        unsafe {
            let task = Task::new(p, head, at, firsts[at], starts[s + 1], starts[s + 1] - starts[s]);
            if by_row { task.lse(&seen[s])? } else { task.score()? }
        }
    }
    Ok(())
}

/// The slots that count for sequence `s`, ascending.
///
/// # Safety
/// As [`run`].
unsafe fn ranges(p: Given<'_, Params>, s: usize) -> Checked<Vec<Range<usize>>> {
    if p.seen.is_null() {
        return Ok(std::iter::once(0..usize::MAX).collect());
    }
    let words = 2 * p.ranges as usize;
    // SAFETY: the caller's promise.
    let pairs = unsafe { slice(p.seen.add(s * words), words) };
    let range = |pair: &[i32]| pair[0].max(0) as usize..pair[1].max(0) as usize;
    let mut ranges: Vec<_> = pairs.chunks_exact(2).map(range).filter(|r| !r.is_empty()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let apart = ranges.is_sorted_by(|a, b| a.end <= b.start);
    if apart { Ok(ranges) } else { Err(Refusal::shape("seen")) }
}

impl<'a> Task<'a> {
    /// Of `given` rows that end before row `end` of q.
    ///
    /// # Safety
    /// As [`run`].
    unsafe fn new(
        p: Given<'a, Params>,
        head: HeadView<'a>,
        at: usize,
        first: usize,
        end: i32,
        given: i32,
    ) -> Self {
        let (q_heads, d) = (p.q_heads as usize, p.cache.head_dim as usize);
        let group = q_heads / p.cache.kv_heads as usize;
        let used = given.min(p.lse_rows) as usize;
        let rows = used.min(head.len);
        let mut q = vec![0.0; rows * group * d];
        let from = (end as usize - rows) * q_heads + at % p.cache.kv_heads as usize * group;
        for (row, q) in q.chunks_exact_mut(group * d).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { Halves::new(p.q, p.dtype).get((from + row * q_heads) * d, q) };
        }
        Self { p, head, at, group, first, q, rows, early: used - rows }
    }

    /// The log-sum-exps of this head that row `i` counted from the end of the last has.
    ///
    /// # Safety
    /// As [`run`]; no one else uses them while the slice lives.
    unsafe fn of_row(&self, i: usize) -> &'a mut [f32] {
        let (heads, q_heads) = (self.p.cache.kv_heads as usize, self.p.q_heads as usize);
        let row = (self.at / heads + 1) * self.p.lse_rows as usize - i;
        let column = self.at % heads * self.group;
        // SAFETY: the caller's promise.
        unsafe { Shared::new(self.p.lse).take(row * q_heads + column, self.group) }
    }

    /// # Safety
    /// As [`run`].
    unsafe fn lse(&self, seen: &[Range<usize>]) -> Checked<()> {
        let mut out = vec![f32::NEG_INFINITY; (self.early + self.rows) * self.group];
        let (q, heads) = (&self.q, std::slice::from_ref(&self.head));
        let of_held = &mut out[self.early * self.group..];
        SCRATCH.with_borrow_mut(|scratch| {
            lse(team(), q, self.rows, heads, self.p.scale, seen, of_held, scratch)
        })?;
        for (i, row) in out.chunks_exact(self.group).rev().enumerate() {
            // SAFETY: the caller's promise; heads have columns of their own.
            unsafe { self.of_row(i + 1) }.copy_from_slice(row);
        }
        Ok(())
    }

    /// # Safety
    /// As [`run`].
    unsafe fn score(&self) -> Checked<()> {
        let (p, columns) = (self.p, self.p.columns as usize);
        let sum = p.op == ffi::KVW_SCORE_SUM;
        let (lines, reduce) = if sum { (self.group, Reduce::Sum) } else { (1, Reduce::Max) };
        // SAFETY: the caller's promise; a head has scores of its own.
        let to = unsafe { Shared::new(p.scores).take(self.at * lines * columns, lines * columns) };
        if p.accumulate == 0 {
            to.fill(0.0);
        }
        let count = columns.min(self.head.len.saturating_sub(self.first));
        if count == 0 {
            return Ok(());
        }
        let mut lse = Vec::with_capacity(self.rows * self.group);
        for i in (0..self.rows).rev() {
            // SAFETY: as above; they are only read.
            lse.extend_from_slice(unsafe { self.of_row(i + 1) });
        }
        let held = |row: &[f32]| row[..count].to_vec();
        let mut scores: Vec<f32> = to.chunks_exact(columns).flat_map(held).collect();
        let (q, heads) = (&self.q, std::slice::from_ref(&self.head));
        let first = [self.first];
        SCRATCH.with_borrow_mut(|scratch| {
            let (n, scale, scores) = (self.rows, p.scale, &mut scores);
            cpu(team(), q, n, &lse, heads, scale, &first, count, reduce, scores, scratch)
        })?;
        for (to, from) in to.chunks_exact_mut(columns).zip(scores.chunks_exact(count)) {
            to[..count].copy_from_slice(from);
        }
        Ok(())
    }
}
