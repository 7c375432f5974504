//! What a partition says about channels, and how far a token's scaled channels lie apart.

use crate::lanes::{Lanes, Row};
use crate::pages::SlabRef;
use crate::prefill_attn::tile::Tile;
use crate::slab::{TOKENS, k_bounds};
use std::ops::Range;

/// How the reference scales a channel: `(x - low) * inverse`; both 0 where it takes no part.
#[derive(Clone, Copy, Default)]
struct Channel {
    low: f32,
    inverse: f32,
}

impl Channel {
    fn of(low: f32, high: f32) -> Self {
        let range = high - low;
        let live = range > 0.0 && range < f32::INFINITY;
        if live { Self { low, inverse: 1.0 / range } } else { Self::default() }
    }
}

/// How a reference scales what is scored against it.
#[derive(Default)]
pub(super) struct Scaling {
    /// The channels of K that take part.
    keys: Vec<(usize, Channel)>,
    /// Of all channels of V, by rows.
    low: Vec<Row<f32>>,
    inverse: Vec<Row<f32>>,
    /// The first channel of V that takes part, and how many do.
    first: usize,
    values: usize,
}

impl Scaling {
    /// Variances of the keys of `tokens` of a decoded slab.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // A tile of tokens is the same column of every channel's row.
    pub fn score_keys<L: Lanes>(&self, l: L, tile: &Tile, tokens: Range<usize>, out: &mut [f32]) {
        let Some(((first, channel), others)) = self.keys.split_first().filter(|k| !k.1.is_empty())
        else {
            return out.fill(0.0);
        };
        let (rows, mut out) = (tile.keys.as_chunks::<4>().0, out);
        for t in tokens.start / 16..tokens.end.div_ceil(16) {
            let scaled = |c: usize, by: &Channel| {
                l.mul(l.sub(l.get(&rows[c][t].0), l.splat(by.low)), l.splat(by.inverse))
            };
            let origin = scaled(*first, channel);
            let (mut sum, mut squares) = (l.splat(0.0), l.splat(0.0));
            for (c, by) in others {
                let x = l.sub(scaled(*c, by), origin);
                (sum, squares) = (l.add(sum, x), l.fma(x, x, squares));
            }
            let (mut sums, mut all) = ([0.0; 16], [0.0; 16]);
            l.put(&mut sums, sum);
            l.put(&mut all, squares);
            let from = tokens.start.max(16 * t);
            let until = tokens.end.min(16 * t + 16);
            let (to, rest) = out.split_at_mut(until - from);
            for (to, i) in to.iter_mut().zip(from % 16..) {
                *to = variance(sums[i], all[i], self.keys.len());
            }
            out = rest;
        }
    }

    /// The same of the values.
    #[inline(always)]
    pub fn score_values<L: Lanes>(&self, l: L, tile: &Tile, tokens: Range<usize>, out: &mut [f32]) {
        if self.values < 2 {
            return out.fill(0.0);
        }
        for (pair, token) in out.chunks_mut(2).zip(tokens.step_by(2)) {
            let [a, b] = self.moments(l, tile, token);
            let [c, d] = self.moments(l, tile, token + pair.len() - 1);
            let sums = l.sums([a, b, c, d]);
            for (to, sums) in pair.iter_mut().zip(sums.as_chunks::<2>().0) {
                *to = variance(sums[0], sums[1], self.values);
            }
        }
    }

    /// Sum and sum of squares of a token's scaled values from the first that takes part, by lanes.
    #[inline(always)]
    fn moments<L: Lanes>(&self, l: L, tile: &Tile, token: usize) -> [L::F; 2] {
        let (width, first, lane) = (self.low.len(), self.first / 16, self.first % 16);
        let rows = &tile.values[token * width..][..width];
        let x = rows[first].0[lane] - self.low[first].0[lane];
        let origin = l.splat(x * self.inverse[first].0[lane]);
        let (mut sum, mut squares) = (l.splat(0.0), l.splat(0.0));
        for ((row, low), inverse) in rows.iter().zip(&self.low).zip(&self.inverse) {
            let inverse = l.get(&inverse.0);
            let x = l.mul(l.sub(l.get(&row.0), l.get(&low.0)), inverse);
            let x = l.positive(inverse, l.sub(x, origin));
            (sum, squares) = (l.add(sum, x), l.fma(x, x, squares));
        }
        [sum, squares]
    }
}

