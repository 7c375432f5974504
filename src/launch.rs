//! From an op of the C ABI to [`crate::Result`].

use crate::device::meaning;
use crate::error::{Error, Result};
use std::fmt::Debug;

/// What a family's status means; `params` name the culprit of a refusal.
pub(crate) fn result(op: &'static str, status: i32, params: &impl Debug) -> Result<()> {
    match status {
        0 => Ok(()),
        ..0 => {
            Err(Error::Invalid { op, status, why: meaning(status), params: format!("{params:?}") })
        }
        code => Err(Error::Cuda { op, code, what: meaning(code) }),
    }
}

/// A profiler's range, open until it is dropped; the name ends in a NUL.
#[cfg(feature = "nvtx")]
pub(crate) fn range(name: &'static str) -> nvtx::LocalRange {
    let name = std::ffi::CStr::from_bytes_with_nul(name.as_bytes()).unwrap_or_default();
    nvtx::LocalRange::new(name)
}

/// `Args` and `run` of a family: its C op, params struct and name. With feature `nvtx` a range of that name is
/// open while `run` is in it.
macro_rules! op {
    ($(#[$doc:meta])* $function:ident, $params:ident, $name:literal) => {
        /// Arguments of the CUDA kernel, as its header describes them: device pointers and sizes.
        pub type Args = crate::ffi::$params;

        $(#[$doc])*
        /// Returns before it has run. `struct_size` is filled in.
        ///
        /// # Errors
        /// [`crate::Error::Invalid`] for refused arguments, [`crate::Error::Cuda`] for a failed launch.
        ///
        /// # Safety
        /// Every pointer of `args` is null where that is allowed, or a device address of as many elements as
        /// the header says, which live until the kernel has run; nothing else writes them meanwhile.
        pub unsafe fn run(args: &Args, stream: crate::ffi::kvw_stream) -> crate::Result<()> {
            #[cfg(feature = "nvtx")]
            let _range = crate::launch::range(concat!($name, "\0"));
            let args = Args { struct_size: size_of::<Args>() as u32, ..*args };
            // SAFETY: the caller's promise; the op reads `args` before it returns.
            crate::launch::result($name, unsafe { crate::ffi::$function(&args, stream) }, &args)
        }
    };
}
pub(crate) use op;
