//! A cache of the C ABI in host memory, as the CPU paths see one.

use super::memory::{Given, Shared, slice};
use super::{Checked, Refusal};
use crate::ffi::kvw_cache;
use crate::pages::{Entry, HeadView, Pools, packed_slabs};
use crate::slab::{Format, Layout, Meta, TOKENS};
use std::ops::Range;

const FORMATS: usize = Format::ALL.len();

/// One kv head of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub seq: usize,
    pub head: usize,
    /// Its place in arrays `[S, lens_heads]`.
    pub at: usize,
    /// Tokens held.
    pub len: usize,
    /// Slabs in the table, all of them or not: a length may have been cut.
    pub packed: usize,
    /// Entries of its row in the table.
    row: usize,
    room: usize,
}

/// What a cache's numbers come to: nothing behind its pools and ring has been followed.
pub(super) struct Host<'a> {
    c: Given<'a, kvw_cache>,
    layouts: [Layout; FORMATS],
    places: Vec<Place>,
}

impl<'a> Host<'a> {
    /// # Safety
    /// `c` has passed a check, and its pointers are as `csrc/slab.h` says, in host memory, while this lives.
    pub(super) unsafe fn new(c: Given<'a, kvw_cache>) -> Checked<Self> {
        let (d, group) = (c.head_dim as usize, c.group as usize);
        let meta = if c.meta == crate::ffi::KVW_META_U8 { Meta::U8 } else { Meta::F16 };
        let layouts = layouts(&Pools::with_meta(d, group, meta)?);
        let (seqs, heads, stride) =
            (c.seqs as usize, c.kv_heads as usize, c.table_stride.max(0) as usize);
        let lens_heads = c.lens_heads as usize;
        let mut places = Vec::with_capacity(seqs * heads);
        // SAFETY: the caller's promise.
        let (lens, packed, starts) = unsafe {
            let lens = slice(c.lens, seqs * lens_heads);
            let packed = (!c.packed.is_null()).then(|| slice(c.packed, seqs * lens_heads));
            let starts = (!c.indptr.is_null()).then(|| slice(c.indptr, seqs + 1));
            (lens, packed, starts)
        };
        for (seq, head) in (0..seqs).flat_map(|s| (0..heads).map(move |h| (s, h))) {
            let at = if lens_heads == 1 { seq } else { seq * heads + head };
            let len = usize::try_from(lens[at]).map_err(|_| Refusal::shape("lens"))?;
            let packed = match packed {
                Some(packed) => packed[at].max(0) as usize,
                None => packed_slabs(len, c.window as usize),
            };
            let (row, room) = match starts {
                Some(starts) => {
                    let (from, to) = (starts[seq], starts[seq + 1]);
                    if from < 0 || to < from {
                        return Err(Refusal::shape("indptr"));
                    }
                    (from as usize, (to - from) as usize)
                }
                None if c.table_heads == 1 => (seq * stride, stride),
                None => ((seq * heads + head) * stride, stride),
            };
            places.push(Place { seq, head, at, len, packed, row, room });
        }
        Ok(Self { c, layouts, places })
    }

    /// `[S][H]`
    pub(super) fn places(&self) -> &[Place] {
        &self.places
    }

    pub(super) fn layout(&self, format: Format) -> &Layout {
        &self.layouts[format as usize]
    }

    /// Entries of these slabs of a head, those without a slab as holes; a shared row's entry e is slab e * H + h.
    ///
    /// # Safety
    /// As [`Host::new`].
    pub(super) unsafe fn entries(&self, place: &Place, slabs: Range<usize>) -> Checked<Vec<Entry>> {
        let c = &*self.c;
        if c.table.is_null() {
            return Ok(vec![Entry::HOLE; slabs.len()]);
        }
        if slabs.end > place.room && !slabs.is_empty() {
            return Err(Refusal::shape(if c.indptr.is_null() { "table_stride" } else { "indptr" }));
        }
        // SAFETY: the row has `room` entries.
        let row = unsafe { slice(c.table.add(place.row), place.room) };
        let entry = |&e: &u32| match Entry(e).get() {
            Some((format, index)) if !c.pools[format as usize].is_null() => {
                let shared = c.table_heads == 1;
                let index = if shared { index * c.kv_heads as usize + place.head } else { index };
                if index < 1 << 28 {
                    Ok(Entry::new(format, index as u32))
                } else {
                    Err(Refusal::shape("table"))
                }
            }
            _ => Ok(Entry::HOLE),
        };
        row[slabs.start.min(slabs.end)..slabs.end].iter().map(entry).collect()
    }

