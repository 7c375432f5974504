//! Who owns which slab of a pool: the bookkeeping, wherever the slabs themselves lie.

/// Slots of a pool: a free list, a count of owners for each, and a limit.
///
/// A slab may be written only while it has one owner; one that is shared is read only.
#[derive(Debug, Clone)]
pub struct Slots {
    /// Owners of each slot handed out so far; 0 = free.
    owners: Vec<u32>,
    free: Vec<u32>,
    limit: usize,
}

impl Default for Slots {
    /// As many as page table entries can name.
    fn default() -> Self {
        Self::new(Self::MOST)
    }
}

impl Slots {
    /// Most slots: an index has 28 bits in a page table entry.
    pub const MOST: usize = 1 << 28;

    /// At most `limit` slots, all free.
    pub fn new(limit: usize) -> Self {
        Self { owners: Vec::new(), free: Vec::new(), limit: limit.min(Self::MOST) }
    }

    /// A slot with one owner, the one freed last where there is one; `None` at the limit.
    pub fn take(&mut self) -> Option<u32> {
        if self.available() == 0 {
            return None;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.owners.push(0);
            self.owners.len() as u32 - 1
        });
        self.owners[slot as usize] = 1;
        Some(slot)
    }

    /// One more owner of a slot that is in use.
    pub fn share(&mut self, slot: u32) {
        debug_assert!(self.owners(slot) > 0, "slot {slot} is free");
        self.owners[slot as usize] += 1;
    }

    /// One owner less; whether it was the last, so that the slot is free now.
    pub fn give(&mut self, slot: u32) -> bool {
        debug_assert!(self.owners(slot) > 0, "slot {slot} is free");
        let owners = &mut self.owners[slot as usize];
        *owners -= 1;
        let last = *owners == 0;
        if last {
            self.free.push(slot);
        }
        last
    }

    /// Owners of a slot; 0 when it is free.
    pub fn owners(&self, slot: u32) -> u32 {
        self.owners.get(slot as usize).copied().unwrap_or(0)
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        self.owners.len() - self.free.len()
    }

    /// Slots that may still be taken.
    pub fn available(&self) -> usize {
        self.limit.saturating_sub(self.used())
    }

    /// Slots that have ever been in use: every index is below this.
    pub fn touched(&self) -> usize {
        self.owners.len()
    }

    /// Slots that may be in use at once.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Sets the limit; slots in use beyond it stay so.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.min(Self::MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::Slots;
    use proptest::prelude::*;

    proptest! {
        /// Against a list of owners: counts balance, a slot taken has nobody else, and the limit holds.
        #[test]
        fn slots_are_owned_as_often_as_taken_and_shared(
            limit in 0..20usize,
            steps in prop::collection::vec((0..3u8, any::<prop::sample::Index>()), 0..200),
        ) {
            let (mut slots, mut owners) = (Slots::new(limit), Vec::<u32>::new());
            for (step, which) in steps {
                match step {
                    0 => match slots.take() {
                        Some(slot) => {
                            prop_assert!(!owners.contains(&slot));
                            owners.push(slot);
                        }
                        None => prop_assert_eq!(slots.used(), limit),
                    },
                    _ if owners.is_empty() => {}
                    1 => {
                        let slot = owners[which.index(owners.len())];
                        slots.share(slot);
                        owners.push(slot);
                    }
                    _ => {
                        let slot = owners.swap_remove(which.index(owners.len()));
                        prop_assert_eq!(slots.give(slot), !owners.contains(&slot));
                    }
                }
                let mut in_use = owners.clone();
                in_use.sort_unstable();
                in_use.dedup();
                prop_assert_eq!((slots.used(), slots.available()), (in_use.len(), limit - in_use.len()));
                for slot in 0..slots.touched() as u32 {
                    let count = owners.iter().filter(|&&owner| owner == slot).count();
                    prop_assert_eq!(slots.owners(slot) as usize, count);
                }
                prop_assert!(slots.touched() <= limit);
            }
        }
    }

    #[test]
    fn the_slot_freed_last_is_taken_first() {
        let mut slots = Slots::new(3);
        let taken = [(); 3].map(|()| slots.take());
        assert_eq!((taken, slots.take()), ([Some(0), Some(1), Some(2)], None));
        slots.give(2);
        slots.give(0);
        assert_eq!([slots.take(), slots.take()], [Some(0), Some(2)]);
        slots.set_limit(1);
        assert_eq!((slots.available(), slots.take()), (0, None));
    }
}
