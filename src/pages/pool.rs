//! Slabs of one size in host memory.

use super::Slots;
use crate::slab::Layout;

/// Alignment of slabs in host memory: one cache line, and what a wide vector load wants.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Slabs of one size in host memory: grows on demand, up to a limit where one is set.
#[derive(Default)]
pub struct Pool {
    lines: Vec<Line>,
    slab_lines: usize,
    slab_bytes: usize,
    slots: Slots,
    /// Slabs of another owner, to read, instead of its own.
    lent: Option<&'static [u8]>,
}

impl Clone for Pool {
    /// Keeps the room that was reserved.
    fn clone(&self) -> Self {
        let mut lines = Vec::with_capacity(self.lines.capacity());
        lines.extend_from_slice(&self.lines);
        Self { lines, slots: self.slots.clone(), ..*self }
    }
}

impl Pool {
    /// An empty pool of slabs of `layout.slab_bytes()` bytes.
    pub fn new(layout: &Layout) -> Self {
        Self::of(layout.slab_bytes())
    }

    /// An empty pool of slabs of `slab_bytes` bytes.
    pub fn of(slab_bytes: usize) -> Self {
        let slab_lines = slab_bytes.div_ceil(64);
        Self { lines: Vec::new(), slab_lines, slab_bytes, slots: Slots::default(), lent: None }
    }

    /// Who owns its slabs.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Who owns its slabs, to share one or to set a limit; [`Pool::take`] takes one.
    pub fn slots_mut(&mut self) -> &mut Slots {
        &mut self.slots
    }

    /// Bytes from a slab to the next: whole cache lines.
    pub fn slab_stride(&self) -> usize {
        self.slab_lines * 64
    }

    /// Make room for `slabs` more without another allocation.
    pub fn reserve(&mut self, slabs: usize) {
        let more = (self.slots.used() + slabs).saturating_sub(self.slots.touched());
        self.lines.reserve_exact(more * self.slab_lines);
    }

    /// A slab, its bytes zero or stale; `None` at the limit.
    pub fn take(&mut self) -> Option<u32> {
        let slot = self.slots.take()?;
        let lines = self.slots.touched() * self.slab_lines;
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0; 64]));
        }
        Some(slot)
    }

    /// Give a slab back; it is free when no one else owns it.
    pub fn give(&mut self, index: u32) {
        self.slots.give(index);
    }

    /// From now on its slabs are these, one after the other without padding.
    #[cfg(kvw_cuda)]
    pub(crate) fn lend(&mut self, slabs: &'static [u8]) {
        self.lent = Some(slabs);
    }

    /// Bytes of one slab.
    pub fn slab(&self, index: usize) -> &[u8] {
        if let Some(slabs) = self.lent {
            return &slabs[index * self.slab_bytes..][..self.slab_bytes];
        }
        let lines = &self.lines[index * self.slab_lines..][..self.slab_lines];
        &bytemuck::cast_slice(lines)[..self.slab_bytes]
    }

    /// Bytes of one slab, to write: it has one owner.
    pub fn slab_mut(&mut self, index: usize) -> &mut [u8] {
        debug_assert!(self.slots.owners(index as u32) == 1, "slab {index} is shared or free");
        let lines = &mut self.lines[index * self.slab_lines..][..self.slab_lines];
        &mut bytemuck::cast_slice_mut(lines)[..self.slab_bytes]
    }

    /// Bytes taken from the allocator.
    pub fn capacity_bytes(&self) -> usize {
        self.lines.capacity() * 64
    }

    /// Bytes of slabs in use.
    pub fn used_bytes(&self) -> usize {
        self.slots.used() * self.slab_stride()
    }
}
