//! The CUDA kernel, for f16 and bf16 weights and up to sixteen tokens.

crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_linear, kvw_linear_params, "linear"
}
