//! Latents of a converted model on the device: `2 r kv_heads + c` elements of a token and layer, in slabs of
//! [`kvwarp::lowrank_kv`].
//!
//! A slot is 64 tokens in every layer, those of one layer in a pool of its own, so a sequence has one line of the page
//! table. Slabs that have left the window count against the limit as those of other stores do; newer ones stand for their
//! rings and are beside it, so many for each row. All are written as f16, and those that have left the window are packed
//! between steps.

use std::sync::Arc;

use kvwarp::device::Pieces;
use kvwarp::ffi::kvw_latent;
use kvwarp::lowrank_kv::Shape;
use kvwarp::pages::{Entry, packed_slabs};
use kvwarp::slab::{Format, TOKENS};

use super::lines::Line;
use super::{Cache, Edit};
use crate::cache::{beside, stride};
use crate::gpu::ops::at;
use crate::gpu::platform::{Buffer, Result};
use crate::runner::{Row, RunError};

/// Rows of each layer.
pub struct Latents(Arc<[Shape]>);

impl Latents {
    pub fn new(shapes: &Arc<[Shape]>) -> Self {
        Self(Arc::clone(shapes))
    }

    /// Bytes of a slot: of its slabs in all layers.
    pub fn slot_bytes(&self, format: Format) -> usize {
        stride(self.0.iter(), format)
    }
}

impl Cache {
    /// The first `seqs` rows of a layer from `row` on to a kernel, lengths `[seqs]` at `lens`; where there are latents.
    pub fn latents(&self, layer: usize, row: Row, seqs: usize, lens: u64) -> Option<kvw_latent> {
        let (shape, exact) =
            (self.latents.as_ref()?.0[layer], self.latent_pool(layer, Format::F16));
        // Where no sequence is long enough there is nothing packed, and no pool.
        let packed = self.spec.packs().map(|store| match self.latent_pool(layer, store) {
            0 => exact,
            packed => packed,
        });
        Some(kvw_latent {
            pool: at(exact),
            packed: at(packed.unwrap_or(0)),
            format: self.spec.store as i32,
            table: at(self.table_at(layer, row)),
            lens: at(lens),
            seqs: seqs as i32,
            kv_heads: shape.kv_heads() as i32,
            pairs: shape.pairs() as i32,
            rank: shape.rank() as i32,
            table_stride: self.stride as i32,
        })
    }

    /// Whether latents are kept, and no keys and values.
    pub fn has_latents(&self) -> bool {
        self.latents.is_some()
    }

    /// Slots beside those of a format that sequences share: of latents those in the windows of rows, and of a block that is
    /// read before it is packed.
    pub(super) fn beside(&self, format: usize) -> usize {
        let exact = self.has_latents() && format == Format::F16 as usize;
        if exact { beside(&self.spec, self.rows) } else { 0 }
    }

    /// The same that open sequences have not begun.
    pub(super) fn unbegun(&self, format: usize) -> usize {
        let begun = |line: &Line| line.entries.len() - line.packed;
        let begun = self.sequences.iter().flatten().map(|sequence| begun(&sequence.heads[0]));
        self.beside(format).saturating_sub(begun.sum())
    }

    /// Takes slots for what has left the windows of `rows` since they were packed last: entries, from where to where, and
    /// edits of the table. What they held before is given back: what follows is enqueued behind the packing.
    pub fn pack_next(
        &mut self,
        rows: impl Iterator<Item = Row>,
    ) -> std::result::Result<(Vec<[u32; 2]>, Vec<Edit>), RunError> {
        let (sinks, mut moves, mut edits) = (self.spec.sinks.div_ceil(TOKENS), vec![], vec![]);
        for row in rows {
            let Line { len, packed, .. } = *self.line(row, 0);
            let left = packed_slabs(len, self.spec.window).max(packed);
            for slab in packed.max(sinks)..left {
                let Some(store) = self.spec.packs() else { break };
                let (from, to) = (self.line(row, 0).entries[slab], self.take(store)?);
                moves.push([from.0, to.0]);
                edits.push([self.table_index(row, 0, slab), to.0]);
                self.give(from);
                self.line_mut(row).entries[slab] = to;
            }
            self.line_mut(row).packed = left;
        }
        Ok((moves, edits))
    }

    fn line_mut(&mut self, row: Row) -> &mut Line {
        &mut self.sequences[row.0].as_mut().expect("the row is open").heads[0]
    }

    /// Where a slot lies: its slab in each layer.
    pub(super) fn slabs_of_slot(&self, entry: Entry) -> Vec<(u64, usize)> {
        let (Some(latents), Some((format, slot))) = (&self.latents, entry.get()) else {
            return Vec::new();
        };
        let slab = |(layer, shape): (usize, &Shape)| {
            let bytes = shape.bytes(format);
            (self.latent_pool(layer, format) + (slot * bytes) as u64, bytes)
        };
        latents.0.iter().enumerate().map(slab).collect()
    }

    /// Copies a slot.
    pub(super) fn copy_slot(&self, to: Entry, from: Entry) -> Result<()> {
        for ((to, width), (from, _)) in
            self.slabs_of_slot(to).into_iter().zip(self.slabs_of_slot(from))
        {
            let piece = Pieces { to, from, to_pitch: width, from_pitch: width, width, rows: 1 };
            self.platform.copy(&piece)?;
        }
        Ok(())
    }

    /// Address of a layer's pool of a format.
    fn latent_pool(&self, layer: usize, format: Format) -> u64 {
        let (pool, latents) = (&self.pools[format as usize], self.latents.as_ref());
        let of = |(pool, latents): (&Buffer, &Latents)| {
            let slots = pool.bytes() / latents.slot_bytes(format);
            pool.at() + (slots * stride(latents.0[..layer].iter(), format)) as u64
        };
        pool.as_ref().zip(latents).map_or(0, of)
    }
}
