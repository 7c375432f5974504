//! A task of attention: the scores of some slabs, their softmax, and the sums of rows that they weigh.
//!
//! Two tokens of a column are 32 bytes, one vector of f16. Scores keep both tokens' products apart until a tile is done;
//! weights are fanned out likewise, and sums of the two tokens meet when a run is done.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use super::cpu::{HEADS, Queries, RUN};
use super::{COLUMN, COLUMN_BYTES, TILE, View};
use crate::lanes::{Kernel, Lanes, Row, with_heads};
use crate::slab::{Format, TOKENS};
use std::ops::Range;

const TILES: usize = RUN * TOKENS / TILE;
/// Two tokens of a column.
type Pair = [u8; 32];
/// Pairs of a column.
const PAIRS: usize = TILE / 2;

/// Buffers of one worker.
pub(super) struct Work {
    /// z of a tile that is not full, the rest zeros.
    copy: Vec<u8>,
    /// Packed tiles as they would be in f16.
    spread: Vec<u8>,
    /// Scores, then weights, `[head][tile]`.
    scores: Vec<[Row<f32>; TILES]>,
    /// Weights of a head, eight times each, `[head][tile][pair]`.
    fanned: Vec<Row<f32>>,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            copy: Vec::new(),
            spread: Vec::new(),
            scores: vec![[Row::default(); TILES]; HEADS],
            fanned: vec![Row::default(); HEADS * TILES * PAIRS],
        }
    }
}

/// Slabs `run * RUN..` of a sequence, query heads `heads`.
pub(super) struct Task<'a> {
    pub view: &'a View<'a>,
    pub queries: &'a Queries,
    pub heads: Range<usize>,
    pub run: usize,
}

impl Kernel for (Task<'_>, &mut Work, &mut [f32]) {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (task, work, part) = self;
        let rank = task.view.shape.rank();
        let (tops, rest) = part.split_at_mut(HEADS);
        let (sums, values) = rest.split_at_mut(HEADS);
        tops.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        values.fill(0.0);
        let (mut copy, mut spread) =
            (std::mem::take(&mut work.copy), std::mem::take(&mut work.spread));
        let mut tiles = [&[] as &[Pair]; TILES];
        let (n, held) = task.tiles(l, &mut spread, &mut tiles);
        if held < TILE {
            tiles[n - 1] = cleared(tiles[n - 1], held, rank, &mut copy);
        }
        let (tiles, count) = (&tiles[..n], task.heads.len());
        for first in (0..count).step_by(L::HEADS) {
            let block = L::HEADS.min(count - first);
            with_heads!(block, N => task.scores::<L, N>(l, tiles, first, work));
        }
        for h in 0..count {
            hide(&mut work.scores[h][..n], held);
            (tops[h], sums[h]) = softmax(l, &mut work.scores[h][..n]);
            fan(&work.scores[h][..n], &mut work.fanned[h * TILES * PAIRS..]);
        }
        for first in (0..count).step_by(L::HEADS) {
            let block = L::HEADS.min(count - first);
            let out = &mut values[first * rank..][..block * rank];
            let fanned = &work.fanned[first * TILES * PAIRS..];
            with_heads!(block, N => add::<L, N>(l, tiles, fanned, rank, out));
        }
        (work.copy, work.spread) = (copy, spread);
    }
}

impl<'a> Task<'a> {
    /// Tiles of the run that hold tokens, packed ones in `spread`; how many, and how many tokens the last one holds.
    #[inline(always)]
    fn tiles<'b, L: Lanes>(
        &self,
        l: L,
        spread: &'b mut Vec<u8>,
        tiles: &mut [&'b [Pair]; TILES],
    ) -> (usize, usize)
    where
        'a: 'b,
    {
        let (view, bytes) = (self.view, self.view.shape.tile_bytes());
        spread.resize(if view.packed.is_some() { TILES * bytes } else { 0 }, 0);
        let (mut room, mut n, mut held) = (spread.chunks_exact_mut(bytes.max(1)), 0, TILE);
        for i in self.run * RUN..view.slabs().min((self.run + 1) * RUN) {
            let Some((format, slab)) = view.slab(i) else { continue };
            for t in 0..(view.len - i * TOKENS).min(TOKENS).div_ceil(TILE) {
                held = (view.len - i * TOKENS - t * TILE).min(TILE);
                let tile = match (format, room.next()) {
                    (Format::F16, _) | (_, None) => &slab[t * bytes..][..bytes],
                    (_, Some(to)) => {
                        view.shape.spread(l, (format, slab), t, to);
                        to
                    }
                };
                (tiles[n], n) = (tile.as_chunks().0, n + 1);
            }
        }
        (n, held)
    }

