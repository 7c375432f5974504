//! `kvw_kv_gather_cpu`: what an eviction leaves, slab by slab.

use super::cache::{Host, Place};
use super::memory::{Given, slice};
use super::team::team;
use super::{Checked, Refusal, entry};
use crate::ffi::{self, kvw_kv_gather_params as Params, kvw_status};
use crate::kv_gather::cpu;
use crate::kv_pack::pack_rounded;
use crate::pages::Entry;
use crate::slab::{Format, Rounding, TOKENS};
use std::ops::Range;

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_kv_gather_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, ffi::kvw_kv_gather_check, |p| run(p)) }
}

/// What is written of one head.
struct Due<'a> {
    place: &'a Place,
    slabs: Range<usize>,
    /// Of those in the table.
    entries: Vec<Entry>,
    slots: Vec<u32>,
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    // SAFETY: the caller's promise.
    let host = unsafe { Host::new(Given(&p.cache))? };
    // SAFETY: as above.
    let due = host.places().iter().map(|place| unsafe { due(p, &host, place) });
    let due: Vec<_> = due.collect::<Checked<_>>()?;
    // SAFETY: as above; heads write rings and slabs of their own.
    team().each(due.len(), |i| unsafe { write(p, &host, &due[i]) });
    Ok(())
}

/// # Safety
/// As [`run`].
unsafe fn due<'a>(p: Given<'_, Params>, host: &Host<'_>, place: &'a Place) -> Checked<Due<'a>> {
    let row = place.seq * p.cache.kv_heads as usize + place.head;
    // SAFETY: the caller's promise.
    let first = if p.first.is_null() { 0 } else { unsafe { *p.first.add(place.at) } };
    let first = usize::try_from(first).map_err(|_| Refusal::shape("first"))?;
    let end = place.len.div_ceil(TOKENS).min(first + p.max_slabs as usize).max(first);
    let count = place.len.min(end * TOKENS).saturating_sub(first * TOKENS);
    if count > p.slots_stride as usize {
        return Err(Refusal::shape("slots_stride"));
    }
    // SAFETY: as above.
    let slots = unsafe { slice(p.slots.add(row * p.slots_stride as usize), count) };
    let slots = slots.iter().map(|&slot| u32::try_from(slot)).collect::<Result<Vec<_>, _>>();
    let slots = slots.map_err(|_| Refusal::shape("slots"))?;
    let spans = |tile: &[u32]| tile[tile.len() - 1] as usize / TOKENS - tile[0] as usize / TOKENS;
    if !slots.is_sorted_by(|a, b| a < b)
        || slots.chunks(TOKENS).any(|tile| spans(tile) >= p.from_slabs as usize)
    {
        return Err(Refusal::shape("slots"));
    }
    // SAFETY: as above.
    let entries = unsafe { host.entries(place, first..place.packed.clamp(first, end))? };
    Ok(Due { place, slabs: first..end, entries, slots })
}

/// # Safety
/// As [`run`]; the head's ring and slabs are this call's alone.
unsafe fn write(p: Given<'_, Params>, host: &Host<'_>, due: &Due<'_>) {
    let (place, layout) = (due.place, host.layout(Format::F16));
    let (bytes, d) = (layout.slab_bytes(), layout.head_dim);
    let row = place.seq * p.cache.kv_heads as usize + place.head;
    let room = p.from_slabs as usize * bytes;
    // SAFETY: the caller's promise.
    let (from, ring) =
        unsafe { (slice(p.from.cast::<u8>().add(row * room), room), host.ring(place)) };
    let feedback = p.feedback.cast::<half::f16>();
    // SAFETY: as above.
    let feedback =
        (!feedback.is_null()).then(|| unsafe { slice(feedback.add(place.head * d * d), d * d) });
    let range = if p.range == 0.0 { 1.0 } else { p.range };
    let slots = ring.len() / bytes;
    let mut tile = vec![0; bytes];
    for (i, tokens) in due.slabs.clone().zip(due.slots.chunks(TOKENS)) {
        tile.fill(0);
        cpu(from, layout, tokens, &mut tile).expect("ascending slots within the ring");
        match due.entries.get(i - due.slabs.start) {
            // SAFETY: as above.
            Some(&entry) => match unsafe { host.slab(entry) } {
                Some((layout, to)) => {
                    pack_rounded(&tile, to, layout, &Rounding { range, feedback })
                }
                None => continue,
            },
            None => ring[i % slots * bytes..][..bytes].copy_from_slice(&tile),
        }
    }
}
