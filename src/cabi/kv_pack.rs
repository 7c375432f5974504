//! `kvw_kv_pack_cpu`: tokens into rings, slabs that leave the window into the table's.

use super::cache::{Host, Place};
use super::memory::{Given, Halves, saturate, slice};
use super::rows::check_starts;
use super::team::team;
use super::{Checked, entry};
use crate::ffi::{self, kvw_kv_pack_params as Params, kvw_status};
use crate::hadamard;
use crate::kv_pack::{advance, append, boundaries, pack_rounded};
use crate::pages::Entry;
use crate::rope_select::{Angles, Pairing};
use crate::slab::{Format, Rounding, TOKENS};
use half::f16;
use std::ops::Range;

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_kv_pack_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, ffi::kvw_kv_pack_check, |p| run(p)) }
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    // SAFETY: the caller's promise.
    let host = unsafe { Host::new(Given(&p.cache))? };
    // SAFETY: as above.
    let work = unsafe { Work::new(p, &host)? };
    let places = host.places();
    // SAFETY: as above; heads write rings and slabs of their own.
    let due = places.iter().map(|place| unsafe { work.due(place) });
    let due: Vec<_> = due.collect::<Checked<_>>()?;
    team().each(places.len(), |i| {
        let (place, due) = (&places[i], &due[i]);
        // SAFETY: as above.
        unsafe {
            match p.op {
                ffi::KVW_PACK_APPEND => work.append(place, due),
                ffi::KVW_PACK_FILL => work.fill(place),
                _ => work.flush(place, due),
            }
        }
    });
    if !p.q.is_null() {
        // SAFETY: as above; tokens have rows of their own.
        team().each(p.tokens as usize, |token| unsafe { work.turn_queries(token) });
    }
    Ok(())
}

/// Slabs that are packed, from the first on, with their entries.
#[derive(Default)]
struct Due {
    first: usize,
    entries: Vec<Entry>,
}

struct Work<'a> {
    p: Given<'a, Params>,
    host: &'a Host<'a>,
    k: Halves<'a>,
    v: Halves<'a>,
    /// Of positions, where keys are turned.
    angles: Option<Angles>,
    pairing: Pairing,
    /// First row of each sequence, and the end.
    rows: &'a [i32],
    d: usize,
    window: usize,
}

impl<'a> Work<'a> {
    /// # Safety
    /// As [`run`].
    unsafe fn new(p: Given<'a, Params>, host: &'a Host<'a>) -> Checked<Self> {
        let (d, seqs, tokens) =
            (p.cache.head_dim as usize, p.cache.seqs as usize, p.tokens as usize);
        let fill = p.op == ffi::KVW_PACK_FILL;
        // SAFETY: the caller's promise.
        let rows = unsafe { slice(p.cu_tokens, if fill { seqs + 1 } else { 0 }) };
        check_starts(rows, p.tokens)?;
        let turned = p.op != ffi::KVW_PACK_FLUSH && !p.positions.is_null();
        // SAFETY: as above.
        let angles = turned
            .then(|| unsafe { Angles::new(slice(p.positions, tokens), slice(p.inv_freq, d / 2)) });
        let half = p.pairing == ffi::KVW_ROPE_HALF;
        Ok(Self {
            p,
            host,
            k: Halves::new(p.k, p.dtype),
            v: Halves::new(p.v, p.dtype),
            angles,
            pairing: if half { Pairing::Half } else { Pairing::Interleaved },
            rows,
            d,
            window: p.cache.window as usize,
        })
    }

    /// What this step packs of a head.
    ///
    /// # Safety
    /// As [`run`].
    unsafe fn due(&self, place: &Place) -> Checked<Due> {
        let (p, len, window) = (self.p, place.len, self.window);
        let kivi = p.kivi_exact == 1;
        let slabs: Range<usize> = match p.op {
            ffi::KVW_PACK_APPEND if len == 0 => 0..0,
            ffi::KVW_PACK_APPEND if kivi => {
                let (done, goal) = (boundaries(len - 1, window), boundaries(len, window));
                let keys = if goal.0 > done.0 { goal.0 } else { 0 };
                let until = keys.max(goal.1);
                if goal == done { 0..0 } else { done.1 / TOKENS..until.div_ceil(TOKENS) }
            }
            ffi::KVW_PACK_APPEND => {
                let before = if p.cache.packed.is_null() {
                    (len.max(window) - window) / TOKENS
                } else {
                    place.packed + 1
                };
                // A slab leaves with this token if the rest after it is whole slabs, the last of which is the next.
                let leaves = before > 0 && len == window + before * TOKENS;
                if leaves { before - 1..before } else { 0..0 }
            }
            ffi::KVW_PACK_FILL => 0..0,
            _ => {
                // SAFETY: the caller's promise.
                let first = unsafe { *p.first.add(place.at) };
                let Ok(first) = usize::try_from(first) else { return Ok(Due::default()) };
                let end =
                    if kivi { boundaries(len, window).0.div_ceil(TOKENS) } else { place.packed };
                first..end.min(first + p.max_tokens as usize).max(first)
            }
        };
        // SAFETY: as above.
        let entries = unsafe { self.host.entries(place, slabs.clone())? };
        Ok(Due { first: slabs.start, entries })
    }

