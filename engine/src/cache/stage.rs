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
    /// Where there are latents, [`Cache::lay`] has to expand those held into it.
    pub fn stage(&mut self, row: Row, layer: usize, n: usize) {
        let (slab, ring_bytes, range) = (self.slab_bytes(), self.ring_bytes(), self.range(layer));
        let held = |head: &Head| (head.len + n).div_ceil(TOKENS) - head.packed;
        let heads = &self.sequence(row).heads[range.clone()];
        let bytes = heads.iter().map(held).max().unwrap_or(0) * slab;
        let (before, kv_heads) = (self.staged_bytes(layer), range.len());
        if before >= bytes && before > 0 {
            return;
        }
        let mut to = std::mem::take(&mut self.spare);
        to.resize(kv_heads * bytes);
        if self.latents.is_some() {
            self.staging[layer] = to;
            return self.note_peak(row);
        }
        let Sequence { heads, rings, .. } = self.sequence(row);
        for (i, h) in range.enumerate() {
            let from = match before {
                0 => rings.slice(h * ring_bytes, ring_bytes),
                _ => self.staging[layer].slice(i * before, before),
            };
            heads[h].move_ring(from, to.slice_mut(i * bytes, bytes), slab);
        }
        self.staging[layer] = to;
        self.note_peak(row);
    }

    /// Gives back what the staged `layer` has room for beyond the tokens that it holds.
    pub fn tighten(&mut self, row: Row, layer: usize) {
        let (slab, range, before) =
            (self.slab_bytes(), self.range(layer), self.staged_bytes(layer));
        let heads = &self.sequence(row).heads[range];
        let slabs = heads.iter().map(|head| head.len.div_ceil(TOKENS) - head.packed).max();
        let bytes = slabs.unwrap_or(0).max(1) * slab;
        let mut to = AlignedBytes::zeroed(heads.len() * bytes);
        for (i, head) in heads.iter().enumerate() {
            let from = self.staging[layer].slice(i * before, before);
            head.move_ring(from, to.slice_mut(i * bytes, bytes), slab);
        }
        self.staging[layer] = to;
    }

    /// Writes `n` tokens of every head of the staged `layer`: `k` (rotated) and `v`, each `[n, kv_heads, head_dim]`.
    pub fn fill(&mut self, row: Row, layer: usize, k: &[f32], v: &[f32], n: usize) {
        for h in 0..self.shape.kv_heads {
            let at = self.range(layer).start + h;
            let first = self.sequence(row).heads[at].len;
            self.lay(layer, (h, first), [k, v], n);
            self.sequence_mut(row).heads[at].len += n;
        }
    }

    /// Writes `n` tokens of head `h` of the staged `layer` at slots from `first` on; K and V as of [`Cache::fill`].
    pub fn lay(&mut self, layer: usize, (h, first): (usize, usize), kv: [&[f32]; 2], n: usize) {
        let (d, stride) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        let (bytes, f16) = (self.staged_bytes(layer), *self.pools.layout(Format::F16));
        let ring = self.staging[layer].slice_mut(h * bytes, bytes);
        let [k, v] = kv.map(|data| Rows { data: &data[h * d..], stride });
        kv_pack::fill(ring, &f16, first, k, v, n);
    }

    /// Packs what has left the window of the staged `layer`, a slab a thread of `team`, and returns the rest to its ring;
    /// of latents nothing is left to do.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn compress(&mut self, row: Row, layer: usize, team: &Team) -> Result<(), CacheError> {
        let (slab, ring_bytes, staged) =
            (self.slab_bytes(), self.ring_bytes(), self.staged_bytes(layer));
        let range = self.range(layer);
        let Self { spec, plan, shape, pools, latents, sequences, staging, spare, .. } = self;
        if latents.is_some() {
            *spare = std::mem::take(&mut staging[layer]);
            return Ok(());
        }
        let Sequence { heads, rings, .. } = open_mut(sequences, row);
        for (i, h) in range.enumerate() {
            let rules = plan.rules(spec, h, shape.head_dim);
            let from = staging[layer].slice_mut(i * staged, staged);
            heads[h].after_fill(&rules, from, pools, team)?;
            heads[h].move_ring(from, rings.slice_mut(h * ring_bytes, ring_bytes), slab);
        }
        *spare = std::mem::take(&mut staging[layer]);
        self.note_peak(row);
        Ok(())
    }

    /// Gives the memory of staging back; every staged layer must have been compressed, or its sequence be closed.
    pub fn unstage(&mut self) {
        self.staging.fill(AlignedBytes::default());
        self.spare = AlignedBytes::default();
    }

    /// What attention over the staged `layer` of `row` reads, a view a kv head.
    pub fn staged_views(&self, row: Row, layer: usize) -> Vec<HeadView<'_>> {
        let bytes = self.staged_bytes(layer);
        let ring = |i: usize| self.staging[layer].slice(i * bytes, bytes);
        let heads = self.sequence(row).heads[self.range(layer)].iter().enumerate();
        heads.map(|(i, head)| head.view(&self.pools, ring(i))).collect()
    }

    /// Bytes of the staged ring of a head of `layer`; 0 where it is not staged.
    pub(super) fn staged_bytes(&self, layer: usize) -> usize {
        self.staging[layer].len() / self.shape.kv_heads
    }
}
