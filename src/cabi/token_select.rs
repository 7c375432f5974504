//! `kvw_token_select_cpu`: pooled scores, selections and gathered rows.

use super::memory::{Given, Shared, slice};
use super::team::team;
use super::{Checked, Refusal, changed, entry};
use crate::ffi::{self, kvw_status, kvw_token_select_params as Params};
use crate::token_select::{Pool, above, kth, pool, top_k};
use std::borrow::Cow;

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_token_select_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, check, |p| run(p)) }
}

/// The op's check, but for the workspace.
///
/// # Safety
/// `p` is null or points to params.
unsafe extern "C" fn check(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise.
    unsafe {
        changed(p, ffi::kvw_token_select_check, |p| {
            (p.workspace, p.workspace_bytes) = (std::ptr::without_provenance_mut(16), usize::MAX)
        })
    }
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    let rows = p.rows as usize;
    // SAFETY: the caller's promise; rows, and segments of them, have results of their own.
    unsafe {
        match p.op {
            ffi::KVW_SELECT_GATHER => return gather(p),
            ffi::KVW_SELECT_POOL => team().each(rows, |row| pool_row(p, row)),
            _ => team().each(rows / p.segment as usize, |segment| select(p, segment)),
        }
    }
    Ok(())
}

/// Scores of a row in use.
///
/// # Safety
/// As [`run`].
unsafe fn len(p: Given<'_, Params>, row: usize) -> usize {
    // SAFETY: the caller's promise.
    let len = if p.lens.is_null() { p.n } else { unsafe { *p.lens.add(row) } };
    len.clamp(0, p.n) as usize
}

/// The scores in use of `lines` lines of `n` from line `first` on, `len(i)` of the i-th.
///
/// # Safety
/// As [`run`].
unsafe fn used<'a>(
    p: Given<'a, Params>,
    first: usize,
    lines: usize,
    len: impl Fn(usize) -> usize,
) -> Cow<'a, [f32]> {
    let n = p.n as usize;
    // SAFETY: the caller's promise.
    let all = unsafe { slice(p.scores.add(first * n), lines * n) };
    if (0..lines).all(|i| len(i) == n) {
        return Cow::Borrowed(all);
    }
    Cow::Owned(all.chunks_exact(n).enumerate().flat_map(|(i, x)| &x[..len(i)]).copied().collect())
}

/// # Safety
/// As [`run`]; the row's results are this call's alone.
unsafe fn pool_row(p: Given<'_, Params>, row: usize) {
    let (n, group) = (p.n as usize, p.group as usize);
    let kind = if p.pool == ffi::KVW_POOL_AVG { Pool::Avg } else { Pool::Max };
    // SAFETY: the caller's promise.
    unsafe {
        let len = len(p, row);
        let scores = used(p, row * group, group, |_| len);
        let out = Shared::new(p.out.cast::<f32>()).take(row * n, len);
        pool(&scores, group, kind, p.width as usize, out);
    }
}

/// # Safety
/// As [`run`]; the segment's results are this call's alone.
unsafe fn select(p: Given<'_, Params>, segment: usize) {
    let (rows, stride) = (p.segment as usize, p.index_stride as usize);
    let first = segment * rows;
    // SAFETY: the caller's promise.
    let (k, scores) = unsafe { (*p.k.add(segment), used(p, first, rows, |i| len(p, first + i))) };
    let k = k.max(0) as usize;
    let last = kth(&scores, k);
    let kept = match last {
        Some(last) if p.op == ffi::KVW_SELECT_ABOVE => above(&scores, last),
        _ => top_k(&scores, k),
    };
    if !p.kth.is_null() {
        // SAFETY: as above.
        unsafe { *p.kth.add(segment) = last.unwrap_or(f32::NAN) };
    }
    let (mut rest, mut start) = (kept.as_slice(), 0);
    for row in first..first + rows {
        // SAFETY: as above.
        let end = start + unsafe { len(p, row) };
        let (mine, after) = rest.split_at(rest.partition_point(|&i| (i as usize) < end));
        // SAFETY: as above.
        let to = unsafe {
            *p.counts.add(row) = mine.len() as i32;
            Shared::new(p.indices).take(row * stride, mine.len().min(stride))
        };
        to.iter_mut().zip(mine).for_each(|(to, &i)| *to = (i as usize - start) as i32);
        (rest, start) = (after, end);
    }
}

/// # Safety
/// As [`run`].
unsafe fn gather(p: Given<'_, Params>) -> Checked<()> {
    let (rows, stride, bytes) = (p.rows as usize, p.index_stride as usize, p.row_bytes as usize);
    let count = |row: usize| {
        // SAFETY: the caller's promise.
        let count = if p.counts.is_null() { p.index_stride } else { unsafe { *p.counts.add(row) } };
        count.clamp(0, p.index_stride) as usize
    };
    // Rows of x, by list.
    let mut from = Vec::with_capacity(rows);
    for row in 0..rows {
        // SAFETY: as above.
        let (first, indices) = unsafe {
            let first = if p.first.is_null() { 0 } else { *p.first.add(row) };
            (i64::from(first), slice(p.indices.add(row * stride), count(row)))
        };
        let of = indices.iter().map(|&i| usize::try_from(first + i64::from(i)));
        let of = of.collect::<Result<Vec<_>, _>>().map_err(|_| Refusal::shape("indices"))?;
        from.push(of);
    }
    let (out, out_positions) = (Shared::new(p.out.cast::<u8>()), Shared::new(p.out_positions));
    team().each(rows, |row| {
        for (i, &from) in from[row].iter().enumerate() {
            let to = row * stride + i;
            // SAFETY: as above; an entry of a list has a place of its own.
            unsafe {
                if !p.x.is_null() {
                    let x = slice(p.x.cast::<u8>().add(from * bytes), bytes);
                    out.take(to * bytes, bytes).copy_from_slice(x);
                }
                if !p.positions.is_null() {
                    out_positions.take(to, 1)[0] = *p.positions.add(from);
                }
            }
        }
    });
    Ok(())
}
