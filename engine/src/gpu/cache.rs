//! The cache on the device: pools of slabs that all sequences share, a ring a head and row, one page table.
//!
//! The host knows every entry and every length; the device is told of entries by edits before the op that packs the slab,
//! and of lengths by each step. A table row is found by (layer, row, head), a ring likewise.

mod share;
mod view;

use std::rc::Rc;

use kvwarp::pages::{Entry, Slots, packed_slabs, ring_slabs};
use kvwarp::slab::{Format, Layout, Meta, TOKENS};

use super::metered::Metered;
use super::platform::{Buffer, GpuError, Result};
use super::tally::Use;
use crate::cache::{CacheStats, Plan, Shape, need};
use crate::runner::{Row, RunError, Slabs, check};
use crate::spec::CacheSpec;

/// One sequence.
struct Sequence {
    len: usize,
    /// Of packed slabs, `[slabs, layers * kv_heads]`.
    entries: Vec<Entry>,
}

/// An entry and where it goes in the device's table.
pub type Edit = [u32; 2];

/// Keys and values of up to `rows` sequences.
pub struct Cache {
    platform: Rc<Metered>,
    shape: Shape,
    spec: CacheSpec,
    rows: usize,
    /// Format of a head's slabs after the sinks, `[layers * kv_heads]`.
    stores: Vec<Format>,
    slab_bytes: [usize; Format::ALL.len()],
    pools: [Option<Buffer>; Format::ALL.len()],
    slots: [Slots; Format::ALL.len()],
    /// `[layers, rows, kv_heads, ring_slabs]` f16 slabs
    rings: Buffer,
    /// `[layers, rows, kv_heads, stride]`
    table: Buffer,
    stride: usize,
    /// `[layers * kv_heads, D, D]` f16
    feedback: Option<Buffer>,
    sequences: Vec<Option<Sequence>>,
}

impl Cache {
    /// Without pools, which take what memory is left in the end ([`Cache::fund`]).
    pub fn new(
        platform: &Rc<Metered>,
        spec: &CacheSpec,
        shape: Shape,
        plan: &Plan,
        rows: usize,
    ) -> Result<Self> {
        let refused = [
            (spec.kivi_exact, "`kivi_exact` quantises slabs in part, for parity tests on the CPU"),
            (spec.selects(), "`evict` and `tsp` run on the processor only"),
        ];
        if let Some((_, what)) = refused.into_iter().find(|(asked, _)| *asked) {
            return Err(GpuError::Unsupported(what.into()));
        }
        let heads = shape.layers * shape.kv_heads;
        let mut slab_bytes = [0; Format::ALL.len()];
        for (format, bytes) in Format::ALL.into_iter().zip(&mut slab_bytes) {
            let meta =
                if [Format::Q4, Format::Q2].contains(&format) { spec.meta } else { Meta::F16 };
            *bytes = Layout::with_meta(format, shape.head_dim, spec.group, meta)?.slab_bytes();
        }
        let stride = shape.context.div_ceil(TOKENS);
        let rings = heads * rows * ring_slabs(spec.window) * slab_bytes[0];
        let stores = (0..heads).map(|h| plan.store(spec, h)).collect();
        let feedback = plan.feedback.as_ref().map(|rows| {
            Buffer::of(
                platform,
                (Use::Weights, "weights of rounding errors"),
                bytemuck::cast_slice(rows),
            )
        });
        Ok(Self {
            platform: Rc::clone(platform),
            shape,
            spec: *spec,
            rows,
            stores,
            slab_bytes,
            pools: Default::default(),
            slots: std::array::from_fn(|_| Slots::new(0)),
            // Kernels read slabs whole, also those that are partly written.
            rings: Buffer::zeroed(platform, (Use::Rings, "recent tokens"), rings)?,
            table: Buffer::new(
                platform,
                (Use::Rings, "page tables"),
                heads * rows * stride * size_of::<Entry>(),
            )?,
            stride,
            feedback: feedback.transpose()?,
            sequences: (0..rows).map(|_| None).collect(),
        })
    }

