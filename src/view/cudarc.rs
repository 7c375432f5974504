//! Slices and streams of cudarc.

use std::marker::PhantomData;

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DriverError, SyncOnDrop};

use super::{View, ViewMut};
use crate::ffi::kvw_stream;
use crate::{Error, Result};

/// `slice` for ops on `stream` that read it: the stream waits for what other streams write there, and those wait for the
/// ops that are enqueued while the view lives.
#[must_use]
pub fn read<'a, T>(
    slice: &'a impl DevicePtr<T>,
    stream: &'a CudaStream,
) -> View<'a, T, SyncOnDrop<'a>> {
    let len = slice.len();
    let (at, held) = slice.device_ptr(stream);
    View { at: at as *const T, len, _held: held, of: PhantomData }
}

/// `slice` for ops on `stream` that write it, with the same order to other streams.
#[must_use]
pub fn write<'a, T>(
    slice: &'a mut impl DevicePtrMut<T>,
    stream: &'a CudaStream,
) -> ViewMut<'a, T, SyncOnDrop<'a>> {
    let len = slice.len();
    let (at, held) = slice.device_ptr_mut(stream);
    ViewMut { at: at as *mut T, len, _held: held, of: PhantomData }
}

/// The stream for ops; makes its context current on this thread, which is where they have to be enqueued.
///
/// # Errors
/// [`Error::Cuda`], also for what failed earlier in the context.
pub fn stream(stream: &CudaStream) -> Result<kvw_stream> {
    stream.context().bind_to_thread().map_err(failed)?;
    Ok(stream.cu_stream().cast())
}

pub(crate) fn failed(e: DriverError) -> Error {
    Error::Cuda { op: "device", code: e.0 as i32, what: e.to_string() }
}
