//! Sequences that begin alike: packed slabs by reference, recent tokens by copies.

use kvwarp::device::Pieces;
use kvwarp::pages::Entry;
use kvwarp::slab::{Format, TOKENS};

use super::lines::{Line, Sequence};
use super::{Cache, Edit};
use crate::gpu::platform::Result;
use crate::runner::{Frozen, Held, Row, RunError, Slabs, check};

impl Cache {
    /// What `row` holds, shared.
    pub fn freeze(&mut self, row: Row) -> Result<Frozen, RunError> {
        let mut need = Slabs::default();
        need[Format::F16 as usize] = self.need_frozen(row);
        check(&need, &self.free())?;
        let (mut heads, mut entries, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        for h in 0..self.stores.len() {
            let held = self.held(row, h);
            for slab in 0..held.len.div_ceil(TOKENS) {
                entries.push(if slab < held.packed {
                    let entry = self.line(row, h).entries[slab];
                    self.share(entry);
                    entry
                } else {
                    let entry = self.take(Format::F16)?;
                    match self.has_latents() {
                        true => self.copy_slot(entry, self.line(row, h).entries[slab])?,
                        false => copies.push((self.slab_at(entry), self.recent_at(row, h, slab))),
                    }
                    entry
                });
            }
            heads.push(held);
        }
        self.copy_all(&copies)?;
        Ok(Frozen { len: self.len(row), heads, entries })
    }

    /// A new sequence that continues from `frozen`; the edits tell the device of its table.
    pub fn thaw(&mut self, frozen: &Frozen, edits: &mut Vec<Edit>) -> Result<Row, RunError> {
        let row = self.open()?;
        let (mut rest, mut heads, mut copies) = (&frozen.entries[..], Vec::new(), Vec::new());
        for (h, &Held { len, packed, chosen }) in frozen.heads.iter().enumerate() {
            let (entries, others) = rest.split_at(len.div_ceil(TOKENS));
            rest = others;
            let (entries, recent) = entries.split_at(packed.min(entries.len()));
            for (slab, &entry) in entries.iter().enumerate() {
                self.share(entry);
                edits.push([self.table_index(row, h, slab), entry.0]);
            }
            let mut entries = entries.to_vec();
            for (slab, &entry) in (packed..).zip(recent) {
                if !self.has_latents() {
                    copies.push((self.recent_at(row, h, slab), self.slab_at(entry)));
                    continue;
                }
                let own = self.take(Format::F16)?;
                self.copy_slot(own, entry)?;
                edits.push([self.table_index(row, h, slab), own.0]);
                entries.push(own);
            }
            heads.push(Line { len, chosen, entries, packed });
        }
        self.sequences[row.0] = Some(Sequence { len: frozen.len, heads });
        self.copy_all(&copies)?;
        Ok(row)
    }

    /// Gives back what a frozen sequence keeps.
    pub fn melt(&mut self, frozen: Frozen) {
        frozen.entries.into_iter().for_each(|entry| self.give(entry));
    }

    fn share(&mut self, entry: Entry) {
        if let Some((format, slot)) = entry.get() {
            self.slots[format as usize].share(slot as u32);
        }
    }

    /// Addresses of a slab in its pool, of latents in each layer, and its bytes there; none of a hole.
    pub fn slab(&self, entry: Entry) -> Vec<(u64, usize)> {
        if self.has_latents() {
            self.slabs_of_slot(entry)
        } else {
            self.kv_slab(entry).into_iter().collect()
        }
    }

    fn kv_slab(&self, entry: Entry) -> Option<(u64, usize)> {
        let (format, slot) = entry.get()?;
        let bytes = self.slab_bytes[format as usize];
        let pool = self.pools[format as usize].as_ref()?;
        Some((pool.at() + (slot * bytes) as u64, bytes))
    }

    fn slab_at(&self, entry: Entry) -> u64 {
        self.kv_slab(entry).map_or(0, |(at, _)| at)
    }

    /// Address of a slab of head `h`, counted over all layers, in the ring.
    fn recent_at(&self, row: Row, h: usize, slab: usize) -> u64 {
        let (layer, head) = (h / self.shape.kv_heads, h % self.shape.kv_heads);
        let slot = head * self.ring_slabs() + slab % self.ring_slabs();
        self.ring_at(layer, row, slot)
    }

    /// Copies f16 slabs, (to, from); those that lie evenly apart on both sides together.
    fn copy_all(&self, copies: &[(u64, u64)]) -> Result<()> {
        let width = self.f16_bytes();
        let apart = |a: u64, b: u64| (b as usize).checked_sub(a as usize).filter(|n| *n >= width);
        let mut rest = copies;
        while let [(to, from), ..] = *rest {
            let next =
                rest.get(1).and_then(|next| Some((apart(to, next.0)?, apart(from, next.1)?)));
            let (to_pitch, from_pitch) = next.unwrap_or((width, width));
            let even = |i: &usize| {
                rest[*i] == (to + (i * to_pitch) as u64, from + (i * from_pitch) as u64)
            };
            let rows = (0..rest.len()).take_while(even).count();
            self.platform.copy(&Pieces { to, from, to_pitch, from_pitch, width, rows })?;
            rest = &rest[rows..];
        }
        Ok(())
    }
}
