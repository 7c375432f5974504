//! What a cache costs, counted where the memory is taken.

use super::head::Rules;
use super::{AlignedBytes, Cache, CacheError, Sequence, Shape};
use crate::runner::Row;
use crate::spec::CacheSpec;
use kvwarp::pages::{Entry, Pools, ring_slabs};
use kvwarp::slab::Format;

/// Memory of a sequence, in bytes from the allocator unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheStats {
    /// Tokens held; the most of any head.
    pub tokens: usize,
    /// Slabs that it refers to, rings and page tables.
    pub used_bytes: usize,
    /// Most of `used_bytes` and staging so far.
    pub peak_bytes: usize,
    /// Everything that the cache took from the allocator, used or not, for this sequence or others.
    pub capacity_bytes: usize,
    /// Bits of `used_bytes` for each element of K and V held; 0 when nothing is.
    pub effective_bits: f64,
}

impl Cache {
    /// What a sequence costs now; slabs that it shares count in full.
    pub fn stats(&self, row: Row) -> CacheStats {
        let sequence = self.sequence(row);
        let held: usize = sequence.heads.iter().map(|head| head.len).sum();
        let elements = 2 * held * self.shape.head_dim;
        let used_bytes = self.used_bytes(sequence);
        CacheStats {
            tokens: sequence.heads.iter().map(|head| head.len).max().unwrap_or(0),
            used_bytes,
            peak_bytes: sequence.peak.max(used_bytes),
            capacity_bytes: self.capacity_bytes(),
            effective_bits: if held == 0 { 0.0 } else { (used_bytes * 8) as f64 / elements as f64 },
        }
    }

    pub(super) fn note_peak(&mut self, row: Row) {
        let bytes = self.used_bytes(self.sequence(row)) + self.staged();
        let sequence = self.sequence_mut(row);
        sequence.peak = sequence.peak.max(bytes);
    }

    fn staged(&self) -> usize {
        self.staging.iter().map(AlignedBytes::len).sum()
    }

    fn used_bytes(&self, sequence: &Sequence) -> usize {
        let entries = || sequence.heads.iter().flat_map(|head| &head.table);
        let slab = |entry: &Entry| {
            entry.get().map_or(0, |(format, _)| self.pools.pool(format).slab_stride())
        };
        entries().map(|entry| slab(entry) + size_of::<Entry>()).sum::<usize>()
            + sequence.rings.len()
    }

    fn capacity_bytes(&self) -> usize {
        let pools: usize = Format::ALL.iter().map(|&f| self.pools.pool(f).capacity_bytes()).sum();
        let sequences = self.sequences.iter().flatten().map(|sequence| {
            let tables = sequence.heads.iter().map(|head| head.table.capacity());
            sequence.rings.capacity() + tables.sum::<usize>() * size_of::<Entry>()
        });
        let staging = self.staging.iter().map(AlignedBytes::capacity).sum::<usize>();
        pools + staging + self.spare.capacity() + sequences.sum::<usize>()
    }
}

/// Bytes of a cache of `spec` that holds `shape.context` tokens, without a calibration: no head is kept at 4 bits.
///
/// # Errors
/// [`CacheError::Kernel`] for a head size that no slab has.
pub fn full_bytes(spec: &CacheSpec, shape: Shape) -> Result<usize, CacheError> {
    let pools = Pools::with_meta(shape.head_dim, spec.group, spec.meta)?;
    let bytes = |format| pools.pool(format).slab_stride();
    let mut head = ring_slabs(spec.window) * bytes(Format::F16);
    for (format, slabs) in Rules::new(spec, None).slabs(shape.context) {
        head += slabs * (bytes(format) + size_of::<Entry>());
    }
    Ok(head * shape.layers * shape.kv_heads)
}
