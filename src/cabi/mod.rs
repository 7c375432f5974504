//! The CPU paths behind the C ABI (`csrc/cpu.h`): the ops' params with pointers to host memory.
//!
//! An entry asks the op's `_check` first, so that it refuses what the CUDA entry refuses, with the same status; what
//! only lengths and tables tell is refused by [`Refusal`] before a pointer is followed.

mod cache;
mod kv_gather;
mod kv_pack;
mod memory;
mod paged_attn;
mod prefill_attn;
mod rms_norm;
mod rope_select;
mod rows;
mod sim_evict;
mod team;
mod token_score;
mod token_select;

use crate::error::Error;
use crate::ffi::{self, kvw_status};
use memory::Given;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why an op did not run: a `KVW_ERR_*` less 16 times the number of the field at fault, as `csrc/common/fields.cuh` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Refusal(kvw_status);

type Checked<T> = Result<T, Refusal>;

impl Refusal {
    const fn of(error: i32, field: &str) -> Self {
        Self(error - 16 * field_number(field))
    }

    /// A number that contradicts another.
    const fn shape(field: &str) -> Self {
        Self::of(ffi::KVW_ERR_SHAPE, field)
    }

    /// What the CPU path does not take.
    const fn cpu(field: &str) -> Self {
        Self::of(ffi::KVW_ERR_CPU, field)
    }
}

impl From<Error> for Refusal {
    /// What a CPU path refuses by itself.
    fn from(error: Error) -> Self {
        let field = match &error {
            Error::Len { buffer, .. } => *buffer,
            Error::Unsupported { field, .. } => *field,
            _ => "params",
        };
        match field {
            "table" => Self::shape("table_stride"),
            "ring" | "to_ring" => Self::shape("ring_slabs"),
            "slots" | "partitions" | "lag" => Self::shape(field),
            "len" => Self::shape("lens"),
            _ => Self::shape("params"),
        }
    }
}

/// FNV-1a, folded to 1 ..= 2^20.
const fn field_number(name: &str) -> i32 {
    let (name, mut hash, mut i) = (name.as_bytes(), 2_166_136_261_u32, 0);
    while i < name.len() {
        hash = (hash ^ name[i] as u32).wrapping_mul(16_777_619);
        i += 1;
    }
    1 + ((hash ^ hash >> 20) & 0xF_FFFF) as i32
}

/// What an op's `_check` is.
type Check<P> = unsafe extern "C" fn(*const P) -> kvw_status;

/// The check of what `change` makes of the params; params of another size, or none, are left to the check.
///
/// # Safety
/// `p` is null or points to params.
unsafe fn changed<P: Copy>(
    p: *const P,
    check: Check<P>,
    change: impl FnOnce(&mut P),
) -> kvw_status {
    // SAFETY: the caller's promise: params begin with their size, and the check follows no other pointer.
    unsafe {
        if p.is_null() || p.cast::<u32>().read() as usize != size_of::<P>() {
            return check(p);
        }
        let mut params = *p;
        change(&mut params);
        check(&params)
    }
}

/// The status of `body` after `check`; a panic becomes one too.
///
/// # Safety
/// `p` is null or points to params whose pointers are as the op's header says, in host memory.
unsafe fn entry<P>(
    p: *const P,
    check: Check<P>,
    body: impl FnOnce(Given<'_, P>) -> Checked<()>,
) -> kvw_status {
    // SAFETY: the check reads the struct alone, and accepts null.
    let status = unsafe { check(p) };
    if status != ffi::KVW_OK {
        return status;
    }
    // SAFETY: not null, says the check.
    let p = Given(unsafe { &*p });
    match catch_unwind(AssertUnwindSafe(|| body(p))) {
        Ok(Ok(())) => ffi::KVW_OK,
        Ok(Err(Refusal(status))) => status,
        Err(_) => Refusal::cpu("params").0,
    }
}
