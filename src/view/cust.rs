//! Buffers and streams of cust, which leaves the order between streams to its user: a buffer may be freed, or written by
//! another stream, only when the ops that use it have run.
//!
//! cust links libcuda: a program that uses it starts only where there is a driver. `csrc/link/stub` makes a library to
//! build with where there is none.

use std::marker::PhantomData;

use cust::memory::{DeviceCopy, DeviceSlice};
use cust::stream::Stream;

use super::{View, ViewMut};
use crate::ffi::kvw_stream;

/// A buffer, or part of one, for ops that read it.
#[must_use]
pub fn read<T: DeviceCopy>(slice: &DeviceSlice<T>) -> View<'_, T> {
    let at = slice.as_device_ptr().as_ptr();
    View { at, len: slice.len(), _held: (), of: PhantomData }
}

/// A buffer, or part of one, for ops that write it.
#[must_use]
pub fn write<T: DeviceCopy>(slice: &mut DeviceSlice<T>) -> ViewMut<'_, T> {
    let at = slice.as_device_ptr().as_mut_ptr();
    ViewMut { at, len: slice.len(), _held: (), of: PhantomData }
}

/// The stream for ops; its context must be current on this thread, as for all that cust does.
#[must_use]
pub fn stream(stream: &Stream) -> kvw_stream {
    stream.as_inner().cast()
}