    /// Makes the pools, by what sequences of the whole context take, each frozen once: of `budget` bytes, or of what
    /// `rows` sequences may need where there is no budget, as far as `free` bytes go. One of `least` tokens must fit.
    pub fn fund(&mut self, budget: Option<usize>, least: usize, free: usize) -> Result<()> {
        let full = self.whole(self.shape.context);
        let (bytes, one) = (self.slabs_of(&full), self.slabs_of(&self.whole(least)));
        let budget = budget.unwrap_or(free.min(self.rows * bytes));
        if budget < one {
            let what = "keys and values of one sequence";
            return Err(GpuError::Memory { what, need: one, free: budget });
        }
        for (f, &need) in full.iter().enumerate().filter(|(_, need)| **need > 0) {
            let slabs = (need as f64 * (budget as f64 / bytes as f64)) as usize;
            let slabs = slabs.min(Slots::MOST);
            self.pools[f] = Some(Buffer::new(
                &self.platform,
                (Use::Pools, "keys and values"),
                slabs * self.slab_bytes[f],
            )?);
            self.slots[f] = Slots::new(slabs);
        }
        Ok(())
    }

    /// Bytes that a sequence of the whole context takes: slabs, their copies once it is frozen, rings, page tables.
    pub fn sequence_bytes(&self) -> usize {
        let rows = [&self.rings, &self.table].map(|buffer| buffer.bytes() / self.rows);
        self.slabs_of(&self.whole(self.shape.context)) + rows.iter().sum::<usize>()
    }

    /// [`super::Gpu::holds_all`]
    pub fn holds_all(&self) -> bool {
        let most = self.slots.each_ref().map(|slots| slots.available() + slots.used());
        check(&self.whole(self.shape.context).map(|slabs| slabs * self.rows), &most).is_ok()
    }

    /// Slabs of a sequence of `len` tokens, frozen once.
    fn whole(&self, len: usize) -> Slabs {
        let mut slabs = self.need(0, len);
        slabs[Format::F16 as usize] += self.ring_slabs() * self.stores.len();
        slabs
    }

    fn slabs_of(&self, slabs: &Slabs) -> usize {
        slabs.iter().zip(self.slab_bytes).map(|(n, bytes)| n * bytes).sum()
    }

    /// How keys and values are kept.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// Of the model, and the most tokens of a sequence.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Most sequences.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Entries of the device's table, and its address.
    pub fn table(&self) -> (usize, u64) {
        (self.table.bytes() / size_of::<Entry>(), self.table.at())
    }

    /// Most edits that `slabs` new slabs of every head take.
    pub fn edits(&self, slabs: usize) -> usize {
        self.stores.len() * slabs
    }

    /// Bytes of an f16 slab.
    pub fn f16_bytes(&self) -> usize {
        self.slab_bytes[Format::F16 as usize]
    }

    /// Slabs of a row's ring.
    pub fn ring_slabs(&self) -> usize {
        ring_slabs(self.spec.window)
    }

    /// An empty sequence, in the lowest row that is free: the rows of a step are those up to the highest.
    pub fn open(&mut self) -> Result<Row, RunError> {
        let row = self.sequences.iter().position(Option::is_none);
        let row = row.ok_or(RunError::Rows { rows: self.rows })?;
        self.sequences[row] = Some(Sequence { len: 0, entries: Vec::new() });
        Ok(Row(row))
    }

    /// Ends a sequence.
    pub fn close(&mut self, row: Row) {
        let sequence = self.sequences[row.0].take();
        sequence.into_iter().flat_map(|s| s.entries).for_each(|entry| self.give(entry));
    }

    /// Tokens held.
    pub fn len(&self, row: Row) -> usize {
        self.sequence(row).len
    }

