//! Bytes aligned as slabs are: one cache line, which is also what the widest vector load wants.

/// One cache line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Owned bytes at 64-byte alignment; lengths and offsets are multiples of 64.
#[derive(Clone, Default)]
pub struct AlignedBytes(Vec<Line>);

impl AlignedBytes {
    /// `bytes` zeros.
    pub fn zeroed(bytes: usize) -> Self {
        Self(vec![Line([0; 64]); bytes.div_ceil(64)])
    }

    /// Makes it exactly `bytes` long; what it held may stay.
    pub fn resize(&mut self, bytes: usize) {
        let lines = bytes.div_ceil(64);
        self.0.reserve_exact(lines.saturating_sub(self.0.len()));
        self.0.resize(lines, Line([0; 64]));
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.0.len() * 64
    }

    /// Bytes taken from the allocator.
    pub fn capacity(&self) -> usize {
        self.0.capacity() * 64
    }

    /// `len` bytes from `start`.
    pub fn slice(&self, start: usize, len: usize) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[start..start + len]
    }

    /// `len` bytes from `start`, to write.
    pub fn slice_mut(&mut self, start: usize, len: usize) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[start..start + len]
    }
}
