//! Reading many tokens, a layer at a time.

use kvwarp::kv_pack::{self, Rows};
use kvwarp::pages::HeadView;
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::Team;

use super::head::Head;
use super::{AlignedBytes, Cache, CacheError, Sequence, open_mut};
use crate::runner::Row;

impl Cache {
    /// Lays out the ring of `layer` of `row` so that `n` more tokens fit without packing any.
    pub fn stage(&mut self, row: Row, layer: usize, n: usize) {
        let (slab, ring_bytes, range) = (self.slab_bytes(), self.ring_bytes(), self.range(layer));
        let Self { sequences, staging, shape, .. } = self;
        let Sequence { heads, rings, .. } = open_mut(sequences, row);
        let held = |head: &Head| (head.len + n).div_ceil(TOKENS) - head.packed;
        let slabs = heads[range.clone()].iter().map(held).max().unwrap_or(0);
        staging.resize(shape.kv_heads * slabs * slab);
        for (i, h) in range.enumerate() {
            let ring = rings.slice(h * ring_bytes, ring_bytes);
            heads[h].move_ring(ring, staging.slice_mut(i * slabs * slab, slabs * slab), slab);
        }
        self.note_peak(row);
    }

    /// Writes `n` tokens of every head of the staged `layer`: `k` (rotated) and `v`, each `[n, kv_heads, head_dim]`.
    pub fn fill(&mut self, row: Row, layer: usize, k: &[f32], v: &[f32], n: usize) {
        let (d, stride) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        let f16 = *self.pools.layout(Format::F16);
        let (bytes, range) = (self.staged_bytes(), self.range(layer));
        let Self { sequences, staging, .. } = self;
        for (i, head) in open_mut(sequences, row).heads[range].iter_mut().enumerate() {
            let ring = staging.slice_mut(i * bytes, bytes);
            let [k, v] = [k, v].map(|data| Rows { data: &data[i * d..], stride });
            kv_pack::fill(ring, &f16, head.len, k, v, n);
            head.len += n;
        }
    }

    /// Packs what has left the window of the staged `layer`, a slab a thread of `team`, and returns the rest to its ring.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn compress(&mut self, row: Row, layer: usize, team: &Team) -> Result<(), CacheError> {
        let (slab, ring_bytes, staged) =
            (self.slab_bytes(), self.ring_bytes(), self.staged_bytes());
        let range = self.range(layer);
        let Self { spec, plan, shape, pools, sequences, staging } = self;
        let Sequence { heads, rings, .. } = open_mut(sequences, row);
        for (i, h) in range.enumerate() {
            let rules = plan.rules(spec, h, shape.head_dim);
            let from = staging.slice_mut(i * staged, staged);
            heads[h].after_fill(&rules, from, pools, team)?;
            heads[h].move_ring(from, rings.slice_mut(h * ring_bytes, ring_bytes), slab);
        }
        self.note_peak(row);
        Ok(())
    }

    /// Gives the memory of staging back; every staged layer must have been compressed, or its sequence be closed.
    pub fn unstage(&mut self) {
        self.staging = AlignedBytes::default();
    }

    /// What attention over the staged `layer` of `row` reads, a view a kv head.
    pub fn staged_views(&self, row: Row, layer: usize) -> Vec<HeadView<'_>> {
        let bytes = self.staged_bytes();
        let ring = |i: usize| self.staging.slice(i * bytes, bytes);
        let heads = self.sequence(row).heads[self.range(layer)].iter().enumerate();
        heads.map(|(i, head)| head.view(&self.pools, ring(i))).collect()
    }

    fn staged_bytes(&self) -> usize {
        self.staging.len() / self.shape.kv_heads
    }
}
