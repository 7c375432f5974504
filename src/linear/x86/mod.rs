//! Kernels in x86-64 vector instructions.

pub(super) mod avx2;
pub(super) mod gemm512;
pub(super) mod gemv2;
pub(super) mod gemv512;
mod units512;
