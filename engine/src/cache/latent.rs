//! What a converted model keeps in place of keys and values (EliteKV, arXiv:2503.01586): `2 r kv_heads + c` elements of a
//! token and layer, in slabs of [`kvwarp::lowrank_kv`].
//!
//! A slot is 64 tokens in every layer, so a sequence has one page table. Slabs that have left the window count against the
//! limits as those of other stores do; newer ones stand for their rings, beside the limit. All are written as f16, and those
//! that have left the window are packed between steps, when layers hold the same tokens: nothing is ever dropped.

use std::ops::Range;

use kvwarp::Error;
use kvwarp::lowrank_kv::{self, View};
use kvwarp::pages::{Entry, Pool, Slots, packed_slabs, ring_slabs};
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::Team;

use super::head::Rules;
use super::{Cache, CacheError, Sequence, open_mut};
use crate::runner::{BLOCK, Frozen, Held, Row, TURN};
use crate::spec::CacheSpec;

/// Slabs of latents.
#[derive(Clone)]
pub struct Latents {
    /// Those of the spec's store, where it is not f16.
    store: Format,
    layers: Vec<Layer>,
    /// Slabs that have left the window and may be in use, of f16 and of the store.
    limits: [usize; 2],
    /// F16 slabs beside the limit, of each open sequence.
    newest: usize,
    /// Sequences.
    open: usize,
}

/// Pools of all layers go in step, so a slot is the same tokens in each.
#[derive(Clone)]
struct Layer {
    shape: lowrank_kv::Shape,
    exact: Pool,
    packed: Pool,
}

impl Layer {
    fn pool(&mut self, format: Format) -> &mut Pool {
        if format == Format::F16 { &mut self.exact } else { &mut self.packed }
    }

    fn slab(&self, (format, slot): (Format, usize)) -> &[u8] {
        if format == Format::F16 { self.exact.slab(slot) } else { self.packed.slab(slot) }
    }
}

/// Bytes of a slab of a layer.
fn bytes(shape: lowrank_kv::Shape, format: Format) -> usize {
    if format == Format::F16 { shape.slab_bytes() } else { shape.packed_bytes(format) }
}

/// Bytes of a slot: of its slabs in all layers.
pub fn stride(shapes: &[lowrank_kv::Shape], format: Format) -> usize {
    shapes.iter().map(|&shape| bytes(shape, format)).sum()
}

/// F16 slabs of a sequence that a step has not packed yet.
pub fn newest(spec: &CacheSpec) -> usize {
    ring_slabs(if spec.store == Format::F16 { 0 } else { spec.window + TURN })
}

impl Latents {
    /// Empty pools for rows of `shapes`, one a layer.
    pub fn new(spec: &CacheSpec, shapes: &[lowrank_kv::Shape]) -> Self {
        let store = spec.store;
        let layer = |&shape: &lowrank_kv::Shape| {
            let pool = |format| Pool::of(bytes(shape, format));
            Layer { shape, exact: pool(Format::F16), packed: pool(store) }
        };
        let (layers, limits) = (shapes.iter().map(layer).collect(), [Slots::MOST; 2]);
        Self { store, layers, limits, newest: newest(spec), open: 0 }
    }

    /// Bytes of a slot of this format.
    pub fn stride(&self, format: Format) -> usize {
        self.layers.iter().map(|layer| bytes(layer.shape, format)).sum()
    }

    /// Bytes taken from the allocator.
    pub fn capacity_bytes(&self) -> usize {
        let pools = self.layers.iter().flat_map(|layer| [&layer.exact, &layer.packed]);
        pools.map(Pool::capacity_bytes).sum()
    }

    /// Slots that may still be filled, of f16 and of the store, where `newest` f16 slots are in the window.
    pub fn free(&self, newest: usize) -> [usize; 2] {
        let used = |pool: fn(&Layer) -> &Pool| {
            self.layers.first().map_or(0, |layer| pool(layer).slots().used())
        };
        let [exact, packed] = self.limits;
        let used = [used(|layer| &layer.exact) - newest, used(|layer| &layer.packed)];
        [exact.saturating_sub(used[0]), packed.saturating_sub(used[1])]
    }

