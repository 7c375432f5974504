//! Memory and streams of cudarc and cust as the ops take them: an engine built on either passes what it has, uncopied.
//!
//! Both work in the device's primary context, as the kernels do, so memory and streams of one are good with those of the
//! other. A view borrows its owner: keep it until the op is enqueued.

#[cfg(feature = "cudarc")]
pub mod cudarc;
#[cfg(feature = "cust")]
pub mod cust;

use std::marker::PhantomData;

use crate::{Error, Result};

/// Elements on a GPU that ops read; `S` is dropped with it.
#[derive(Debug)]
pub struct View<'a, T, S = ()> {
    at: *const T,
    len: usize,
    _held: S,
    of: PhantomData<&'a [T]>,
}

/// Elements on a GPU that ops write; `S` is dropped with it.
#[derive(Debug)]
pub struct ViewMut<'a, T, S = ()> {
    at: *mut T,
    len: usize,
    _held: S,
    of: PhantomData<&'a mut [T]>,
}

impl<T, S> View<'_, T, S> {
    /// Device address of the first.
    pub const fn ptr(&self) -> *const T {
        self.at
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address for `field` of `op`, which reads `need` elements.
    ///
    /// # Errors
    /// [`Error::Len`], naming both, where there are fewer.
    pub fn holding(&self, op: &'static str, field: &'static str, need: usize) -> Result<*const T> {
        enough(op, field, need, self.len).map(|()| self.at)
    }
}

impl<T, S> ViewMut<'_, T, S> {
    /// Device address of the first.
    pub const fn ptr(&self) -> *mut T {
        self.at
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address for `field` of `op`, which writes `need` elements.
    ///
    /// # Errors
    /// [`Error::Len`], naming both, where there are fewer.
    pub fn holding(&self, op: &'static str, field: &'static str, need: usize) -> Result<*mut T> {
        enough(op, field, need, self.len).map(|()| self.at)
    }
}

fn enough(op: &'static str, buffer: &'static str, need: usize, got: usize) -> Result<()> {
    if got >= need { Ok(()) } else { Err(Error::Len { op, buffer, need, got }) }
}
