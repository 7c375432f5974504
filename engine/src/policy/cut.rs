//! What a layer keeps, where that is known before there are scores: as many tokens in every head.

use std::ops::Range;

use super::budget;
use super::choose::kept;
use super::{Budget, Evict, Method};
use crate::runner::Held;
use crate::spec::CacheSpec;

/// Of `len` slots of each head, all stay but those of `parts` stretches of `width` from slot `first` on, of each of which
/// the best `k` stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub len: usize,
    pub first: usize,
    pub parts: usize,
    pub width: usize,
    pub k: usize,
}

/// Tokens that go deeper than a layer, the newest `window` of them whatever their scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Onward {
    pub kept: usize,
    pub window: usize,
    /// Neighbours that their scores are the most of.
    pub pool: usize,
}

impl Cut {
    /// Of a layer that has read all `n` tokens of a sequence; `read` were given to the first layer. `None` where all stay, or
    /// none is chosen among where other layers' scores count.
    pub fn first_read(
        spec: &CacheSpec,
        read: usize,
        (layer, layers): (usize, usize),
        n: usize,
    ) -> Option<Self> {
        let evict = spec.evict?;
        if evict.method() == Method::Lag {
            return Self::lag(&evict, Held { len: n, packed: 0, chosen: 0 });
        }
        let (oldest, newest) = evict.protects(n, kept(evict.keep, read, n));
        let open = n - (oldest + newest).min(n);
        let even = kept(evict.keep, read, n).saturating_sub(n - open);
        let k = match spec.budget() {
            Budget::Pyramid => budget::pyramid(even, open, layer, layers),
            _ => even,
        };
        let chooses = k < open || spec.budget().waits() && open > 0;
        chooses.then_some(Self { len: n, first: oldest, parts: 1, width: open, k })
    }

    /// LagKV's, of a layer that holds so much; `None` while there are fewer than two partitions.
    pub fn lag(evict: &Evict, held: Held) -> Option<Self> {
        let width = usize::from(evict.options.lag);
        let first = held.chosen.max(usize::from(evict.options.sink));
        let parts = (held.len.saturating_sub(first) / width).saturating_sub(1);
        let k = evict.keep.of(width);
        (parts > 0 && k < width).then_some(Self { len: held.len, first, parts, width, k })
    }

    /// Slots that stay.
    pub fn stays(&self) -> usize {
        self.len - self.parts * (self.width - self.k)
    }

    /// Of those, the ones before and among which has been chosen.
    pub fn chosen(&self) -> usize {
        self.first + self.parts * self.k
    }

    /// Slots from `base` on that stay, ascending: the `best` of each stretch, counted from its first, and all others.
    pub fn slots(&self, base: usize, mut best: impl FnMut(usize) -> Vec<u32>) -> Vec<u32> {
        let all = |range: Range<usize>| range.map(|slot| slot as u32);
        let mut slots: Vec<u32> = all(base..self.first).collect();
        for p in 0..self.parts {
            let from = (self.first + p * self.width) as u32;
            slots.extend(best(p).into_iter().map(|i| from + i));
        }
        slots.extend(all(self.first + self.parts * self.width..self.len));
        slots
    }
}

impl Onward {
    /// FastKV's window and its neighbours.
    pub const WINDOW: usize = 8;
    const POOL: usize = 7;

    /// Of `n` tokens that have passed layer `layer`; `None` where all go on.
    pub fn new(
        spec: &CacheSpec,
        read: usize,
        (layer, layers): (usize, usize),
        n: usize,
    ) -> Option<Self> {
        let tsp = spec.tsp.filter(|tsp| tsp.layer(layers) == layer)?;
        let kept = tsp.rate.of(read).max(Self::WINDOW);
        (kept < n).then_some(Self { kept, window: Self::WINDOW, pool: Self::POOL })
    }
}