    /// Counts tokens that the device has been given, or forgets `n` of them.
    pub fn set_len(&mut self, row: Row, len: usize) {
        if let Some(sequence) = &mut self.sequences[row.0] {
            sequence.len = len;
        }
    }

    /// Slabs in the table.
    pub fn packed(&self, row: Row) -> usize {
        self.sequence(row).entries.len() / self.stores.len()
    }

    /// Slabs at hand.
    pub fn free(&self) -> Slabs {
        std::array::from_fn(|f| self.slots[f].available())
    }

    /// Slabs in use.
    pub fn used(&self) -> Slabs {
        std::array::from_fn(|f| self.slots[f].used())
    }

    /// Slabs that a sequence of `len` tokens takes for `n` more.
    pub fn need(&self, len: usize, n: usize) -> Slabs {
        need(self.stores.iter().copied(), &self.spec, len, n)
    }

    /// Slabs that freezing a sequence of `len` tokens takes.
    pub fn need_frozen(&self, len: usize) -> Slabs {
        let mut need = Slabs::default();
        let ring = len.div_ceil(TOKENS) - packed_slabs(len, self.spec.window);
        need[Format::F16 as usize] = ring * self.stores.len();
        need
    }

    /// Takes the slabs that `row` needs once it holds `len` tokens, which must be free; the edits say so to the device.
    pub fn extend(&mut self, row: Row, len: usize, edits: &mut Vec<Edit>) -> Result<(), RunError> {
        let sinks = self.spec.sinks.div_ceil(TOKENS);
        for slab in self.packed(row)..packed_slabs(len, self.spec.window) {
            for h in 0..self.stores.len() {
                let format = if slab < sinks { Format::F16 } else { self.stores[h] };
                let entry = self.take(format)?;
                edits.push([self.table_index(row, h, slab), entry.0]);
                if let Some(sequence) = &mut self.sequences[row.0] {
                    sequence.entries.push(entry);
                }
            }
        }
        Ok(())
    }

    /// What a sequence costs; slabs that it shares count in full.
    pub fn stats(&self, row: Row) -> CacheStats {
        let Sequence { len, entries } = self.sequence(row);
        let heads = self.stores.len();
        let slabs = entries.iter().filter_map(|entry| entry.get());
        let slabs: usize = slabs.map(|(format, _)| self.slab_bytes[format as usize]).sum();
        let used_bytes =
            slabs + size_of_val(&entries[..]) + heads * self.ring_slabs() * self.f16_bytes();
        let pools: usize = self.pools.iter().flatten().map(Buffer::bytes).sum();
        let elements = 2 * len * heads * self.shape.head_dim;
        CacheStats {
            tokens: *len,
            used_bytes,
            peak_bytes: used_bytes,
            capacity_bytes: pools + self.rings.bytes() + self.table.bytes(),
            effective_bits: if *len == 0 { 0.0 } else { (used_bytes * 8) as f64 / elements as f64 },
        }
    }

    fn sequence(&self, row: Row) -> &Sequence {
        static EMPTY: Sequence = Sequence { len: 0, entries: Vec::new() };
        self.sequences[row.0].as_ref().unwrap_or(&EMPTY)
    }

    /// Entry `slab` of head `h`, counted over all layers.
    fn table_index(&self, row: Row, h: usize, slab: usize) -> u32 {
        let (layer, head) = (h / self.shape.kv_heads, h % self.shape.kv_heads);
        let line = (layer * self.rows + row.0) * self.shape.kv_heads + head;
        (line * self.stride + slab) as u32
    }

    fn take(&mut self, format: Format) -> Result<Entry, RunError> {
        let slot = self.slots[format as usize].take();
        let slot = slot.ok_or(RunError::Exhausted { format, need: 1, free: 0 })?;
        Ok(Entry::new(format, slot))
    }

    fn give(&mut self, entry: Entry) {
        if let Some((format, slot)) = entry.get() {
            self.slots[format as usize].give(slot as u32);
        }
    }
}
