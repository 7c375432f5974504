//! Pools of latents, one a layer and format.

use kvwarp::Error;
use kvwarp::lowrank_kv;
use kvwarp::pages::{Entry, Pool, Slots, packed_slabs, ring_slabs};
use kvwarp::simd::Level;
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::Team;

use crate::runner::{BLOCK, TURN};
use crate::spec::CacheSpec;

/// Slabs of latents.
#[derive(Clone)]
pub struct Latents {
    spec: CacheSpec,
    pub(super) layers: Vec<Layer>,
    /// Slabs that have left the window and may be in use, of f16 and of the store.
    limits: [usize; 2],
    /// Sequences.
    open: usize,
}

/// Pools of all layers go in step, so a slot is the same tokens in each.
#[derive(Clone)]
pub(super) struct Layer {
    pub shape: lowrank_kv::Shape,
    pub exact: Pool,
    pub packed: Pool,
}

impl Layer {
    fn pool(&mut self, format: Format) -> &mut Pool {
        if format == Format::F16 { &mut self.exact } else { &mut self.packed }
    }

    pub fn slab(&self, (format, slot): (Format, usize)) -> &[u8] {
        if format == Format::F16 { self.exact.slab(slot) } else { self.packed.slab(slot) }
    }

    /// A slab as it is in f16, in `room` where it is packed.
    pub fn exact<'a>(&'a self, at: (Format, usize), room: &'a mut [u8]) -> Result<&'a [u8], Error> {
        let slab = self.slab(at);
        if at.0 == Format::F16 {
            return Ok(slab);
        }
        self.shape.unpack(Level::detect(), (at.0, slab), room)?;
        Ok(room)
    }
}

/// Bytes of a slot: of its slabs in all layers.
pub fn stride<'a>(shapes: impl Iterator<Item = &'a lowrank_kv::Shape>, format: Format) -> usize {
    shapes.map(|shape| shape.bytes(format)).sum()
}

/// F16 slabs of a sequence of `len` tokens in its window.
pub fn in_window(spec: &CacheSpec, len: usize) -> usize {
    len.div_ceil(TOKENS) - packed_slabs(len, spec.window)
}

/// The most of them, and of those that a step has not packed yet.
pub fn newest(spec: &CacheSpec) -> usize {
    ring_slabs(spec.packs().map_or(0, |_| spec.window + TURN))
}

/// F16 slabs beside the limit: the newest of `rows` sequences, and a block that is read before it is packed.
pub fn beside(spec: &CacheSpec, rows: usize) -> usize {
    rows * newest(spec) + spec.packs().map_or(0, |_| BLOCK / TOKENS)
}

impl Latents {
    /// Empty pools for rows of `shapes`, one a layer.
    pub fn new(spec: &CacheSpec, shapes: &[lowrank_kv::Shape]) -> Self {
        let layer = |&shape: &lowrank_kv::Shape| {
            let pool = |format| Pool::of(shape.bytes(format));
            Layer { shape, exact: pool(Format::F16), packed: pool(spec.store) }
        };
        let (layers, limits) = (shapes.iter().map(layer).collect(), [Slots::MOST; 2]);
        Self { spec: *spec, layers, limits, open: 0 }
    }

    /// Bytes of a slot of this format.
    pub fn stride(&self, format: Format) -> usize {
        stride(self.layers.iter().map(|layer| &layer.shape), format)
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
        let exact = self.limits[0].saturating_add(beside(&self.spec, self.open));
        for layer in &mut self.layers {
            layer.exact.slots_mut().set_limit(exact);
            layer.packed.slots_mut().set_limit(self.limits[1]);
        }
    }

    pub(super) fn take(&mut self, format: Format) -> Result<Entry, Error> {
        let slots = self.layers.iter_mut().map(|layer| layer.pool(format).take());
        let slot = slots.fold(None, |_, slot| slot);
        let size = self.limits[usize::from(format != Format::F16)];
        Ok(Entry::new(format, slot.ok_or(Error::TooBig { op: "cache", size })?))
    }

    pub(super) fn share(&mut self, entry: Entry) {
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
    pub fn adopt(&mut self, format: Format, mut bytes: &[u8]) -> Result<Entry, Error> {
        let entry = self.take(format)?;
        for layer in &mut self.layers {
            let (slab, rest) = bytes.split_at(layer.shape.bytes(format));
            layer.pool(format).slab_mut(slot(entry)).copy_from_slice(slab);
            bytes = rest;
        }
        Ok(entry)
    }

    /// A slot of the store with what an f16 slot holds, which is given back; a layer a thread.
    pub(super) fn pack(&mut self, from: Entry, range: f32, team: &Team) -> Result<Entry, Error> {
        let store = self.spec.store;
        let to = self.take(store)?;
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

pub(super) fn slot(entry: Entry) -> usize {
    entry.get().map_or(0, |(_, slot)| slot)
}
