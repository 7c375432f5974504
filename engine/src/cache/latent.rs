//! What a converted model keeps in place of keys and values (EliteKV, arXiv:2503.01586): `2 r kv_heads + c` f16 elements
//! of a token and layer, in slabs of [`kvwarp::lowrank_kv`].
//!
//! A slot is 64 tokens in every layer, so a sequence has one page table. Full slabs count against the limit as packed
//! slabs of other stores do; the newest, while it is not full, stands for their rings, one beside the limit for each open
//! sequence. Layers hold the same tokens: nothing is ever dropped.

use std::ops::Range;

use kvwarp::Error;
use kvwarp::lowrank_kv::{self, View};
use kvwarp::pages::{Entry, Pool, Slots};
use kvwarp::slab::{Format, TOKENS};

use super::{Cache, CacheError, Sequence, open_mut};
use crate::runner::{Frozen, Held, Row};

/// Slabs of latents.
#[derive(Clone)]
pub struct Latents {
    /// By layer; pools go in step, so a slot is the same tokens in each.
    layers: Vec<(lowrank_kv::Shape, Pool)>,
    /// Full slabs that may be in use.
    limit: usize,
    /// Sequences, each with a slab that is not full.
    open: usize,
}

impl Latents {
    /// Empty pools for rows of `shapes`, one a layer.
    pub fn new(shapes: &[lowrank_kv::Shape]) -> Self {
        let layers = shapes.iter().map(|&shape| (shape, Pool::of(shape.slab_bytes()))).collect();
        Self { layers, limit: Slots::MOST, open: 0 }
    }

    /// Bytes of a slot: of its slabs in all layers.
    pub fn stride(&self) -> usize {
        self.layers.iter().map(|(_, pool)| pool.slab_stride()).sum()
    }

    /// Bytes taken from the allocator.
    pub fn capacity_bytes(&self) -> usize {
        self.layers.iter().map(|(_, pool)| pool.capacity_bytes()).sum()
    }

    /// Slots that may still be filled, where `tails` are in use that are not full.
    pub fn free(&self, tails: usize) -> usize {
        let used = self.layers.first().map_or(0, |(_, pool)| pool.slots().used());
        self.limit.saturating_sub(used - tails)
    }

    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.count(0, 0);
    }

    pub fn reserve(&mut self, slots: usize) {
        self.layers.iter_mut().for_each(|(_, pool)| pool.reserve(slots));
    }

    /// Counts sequences that were opened and closed.
    pub fn count(&mut self, opened: usize, closed: usize) {
        self.open = self.open + opened - closed;
        let limit = self.limit.saturating_add(self.open);
        self.layers.iter_mut().for_each(|(_, pool)| pool.slots_mut().set_limit(limit));
    }

    fn take(&mut self) -> Result<Entry, Error> {
        let slots = self.layers.iter_mut().map(|(_, pool)| pool.take());
        let slot = slots.fold(None, |_, slot| slot);
        let slot = slot.ok_or(Error::TooBig { op: "cache", size: self.limit })?;
        Ok(Entry::new(Format::F16, slot))
    }

    fn share(&mut self, entry: Entry) {
        let slot = slot(entry) as u32;
        self.layers.iter_mut().for_each(|(_, pool)| pool.slots_mut().share(slot));
    }

    pub fn give(&mut self, entry: Entry) {
        self.layers.iter_mut().for_each(|(_, pool)| pool.give(slot(entry) as u32));
    }

    /// Bytes of the first `tokens` of a slot, the others zero, those of each layer after those of the one before it.
    pub fn read(&self, entry: Entry, tokens: usize) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.stride());
        for (shape, pool) in &self.layers {
            let mut slab = pool.slab(slot(entry)).to_vec();
            (tokens..TOKENS).for_each(|token| shape.clear(&mut slab, token));
            all.extend(slab);
        }
        all
    }

    /// A slot with these bytes.
    pub fn adopt(&mut self, mut bytes: &[u8]) -> Result<Entry, Error> {
        let entry = self.take()?;
        for (shape, pool) in &mut self.layers {
            let (slab, rest) = bytes.split_at(shape.slab_bytes());
            pool.slab_mut(slot(entry)).copy_from_slice(slab);
            bytes = rest;
        }
        Ok(entry)
    }
}