/// Unbiased, of `n` numbers by their sum and sum of squares from one of them; NaN stays.
#[inline(always)]
fn variance(sum: f32, squares: f32, n: usize) -> f32 {
    let x = (squares - sum * sum / n as f32) / (n - 1) as f32;
    if x < 0.0 { 0.0 } else { x }
}

/// Smallest and largest so far: of K a row of sixteen token lanes a channel, of V rows of channels.
pub(super) struct Extremes {
    keys: [Vec<Row<f32>>; 2],
    values: [Vec<Row<f32>>; 2],
}

impl Extremes {
    pub fn new(d: usize) -> Self {
        let rows = |n| [f32::INFINITY, f32::NEG_INFINITY].map(|x| vec![Row([x; 16]); n]);
        Self { keys: rows(d), values: rows(d / 16) }
    }

    pub fn clear(&mut self) {
        for [low, high] in [&mut self.keys, &mut self.values] {
            low.fill(Row([f32::INFINITY; 16]));
            high.fill(Row([f32::NEG_INFINITY; 16]));
        }
    }

    /// Keys of `tokens` of a decoded slab.
    #[inline(always)]
    pub fn see_keys<L: Lanes>(&mut self, l: L, tile: &Tile, tokens: Range<usize>) {
        let mut skip = [0.0; TOKENS];
        for (i, skip) in skip.iter_mut().enumerate() {
            *skip = if tokens.contains(&i) { 0.0 } else { f32::NAN };
        }
        let (rows, skip) = (tile.keys.as_chunks::<4>().0, skip.as_chunks().0);
        let [lows, highs] = &mut self.keys;
        for ((rows, low), high) in rows.iter().zip(lows).zip(highs) {
            let (mut least, mut most) = (l.get(&low.0), l.get(&high.0));
            for (row, skip) in rows.iter().zip(skip) {
                let x = l.add(l.get(&row.0), l.get(skip));
                (least, most) = (l.min(x, least), l.max(x, most));
            }
            l.put(&mut low.0, least);
            l.put(&mut high.0, most);
        }
    }

    /// Keys of the group of a token, by its scales and minima.
    pub fn see_bounds(&mut self, slab: &SlabRef<'_>, token: usize) {
        let [lows, highs] = &mut self.keys;
        for (c, (low, high)) in lows.iter_mut().zip(highs).enumerate() {
            if let Some(bounds) = k_bounds(slab.layout, slab.bytes, token, c) {
                (low.0[0], high.0[0]) = (low.0[0].min(bounds.0), high.0[0].max(bounds.1));
            }
        }
    }

    /// Values of `tokens` of a decoded slab.
    #[inline(always)]
    pub fn see_values<L: Lanes>(&mut self, l: L, tile: &Tile, tokens: Range<usize>) {
        let [lows, highs] = &mut self.values;
        let width = lows.len();
        for (j, (low, high)) in lows.iter_mut().zip(highs).enumerate() {
            let (mut least, mut most) = (l.get(&low.0), l.get(&high.0));
            for token in tokens.clone() {
                let x = l.get(&tile.values[token * width + j].0);
                (least, most) = (l.min(x, least), l.max(x, most));
            }
            l.put(&mut low.0, least);
            l.put(&mut high.0, most);
        }
    }

    /// How what has been seen scales.
    pub fn scaling(&self, to: &mut Scaling) {
        let least = |row: &Row<f32>| row.0.iter().copied().fold(f32::INFINITY, f32::min);
        let most = |row: &Row<f32>| row.0.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let [lows, highs] = &self.keys;
        let channels = lows.iter().zip(highs).map(|(a, b)| Channel::of(least(a), most(b)));
        to.keys.clear();
        to.keys.extend(channels.enumerate().filter(|(_, c)| c.inverse > 0.0));
        to.low.clone_from(&self.values[0]);
        to.inverse.clone_from(&self.values[1]);
        (to.first, to.values) = (usize::MAX, 0);
        for (j, (low, inverse)) in to.low.iter_mut().zip(&mut to.inverse).enumerate() {
            for (i, (low, inverse)) in low.0.iter_mut().zip(&mut inverse.0).enumerate() {
                let c = Channel::of(*low, *inverse);
                (*low, *inverse) = (c.low, c.inverse);
                if c.inverse > 0.0 {
                    to.first = to.first.min(16 * j + i);
                    to.values += 1;
                }
            }
        }
    }
}
