//! Sequences that begin alike: packed slabs by reference, recent tokens by copies.

use kvwarp::device::Pieces;
use kvwarp::pages::Entry;
use kvwarp::slab::{Format, TOKENS};

use super::{Cache, Edit, Sequence};
use crate::gpu::platform::Result;
use crate::runner::{Frozen, Row, RunError, check};

impl Cache {
    /// What `row` holds, shared.
    pub fn freeze(&mut self, row: Row) -> Result<Frozen, RunError> {
        let (len, packed) = (self.len(row), self.packed(row));
        check(&self.need_frozen(len), &self.free())?;
        let (heads, slabs) = (self.stores.len(), len.div_ceil(TOKENS));
        let mut entries = vec![Entry::HOLE; heads * slabs];
        let mut copies = Vec::new();
        for h in 0..heads {
            for slab in 0..slabs {
                entries[h * slabs + slab] = if slab < packed {
                    let entry = self.sequence(row).entries[slab * heads + h];
                    self.share(entry);
                    entry
                } else {
                    let entry = self.take(Format::F16)?;
                    copies.push((self.slab_at(entry), self.recent_at(row, h, slab)));
                    entry
                };
            }
        }
        self.copy_all(&copies)?;
        Ok(Frozen { len, heads: Vec::new(), entries })
    }

    /// A new sequence that continues from `frozen`; the edits tell the device of its table.
    pub fn thaw(&mut self, frozen: &Frozen, edits: &mut Vec<Edit>) -> Result<Row, RunError> {
        let row = self.open()?;
        let (heads, slabs) = (self.stores.len(), frozen.len.div_ceil(TOKENS));
        let packed = kvwarp::pages::packed_slabs(frozen.len, self.spec.window);
        let mut entries = vec![Entry::HOLE; heads * packed];
        let mut copies = Vec::new();
        for h in 0..heads {
            for slab in 0..slabs {
                let entry = frozen.entries[h * slabs + slab];
                if slab < packed {
                    self.share(entry);
                    entries[slab * heads + h] = entry;
                    edits.push([self.table_index(row, h, slab), entry.0]);
                } else {
                    copies.push((self.recent_at(row, h, slab), self.slab_at(entry)));
                }
            }
        }
        self.sequences[row.0] = Some(Sequence { len: frozen.len, entries });
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

    /// Address of a slab in its pool, and its bytes.
    pub fn slab(&self, entry: Entry) -> Option<(u64, usize)> {
        let (format, slot) = entry.get()?;
        let bytes = self.slab_bytes[format as usize];
        let pool = self.pools[format as usize].as_ref()?;
        Some((pool.at() + (slot * bytes) as u64, bytes))
    }

    fn slab_at(&self, entry: Entry) -> u64 {
        self.slab(entry).map_or(0, |(at, _)| at)
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
