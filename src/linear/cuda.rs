//! The CUDA kernel, for up to sixteen tokens: f16, bf16 and [`super::planes`] of blocks.

crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_linear, kvw_linear_params, "linear"
}
