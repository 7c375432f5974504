//! What the GPU engine asks of a machine: memory, copies, one product that belongs to a library, and graphs.
//!
//! Everything is enqueued on one stream and runs in the order in which it was asked for; only [`Platform::read`] waits.
//! Addresses are the device's; nothing here follows them.

use std::rc::Rc;
use std::time::Duration;

use kvwarp::device::{Gemm, Pieces};
use kvwarp::ffi::kvw_stream;
use kvwarp::kernels::Kernels;

use super::metered::Metered;
use super::tally::Use;

/// Why a GPU did not do its part.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// Memory is short.
    #[error(
        "{what}: {need} bytes of GPU memory asked for, {free} free; less is needed with a smaller context (-c), \
         fewer sequences at once, or fewer bits (--cache q2)"
    )]
    Memory {
        /// What it was for.
        what: &'static str,
        /// Bytes asked for.
        need: usize,
        /// Bytes free.
        free: usize,
    },
    /// A model, cache or machine that the engine does not run on a GPU.
    #[error("{0}")]
    Unsupported(String),
    /// A weight is missing or of another type.
    #[error(transparent)]
    Weights(#[from] crate::error::Error),
    /// A kernel refused, or CUDA failed.
    #[error(transparent)]
    Kernel(#[from] kvwarp::Error),
}

/// What GPU calls return.
pub type Result<T, E = GpuError> = std::result::Result<T, E>;

/// Work recorded once, to be enqueued as a whole.
pub trait Replay {
    /// Enqueues it.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn launch(&self) -> Result<()>;
}

/// A device, its stream, and the kernels that run on it.
pub trait Platform {
    /// The ops.
    fn kernels(&self) -> &Kernels;

    /// What ops are enqueued on.
    fn stream(&self) -> kvw_stream;

    /// An address of `bytes` bytes that nobody has written, a multiple of 256; `what` they are for is what messages say.
    ///
    /// # Errors
    /// [`GpuError::Memory`] with the bytes that are free.
    fn alloc(&self, what: &'static str, bytes: usize) -> Result<u64>;

    /// Gives back what `alloc` gave, once what has been enqueued is done with it.
    fn release(&self, at: u64);

    /// Whether what is written is kept; where it is not, nobody need make it.
    fn holds(&self) -> bool {
        true
    }

    /// Copies from the host, in stream order; `bytes` may change once it returns.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Waits for the stream and copies to the host.
    ///
    /// # Errors
    /// [`GpuError::Kernel`], also of anything that failed since the last read.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()>;

    /// Writes zeros.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn zero(&self, at: u64, bytes: usize) -> Result<()>;

    /// Copies within the device; the two places do not overlap.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn copy(&self, pieces: &Pieces) -> Result<()>;

    /// Multiplies.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// Records what `body` enqueues (ops, `gemm`, `copy`, `zero`) without running it. `None`, and `body` is not called,
    /// where there are no graphs: the work is then enqueued each time.
    ///
    /// # Errors
    /// What `body` returns; [`GpuError::Kernel`].
    fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Replay>>>;

    /// Bytes free and bytes in all.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn memory(&self) -> Result<(usize, usize)>;

    /// Notes the moment at which what has been enqueued so far is done. What follows the first of some stamps may wait
    /// until the host has enqueued more.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn stamp(&self) -> Result<()>;

    /// Waits for the stream; gives the time from each stamp to the next, and forgets them.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    fn stamps(&self) -> Result<Vec<Duration>>;
}

/// Device memory, given back when dropped.
pub struct Buffer {
    platform: Rc<Metered>,
    of: Use,
    at: u64,
    bytes: usize,
}

/// What memory is for, in a report and in a message.
pub type What = (Use, &'static str);

impl Buffer {
    /// `bytes` that nobody has written.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    pub fn new(platform: &Rc<Metered>, what: What, bytes: usize) -> Result<Self> {
        let at = platform.alloc(what, bytes)?;
        Ok(Self { platform: Rc::clone(platform), of: what.0, at, bytes })
    }

    /// With these contents.
    ///
    /// # Errors
    /// As of [`Buffer::new`] and [`Platform::write`].
    pub fn of(platform: &Rc<Metered>, what: What, bytes: &[u8]) -> Result<Self> {
        let buffer = Self::new(platform, what, bytes.len())?;
        platform.write(buffer.at, bytes)?;
        Ok(buffer)
    }

    /// Of zeros.
    ///
    /// # Errors
    /// As of [`Buffer::new`] and [`Platform::zero`].
    pub fn zeroed(platform: &Rc<Metered>, what: What, bytes: usize) -> Result<Self> {
        let buffer = Self::new(platform, what, bytes)?;
        platform.zero(buffer.at, bytes)?;
        Ok(buffer)
    }

    /// Its first byte.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.platform.release(self.at, self.of, self.bytes);
    }
}
