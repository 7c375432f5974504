//! `kvw_rms_norm_cpu`.

use super::memory::{Given, Halves, slice};
use super::team::team;
use super::{Checked, entry};
use crate::ffi::{self, kvw_rms_norm_params as Params, kvw_status};
use crate::rms_norm::cpu;

/// As `csrc/cpu.h` has it.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvw_rms_norm_cpu(p: *const Params) -> kvw_status {
    // SAFETY: the caller's promise, here and in `run`.
    unsafe { entry(p, ffi::kvw_rms_norm_check, |p| run(p)) }
}

/// # Safety
/// `p` has passed its check, and its pointers are as the header says.
unsafe fn run(p: Given<'_, Params>) -> Checked<()> {
    let (tokens, width) = (p.tokens as usize, p.width as usize);
    // SAFETY: the caller's promise.
    let (x, weight) = unsafe { (slice(p.x, tokens * width), slice(p.weight, width)) };
    let out = Halves::new(p.out, ffi::KVW_F16);
    team().each(tokens, |token| {
        let mut row = vec![0.0; width];
        cpu(&x[token * width..][..width], weight, p.eps, &mut row).expect("rows of one width");
        // SAFETY: as above; a token has a row of its own.
        unsafe { out.put(token * width, &row) };
    });
    Ok(())
}