fn slot(entry: Entry) -> usize {
    entry.get().map_or(0, |(_, slot)| slot)
}

impl Cache {
    /// Writes `n` tokens of `layer` of `row` after those that it holds: `z` `[n, c]` and `k` `[n, kv_heads, 2 r]`, rotated.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when the pools are full.
    pub fn put(
        &mut self,
        row: Row,
        layer: usize,
        (z, k): (&[f32], &[f32]),
        n: usize,
    ) -> Result<(), CacheError> {
        let range = self.range(layer);
        let Some(latents) = &mut self.latents else { return Ok(()) };
        let Sequence { heads, table, .. } = open_mut(&mut self.sequences, row);
        let first = heads[range.start].len;
        while table.len() < (first + n).div_ceil(TOKENS) {
            table.push(latents.take()?);
        }
        let (shape, pool) = &mut latents.layers[layer];
        let rows = z.chunks_exact(z.len() / n).zip(k.chunks_exact(k.len() / n));
        for (token, (z, k)) in (first..first + n).zip(rows) {
            shape.write(pool.slab_mut(slot(table[token / TOKENS])), token % TOKENS, z, k)?;
        }
        heads[range].iter_mut().for_each(|head| head.len += n);
        Ok(())
    }

    /// What the tokens `range` of `layer` of `row` are: `z` `[n, c]`, then `k` `[n, kv_heads, 2 r]`.
    pub fn rows(&self, row: Row, layer: usize, range: Range<usize>) -> [Vec<f32>; 2] {
        let [mut z, mut k] = [Vec::new(), Vec::new()];
        let Some((shape, pool)) = self.latents.as_ref().map(|l| &l.layers[layer]) else {
            return [z, k];
        };
        let table = &self.sequence(row).table;
        for token in range {
            let slab = pool.slab(slot(table[token / TOKENS]));
            let row = shape.read((Format::F16, slab), token % TOKENS);
            let (of_z, of_k) = row.split_at(shape.rank());
            z.extend_from_slice(of_z);
            k.extend_from_slice(of_k);
        }
        [z, k]
    }

    /// What attention over `layer` of `row` reads, where there are latents: the tokens before the newest `later`.
    pub fn latent(&self, row: Row, layer: usize, later: usize) -> Option<View<'_>> {
        let (shape, pool) = &self.latents.as_ref()?.layers[layer];
        let Sequence { heads, table, .. } = self.sequence(row);
        let len = heads[self.range(layer).start].len - later;
        Some(View { shape: *shape, pool, packed: None, table, len })
    }

    /// Slots that open sequences have begun and not filled.
    pub(super) fn tails(&self) -> usize {
        let begun = |s: &&Sequence| s.table.len() > s.position / TOKENS;
        self.sequences.iter().flatten().filter(begun).count()
    }

    /// [`Cache::freeze`] of latents: full slabs by reference, one that is not full copied.
    pub(super) fn freeze_latents(&mut self, row: Row) -> Result<Frozen, CacheError> {
        let len = self.position(row);
        let table = self.sequence(row).table[..len.div_ceil(TOKENS)].to_vec();
        let entries = self.table_again(table, len)?;
        let heads = vec![Held { len, packed: len / TOKENS, chosen: 0 }];
        Ok(Frozen { len, heads, entries })
    }

    /// [`Cache::thaw`] of latents into an empty sequence.
    pub(super) fn thaw_latents(&mut self, row: Row, frozen: &Frozen) {
        let table = self.table_again(frozen.entries.clone(), frozen.len);
        let table = table.expect("an open sequence has a slot beside the limit");
        let sequence = self.sequence_mut(row);
        sequence.heads.iter_mut().for_each(|head| head.len = frozen.len);
        (sequence.table, sequence.position) = (table, frozen.len);
    }

    /// Another table of the same `len` tokens.
    fn table_again(&mut self, table: Vec<Entry>, len: usize) -> Result<Vec<Entry>, Error> {
        let Some(latents) = &mut self.latents else { return Ok(table) };
        let (full, rest) = table.split_at(len / TOKENS);
        let copies = rest.iter().map(|&entry| latents.adopt(&latents.read(entry, len % TOKENS)));
        let copies = copies.collect::<Result<Vec<_>, _>>()?;
        full.iter().for_each(|&entry| latents.share(entry));
        Ok([full, &copies].concat())
    }
}
