//! Sequences: what each holds of every layer.

use kvwarp::pages::{Entry, packed_slabs};
use kvwarp::slab::{Format, TOKENS};

use super::{Cache, Edit};
use crate::cache::{CacheStats, Shape};
use crate::gpu::platform::Buffer;
use crate::runner::{Held, Row, RunError};

/// One sequence.
#[derive(Clone, Default)]
pub(super) struct Sequence {
    /// Tokens given.
    pub len: usize,
    /// `[layers * kv_heads]`
    pub heads: Vec<Line>,
}

/// What a sequence holds of a head.
#[derive(Clone, Default)]
pub(super) struct Line {
    pub len: usize,
    /// Tokens at the start that a policy does not choose among again.
    pub chosen: usize,
    /// Of packed slabs; of latents of all.
    pub entries: Vec<Entry>,
    /// Of latents, slabs that have left the window.
    pub packed: usize,
}

impl Cache {
    /// An empty sequence, in the lowest row that is free: the rows of a step are those up to the highest.
    pub fn open(&mut self) -> Result<Row, RunError> {
        let row = self.sequences.iter().position(Option::is_none);
        let row = row.ok_or(RunError::Rows { rows: self.rows })?;
        let heads = vec![Line::default(); self.stores.len()];
        self.sequences[row] = Some(Sequence { len: 0, heads });
        Ok(Row(row))
    }

    /// Ends a sequence.
    pub fn close(&mut self, row: Row) {
        let heads = self.sequences[row.0].take().into_iter().flat_map(|s| s.heads);
        heads.flat_map(|line| line.entries).for_each(|entry| self.give(entry));
    }

    /// Tokens given.
    pub fn len(&self, row: Row) -> usize {
        self.sequences[row.0].as_ref().map_or(0, |sequence| sequence.len)
    }

    /// What head `h` holds, counted over all layers.
    pub fn held(&self, row: Row, h: usize) -> Held {
        let Line { len, chosen, entries, packed } = self.line(row, h);
        let packed = if self.has_latents() { *packed } else { entries.len() };
        Held { len: *len, packed, chosen: *chosen }
    }

    /// What every head holds, `[layers * kv_heads]`.
    pub fn all_held(&self, row: Row) -> Vec<Held> {
        (0..self.stores.len()).map(|h| self.held(row, h)).collect()
    }

    /// Says that the device was given `n` tokens.
    pub fn advance(&mut self, row: Row, n: usize) {
        let Some(sequence) = &mut self.sequences[row.0] else { return };
        sequence.len += n;
        sequence.heads.iter_mut().for_each(|line| line.len += n);
    }

    /// Forgets the newest `n` tokens.
    pub fn retreat(&mut self, row: Row, n: usize) {
        let Some(sequence) = &mut self.sequences[row.0] else { return };
        sequence.len -= n;
        sequence.heads.iter_mut().for_each(|line| line.len -= n);
    }

    /// Says what a head holds when tokens of it were dropped.
    pub fn keep(&mut self, row: Row, h: usize, (len, chosen): (usize, usize)) {
        let Some(sequence) = &mut self.sequences[row.0] else { return };
        (sequence.heads[h].len, sequence.heads[h].chosen) = (len, chosen);
    }

    /// Says how many tokens the device was given in all.
    pub fn set_len(&mut self, row: Row, len: usize) {
        if let Some(sequence) = &mut self.sequences[row.0] {
            sequence.len = len;
        }
    }

    /// Newest tokens that are not packed, in any head.
    pub fn spare(&self, row: Row) -> usize {
        let spare = |held: Held| held.len.saturating_sub(held.packed * TOKENS);
        self.all_held(row).into_iter().map(spare).min().unwrap_or(0)
    }

    /// Most of `room` tokens after the next that pack no slab and have none dropped.
    pub fn loose(&self, row: Row, room: usize) -> usize {
        let heads = self.all_held(row);
        let loose = |held: &Held, n| self.spec.is_loose((held.len, held.chosen), n);
        (1..=room).take_while(|n| heads.iter().all(|held| loose(held, *n))).count()
    }

    /// F16 slabs that freezing a sequence takes.
    pub fn need_frozen(&self, row: Row) -> usize {
        let ring = |held: Held| held.len.div_ceil(TOKENS) - held.packed;
        self.all_held(row).into_iter().map(ring).sum()
    }

    /// Takes the slabs that head `h` of `row` needs once it holds `len` tokens, which must be free; the edits say so to the
    /// device.
    pub fn extend(
        &mut self,
        row: Row,
        h: usize,
        len: usize,
        edits: &mut Vec<Edit>,
    ) -> Result<(), RunError> {
        let sinks = self.spec.sinks.div_ceil(TOKENS);
        // What is in the window of latents lies in the table too.
        let slabs = match self.has_latents() {
            true => len.div_ceil(TOKENS),
            false => packed_slabs(len, self.spec.window),
        };
        for slab in self.line(row, h).entries.len()..slabs {
            let exact = slab < sinks || self.has_latents();
            let format = if exact { Format::F16 } else { self.stores[h] };
            let entry = self.take(format)?;
            edits.push([self.table_index(row, h, slab), entry.0]);
            if let Some(sequence) = &mut self.sequences[row.0] {
                sequence.heads[h].entries.push(entry);
            }
        }
        Ok(())
    }

    /// What a sequence costs; slabs that it shares count in full.
    pub fn stats(&self, row: Row) -> CacheStats {
        let (len, heads) = (self.len(row), self.stores.len());
        let entries = (0..heads).flat_map(|h| &self.line(row, h).entries);
        let slab = |entry: &Entry| {
            let packed = entry.get().map_or(0, |(format, _)| self.slab_bytes[format as usize]);
            packed + size_of::<Entry>()
        };
        let slabs: usize = entries.map(slab).sum();
        let rings =
            if self.has_latents() { 0 } else { heads * self.ring_slabs() * self.f16_bytes() };
        let used_bytes = slabs + rings;
        let pools: usize = self.pools.iter().flatten().map(Buffer::bytes).sum();
        let Shape { layers, kv_heads, head_dim, .. } = self.shape;
        let elements = 2 * len * layers * kv_heads * head_dim;
        CacheStats {
            tokens: len,
            used_bytes,
            peak_bytes: used_bytes,
            capacity_bytes: pools + self.rings.bytes() + self.table.bytes(),
            effective_bits: if len == 0 { 0.0 } else { (used_bytes * 8) as f64 / elements as f64 },
        }
    }

    pub(super) fn line(&self, row: Row, h: usize) -> &Line {
        static EMPTY: Line = Line { len: 0, chosen: 0, entries: Vec::new(), packed: 0 };
        self.sequences[row.0].as_ref().map_or(&EMPTY, |sequence| &sequence.heads[h])
    }
}
