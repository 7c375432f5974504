//! KIVI's own boundaries (arXiv:2402.02750), for parity: of `len` tokens, K of the newest `len mod R` and V of the
//! newest R stay f16, R being the spec's window. Both boundaries can lie inside a slab that is still in the ring: its
//! codes then go to the slab that the table will hold, and the ring gets the values that those codes stand for.
//!
//! A step of KIVI quantises after its own attention, which is the same as before the next token is written.

use kvwarp::pages::{Entry, Pools};
use kvwarp::slab::{Format, TOKENS};
use kvwarp::{Error, kv_pack};

use super::head::{Head, Rules, ring_slot, take};

impl Head {
    /// Quantises what KIVI has quantised once `self.len` tokens were attended to.
    pub fn settle(
        &mut self,
        rules: &Rules<'_>,
        ring: &mut [u8],
        pools: &mut Pools,
    ) -> Result<(), Error> {
        let (done, goal) = (self.settled, kv_pack::boundaries(self.len, rules.window));
        let layout = *pools.layout(rules.store);
        let slab = pools.layout(Format::F16).slab_bytes();
        for index in done.0.min(done.1) / TOKENS..goal.0.max(goal.1).div_ceil(TOKENS) {
            let at = ring_slot(pools, ring.len(), index);
            let codes = self.open(index, rules.store, pools)?;
            kv_pack::advance(index, done, goal, &mut ring[at..at + slab], codes, &layout);
        }
        self.settled = goal;
        self.packed = goal.0.min(goal.1) / TOKENS;
        Ok(())
    }

    /// The bytes of slab `index` in its pool, which it gets when it is first asked for.
    fn open<'a>(
        &mut self,
        index: usize,
        format: Format,
        pools: &'a mut Pools,
    ) -> Result<&'a mut [u8], Error> {
        if index == self.table.len() {
            self.table.push(Entry::new(format, take(pools, format)?));
        }
        let slot = self.table[index].get().map_or(0, |(_, slot)| slot);
        Ok(pools.pool_mut(format).slab_mut(slot))
    }
}
