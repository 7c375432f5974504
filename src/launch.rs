//! From an op of the C ABI to a Rust function.

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
            let args = Args { struct_size: size_of::<Args>() as u32, ..*args };
            let op = (crate::ffi::$function as _, crate::ffi::kvw_status_str as _);
            // SAFETY: the caller's promise.
            unsafe { crate::kernels::enqueue($name, op, &args, stream) }
        }
    };
}
pub(crate) use op;
