//! Large matrix products: cuBLAS, loaded when first asked for.

use std::ffi::c_void;
use std::panic::catch_unwind;
use std::sync::Arc;

use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::CudaStream;

use super::Gemm;
use super::cuda::Memory;
use crate::{Error, Result, ffi};

/// What cuBLAS may use for itself, its advice for Hopper; given once, so that products can be recorded in graphs.
const WORKSPACE: usize = 32 << 20;

/// A handle on one stream, and its scratch memory.
pub(super) struct Blas {
    handle: CudaBlas,
    _workspace: Memory,
}

fn failed(what: impl Into<String>) -> Error {
    Error::Cuda { op: "cublas", code: 999, what: what.into() }
}

/// Whether the library is there, also where another crate of the graph has cudarc link it: without it cudarc panics.
fn present() -> bool {
    let names = ["libcublas.so", "libcublas.so.13", "libcublas.so.12"];
    // SAFETY: opens the library, which cudarc would open too, and closes it again.
    names.iter().any(|name| unsafe { libloading::Library::new(name) }.is_ok())
}

impl Blas {
    /// [`Error::Cuda`] where there is no libcublas.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        if !present() {
            return Err(failed(
                "libcublas.so.13 or .12 is not found; prompts need it (CUDA toolkit, or pip's nvidia-cublas)",
            ));
        }
        let create = || CudaBlas::new(stream.clone());
        let handle = catch_unwind(std::panic::AssertUnwindSafe(create))
            .map_err(|_| failed("libcublas lacks a function of CUDA 13"))?
            .map_err(|e| failed(format!("{e:?}")))?;
        let workspace = Memory::new(stream, WORKSPACE)?;
        // SAFETY: the memory lives as long as the handle.
        unsafe {
            sys::cublasSetWorkspace_v2(*handle.handle(), workspace.at() as *mut c_void, WORKSPACE)
        }
        .result()
        .map_err(|e| failed(format!("{e:?}")))?;
        Ok(Self { handle, _workspace: workspace })
    }

    /// Enqueues a product. cuBLAS counts columns first: y^T = weight x^T.
    ///
    /// # Safety
    /// The addresses of `gemm` hold as many elements as it says until the product has run.
    pub unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { x, weight, y, y_dtype, accumulate, tokens, rows, cols } = *gemm;
        let int =
            |size: usize| i32::try_from(size).map_err(|_| Error::TooBig { op: "cublas", size });
        let (m, n, k) = (int(rows)?, int(tokens)?, int(cols)?);
        let (alpha, beta) = (1f32, if accumulate { 1f32 } else { 0.0 });
        let half = sys::cudaDataType::CUDA_R_16F;
        let out = if y_dtype == ffi::KVW_F32 { sys::cudaDataType::CUDA_R_32F } else { half };
        // SAFETY: the caller's promise; alpha and beta are read before the call returns.
        unsafe {
            result::gemm_ex(
                *self.handle.handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                m,
                n,
                k,
                (&raw const alpha).cast(),
                weight as *const c_void,
                half,
                k,
                x as *const c_void,
                half,
                k,
                (&raw const beta).cast(),
                y as *mut c_void,
                out,
                m,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|e| failed(format!("{e:?} for {gemm:?}")))
    }
}
