//! Pinned memory between the host's and a GPU's.

use cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice, result};

/// Bytes of a pinned buffer; two of them alternate, so that one is filled while the other is sent.
pub(super) const STAGE: usize = 8 << 20;

/// Pinned memory that uploads pass through, made when first needed.
#[derive(Default)]
pub(super) struct Staging {
    /// Each with the event that says when it has been sent.
    buffers: Vec<(PinnedHostSlice<u8>, CudaEvent)>,
    next: usize,
}

impl Staging {
    /// Copies `part`, [`STAGE`] bytes at most, into pinned memory and from there to `at`.
    ///
    /// # Safety
    /// `at` is an address of the stream's device with room for `part`.
    pub unsafe fn send(
        &mut self,
        stream: &CudaStream,
        at: u64,
        part: &[u8],
    ) -> Result<(), DriverError> {
        let context = stream.context();
        if self.buffers.len() < 2 {
            // SAFETY: bytes are written before they are read.
            let pinned = unsafe { context.alloc_pinned(STAGE) }?;
            self.buffers.push((pinned, context.new_event(None)?));
            self.next = self.buffers.len() - 1;
        }
        let (pinned, sent) = &mut self.buffers[self.next];
        sent.synchronize()?;
        let pinned = &mut pinned.as_mut_slice()?[..part.len()];
        pinned.copy_from_slice(part);
        // SAFETY: the caller's promise; the pinned bytes stay as they are until the event says that they were sent.
        unsafe { result::memcpy_htod_async(at, pinned, stream.cu_stream()) }?;
        sent.record(stream)?;
        self.next = 1 - self.next;
        Ok(())
    }
}
