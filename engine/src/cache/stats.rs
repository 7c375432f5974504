//! What a cache costs, counted where the memory is taken.

use super::head::Rules;
use super::latent::{in_window, stride};
use super::{AlignedBytes, Cache, CacheError, Latents, Plan, Sequence, Shape};
use crate::runner::Row;
use crate::spec::CacheSpec;
use kvwarp::pages::{Entry, Pools, ring_slabs};
use kvwarp::slab::{Format, TOKENS};

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
            capacity_bytes: self.taken().iter().sum(),
            effective_bits: if held == 0 { 0.0 } else { (used_bytes * 8) as f64 / elements as f64 },
        }
    }

    /// Bytes from the allocator when they were the most: pools, rings and page tables, one exact layer of a prompt.
    pub fn most_bytes(&self) -> [usize; 3] {
        self.most
    }

    pub(super) fn note_peak(&mut self, row: Row) {
        let bytes = self.used_bytes(self.sequence(row)) + self.staged();
        let sequence = self.sequence_mut(row);
        sequence.peak = sequence.peak.max(bytes);
        let taken = self.taken();
        if taken.iter().sum::<usize>() > self.most.iter().sum() {
            self.most = taken;
        }
    }

    fn staged(&self) -> usize {
        self.staging.iter().map(AlignedBytes::len).sum()
    }

    fn used_bytes(&self, sequence: &Sequence) -> usize {
        let entries = || sequence.heads.iter().flat_map(|head| &head.table);
        let slab = |entry: &Entry| {
            entry.get().map_or(0, |(format, _)| self.pools.pool(format).slab_stride())
        };
        let slot = |entry: &Entry| {
            let latents = self.latents.as_ref().zip(entry.get());
            latents.map_or(0, |(latents, (format, _))| latents.stride(format))
        };
        entries().map(|entry| slab(entry) + size_of::<Entry>()).sum::<usize>()
            + sequence.rings.len()
            + sequence.table.iter().map(|entry| slot(entry) + size_of::<Entry>()).sum::<usize>()
    }

    /// Bytes from the allocator, as [`Cache::most_bytes`] has them.
    fn taken(&self) -> [usize; 3] {
        let pools: usize = Format::ALL.iter().map(|&f| self.pools.pool(f).capacity_bytes()).sum();
        let pools = pools + self.latents.as_ref().map_or(0, Latents::capacity_bytes);
        let sequences = self.sequences.iter().flatten().map(|sequence| {
            let tables = sequence.heads.iter().map(|head| head.table.capacity());
            let entries = tables.sum::<usize>() + sequence.table.capacity();
            sequence.rings.capacity() + entries * size_of::<Entry>()
        });
        let staging = self.staging.iter().map(AlignedBytes::capacity).sum::<usize>();
        [pools, sequences.sum(), staging + self.spare.capacity()]
    }
}

/// Bytes of a sequence of `shape.context` tokens in a cache of `spec`, with what a model adds to it.
///
/// # Errors
/// [`CacheError::Kernel`] for a head size that no slab has.
pub fn full_bytes(spec: &CacheSpec, shape: Shape, plan: &Plan) -> Result<usize, CacheError> {
    if let Some(latents) = &plan.latents {
        let slabs = Rules::new(spec, None).slabs(shape.context);
        let packed: usize =
            slabs.iter().map(|&(format, n)| n * stride(latents.iter(), format)).sum();
        let newest = in_window(spec, shape.context) * stride(latents.iter(), Format::F16);
        return Ok(packed + newest + shape.context.div_ceil(TOKENS) * size_of::<Entry>());
    }
    let pools = Pools::with_meta(shape.head_dim, spec.group, spec.meta)?;
    let bytes = |format| pools.pool(format).slab_stride();
    let head = |h| {
        let rules = Rules { store: plan.store(spec, h), ..Rules::new(spec, None) };
        let slabs = rules.slabs(shape.context).into_iter();
        let packed: usize = slabs.map(|(format, n)| n * (bytes(format) + size_of::<Entry>())).sum();
        ring_slabs(spec.window) * bytes(Format::F16) + packed
    };
    Ok((0..shape.layers * shape.kv_heads).map(head).sum())
}
