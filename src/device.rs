//! Where ops run: the CPU, or a CUDA device with its context, stream and memory (owned by cudarc).
//!
//! A program built with CUDA starts and works on a machine without a driver; [`Device::cuda`] then says so.

#[cfg(feature = "cuda")]
mod blas;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
mod staging;

use crate::{Error, Result};

/// True when this build holds the CUDA kernels: `build.rs` found nvcc.
pub const HAS_KERNELS: bool = cfg!(kvw_cuda);

/// Architectures that the kernels were compiled for, as in `KVW_ARCHS`; empty without kernels.
pub const BUILT_ARCHS: &str = match option_env!("KVW_BUILT_ARCHS") {
    Some(archs) => archs,
    None => "",
};

/// A place to run on. A value, not a type parameter: an engine has one code path.
pub enum Device {
    /// This machine's processor.
    Cpu,
    /// One NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Cuda),
}

impl Device {
    /// The processor.
    pub const fn cpu() -> Self {
        Self::Cpu
    }

    /// GPU `ordinal`, its primary context and a stream of its own.
    ///
    /// [`Error::NotBuilt`] without kernels, [`Error::Cuda`] where the driver or the device is missing.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let count = device_count()?;
        if ordinal >= count {
            let what = format!("device {ordinal} asked for, {count} present");
            return Err(Error::Cuda { op: "device", code: 101, what });
        }
        #[cfg(feature = "cuda")]
        return cuda::Cuda::new(ordinal).map(Self::Cuda);
        #[cfg(not(feature = "cuda"))]
        Err(Error::NotBuilt)
    }
}

/// Usable NVIDIA GPUs, by the statically linked CUDA runtime; asks the driver for nothing else.
pub fn device_count() -> Result<usize> {
    #[cfg(kvw_cuda)]
    {
        let mut count = 0;
        // SAFETY: `count` is a live i32, the only thing the call writes.
        let status = unsafe { crate::ffi::kvw_device_count(&mut count) };
        match status {
            0 => Ok(usize::try_from(count).unwrap_or(0)),
            code => Err(Error::Cuda { op: "device", code, what: meaning(code) }),
        }
    }
    #[cfg(not(kvw_cuda))]
    Err(Error::NotBuilt)
}

/// What a `kvw_status` means, in words a person can act on.
#[cfg(kvw_cuda)]
pub(crate) fn meaning(code: i32) -> String {
    match code {
        35 => "no NVIDIA driver, or one older than R580 (libcuda.so.1)".into(),
        100 => "the NVIDIA driver sees no GPU".into(),
        // SAFETY: the function returns a pointer to a static, NUL-terminated string for every value.
        _ => unsafe { std::ffi::CStr::from_ptr(crate::ffi::kvw_status_str(code)) }
            .to_string_lossy()
            .into_owned(),
    }
}

/// A copy of `rows` pieces within a device.
#[derive(Debug, Clone, Copy)]
pub struct Pieces {
    /// Address of the first byte written.
    pub to: u64,
    /// Address of the first byte read.
    pub from: u64,
    /// Bytes from a piece to the next where they are written, at least `width`.
    pub to_pitch: usize,
    /// Bytes from a piece to the next where they are read, at least `width`.
    pub from_pitch: usize,
    /// Bytes of a piece.
    pub width: usize,
    /// Pieces; 0 copies nothing.
    pub rows: usize,
}

/// `y[t, r] = sum_c x[t, c] weight[r, c]`, sums in f32. Everything is dense, row by row.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Address of `[tokens, cols]` f16.
    pub x: u64,
    /// Address of `[rows, cols]` f16.
    pub weight: u64,
    /// Address of `[tokens, rows]` of `y_dtype`.
    pub y: u64,
    /// `KVW_F16` or `KVW_F32`.
    pub y_dtype: i32,
    /// Adds to what `y` holds; with an f16 `y` before the sum is rounded.
    pub accumulate: bool,
    /// Rows of `x`.
    pub tokens: usize,
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of both.
    pub cols: usize,
}
