//! One error type: our argument errors, and CUDA's own code passed through.

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an op did not run. Nothing was launched or written unless it is [`Error::Cuda`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A buffer does not hold what the shape says; lengths in elements.
    #[error("{op}: `{buffer}` holds {got} elements, needs {need}")]
    Len {
        /// Family that refused.
        op: &'static str,
        /// Which argument.
        buffer: &'static str,
        /// Elements that the shape asks for.
        need: usize,
        /// Elements at hand.
        got: usize,
    },
    /// An argument has a value that the op does not support.
    #[error("{op}: `{field}` is {got}; supported: {supported}")]
    Unsupported {
        /// Family that refused.
        op: &'static str,
        /// Which argument.
        field: &'static str,
        /// Its value.
        got: String,
        /// What would do.
        supported: &'static str,
    },
    /// A size does not fit the C ABI's int32_t.
    #[error("{op}: {size} does not fit in 32 bits")]
    TooBig {
        /// Family that refused.
        op: &'static str,
        /// The size.
        size: usize,
    },
    /// The C side refused the arguments (a negative `kvw_status`).
    #[error("{op}: arguments refused: {why}; {params}")]
    Invalid {
        /// Family that refused.
        op: &'static str,
        /// The `kvw_status`.
        status: i32,
        /// The field at fault and what is wrong with it.
        why: String,
        /// The refused struct.
        params: String,
    },
    /// A CUDA call failed with this `cudaError_t`.
    #[error("{op}: CUDA error {code}: {what}")]
    Cuda {
        /// Family or device call that failed.
        op: &'static str,
        /// The `cudaError_t`.
        code: i32,
        /// Its meaning.
        what: String,
    },
    /// This build has no CUDA kernels.
    #[error("kvwarp was built without nvcc: no CUDA kernels in this build")]
    NotBuilt,
}
