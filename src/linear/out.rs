//! The output matrix, written by several workers at once.

use std::marker::PhantomData;

/// `[n, rows]` floats of which every worker writes its own rows, for all tokens.
pub(super) struct Out<'a> {
    start: *mut f32,
    len: usize,
    rows: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: `Out` is an exclusive borrow; `put` asks its callers to write disjoint places.
unsafe impl Sync for Out<'_> {}
// SAFETY: as above.
unsafe impl Send for Out<'_> {}

impl<'a> Out<'a> {
    pub fn new(y: &'a mut [f32], rows: usize) -> Self {
        Self { start: y.as_mut_ptr(), len: y.len(), rows, borrow: PhantomData }
    }

    /// Writes `values` to rows `row..` of `token`.
    ///
    /// # Safety
    /// No two threads may write the same row of a token at the same time.
    pub unsafe fn put(&self, token: usize, row: usize, values: &[f32]) {
        let at = token * self.rows + row;
        assert!(row + values.len() <= self.rows && at + values.len() <= self.len);
        // SAFETY: in bounds by the assertion, borrowed exclusively, and this caller's alone.
        unsafe { self.start.add(at).copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }
}
