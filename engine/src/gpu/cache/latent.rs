//! Latents of a converted model on the device: `2 r kv_heads + c` f16 elements of a token and layer, in slabs of
//! [`kvwarp::lowrank_kv`].
//!
//! A slot is 64 tokens in every layer, those of one layer in a pool of its own, so a sequence has one line of the page
//! table. Full slabs count against the limit as packed slabs of other stores do; the newest, while it is not full, stands
//! for their rings and is beside the limit, one for each row.

use std::sync::Arc;

use kvwarp::device::Pieces;
use kvwarp::ffi::kvw_latent;
use kvwarp::lowrank_kv::Shape;
use kvwarp::pages::Entry;
use kvwarp::slab::Format;

use super::Cache;
use crate::gpu::ops::at;
use crate::gpu::platform::{Buffer, Result};
use crate::runner::Row;

/// Rows of each layer.
pub struct Latents(Arc<[Shape]>);

impl Latents {
    pub fn new(shapes: &Arc<[Shape]>) -> Self {
        Self(Arc::clone(shapes))
    }

    /// Bytes of a slot: of its slabs in all layers.
    pub fn slot_bytes(&self) -> usize {
        self.before(self.0.len())
    }

    /// Bytes of a slot in the layers before `layer`.
    fn before(&self, layer: usize) -> usize {
        self.0[..layer].iter().map(|shape| shape.slab_bytes()).sum()
    }
}

impl Cache {
    /// The first `seqs` rows of a layer from `row` on to a kernel, lengths `[seqs]` at `lens`; where there are latents.
    pub fn latents(&self, layer: usize, row: Row, seqs: usize, lens: u64) -> Option<kvw_latent> {
        let shape = self.latents.as_ref()?.0[layer];
        Some(kvw_latent {
            pool: at(self.latent_pool(layer)),
            table: at(self.table_at(layer, row)),
            lens: at(lens),
            seqs: seqs as i32,
            kv_heads: shape.kv_heads() as i32,
            pairs: shape.pairs() as i32,
            rank: shape.rank() as i32,
            table_stride: self.stride as i32,
            ..Default::default()
        })
    }

    /// Whether latents are kept, and no keys and values.
    pub fn has_latents(&self) -> bool {
        self.latents.is_some()
    }

    /// Slots beside those of a format that sequences share: rows may each begin one of latents.
    pub(super) fn beside(&self, format: usize) -> usize {
        if self.has_latents() && format == Format::F16 as usize { self.rows } else { 0 }
    }

    /// The same that open sequences have not begun.
    pub(super) fn unbegun(&self, format: usize) -> usize {
        let begun =
            |heads: &[super::lines::Line]| heads[0].entries.len() > heads[0].len / super::TOKENS;
        let begun = self.sequences.iter().flatten().filter(|sequence| begun(&sequence.heads));
        self.beside(format).saturating_sub(begun.count())
    }

    /// Where a slot lies: its slab in each layer.
    pub(super) fn slabs_of_slot(&self, entry: Entry) -> Vec<(u64, usize)> {
        let (Some(latents), Some((_, slot))) = (&self.latents, entry.get()) else {
            return Vec::new();
        };
        let slab = |(layer, shape): (usize, &Shape)| {
            (self.latent_pool(layer) + (slot * shape.slab_bytes()) as u64, shape.slab_bytes())
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

    /// Address of a layer's pool.
    fn latent_pool(&self, layer: usize) -> u64 {
        let (pool, latents) = (&self.pools[Format::F16 as usize], self.latents.as_ref());
        let of = |(pool, latents): (&Buffer, &Latents)| {
            let slots = pool.bytes() / latents.slot_bytes();
            pool.at() + (slots * latents.before(layer)) as u64
        };
        pool.as_ref().zip(latents).map_or(0, of)
    }
}
