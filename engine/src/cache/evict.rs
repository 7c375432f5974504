//! Dropping tokens that a policy does not keep.

use kvwarp::kv_gather;
use kvwarp::pages::HeadView;
use kvwarp::slab::Format;
use kvwarp::threads::Team;

use super::{Cache, CacheError, Sequence, open_mut};
use crate::policy::{Evict, choose_lag};
use crate::runner::Row;

impl Cache {
    /// Of head `h` of the staged `layer`, keeps the tokens before slot `first` and, of those from there on, the ones in
    /// `slots`, ascending.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] where they are not; nothing changes then.
    pub fn keep(
        &mut self,
        row: Row,
        layer: usize,
        h: usize,
        first: usize,
        slots: &[u32],
    ) -> Result<(), CacheError> {
        let (bytes, f16) = (self.staged_bytes(layer), *self.pools.layout(Format::F16));
        let at = self.range(layer).start + h;
        let Self { sequences, staging, .. } = self;
        let head = &mut open_mut(sequences, row).heads[at];
        let ring = staging[layer].slice_mut(h * bytes, bytes);
        kv_gather::compact(ring, &f16, first, slots)?;
        head.len = first + slots.len();
        Ok(())
    }

    /// Forgets the newest `n` tokens of the staged `layer`.
    pub fn retract(&mut self, row: Row, layer: usize, n: usize) {
        let range = self.range(layer);
        self.sequence_mut(row).heads[range].iter_mut().for_each(|head| head.len -= n);
    }

    /// LagKV among the tokens of the staged `layer` that it has not chosen among.
    ///
    /// # Errors
    /// [`CacheError::Kernel`].
    pub fn lag_staged(
        &mut self,
        row: Row,
        layer: usize,
        evict: &Evict,
        team: &Team,
    ) -> Result<(), CacheError> {
        let first = self.range(layer).start;
        let views = self.staged_views(row, layer);
        for (h, choice) in self.lags(views, (row, layer), evict, team)? {
            let head = &mut self.sequence_mut(row).heads[first + h];
            let from = std::mem::replace(&mut head.chosen, choice.1);
            self.keep(row, layer, h, from, &choice.0)?;
        }
        Ok(())
    }

    /// LagKV among the tokens of `layer` that it has not chosen among: once for each partition that a decoded token
    /// completes. They are all in the ring.
    ///
    /// # Errors
    /// [`CacheError::Kernel`].
    pub fn lag(
        &mut self,
        row: Row,
        layer: usize,
        evict: &Evict,
        team: &Team,
    ) -> Result<(), CacheError> {
        let (first, bytes) = (self.range(layer).start, self.ring_bytes());
        let f16 = *self.pools.layout(Format::F16);
        for (h, (slots, chosen)) in self.lags(self.views(row, layer), (row, layer), evict, team)? {
            let Sequence { heads, rings, .. } = self.sequence_mut(row);
            let head = &mut heads[first + h];
            let ring = rings.slice_mut((first + h) * bytes, bytes);
            kv_gather::compact(ring, &f16, head.chosen, &slots)?;
            head.len = head.chosen + slots.len();
            head.chosen = chosen;
        }
        Ok(())
    }

    /// What LagKV keeps of each head, by number, that has something to drop.
    #[allow(clippy::type_complexity)]
    fn lags(
        &self,
        views: Vec<HeadView<'_>>,
        (row, layer): (Row, usize),
        evict: &Evict,
        team: &Team,
    ) -> Result<Vec<(usize, (Vec<u32>, usize))>, CacheError> {
        let heads = &self.sequence(row).heads[self.range(layer)];
        let mut all = Vec::new();
        for (h, (view, head)) in views.iter().zip(heads).enumerate() {
            all.extend(choose_lag(team, evict, view, head.chosen)?.map(|choice| (h, choice)));
        }
        Ok(all)
    }
}