    pub fn set_limits(&mut self, limits: [usize; 2]) {
        self.limits = limits;
        self.count(0, 0);
    }

    pub fn reserve(&mut self, [exact, packed]: [usize; 2]) {
        for layer in &mut self.layers {
            layer.exact.reserve(exact);
            layer.packed.reserve(packed);
        }
    }

    /// Counts sequences that were opened and closed.
    pub fn count(&mut self, opened: usize, closed: usize) {
        self.open = self.open + opened - closed;
        let block = if self.store == Format::F16 { 0 } else { BLOCK / TOKENS };
        let exact = self.limits[0].saturating_add(self.open * self.newest + block);
        for layer in &mut self.layers {
            layer.exact.slots_mut().set_limit(exact);
            layer.packed.slots_mut().set_limit(self.limits[1]);
        }
    }

    fn take(&mut self, format: Format) -> Result<Entry, Error> {
        let slots = self.layers.iter_mut().map(|layer| layer.pool(format).take());
        let slot = slots.fold(None, |_, slot| slot);
        let size = self.limits[usize::from(format != Format::F16)];
        Ok(Entry::new(format, slot.ok_or(Error::TooBig { op: "cache", size })?))
    }

    fn share(&mut self, entry: Entry) {
        let Some((format, slot)) = entry.get() else { return };
        self.layers.iter_mut().for_each(|layer| layer.pool(format).slots_mut().share(slot as u32));
    }

    pub fn give(&mut self, entry: Entry) {
        let Some((format, slot)) = entry.get() else { return };
        self.layers.iter_mut().for_each(|layer| layer.pool(format).give(slot as u32));
    }

    /// Bytes of the first `tokens` of a slot, the others zero, those of each layer after those of the one before it; only
    /// f16 slots are not full.
    pub fn read(&self, entry: Entry, tokens: usize) -> Vec<u8> {
        let Some(at) = entry.get() else { return Vec::new() };
        let mut all = Vec::with_capacity(self.stride(at.0));
        for layer in &self.layers {
            let mut slab = layer.slab(at).to_vec();
            (tokens..TOKENS).for_each(|token| layer.shape.clear(&mut slab, token));
            all.extend(slab);
        }
        all
    }

    /// A slot with these bytes.
    pub fn adopt(&mut self, format: Format, mut bytes_of: &[u8]) -> Result<Entry, Error> {
        let entry = self.take(format)?;
        for layer in &mut self.layers {
            let (slab, rest) = bytes_of.split_at(bytes(layer.shape, format));
            layer.pool(format).slab_mut(slot(entry)).copy_from_slice(slab);
            bytes_of = rest;
        }
        Ok(entry)
    }

