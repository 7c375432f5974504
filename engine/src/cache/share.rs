//! Slabs counted, and sequences that share them.

use std::borrow::Cow;

use kvwarp::kv_pack;
use kvwarp::pages::{Entry, Pools, ring_slabs};
use kvwarp::slab::{Format, TOKENS};

use super::head::{Head, Rules, ring_slot, take};
use super::latent::{beside, in_window, newest};
use super::{Cache, CacheError, Sequence, give, need, open_mut};
use crate::runner::{Frozen, Held, Row, Slabs, plus};
use crate::spec::CacheSpec;

impl Cache {
    /// Slabs that may still be taken.
    pub fn free(&self) -> Slabs {
        let mut free = Format::ALL.map(|format| self.pools.pool(format).slots().available());
        if let Some(latents) = &self.latents {
            let [exact, packed] = latents.free(self.newest());
            (free[self.spec.store as usize], free[Format::F16 as usize]) = (packed, exact);
        }
        free
    }

    /// Sets how many slabs may be in use.
    pub fn limit(&mut self, slabs: &Slabs) {
        for (format, &slabs) in Format::ALL.into_iter().zip(slabs) {
            self.pools.pool_mut(format).slots_mut().set_limit(slabs);
        }
        let limits = self.of_latents(slabs);
        self.latents.iter_mut().for_each(|latents| latents.set_limits(limits));
    }

    /// Takes memory for `slabs` more at once.
    pub fn reserve(&mut self, slabs: &Slabs) {
        let of_latents = self.of_latents(slabs);
        if let Some(latents) = &mut self.latents {
            return latents.reserve(of_latents);
        }
        for (format, &slabs) in Format::ALL.into_iter().zip(slabs) {
            self.pools.pool_mut(format).reserve(slabs);
        }
    }

    /// Those of f16, and of the store where it is another.
    fn of_latents(&self, slabs: &Slabs) -> [usize; 2] {
        let store = self.spec.store;
        let packed = if store == Format::F16 { 0 } else { slabs[store as usize] };
        [slabs[Format::F16 as usize], packed]
    }

    /// Slabs that a sequence of `len` tokens takes for `n` more.
    pub fn need(&self, len: usize, n: usize) -> Slabs {
        let heads = 0..self.tables();
        need(heads.map(|h| self.plan.store(&self.spec, h)), &self.spec, len, n)
    }

    /// Slabs beside those of [`Cache::need`] that `rows` sequences of `len` tokens have in place of rings.
    pub fn begun(&self, rows: usize, len: usize) -> Slabs {
        let mut slabs = Slabs::default();
        if self.latents.is_some() {
            slabs[Format::F16 as usize] = rows * in_window(&self.spec, len);
        }
        slabs
    }

    /// Whether `row` takes a token and `n` more after it, none of which packs a slab or has others dropped.
    pub fn is_loose(&self, row: Row, n: usize) -> bool {
        let loose = |head: &Head| self.spec.is_loose((head.len, head.chosen), n);
        !self.spec.kivi_exact && self.sequence(row).heads.iter().all(loose)
    }

    /// F16 slabs of the rings of a sequence; of latents, those that stand for them.
    pub fn rings(&self) -> usize {
        if self.latents.is_some() {
            return newest(&self.spec);
        }
        self.tables() * ring_slabs(self.spec.window)
    }

    /// F16 slabs beside the limits: the rings of `rows` sequences, and latents of a block that is read before it is packed.
    pub fn beside(&self, rows: usize) -> usize {
        if self.latents.is_some() { beside(&self.spec, rows) } else { rows * self.rings() }
    }

    /// Bytes from a slab of `format` to the next.
    pub fn slab_stride(&self, format: Format) -> usize {
        if let Some(latents) = &self.latents {
            return latents.stride(format);
        }
        self.pools.pool(format).slab_stride()
    }

    /// F16 slabs that [`Cache::freeze`] takes for `row`: those of its rings that hold tokens.
    pub fn need_frozen(&self, row: Row) -> usize {
        if self.latents.is_some() {
            let packed = self.sequence(row).packed;
            return self.position(row).div_ceil(TOKENS) - packed;
        }
        self.sequence(row).heads.iter().map(|head| head.len.div_ceil(TOKENS) - head.packed).sum()
    }

    /// What `row` holds, shared: packed slabs by reference, the ring's slabs copied. Not for `kivi_exact`, whose slabs
    /// are packed in part.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when there are fewer than [`Cache::need_frozen`] f16 slabs; nothing changes then.
    pub fn freeze(&mut self, row: Row) -> Result<Frozen, CacheError> {
        let (need, free) = (self.need_frozen(row), self.free()[Format::F16 as usize]);
        if need > free {
            return Err(kvwarp::Error::TooBig { op: "cache", size: need }.into());
        }
        if self.latents.is_some() {
            return self.freeze_latents(row);
        }
        let (slab, ring_bytes) = (self.slab_bytes(), self.ring_bytes());
        let Self { pools, sequences, .. } = self;
        let Sequence { heads, rings, position, .. } = open_mut(sequences, row);
        let mut entries = Vec::new();
        for (h, head) in heads.iter().enumerate() {
            for &entry in &head.table[..head.packed] {
                share(pools, entry);
                entries.push(entry);
            }
            let ring = rings.slice(h * ring_bytes, ring_bytes);
            for index in head.packed..head.len.div_ceil(TOKENS) {
                let slot = take(pools, Format::F16)?;
                let at = ring_slot(pools, ring_bytes, index);
                let to = pools.pool_mut(Format::F16).slab_mut(slot as usize);
                to.copy_from_slice(&ring[at..at + slab]);
                entries.push(Entry::new(Format::F16, slot));
            }
        }
        let held = |head: &Head| Held { len: head.len, packed: head.packed, chosen: head.chosen };
        Ok(Frozen { len: *position, heads: heads.iter().map(held).collect(), entries })
    }

