//! Prompts of a cache of latents: what is read is written as it comes, and expanded a layer at a time, with all that the
//! sequence held before.

use std::ops::Range;

use super::block::{Block, Prompt};
use super::{Gpu, Piece};
use crate::gpu::control::EDITS;
use crate::gpu::platform::Result;
use crate::runner::{Held, Row, RunError};

impl Gpu {
    /// What the heads of all layers hold before a read, `[layers * kv_heads]`: nothing of latents is packed, as the ring of a
    /// staged layer has all of them.
    pub(super) fn before(&self, row: Row) -> Vec<Held> {
        if !self.cache.has_latents() {
            return self.cache.all_held(row);
        }
        let heads = self.net.config.layers * self.net.config.kv_heads;
        vec![Held { len: self.cache.len(row), packed: 0, chosen: 0 }; heads]
    }

    /// Pieces in which `len` tokens of latents are expanded.
    pub(super) fn unfolded(&self, len: usize) -> Vec<Range<usize>> {
        let len = if self.cache.has_latents() { len } else { 0 };
        super::pieces(len, self.piece, 0)
    }

    /// Fills in what the device is told of them.
    pub(super) fn tell_unfolded(&self, block: &Block, numbers: &mut [u32]) {
        for (i, piece) in self.unfolded(block.before(0)[0].len).into_iter().enumerate() {
            let [firsts, len] = block.words.held(i);
            (numbers[firsts + 1], numbers[len]) = (piece.len() as u32, piece.end as u32);
        }
    }

    /// Expands what a sequence holds of a layer into the staged ring, unless it is the last: its outputs are nobody's.
    pub(super) fn unfold(&self, prompt: &Prompt, block: &Block, layer: usize) -> Result<()> {
        if layer + 1 == self.net.config.layers {
            return Ok(());
        }
        let weights = &self.net.weights.layers[layer];
        for (i, piece) in self.unfolded(block.before(layer)[0].len).into_iter().enumerate() {
            let [firsts, len] = block.words.held(i).map(|word| block.at(word));
            let Some(latents) = self.cache.latents(layer, block.row, 1, len) else { continue };
            self.net.unfold(weights, latents, firsts, piece.len())?;
            let told = [len, block.at(block.words.packed(layer))];
            let ring = (prompt.ring(layer), prompt.slabs);
            let staged = self.cache.staged_view(layer, block.row, told, ring);
            self.fill(layer, staged, (firsts, piece.len()))?;
        }
        Ok(())
    }

    /// Packs what has left the windows of `rows`: between steps.
    pub(in crate::gpu) fn pack_latents(
        &mut self,
        rows: impl Iterator<Item = Row>,
    ) -> std::result::Result<(), RunError> {
        if !self.cache.has_latents() {
            return Ok(());
        }
        let (moves, edits) = self.cache.pack_next(rows)?;
        for moves in moves.chunks(EDITS) {
            let list = (self.control.list(&self.platform, moves)?, moves.len());
            for layer in 0..self.net.config.layers {
                // A move says from where to where: lengths are not looked at.
                let cache = self.cache.latents(layer, Row(0), 1, self.control.at(0));
                let pack = |cache| self.net.pack(cache, list, self.cache.range());
                cache.map_or(Ok(()), pack)?;
            }
        }
        Ok(self.control.edit(&self.net.ops, self.cache.table(), &edits)?)
    }

    /// Writes a piece's latents.
    pub(super) fn put(&self, piece: &Piece<'_>) -> Result<()> {
        let Piece { block, layer, number, .. } = *piece;
        let len = block.at(block.words.len(layer, number));
        let Some(latents) = self.cache.latents(layer, block.row, 1, len) else { return Ok(()) };
        let weights = &self.net.weights.layers[layer];
        self.net.put(weights, latents, piece.firsts(), [piece.rows(); 2])
    }
}
