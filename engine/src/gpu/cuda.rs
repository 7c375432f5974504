//! The platform of the program: one NVIDIA GPU.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

use kvwarp::device::cuda::{Cuda, Graph, Memory, Stamp};
use kvwarp::device::{Gemm, Pieces};
use kvwarp::ffi::kvw_stream;
use kvwarp::kernels::Kernels;

use super::platform::{GpuError, Platform, Replay, Result};

/// CUDA's code for memory that is short.
const OUT_OF_MEMORY: i32 = 2;
/// What the host is given to enqueue launches that are timed, so that no kernel waits for it: it takes a few microseconds
/// for each of a step's few hundred.
const HEAD_START: Duration = Duration::from_millis(20);

/// A GPU with the kernels of this build.
pub struct CudaPlatform {
    cuda: Cuda,
    stream: kvw_stream,
    kernels: Kernels,
    memory: RefCell<HashMap<u64, Memory>>,
    stamps: RefCell<Vec<Stamp>>,
}

impl CudaPlatform {
    /// On `cuda`.
    ///
    /// # Errors
    /// [`kvwarp::Error::NotBuilt`] without kernels, [`kvwarp::Error::Cuda`].
    pub fn new(cuda: Cuda) -> kvwarp::Result<Self> {
        let (stream, kernels) = (cuda.stream()?, Kernels::linked()?);
        Ok(Self { cuda, stream, kernels, memory: RefCell::default(), stamps: RefCell::default() })
    }
}

impl Platform for CudaPlatform {
    fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    fn stream(&self) -> kvw_stream {
        self.stream
    }

    fn alloc(&self, what: &'static str, bytes: usize) -> Result<u64> {
        match self.cuda.allocate(bytes) {
            Ok(memory) => {
                let at = memory.at();
                self.memory.borrow_mut().insert(at, memory);
                Ok(at)
            }
            Err(kvwarp::Error::Cuda { code: OUT_OF_MEMORY, .. }) => {
                let (free, _) = self.cuda.memory()?;
                Err(GpuError::Memory { what, need: bytes, free })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn release(&self, at: u64) {
        self.memory.borrow_mut().remove(&at);
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: here and below addresses are of memory that `alloc` gave and `release` has not taken back, and the
        // engine touches no more bytes than it asked for.
        Ok(unsafe { self.cuda.write(at, bytes) }?)
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        Ok(unsafe { self.cuda.read(at, bytes) }?)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        Ok(unsafe { self.cuda.zero(at, bytes) }?)
    }

    fn copy(&self, pieces: &Pieces) -> Result<()> {
        // SAFETY: as above; the two places do not overlap.
        Ok(unsafe { self.cuda.copy(pieces) }?)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        // SAFETY: as above.
        Ok(unsafe { self.cuda.gemm(gemm) }?)
    }

    fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Replay>>> {
        let graph = self.cuda.record::<GpuError>(body)?;
        Ok(graph.map(|graph| Box::new(graph) as Box<dyn Replay>))
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok(self.cuda.memory()?)
    }

    fn stamp(&self) -> Result<()> {
        let mut stamps = self.stamps.borrow_mut();
        if stamps.is_empty() {
            self.cuda.hold(HEAD_START)?;
        }
        stamps.push(self.cuda.stamp()?);
        Ok(())
    }

    fn stamps(&self) -> Result<Vec<Duration>> {
        let stamps = self.stamps.take();
        let times = stamps.windows(2).map(|pair| pair[1].since(&pair[0]));
        Ok(times.collect::<kvwarp::Result<_>>()?)
    }
}

impl Replay for Graph {
    fn launch(&self) -> Result<()> {
        Ok(Graph::launch(self)?)
    }
}