    /// A new sequence that continues from what was frozen.
    pub fn thaw(&mut self, frozen: &Frozen) -> Row {
        let row = self.open();
        if self.latents.is_some() {
            self.thaw_latents(row, frozen);
            self.note_peak(row);
            return row;
        }
        let (slab, ring_bytes) = (self.slab_bytes(), self.ring_bytes());
        let Self { pools, sequences, .. } = self;
        let sequence = open_mut(sequences, row);
        sequence.position = frozen.len;
        let mut rest = &frozen.entries[..];
        for (h, &Held { len, packed, chosen }) in frozen.heads.iter().enumerate() {
            let (entries, others) = rest.split_at(len.div_ceil(TOKENS));
            rest = others;
            entries[..packed].iter().for_each(|&entry| share(pools, entry));
            let table = entries[..packed].to_vec();
            sequence.heads[h] = Head { table, len, packed, chosen, ..Head::default() };
            let ring = sequence.rings.slice_mut(h * ring_bytes, ring_bytes);
            for (index, entry) in entries.iter().enumerate().skip(packed) {
                let Some((format, slot)) = entry.get() else { continue };
                let at = ring_slot(pools, ring_bytes, index);
                ring[at..at + slab].copy_from_slice(pools.pool(format).slab(slot));
            }
        }
        self.note_peak(row);
        row
    }

    /// Bytes of a slab that a frozen sequence keeps, of latents those of all layers, without what lies behind its first
    /// `tokens`: only f16 slabs are not full. Empty for a hole.
    pub fn slab(&self, entry: Entry, tokens: usize) -> Cow<'_, [u8]> {
        let Some((format, slot)) = entry.get() else { return Cow::default() };
        if let Some(latents) = &self.latents {
            return latents.read(entry, tokens).into();
        }
        let (layout, slab) = (self.pools.layout(format), self.pools.pool(format).slab(slot));
        if tokens >= TOKENS {
            return slab.into();
        }
        let (mut slab, zeros) = (slab.to_vec(), vec![0.0; layout.head_dim]);
        (tokens..TOKENS).for_each(|slot| kv_pack::append(&mut slab, layout, slot, &zeros, &zeros));
        slab.into()
    }

    /// Bytes of [`Cache::slab`].
    pub fn slab_bytes_of(&self, format: Format) -> usize {
        let own = self.latents.as_ref().map(|latents| latents.stride(format));
        own.unwrap_or(self.pools.layout(format).slab_bytes())
    }

    /// A frozen sequence of `len` tokens whose `heads` hold `slabs` from elsewhere, in the order of [`Frozen::entries`] and
    /// in this cache's formats and sizes.
    ///
    /// # Errors
    /// [`CacheError::Full`]; [`CacheError::Kernel`] when a pool has too few slabs. Nothing changes then.
    pub fn adopt<'a>(
        &mut self,
        len: usize,
        heads: Vec<Held>,
        slabs: impl Iterator<Item = (Format, &'a [u8])> + Clone,
    ) -> Result<Frozen, CacheError> {
        let context = self.shape.context;
        let left = context.checked_sub(len).ok_or(CacheError::Full { need: len, context })?;
        let (mut need, free) = (Slabs::default(), self.free());
        slabs.clone().for_each(|(format, _)| need[format as usize] += 1);
        if let Some((&size, _)) = need.iter().zip(&free).find(|(need, free)| need > free) {
            return Err(kvwarp::Error::TooBig { op: "cache", size }.into());
        }
        self.reserve(&plus(need, self.need(len, left)));
        let mut entries = Vec::with_capacity(need.iter().sum());
        for (format, bytes) in slabs {
            if let Some(latents) = &mut self.latents {
                entries.push(latents.adopt(format, bytes)?);
                continue;
            }
            let slot = take(&mut self.pools, format)?;
            self.pools.pool_mut(format).slab_mut(slot as usize).copy_from_slice(bytes);
            entries.push(Entry::new(format, slot));
        }
        Ok(Frozen { len, heads, entries })
    }

    /// Gives back what a frozen sequence keeps.
    pub fn melt(&mut self, frozen: Frozen) {
        frozen.entries.into_iter().for_each(|entry| match &mut self.latents {
            Some(latents) => latents.give(entry),
            None => give(&mut self.pools, entry),
        });
    }
}

/// Formats of the slabs of a frozen head whose history has this store.
pub fn formats(spec: &CacheSpec, store: Format, held: Held) -> impl Iterator<Item = Format> {
    let rules = Rules { store, ..Rules::new(spec, None) };
    let format = move |i| if i < held.packed { rules.format(i) } else { Format::F16 };
    (0..held.len.div_ceil(TOKENS)).map(format)
}

fn share(pools: &mut Pools, entry: Entry) {
    if let Some((format, slot)) = entry.get() {
        pools.pool_mut(format).slots_mut().share(slot as u32);
    }
}
