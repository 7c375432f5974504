//! `kvw_paged_attn_cpu`: one row a sequence by the decode path, more rows or their log-sum-exps by that of chunks.

use super::cache::Views;
use super::memory::{Given, Halves, Shared};
use super::rows::{Rows, mask};
use super::team::team;
use super::{Checked, Refusal, changed, entry};
use crate::ffi::{self, kvw_paged_attn_params as Params, kvw_status};
use crate::paged_attn::{Scratch, cpu};
use std::cell::RefCell;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_paged_attn_cpu(p: *const Params) -> kvw_status {
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
        changed(p, ffi::kvw_paged_attn_check, |p| {
            (p.workspace, p.workspace_bytes) = (std::ptr::without_provenance_mut(16), usize::MAX)
        })
    }
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    for (given, field) in [
        (!p.sinks.is_null(), "sinks"),
        (!p.k_norm.is_null(), "k_norm"),
        (!p.rotation.is_null(), "rotation"),
        (p.softcap != 0.0, "softcap"),
    ] {
        if given {
            return Err(Refusal::cpu(field));
        }
    }
    // SAFETY: the caller's promise.
    let views = unsafe { Views::new(Given(&p.cache))? };
    let heads = views.heads();
    let (seqs, rows) = (p.cache.seqs as usize, p.q_len as usize);
    let (q, out) = (Halves::new(p.q, p.dtype), Halves::new(p.out, p.dtype));
    let (q_heads, head_dim) = (p.q_heads as usize, p.cache.head_dim as usize);
    if rows == 1 && p.lse.is_null() {
        let mut q_wide = vec![0.0; seqs * q_heads * head_dim];
        let mut out_wide = vec![0.0; q_wide.len()];
        // SAFETY: as above.
        unsafe { q.get(0, &mut q_wide) };
        let mask = mask(p.sliding_window);
        // Sequences are heads among others: a query head knows its kv head, and a kv head its length.
        SCRATCH.with_borrow_mut(|scratch| {
            cpu(team(), &q_wide, &heads, p.scale, mask, &mut out_wide, scratch)
        })?;
        // SAFETY: as above.
        unsafe { out.put(0, &out_wide) };
        return Ok(());
    }
    let rows_of = Rows {
        q,
        out,
        lse: (!p.lse.is_null()).then(|| Shared::new(p.lse)),
        lse_rows: rows,
        q_heads,
        kv_heads: p.cache.kv_heads as usize,
        head_dim,
        scale: p.scale,
        mask: mask(p.sliding_window),
    };
    // SAFETY: as above.
    (0..seqs).try_for_each(|s| unsafe { rows_of.attend(&heads, s, s * rows..(s + 1) * rows) })
}