    /// # Safety
    /// As [`run`]; the head's ring and slabs are this call's alone.
    unsafe fn append(&self, place: &Place, due: &Due) {
        let (len, kivi) = (place.len, self.p.kivi_exact == 1);
        if len == 0 {
            return;
        }
        let first = self.window == 0 || kivi;
        // SAFETY: the caller's promise, as below.
        let ring = unsafe { self.host.ring(place) };
        if first {
            // SAFETY: as above.
            unsafe { self.write(place, ring, place.seq, len - 1) };
        }
        let (done, goal) =
            (boundaries(len - 1, self.window.max(1)), boundaries(len, self.window.max(1)));
        // SAFETY: as above.
        unsafe { self.pack(place, ring, due, kivi.then_some((done, goal))) };
        if !first {
            // SAFETY: as above.
            unsafe { self.write(place, ring, place.seq, len - 1) };
        }
    }

    /// # Safety
    /// As [`Work::append`].
    unsafe fn fill(&self, place: &Place) {
        let (from, to) = (self.rows[place.seq] as usize, self.rows[place.seq + 1] as usize);
        let Some(start) = place.len.checked_sub(to - from) else { return };
        // SAFETY: the caller's promise.
        unsafe {
            let ring = self.host.ring(place);
            (from..to).for_each(|token| self.write(place, ring, token, start + token - from));
        }
    }

    /// # Safety
    /// As [`Work::append`].
    unsafe fn flush(&self, place: &Place, due: &Due) {
        let kivi = (self.p.kivi_exact == 1).then(|| ((0, 0), boundaries(place.len, self.window)));
        // SAFETY: the caller's promise.
        unsafe { self.pack(place, self.host.ring(place), due, kivi) };
    }

    /// Row `token` of k and v to `slot` of the ring.
    ///
    /// # Safety
    /// As [`run`].
    unsafe fn write(&self, place: &Place, ring: &mut [u8], token: usize, slot: usize) {
        let (d, column) = (self.d, place.head * self.d);
        let (mut k, mut v) = ([0.0; 256], [0.0; 256]);
        let (k, v) = (&mut k[..d], &mut v[..d]);
        // SAFETY: the caller's promise.
        unsafe {
            self.k.get(token * self.p.k_stride as usize + column, k);
            self.v.get(token * self.p.v_stride as usize + column, v);
        }
        self.turn(token, k);
        append(ring, self.host.layout(Format::F16), slot, k, v);
    }

    /// A head of a token times its rotation and, where it is asked for, the Hadamard matrix.
    fn turn(&self, token: usize, row: &mut [f32]) {
        let Some(angles) = &self.angles else { return };
        angles.rotate(token, row, self.pairing).expect("a row of D channels");
        if self.p.hadamard == 1 {
            hadamard::keys(row, self.d);
        }
    }

    /// # Safety
    /// As [`run`]; the token's row of `q_out` is this call's alone.
    unsafe fn turn_queries(&self, token: usize) {
        let (q, out) =
            (Halves::new(self.p.q, ffi::KVW_F16), Halves::new(self.p.q_out, ffi::KVW_F16));
        let heads = self.p.q_heads as usize;
        let mut row = [0.0; 256];
        for head in 0..heads {
            let row = &mut row[..self.d];
            // SAFETY: the caller's promise.
            unsafe { q.get(token * self.p.q_stride as usize + head * self.d, row) };
            self.turn(token, row);
            saturate(row);
            // SAFETY: as above.
            unsafe { out.put((token * heads + head) * self.d, row) };
        }
    }

    /// Packs the slabs that are due; under KIVI's schedule what lies between two boundaries of each.
    ///
    /// # Safety
    /// As [`Work::append`].
    unsafe fn pack(
        &self,
        place: &Place,
        ring: &mut [u8],
        due: &Due,
        kivi: Option<((usize, usize), (usize, usize))>,
    ) {
        let bytes = self.host.layout(Format::F16).slab_bytes();
        let slots = ring.len() / bytes;
        for (i, &entry) in (due.first..).zip(&due.entries) {
            // SAFETY: the caller's promise.
            let Some((layout, to)) = (unsafe { self.host.slab(entry) }) else { continue };
            let from = &mut ring[i % slots * bytes..][..bytes];
            match kivi {
                Some((done, goal)) => advance(i, done, goal, from, to, layout),
                None => {
                    // SAFETY: as above.
                    let feedback = unsafe { self.feedback(place) };
                    let range = if self.p.range == 0.0 { 1.0 } else { self.p.range };
                    pack_rounded(from, to, layout, &Rounding { range, feedback });
                }
            }
        }
    }

    /// # Safety
    /// As [`run`].
    unsafe fn feedback(&self, place: &Place) -> Option<&'a [f16]> {
        let square = self.d * self.d;
        let all = self.p.feedback.cast::<f16>();
        // SAFETY: the caller's promise.
        (!all.is_null()).then(|| unsafe { slice(all.add(place.head * square), square) })
    }
}
