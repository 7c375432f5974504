//! A GPU on paper: it has so much memory and counts what is taken of it, but holds nothing and runs nothing.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Duration;

use kvwarp::device::{Gemm, Pieces};
use kvwarp::ffi::kvw_stream;
use kvwarp::kernels::Kernels;

use super::platform::{GpuError, Platform, Replay, Result};

/// What the driver's pool rounds sizes up to.
const GRAIN: usize = 512;

/// Memory that is only counted.
pub struct Paper {
    kernels: Kernels,
    bytes: usize,
    taken: Cell<usize>,
    buffers: RefCell<HashMap<u64, usize>>,
    next: Cell<u64>,
}

impl Paper {
    /// With `bytes` free.
    ///
    /// # Errors
    /// [`kvwarp::Error::NotBuilt`] without kernels: they say what scratch they need.
    pub fn new(bytes: usize) -> kvwarp::Result<Self> {
        Ok(Self {
            kernels: Kernels::linked()?,
            bytes,
            taken: Cell::new(0),
            buffers: RefCell::default(),
            next: Cell::new(GRAIN as u64),
        })
    }
}

impl Platform for Paper {
    fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    fn stream(&self) -> kvw_stream {
        std::ptr::null_mut()
    }

    fn alloc(&self, what: &'static str, bytes: usize) -> Result<u64> {
        let (free, need) = (self.bytes - self.taken.get(), bytes.max(1).next_multiple_of(GRAIN));
        if need > free {
            return Err(GpuError::Memory { what, need: bytes, free });
        }
        let at = self.next.get();
        self.next.set(at + need as u64);
        self.taken.set(self.taken.get() + need);
        self.buffers.borrow_mut().insert(at, need);
        Ok(at)
    }

    fn release(&self, at: u64) {
        let bytes = self.buffers.borrow_mut().remove(&at).unwrap_or(0);
        self.taken.set(self.taken.get() - bytes);
    }

    fn holds(&self) -> bool {
        false
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Err(GpuError::Unsupported("a GPU on paper has nothing to read".into()))
    }

    fn zero(&self, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    fn copy(&self, _: &Pieces) -> Result<()> {
        Ok(())
    }

    fn gemm(&self, _: &Gemm) -> Result<()> {
        Err(GpuError::Unsupported("a GPU on paper runs nothing".into()))
    }

    fn record(&self, _: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Replay>>> {
        Ok(None)
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok((self.bytes - self.taken.get(), self.bytes))
    }

    fn stamp(&self) -> Result<()> {
        Ok(())
    }

    fn stamps(&self) -> Result<Vec<Duration>> {
        Ok(Vec::new())
    }
}