    /// The slab of one entry, to write: `None` where there is none.
    ///
    /// # Safety
    /// The pools hold what the table says, and no one else uses the slab while it lives.
    pub(super) unsafe fn slab<'b>(&self, entry: Entry) -> Option<(&Layout, &'b mut [u8])> {
        let (format, index) = entry.get()?;
        let (layout, pool) = (self.layout(format), self.c.pools[format as usize]);
        let bytes = layout.slab_bytes();
        // SAFETY: the caller's promise.
        Some((layout, unsafe { Shared::new(pool.cast::<u8>()).take(index * bytes, bytes) }))
    }

    /// A head's ring, to write.
    ///
    /// # Safety
    /// It is there, and no one else uses it while the slice lives.
    pub(super) unsafe fn ring<'b>(&self, place: &Place) -> &'b mut [u8] {
        let at = self.ring_at(place);
        // SAFETY: the caller's promise.
        unsafe { Shared::new(self.c.ring.cast::<u8>()).take(at.start, at.len()) }
    }

    /// Bytes of a head's ring in those of all.
    fn ring_at(&self, place: &Place) -> Range<usize> {
        let bytes = self.c.ring_slabs as usize * self.layout(Format::F16).slab_bytes();
        let row = place.seq * self.c.kv_heads as usize + place.head;
        row * bytes..(row + 1) * bytes
    }
}

/// A cache that is read: a view a head.
pub(super) struct Views<'a> {
    host: Host<'a>,
    pools: Pools,
    entries: Vec<Vec<Entry>>,
}

impl<'a> Views<'a> {
    /// # Safety
    /// As [`Host::new`]; nobody writes the cache while this lives.
    pub(super) unsafe fn new(c: Given<'a, kvw_cache>) -> Checked<Self> {
        // SAFETY: the caller's promise.
        let host = unsafe { Host::new(c)? };
        let mut entries = Vec::with_capacity(host.places.len());
        let mut slabs = [0; FORMATS];
        for place in &host.places {
            let held = place.packed.min(place.len.div_ceil(TOKENS));
            // SAFETY: the caller's promise.
            let row = unsafe { host.entries(place, 0..held)? };
            for (format, index) in row.iter().filter_map(|e| e.get()) {
                let slabs = &mut slabs[format as usize];
                *slabs = (index + 1).max(*slabs);
            }
            if place.len.div_ceil(TOKENS) - held > c.ring_slabs as usize {
                return Err(Refusal::shape("ring_slabs"));
            }
            entries.push(row);
        }
        let (d, group) = (c.head_dim as usize, c.group as usize);
        let meta = host.layout(Format::Q2).meta;
        let mut pools = Pools::with_meta(d, group, meta)?;
        for format in Format::ALL {
            let len = slabs[format as usize] * host.layout(format).slab_bytes();
            // SAFETY: a pool holds every slab that an entry names; `'static` ends with `self`, whose views borrow it.
            let bytes: &'static [u8] = unsafe { slice(c.pools[format as usize].cast(), len) };
            pools.pool_mut(format).lend(bytes);
        }
        Ok(Self { host, pools, entries })
    }

    pub(super) fn places(&self) -> &[Place] {
        &self.host.places
    }

    /// `[S][H]`
    pub(super) fn heads(&self) -> Vec<HeadView<'_>> {
        let view = |(place, table)| {
            let (place, table): (&Place, &Vec<Entry>) = (place, table);
            let (at, ring) = (self.host.ring_at(place), self.host.c.ring.cast::<u8>());
            HeadView {
                pools: &self.pools,
                table,
                // SAFETY: as `new` was promised.
                ring: unsafe { slice(ring.add(at.start), at.len()) },
                len: place.len,
                packed: table.len(),
            }
        };
        self.host.places.iter().zip(&self.entries).map(view).collect()
    }
}

fn layouts(pools: &Pools) -> [Layout; FORMATS] {
    Format::ALL.map(|format| *pools.layout(format))
}
