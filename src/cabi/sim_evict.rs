//! `kvw_sim_evict_cpu`: scores of LagKV, and key norms.

use super::cache::Views;
use super::memory::{Given, Shared};
use super::team::team;
use super::{Checked, Refusal, entry};
use crate::ffi::{self, kvw_sim_evict_params as Params, kvw_status};
use crate::sim_evict::{Lag, Reference, key_norms, lag_at};
use crate::simd::Level;

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_sim_evict_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, ffi::kvw_sim_evict_check, |p| run(p)) }
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    if p.op != ffi::KVW_EVICT_LAG && p.op != ffi::KVW_EVICT_NORM {
        return Err(Refusal::cpu("op"));
    }
    // SAFETY: the caller's promise.
    let views = unsafe { Views::new(Given(&p.cache))? };
    let (heads, places) = (views.heads(), views.places());
    let mut firsts = Vec::with_capacity(places.len());
    for place in places {
        // SAFETY: as above.
        let first = if p.first.is_null() { 0 } else { unsafe { *p.first.add(place.at) } };
        firsts.push(usize::try_from(first).map_err(|_| Refusal::shape("first"))?);
    }
    let scores = Shared::new(p.scores);
    team().each(heads.len(), |i| {
        let (head, first) = (&heads[i], firsts[i]);
        let held = head.len.saturating_sub(first);
        if p.op == ffi::KVW_EVICT_NORM {
            let columns = p.columns as usize;
            // SAFETY: as above; a head has scores of its own.
            let out = unsafe { scores.take(i * columns, columns.min(held)) };
            key_norms(head, first..first + out.len(), out).expect("slots that are held");
            return;
        }
        let (lag, most) = (p.lag as usize, p.partitions as usize);
        let partitions = (held / lag).saturating_sub(1).min(most);
        let meta = p.reference == ffi::KVW_LAG_META;
        let reference = if meta { Reference::Metadata } else { Reference::Elements };
        let what = Lag { first, lag, partitions, v_weight: p.v_weight, reference };
        // SAFETY: as above.
        let out = unsafe { scores.take(i * most * lag, partitions * lag) };
        lag_at(Level::detect(), head, &what, out).expect("partitions that are held");
    });
    Ok(())
}
