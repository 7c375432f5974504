//! Elements behind the pointers of params.

use crate::ffi;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Deref;

/// Params, or a part of them, that workers read: their pointers are followed under the promise that the entry has.
pub(super) struct Given<'a, P>(pub &'a P);

impl<P> Clone for Given<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Given<'_, P> {}

impl<P> Deref for Given<'_, P> {
    type Target = P;

    fn deref(&self) -> &P {
        self.0
    }
}

// SAFETY: numbers and addresses; following those is what each user of one promises about.
unsafe impl<P> Sync for Given<'_, P> {}

/// `len` elements at `at`.
///
/// # Safety
/// They are there, aligned and initialised, and nobody writes them while the slice lives.
pub(super) unsafe fn slice<'a, T>(at: *const T, len: usize) -> &'a [T] {
    // SAFETY: the caller's promise; an empty slice needs none.
    if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(at, len) } }
}

/// An array that workers write or read side by side, each elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a, T> {
    at: *mut T,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: who takes elements promises that they are its own.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<T> Shared<'_, T> {
    pub(super) fn new(at: *mut T) -> Self {
        Self { at, of: PhantomData }
    }

    /// `len` elements from `first` on.
    ///
    /// # Safety
    /// They are there, and no one else uses them while the slice lives.
    pub(super) unsafe fn take<'b>(self, first: usize, len: usize) -> &'b mut [T] {
        if len == 0 {
            return &mut [];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(first), len) }
    }
}

/// Rows of f16 or bf16.
#[derive(Clone, Copy)]
pub(super) struct Halves<'a> {
    bits: Shared<'a, u16>,
    brain: bool,
}

impl Halves<'_> {
    /// `dtype` is `KVW_F16` or `KVW_BF16`; `at` is written only by [`Halves::put`].
    pub(super) fn new(at: *const c_void, dtype: i32) -> Self {
        Self { bits: Shared::new(at.cast_mut().cast()), brain: dtype == ffi::KVW_BF16 }
    }

    /// Elements from `first` on.
    ///
    /// # Safety
    /// They are there, and nobody writes them meanwhile.
    pub(super) unsafe fn get(self, first: usize, to: &mut [f32]) {
        // SAFETY: the caller's promise; both types are 16 bits of any value.
        unsafe {
            if self.brain {
                slice(self.bits.at.add(first).cast::<bf16>(), to.len()).convert_to_f32_slice(to);
            } else {
                slice(self.bits.at.add(first).cast::<f16>(), to.len()).convert_to_f32_slice(to);
            }
        }
    }

    /// Elements from `first` on, rounded to nearest even.
    ///
    /// # Safety
    /// They are there, and no one else uses them meanwhile.
    pub(super) unsafe fn put(self, first: usize, from: &[f32]) {
        // SAFETY: the caller's promise.
        let to = unsafe { self.bits.take(first, from.len()) };
        if self.brain {
            bytemuck::cast_slice_mut::<_, bf16>(to).convert_from_f32_slice(from);
        } else {
            bytemuck::cast_slice_mut::<_, f16>(to).convert_from_f32_slice(from);
        }
    }
}

/// Within the range of f16, as rounding with saturation leaves it; NaN stays.
pub(super) fn saturate(x: &mut [f32]) {
    let most = f16::MAX.to_f32();
    x.iter_mut().for_each(|x| *x = x.clamp(-most, most));
}
