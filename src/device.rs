//! Where ops run: the CPU, or a CUDA device with its context, stream and memory (owned by cudarc).
//!
//! A program built with CUDA starts and works on a machine without a driver; [`Device::cuda`] then says so.

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

/// Device memory and streams.
#[cfg(feature = "cuda")]
pub mod cuda {
    use crate::{Error, Result, ffi};
    use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError};
    use std::sync::Arc;

    /// A GPU's primary context and one stream.
    pub struct Cuda {
        context: Arc<CudaContext>,
        stream: Arc<CudaStream>,
    }

    /// Bytes on a GPU, freed in stream order when dropped.
    pub struct Buffer(CudaSlice<u8>);

    fn failed(e: DriverError) -> Error {
        Error::Cuda { op: "device", code: e.0 as i32, what: e.to_string() }
    }

    impl Cuda {
        pub(super) fn new(ordinal: usize) -> Result<Self> {
            let context = CudaContext::new(ordinal).map_err(failed)?;
            let stream = context.new_stream().map_err(failed)?;
            Ok(Self { context, stream })
        }

        /// Name as the driver gives it, such as `NVIDIA H200`.
        pub fn name(&self) -> Result<String> {
            self.context.name().map_err(failed)
        }

        /// The stream that ops of this device are enqueued on; makes the context current on this thread.
        pub fn stream(&self) -> Result<ffi::kvw_stream> {
            self.context.bind_to_thread().map_err(failed)?;
            Ok(self.stream.cu_stream().cast())
        }

        /// A buffer with a copy of `host`.
        pub fn upload(&self, host: &[u8]) -> Result<Buffer> {
            self.stream.clone_htod(host).map(Buffer).map_err(failed)
        }

        /// Wait for the stream, then copy a buffer back.
        pub fn download(&self, buffer: &Buffer) -> Result<Vec<u8>> {
            let host = self.stream.clone_dtoh(&buffer.0).map_err(failed)?;
            self.synchronize()?;
            Ok(host)
        }

        /// Device address of a buffer, at least 256-byte aligned.
        pub fn address(&self, buffer: &Buffer) -> u64 {
            buffer.0.device_ptr(&self.stream).0
        }

        /// Wait until everything enqueued has run; errors of kernels surface here.
        pub fn synchronize(&self) -> Result<()> {
            self.stream.synchronize().map_err(failed)
        }
    }
}
