//! Memory for slabs: how much of it there is to be, and who has it.

use kvwarp::pages::{Entry, Slots};
use kvwarp::slab::Format;

use super::Cache;
use crate::cache::newest;
use crate::gpu::platform::{Buffer, GpuError, Result};
use crate::gpu::tally::Use;
use crate::runner::{RunError, Slabs, check};

impl Cache {
    /// Makes the pools, by what sequences of the whole context take, each frozen once: of `budget` bytes, or of what
    /// `rows` sequences may need where there is no budget, as far as `free` bytes go. One of `least` tokens must fit.
    pub fn fund(&mut self, budget: Option<usize>, least: usize, free: usize) -> Result<()> {
        let full = self.whole(self.shape.context);
        let (bytes, one) =
            (self.slabs_of(&full), self.slabs_of(&self.whole(least.min(self.shape.context))));
        let aside = self.beside(Format::F16 as usize) * self.f16_bytes();
        let budget = budget.unwrap_or(free.saturating_sub(aside).min(self.rows * bytes));
        if budget < one {
            let what = "keys and values of one sequence";
            return Err(GpuError::Memory { what, need: one, free: budget });
        }
        for (f, &need) in full.iter().enumerate().filter(|(_, need)| **need > 0) {
            let slabs = (need as f64 * (budget as f64 / bytes as f64)) as usize;
            let slabs = slabs.min(Slots::MOST - self.beside(f)) + self.beside(f);
            let (what, size) = ((Use::Pools, "keys and values"), slabs * self.slab_bytes[f]);
            // Slabs of latents are read whole while they are partly written.
            self.pools[f] = Some(match self.has_latents() {
                true => Buffer::zeroed(&self.platform, what, size)?,
                false => Buffer::new(&self.platform, what, size)?,
            });
            self.slots[f] = Slots::new(slabs);
        }
        Ok(())
    }

    /// Bytes that a sequence of the whole context takes: slabs, their copies once it is frozen, rings, page tables.
    pub fn sequence_bytes(&self) -> usize {
        let rows = [&self.rings, &self.table].map(|buffer| buffer.bytes() / self.rows);
        let begun = if self.has_latents() { self.rings() * self.f16_bytes() } else { 0 };
        self.slabs_of(&self.whole(self.shape.context)) + begun + rows.iter().sum::<usize>()
    }

    /// [`super::Gpu::holds_all`]
    pub fn holds_all(&self) -> bool {
        let of = |f: usize| self.slots[f].available() + self.slots[f].used() - self.beside(f);
        let most = std::array::from_fn(of);
        check(&self.whole(self.shape.context).map(|slabs| slabs * self.rows), &most).is_ok()
    }

    /// Slabs of a sequence of `len` tokens, frozen once.
    fn whole(&self, len: usize) -> Slabs {
        let mut slabs = self.need(0, len);
        slabs[Format::F16 as usize] += self.rings();
        slabs
    }

    /// F16 slabs of the rings of a row; of latents, those that stand for them.
    fn rings(&self) -> usize {
        if self.has_latents() { newest(&self.spec) } else { self.ring_slabs() * self.stores.len() }
    }

    fn slabs_of(&self, slabs: &Slabs) -> usize {
        slabs.iter().zip(self.slab_bytes).map(|(n, bytes)| n * bytes).sum()
    }

    pub(super) fn take(&mut self, format: Format) -> Result<Entry, RunError> {
        let slot = self.slots[format as usize].take();
        let slot = slot.ok_or(RunError::Exhausted { format, need: 1, free: 0 })?;
        Ok(Entry::new(format, slot))
    }

    pub(super) fn give(&mut self, entry: Entry) {
        if let Some((format, slot)) = entry.get() {
            self.slots[format as usize].give(slot as u32);
        }
    }
}
