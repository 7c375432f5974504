//! What one kv head of one layer holds, and when its slabs leave the ring.

use half::f16;
use kvwarp::pages::{Entry, HeadView, Pools, packed_slabs};
use kvwarp::slab::{Format, Rounding, TOKENS};
use kvwarp::threads::Team;
use kvwarp::{Error, kv_pack};

use crate::spec::CacheSpec;

/// When a slab leaves the ring, for which format, and how it is rounded.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    pub store: Format,
    pub window: usize,
    /// Slabs at the start that stay f16.
    pub sink_slabs: usize,
    pub kivi_exact: bool,
    pub rounding: Rounding<'a>,
}

impl<'a> Rules<'a> {
    /// For a head whose rounding errors have these weights.
    pub fn new(spec: &CacheSpec, feedback: Option<&'a [f16]>) -> Self {
        let CacheSpec { store, window, sinks, kivi_exact, range, .. } = *spec;
        let rounding = Rounding { range: f32::from(range) / 100.0, feedback };
        Self { store, window, sink_slabs: sinks.div_ceil(TOKENS), kivi_exact, rounding }
    }

    /// Format of slab `index` once it is packed.
    pub fn format(&self, index: usize) -> Format {
        if index < self.sink_slabs { Format::F16 } else { self.store }
    }

    /// Packed slabs of each format that `len` tokens need; `kivi_exact` opens a slab while it is still in the ring.
    pub fn slabs(&self, len: usize) -> [(Format, usize); 2] {
        let packed = match self.kivi_exact {
            true => (len - len % self.window).div_ceil(TOKENS),
            false => packed_slabs(len, self.window),
        };
        let sinks = packed.min(self.sink_slabs);
        [(Format::F16, sinks), (self.store, packed - sinks)]
    }
}

/// One head's tokens.
#[derive(Clone, Default)]
pub struct Head {
    /// Entries of packed slabs; with `kivi_exact` also of slabs that are partly quantised.
    pub table: Vec<Entry>,
    /// Tokens held.
    pub len: usize,
    /// Slabs found through the table; later ones lie in the ring.
    pub packed: usize,
    /// Tokens at the start that a policy has chosen and does not choose among again.
    pub chosen: usize,
    /// With `kivi_exact`, the tokens whose K and V are quantised.
    pub settled: (usize, usize),
}

impl Head {
    /// To be called before a token is written: frees the ring slot that it may need.
    pub fn before_append(
        &mut self,
        rules: &Rules<'_>,
        ring: &mut [u8],
        pools: &mut Pools,
    ) -> Result<(), Error> {
        if rules.kivi_exact {
            return self.settle(rules, ring, pools);
        }
        self.pack(
            rules,
            packed_slabs(self.len + 1, rules.window).min(self.len / TOKENS),
            ring,
            pools,
        )
    }

    /// To be called when a token was written: packs the slab that it pushed out of the window.
    pub fn after_append(
        &mut self,
        rules: &Rules<'_>,
        ring: &[u8],
        pools: &mut Pools,
    ) -> Result<(), Error> {
        if rules.kivi_exact {
            return Ok(());
        }
        self.pack(rules, packed_slabs(self.len, rules.window), ring, pools)
    }

    /// To be called when many tokens were written and attended to: packs every slab that left the window, each by
    /// whichever thread is free.
    pub fn after_fill(
        &mut self,
        rules: &Rules<'_>,
        ring: &mut [u8],
        pools: &mut Pools,
        team: &Team,
    ) -> Result<(), Error> {
        if rules.kivi_exact {
            return self.settle(rules, ring, pools);
        }
        let (first, target) = (self.packed, packed_slabs(self.len, rules.window));
        let layout = |i| *pools.layout(rules.format(first + i));
        let f16 = pools.layout(Format::F16).slab_bytes();
        let mut packed = vec![0; target.saturating_sub(first) * f16];
        team.each_chunk(&mut packed, f16, |i, to| {
            let at = ring_slot(pools, ring.len(), first + i);
            let layout = layout(i);
            let to = &mut to[..layout.slab_bytes()];
            kv_pack::pack_rounded(&ring[at..at + f16], to, &layout, &rules.rounding);
        });
        for bytes in packed.chunks_exact(f16) {
            let to = self.open_next(rules, pools)?;
            to.copy_from_slice(&bytes[..to.len()]);
        }
        Ok(())
    }

    /// Packs slabs from the ring until `target` are.
    fn pack(
        &mut self,
        rules: &Rules<'_>,
        target: usize,
        ring: &[u8],
        pools: &mut Pools,
    ) -> Result<(), Error> {
        while self.packed < target {
            let layout = *pools.layout(rules.format(self.packed));
            let at = ring_slot(pools, ring.len(), self.packed);
            let f16 = pools.layout(Format::F16).slab_bytes();
            let to = self.open_next(rules, pools)?;
            kv_pack::pack_rounded(&ring[at..at + f16], to, &layout, &rules.rounding);
        }
        Ok(())
    }

    /// Packs f16 slabs of the table, sinks left out, as the rules have it.
    pub fn repack(&mut self, rules: &Rules<'_>, pools: &mut Pools) -> Result<(), Error> {
        let layout = *pools.layout(rules.store);
        for entry in self.table.iter_mut().skip(rules.sink_slabs) {
            let Some((Format::F16, from)) = entry.get() else { continue };
            let bytes = pools.pool(Format::F16).slab(from).to_vec();
            let slot = take(pools, rules.store)?;
            let to = pools.pool_mut(rules.store).slab_mut(slot as usize);
            kv_pack::pack_rounded(&bytes, to, &layout, &rules.rounding);
            pools.pool_mut(Format::F16).give(from as u32);
            *entry = Entry::new(rules.store, slot);
        }
        Ok(())
    }

    /// Counts the next slab as packed; returns the bytes that it gets in its pool.
    fn open_next<'a>(
        &mut self,
        rules: &Rules<'_>,
        pools: &'a mut Pools,
    ) -> Result<&'a mut [u8], Error> {
        let format = rules.format(self.packed);
        let slot = take(pools, format)?;
        self.table.push(Entry::new(format, slot));
        self.packed += 1;
        Ok(pools.pool_mut(format).slab_mut(slot as usize))
    }

    /// Copies the slabs that are not packed from one ring to another, which may have another number of slots.
    pub fn move_ring(&self, from: &[u8], to: &mut [u8], slab: usize) {
        for index in self.packed..self.len.div_ceil(TOKENS) {
            let (at, then) = (index % (from.len() / slab) * slab, index % (to.len() / slab) * slab);
            to[then..then + slab].copy_from_slice(&from[at..at + slab]);
        }
    }

    /// What a kernel reads.
    pub fn view<'a>(&'a self, pools: &'a Pools, ring: &'a [u8]) -> HeadView<'a> {
        HeadView { pools, table: &self.table, ring, len: self.len, packed: self.packed }
    }

    /// Tokens that can no longer be forgotten.
    pub fn fixed(&self) -> usize {
        (self.packed * TOKENS).max(self.settled.0).max(self.settled.1)
    }
}

/// Byte offset of slab `index` in a ring of `bytes`.
pub fn ring_slot(pools: &Pools, bytes: usize, index: usize) -> usize {
    let slab = pools.layout(Format::F16).slab_bytes();
    index % (bytes / slab) * slab
}

/// A slab of `format`.
pub fn take(pools: &mut Pools, format: Format) -> Result<u32, Error> {
    pools.pool_mut(format).take().ok_or(Error::TooBig { op: "cache", size: 1 << 28 })
}
