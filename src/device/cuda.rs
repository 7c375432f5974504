//! One GPU through cudarc: its primary context, one stream, memory from the driver's pool, copies, graphs.
//!
//! Everything is enqueued on the stream, with feature `nvtx` in a range of the method's name; only [`Cuda::read`],
//! [`Cuda::download`] and [`Cuda::synchronize`] wait.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{self, CUmemorytype, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, result};

use super::blas::Blas;
use super::staging::{STAGE, Staging};
use super::{Gemm, Pieces};
use crate::range::range;
pub(super) use crate::view::cudarc::failed;
use crate::{Error, Result, ffi};

/// A GPU's primary context and one stream.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    staging: Mutex<Staging>,
    blas: OnceLock<Blas>,
}

/// Bytes on a GPU, freed in stream order when dropped.
pub struct Memory {
    stream: Arc<CudaStream>,
    at: u64,
    bytes: usize,
}

/// Work recorded once, to be enqueued as a whole.
pub struct Graph(CudaGraph);

/// The moment at which what had been enqueued was done.
pub struct Stamp(CudaEvent);

impl Memory {
    /// `bytes` that nobody has written, at a multiple of 256.
    pub(super) fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: the size is not zero; the memory is freed once, on drop.
        let at =
            unsafe { result::malloc_async(stream.cu_stream(), bytes.max(1)) }.map_err(failed)?;
        Ok(Self { stream: stream.clone(), at, bytes })
    }

    /// Device address of the first byte.
    pub const fn at(&self) -> u64 {
        self.at
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let context = self.stream.context();
        // SAFETY: allocated by `new`, freed here alone, after what was enqueued before.
        let freed = context
            .bind_to_thread()
            .and_then(|()| unsafe { result::free_async(self.at, self.stream.cu_stream()) });
        context.record_err(freed);
    }
}

impl Graph {
    /// Enqueues the work.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn launch(&self) -> Result<()> {
        range!("recording");
        self.0.launch().map_err(failed)
    }
}

impl Stamp {
    /// Waits for both moments; the time between them, to about half a microsecond.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn since(&self, earlier: &Self) -> Result<Duration> {
        let milliseconds = earlier.0.elapsed_ms(&self.0).map_err(failed)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

/// Sleeps; `microseconds` is a number, not an address.
unsafe extern "C" fn sleep(microseconds: *mut c_void) {
    std::thread::sleep(Duration::from_micros(microseconds as u64));
}

impl Cuda {
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let stream = context.new_stream().map_err(failed)?;
        Ok(Self { context, stream, staging: Mutex::default(), blas: OnceLock::new() })
    }

    /// Name as the driver gives it, such as `NVIDIA H200`.
    ///
    /// # Errors
    /// [`Error::Cuda`], as of every method here.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(failed)
    }

    /// Bytes free and bytes in all.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(failed)
    }

    /// The stream that ops of this device are enqueued on; makes the context current on this thread.
    pub fn stream(&self) -> Result<ffi::kvw_stream> {
        self.context.bind_to_thread().map_err(failed)?;
        Ok(self.stream.cu_stream().cast())
    }

    /// `bytes` that nobody has written, at a multiple of 256.
    pub fn allocate(&self, bytes: usize) -> Result<Memory> {
        Memory::new(&self.stream, bytes)
    }

    /// Memory with a copy of `host`.
    pub fn upload(&self, host: &[u8]) -> Result<Memory> {
        let memory = self.allocate(host.len())?;
        // SAFETY: all of the memory, just allocated.
        unsafe { self.write(memory.at, host) }?;
        Ok(memory)
    }

    /// Waits for the stream, then copies memory back.
    pub fn download(&self, memory: &Memory) -> Result<Vec<u8>> {
        let mut host = vec![0; memory.bytes];
        // SAFETY: all of the memory.
        unsafe { self.read(memory.at, &mut host) }?;
        Ok(host)
    }

    /// Copies `host` to address `at` by way of pinned memory; `host` may change once it returns.
    ///
    /// # Safety
    /// `at` is an address of this device with room for `host`.
    pub unsafe fn write(&self, at: u64, host: &[u8]) -> Result<()> {
        range!("write");
        self.context.bind_to_thread().map_err(failed)?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        for (i, part) in host.chunks(STAGE).enumerate() {
            // SAFETY: the caller's promise, part by part.
            unsafe { staging.send(&self.stream, at + (i * STAGE) as u64, part) }.map_err(failed)?;
        }
        Ok(())
    }

    /// Waits for the stream, then fills `host` from address `at`.
    ///
    /// # Safety
    /// `at` is an address of this device of as many bytes.
    pub unsafe fn read(&self, at: u64, host: &mut [u8]) -> Result<()> {
        range!("read");
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the caller's promise; `host` is borrowed until the copy is over.
        let copied = unsafe { result::memcpy_dtoh_async(host, at, self.stream.cu_stream()) };
        copied.and_then(|()| self.stream.synchronize()).map_err(failed)
    }

    /// Writes zeros.
    ///
    /// # Safety
    /// `at` is an address of this device of as many bytes.
    pub unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        range!("zero");
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream.cu_stream()) }.map_err(failed)
    }

    /// Copies within the device.
    ///
    /// # Safety
    /// What is read and written are addresses of this device and do not overlap.
    pub unsafe fn copy(&self, pieces: &Pieces) -> Result<()> {
        range!("copy");
        let Pieces { to, from, to_pitch, from_pitch, width, rows } = *pieces;
        if width == 0 || rows == 0 {
            return Ok(());
        }
        self.context.bind_to_thread().map_err(failed)?;
        let copy = sys::CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: from_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: to_pitch,
            WidthInBytes: width,
            Height: rows,
        };
        // SAFETY: the caller's promise; the description is read before the call returns.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream.cu_stream()) }.result().map_err(failed)
    }

    /// Multiplies by cuBLAS, which is loaded at the first call.
    ///
    /// # Safety
    /// The addresses of `gemm` hold as many elements as it says until the product has run.
    pub unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        range!("gemm");
        self.context.bind_to_thread().map_err(failed)?;
        let blas = match self.blas.get() {
            Some(blas) => blas,
            None => {
                let new = Blas::new(&self.stream)?;
                self.blas.get_or_init(|| new)
            }
        };
        // SAFETY: the caller's promise.
        unsafe { blas.gemm(gemm) }
    }

    /// Records what `body` enqueues on the stream, without running it; `None` for nothing.
    pub fn record<E: From<Error>>(
        &self,
        body: impl FnOnce() -> Result<(), E>,
    ) -> Result<Option<Graph>, E> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed)?;
        let recorded = body();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(failed);
        recorded?;
        Ok(graph?.map(Graph))
    }

    /// Has the stream wait for so long, so that what is enqueued meanwhile runs without gaps after it.
    pub fn hold(&self, time: Duration) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)?;
        let microseconds = time.as_micros() as usize as *mut c_void;
        // SAFETY: the function follows no pointer and calls nothing of CUDA.
        unsafe { sys::cuLaunchHostFunc(self.stream.cu_stream(), Some(sleep), microseconds) }
            .result()
            .map_err(failed)
    }

    /// Notes when what has been enqueued so far is done.
    pub fn stamp(&self) -> Result<Stamp> {
        let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.stream.record_event(Some(timed)).map(Stamp).map_err(failed)
    }

    /// Waits until everything enqueued has run; errors of kernels surface here.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed)
    }
}