    /// A slot of the store with what an f16 slot holds, which is given back; a layer a thread.
    fn pack(&mut self, from: Entry, range: f32, team: &Team) -> Result<Entry, Error> {
        let (to, store) = (self.take(self.store)?, self.store);
        let mut done: Vec<_> = self.layers.iter_mut().map(|layer| (layer, Ok(()))).collect();
        team.each_chunk(&mut done, 1, |_, layer| {
            let (Layer { shape, exact, packed }, done) = &mut layer[0];
            let (from, to) = (exact.slab(slot(from)), packed.slab_mut(slot(to)));
            *done = shape.pack(store, from, range, to);
        });
        done.into_iter().try_for_each(|(_, done)| done)?;
        self.give(from);
        Ok(to)
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
            table.push(latents.take(Format::F16)?);
        }
        let Layer { shape, exact, .. } = &mut latents.layers[layer];
        let rows = z.chunks_exact(z.len() / n).zip(k.chunks_exact(k.len() / n));
        for (token, (z, k)) in (first..first + n).zip(rows) {
            shape.write(exact.slab_mut(slot(table[token / TOKENS])), token % TOKENS, z, k)?;
        }
        heads[range].iter_mut().for_each(|head| head.len += n);
        Ok(())
    }

    /// Packs what has left the window of `row`: between steps.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn pack_latents(&mut self, row: Row, team: &Team) -> Result<(), CacheError> {
        let Some(latents) = &mut self.latents else { return Ok(()) };
        let (rules, range) = (Rules::new(&self.spec, None), f32::from(self.spec.range) / 100.0);
        let Sequence { table, packed, position, .. } = open_mut(&mut self.sequences, row);
        while *packed < packed_slabs(*position, rules.window) {
            if rules.format(*packed) != Format::F16 {
                table[*packed] = latents.pack(table[*packed], range, team)?;
            }
            *packed += 1;
        }
        Ok(())
    }

    /// What the tokens `range` of `layer` of `row` are: `z` `[n, c]`, then `k` `[n, kv_heads, 2 r]`.
    pub fn rows(&self, row: Row, layer: usize, range: Range<usize>) -> [Vec<f32>; 2] {
        let [mut z, mut k] = [Vec::new(), Vec::new()];
        let Some(layer) = self.latents.as_ref().map(|latents| &latents.layers[layer]) else {
            return [z, k];
        };
        let table = &self.sequence(row).table;
        for token in range {
            let Some(at) = table[token / TOKENS].get() else { continue };
            let row = layer.shape.read((at.0, layer.slab(at)), token % TOKENS);
            let (of_z, of_k) = row.split_at(layer.shape.rank());
            z.extend_from_slice(of_z);
            k.extend_from_slice(of_k);
        }
        [z, k]
    }

    /// What attention over `layer` of `row` reads, where there are latents: the tokens before the newest `later`.
    pub fn latent(&self, row: Row, layer: usize, later: usize) -> Option<View<'_>> {
        let latents = self.latents.as_ref()?;
        let Layer { shape, exact, packed } = &latents.layers[layer];
        let Sequence { heads, table, .. } = self.sequence(row);
        let len = heads[self.range(layer).start].len - later;
        let packed = (latents.store != Format::F16).then_some((latents.store, packed));
        Some(View { shape: *shape, pool: exact, packed, table, len })
    }

    /// F16 slots of open sequences that are in their windows.
    pub(super) fn newest(&self) -> usize {
        let newest = |s: &Sequence| s.table.len() - s.packed;
        self.sequences.iter().flatten().map(newest).sum()
    }

    /// [`Cache::freeze`] of latents: what has left the window by reference, the rest copied.
    pub(super) fn freeze_latents(&mut self, row: Row) -> Result<Frozen, CacheError> {
        let (len, packed) = (self.position(row), self.sequence(row).packed);
        let table = self.sequence(row).table[..len.div_ceil(TOKENS)].to_vec();
        let entries = self.table_again(table, [len, packed])?;
        let heads = vec![Held { len, packed, chosen: 0 }];
        Ok(Frozen { len, heads, entries })
    }

    /// [`Cache::thaw`] of latents into an empty sequence.
    pub(super) fn thaw_latents(&mut self, row: Row, frozen: &Frozen) {
        let (len, packed) = (frozen.len, frozen.heads[0].packed);
        let table = self.table_again(frozen.entries.clone(), [len, packed]);
        let table = table.expect("an open sequence has its window beside the limit");
        let sequence = self.sequence_mut(row);
        sequence.heads.iter_mut().for_each(|head| head.len = len);
        (sequence.table, sequence.packed, sequence.position) = (table, packed, len);
    }

    /// Another table of the same `len` tokens, of which `packed` slabs have left the window.
    fn table_again(
        &mut self,
        table: Vec<Entry>,
        [len, packed]: [usize; 2],
    ) -> Result<Vec<Entry>, Error> {
        let Some(latents) = &mut self.latents else { return Ok(table) };
        let (shared, rest) = table.split_at(packed);
        let tokens = |i: usize| TOKENS.min(len - (packed + i) * TOKENS);
        let copies = rest.iter().enumerate();
        let copies = copies
            .map(|(i, &entry)| latents.adopt(Format::F16, &latents.read(entry, tokens(i))))
            .collect::<Result<Vec<_>, _>>()?;
        shared.iter().for_each(|&entry| latents.share(entry));
        Ok([shared, &copies].concat())
    }
}