    /// Base-2 scores of `N` heads from `first` of the task's on.
    #[inline(always)]
    fn scores<L: Lanes, const N: usize>(
        &self,
        l: L,
        tiles: &[&[Pair]],
        first: usize,
        work: &mut Work,
    ) {
        let mut latent: [&[Row<f32>]; N] = [&[]; N];
        let mut elite = [(0, latent[0]); N];
        for g in 0..N {
            let h = self.heads.start + first + g;
            (latent[g], elite[g]) = (self.queries.latent(h), self.queries.elite(h));
        }
        for (t, tile) in tiles.iter().enumerate() {
            let mut out = [[0.0; TILE]; N];
            // As many accumulators as a level has registers for.
            if L::HEADS >= 4 {
                dots::<L, N, 4>(l, tile, latent, &mut out);
            } else {
                dots::<L, N, 2>(l, tile, latent, &mut out);
            }
            for g in 0..N {
                let (column, queries) = elite[g];
                let mut keys = [[0.0; TILE]];
                dots::<L, 1, 4>(l, &tile[column * PAIRS..], [queries], &mut keys);
                let scores = &mut work.scores[first + g][t].0;
                l.put(scores, l.add(l.get(&out[g]), l.get(&keys[0])));
            }
        }
    }
}

/// Products of a tile's columns with `queries`, a row each, for its 16 tokens; `P` pairs of tokens at a time.
#[inline(always)]
fn dots<L: Lanes, const N: usize, const P: usize>(
    l: L,
    tile: &[Pair],
    queries: [&[Row<f32>]; N],
    out: &mut [[f32; TILE]; N],
) {
    for first in (0..PAIRS).step_by(P) {
        let mut acc = [[l.splat(0.0); P]; N];
        for (j, column) in tile.as_chunks::<PAIRS>().0.iter().take(queries[0].len()).enumerate() {
            let mut z = [l.splat(0.0); P];
            for p in 0..P {
                z[p] = l.half(&column[first + p]);
            }
            for g in 0..N {
                let q = l.get(&queries[g][j].0);
                for p in 0..P {
                    acc[g][p] = l.fma(z[p], q, acc[g][p]);
                }
            }
        }
        for g in 0..N {
            for p in 0..P {
                let mut both = [0.0; 16];
                l.put(&mut both, acc[g][p]);
                for token in 0..2 {
                    out[g][2 * (first + p) + token] = both[token * COLUMN..][..COLUMN].iter().sum();
                }
            }
        }
    }
}

/// A copy of a tile's z in which tokens from `held` on are zeros: they may hold NaN, which a weight of 0 does not
/// silence; of its keys, which are not weighed, the copy has none.
fn cleared<'a>(tile: &[Pair], held: usize, rank: usize, copy: &'a mut Vec<u8>) -> &'a [Pair] {
    copy.clear();
    copy.extend_from_slice(tile.as_flattened());
    for column in copy[..rank / COLUMN * COLUMN_BYTES].chunks_exact_mut(COLUMN_BYTES) {
        column[held * 2 * COLUMN..].fill(0);
    }
    copy.as_chunks().0
}

/// Minus infinity for tokens from `held` of the last tile on.
fn hide(scores: &mut [Row<f32>], held: usize) {
    if let Some(last) = scores.last_mut() {
        last.0[held..].fill(f32::NEG_INFINITY);
    }
}

/// Scores to weights; returns the largest score and the sum of the weights.
#[inline(always)]
fn softmax<L: Lanes>(l: L, scores: &mut [Row<f32>]) -> (f32, f32) {
    let mut highest = l.splat(f32::NEG_INFINITY);
    for row in scores.iter() {
        highest = l.max(l.get(&row.0), highest);
    }
    let top = l.top(highest);
    let mut total = l.splat(0.0);
    for row in scores {
        let p = l.exp2(l.sub(l.get(&row.0), l.splat(top)));
        l.put(&mut row.0, p);
        total = l.add(total, p);
    }
    (top, l.sum(total))
}

/// Each weight eight times.
fn fan(weights: &[Row<f32>], fanned: &mut [Row<f32>]) {
    for (tile, rows) in weights.iter().zip(fanned.chunks_exact_mut(PAIRS)) {
        for (pair, row) in tile.0.as_chunks::<2>().0.iter().zip(rows) {
            row.0 = std::array::from_fn(|i| pair[i / COLUMN]);
        }
    }
}

/// Sums of `p z`, `out` `[N, c]`.
#[inline(always)]
fn add<L: Lanes, const N: usize>(
    l: L,
    tiles: &[&[Pair]],
    fanned: &[Row<f32>],
    rank: usize,
    out: &mut [f32],
) {
    for j in (0..rank / COLUMN).step_by(2) {
        let mut acc = [[l.splat(0.0); 2]; N];
        for (t, tile) in tiles.iter().enumerate() {
            let columns = &tile[j * PAIRS..][..2 * PAIRS];
            for p in 0..PAIRS {
                let z = [l.half(&columns[p]), l.half(&columns[PAIRS + p])];
                for g in 0..N {
                    let weight = l.get(&fanned[(g * TILES + t) * PAIRS + p].0);
                    acc[g][0] = l.fma(z[0], weight, acc[g][0]);
                    acc[g][1] = l.fma(z[1], weight, acc[g][1]);
                }
            }
        }
        for g in 0..N {
            for k in 0..2 {
                let mut both = [0.0; 16];
                l.put(&mut both, acc[g][k]);
                let (even, odd) = both.split_at(COLUMN);
                let channels = &mut out[g * rank + (j + k) * COLUMN..][..COLUMN];
                channels.iter_mut().zip(even).zip(odd).for_each(|((o, a), b)| *o = a + b);
            }
        }
    }
}
