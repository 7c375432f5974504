//! The cache as kernels see it.

use kvwarp::ffi::kvw_cache;

use super::Cache;
use crate::cache::Shape;
use crate::gpu::ops::at;
use crate::gpu::platform::Buffer;
use crate::runner::Row;

impl Cache {
    /// The first `seqs` rows of a layer to a kernel, lengths `[seqs]` at `lens`, slabs in the table at `packed` or, where
    /// that is 0, as lengths have it.
    pub fn view(&self, layer: usize, seqs: usize, [lens, packed]: [u64; 2]) -> kvw_cache {
        let Shape { kv_heads, head_dim, .. } = self.shape;
        kvw_cache {
            pools: std::array::from_fn(|f| at(self.pools[f].as_ref().map_or(0, Buffer::at))),
            ring: at(self.ring_at(layer, Row(0), 0)),
            table: at(self.table_at(layer, Row(0))),
            lens: at(lens),
            packed: at(packed),
            seqs: seqs as i32,
            kv_heads: kv_heads as i32,
            head_dim: head_dim as i32,
            group: self.spec.group as i32,
            window: self.spec.window as i32,
            ring_slabs: self.ring_slabs() as i32,
            table_stride: self.stride as i32,
            table_heads: kv_heads as i32,
            lens_heads: if self.spec.ragged() { kv_heads as i32 } else { 1 },
            meta: self.spec.meta as i32,
            ..Default::default()
        }
    }

    /// The same of one row.
    pub fn view_of(&self, layer: usize, row: Row, told: [u64; 2]) -> kvw_cache {
        kvw_cache {
            table: at(self.table_at(layer, row)),
            ring: at(self.ring_at(layer, row, 0)),
            ..self.view(layer, 1, told)
        }
    }

    /// The same of one row, whose recent tokens lie in another ring of `slabs` slabs a head.
    pub fn staged_view(
        &self,
        layer: usize,
        row: Row,
        told: [u64; 2],
        (ring, slabs): (u64, usize),
    ) -> kvw_cache {
        let own = self.view_of(layer, row, told);
        kvw_cache { ring: at(ring), ring_slabs: slabs as i32, ..own }
    }

    /// Weights of the rounding errors of a layer's keys, or 0.
    pub fn feedback(&self, layer: usize) -> u64 {
        let Shape { kv_heads, head_dim, .. } = self.shape;
        let offset = layer * kv_heads * head_dim * head_dim * 2;
        self.feedback.as_ref().map_or(0, |buffer| buffer.at() + offset as u64)
    }

    /// Share of a group's range that codes span, as kernels have it.
    pub fn range(&self) -> f32 {
        f32::from(self.spec.range) / 100.0
    }

    /// Slot `slot` of the ring of a row's first head.
    pub fn ring_at(&self, layer: usize, row: Row, slot: usize) -> u64 {
        let head = (layer * self.rows + row.0) * self.shape.kv_heads;
        self.rings.at() + ((head * self.ring_slabs() + slot) * self.f16_bytes()) as u64
    }
}
