//! `kvw_prefill_attn_cpu`.

use super::cache::Views;
use super::memory::{Given, Halves, Shared, slice};
use super::rows::{Rows, check_starts, mask};
use super::{Checked, entry};
use crate::ffi::{self, kvw_prefill_attn_params as Params, kvw_status};

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_prefill_attn_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, ffi::kvw_prefill_attn_check, |p| run(p)) }
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    // SAFETY: the caller's promise.
    let (views, starts) =
        unsafe { (Views::new(Given(&p.cache))?, slice(p.cu_tokens, p.cache.seqs as usize + 1)) };
    check_starts(starts, p.tokens)?;
    let heads = views.heads();
    let rows = Rows {
        q: Halves::new(p.q, p.dtype),
        out: Halves::new(p.out, p.dtype),
        lse: (!p.lse.is_null()).then(|| Shared::new(p.lse)),
        lse_rows: p.lse_rows as usize,
        q_heads: p.q_heads as usize,
        kv_heads: p.cache.kv_heads as usize,
        head_dim: p.cache.head_dim as usize,
        scale: p.scale,
        mask: mask(p.sliding_window),
    };
    for (s, pair) in starts.windows(2).enumerate() {
        // SAFETY: as above.
        unsafe { rows.attend(&heads, s, pair[0] as usize..pair[1] as usize)? };
    }
    Ok(())
}
