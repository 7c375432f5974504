//! `kvw_rope_select_cpu`: every pair of every head.

use super::memory::{Given, Halves, saturate, slice};
use super::team::team;
use super::{Checked, Refusal, entry};
use crate::ffi::{self, kvw_rope_select_params as Params, kvw_status};
use crate::hadamard;
use crate::rope_select::{Angles, Pairing};

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_rope_select_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, ffi::kvw_rope_select_check, |p| run(p)) }
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    if !p.pairs.is_null() {
        return Err(Refusal::cpu("pairs"));
    }
    let (d, heads, tokens) = (p.head_dim as usize, p.heads as usize, p.tokens as usize);
    let plain = (heads - p.rest_heads as usize) * d;
    // SAFETY: the caller's promise.
    let angles = unsafe { Angles::new(slice(p.positions, tokens), slice(p.inv_freq, d / 2)) };
    let [x, out, rest] = [p.x, p.out, p.rest].map(|at| Halves::new(at, ffi::KVW_F16));
    let half = p.pairing == ffi::KVW_ROPE_HALF;
    let pairing = if half { Pairing::Half } else { Pairing::Interleaved };
    team().each(tokens, |token| {
        let mut row = vec![0.0; heads * d];
        // SAFETY: as above; a row is read before it is written, and tokens have rows of their own.
        unsafe { x.get(token * p.x_stride as usize, &mut row) };
        angles.rotate(token, &mut row, pairing).expect("whole heads");
        if p.hadamard == 1 {
            hadamard::keys(&mut row, d);
        }
        saturate(&mut row);
        let (first, last) = row.split_at(plain);
        // SAFETY: as above.
        unsafe {
            out.put(token * p.out_stride as usize, first);
            rest.put(token * p.rest_stride as usize, last);
        }
    });
    Ok(())
}
