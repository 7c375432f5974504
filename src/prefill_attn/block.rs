//! Blocks of `M` query rows (tokens times heads): scores, online softmax, values.
//!
//! A matrix of a block is cut into panels of 32 columns, `[panel][M][32]`, so that a product is a loop over
//! the panels of its left factor with `M` x 32 sums in registers.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use super::tile::Tile;
use crate::lanes::{Lanes, Row};
use crate::slab::TOKENS;

/// Columns of a panel.
pub(super) const PANEL: usize = 32;

/// `M` query rows and what they have seen so far.
pub(super) struct Block<const M: usize> {
    /// Scaled queries, `[D / 32][M][32]`.
    pub queries: Vec<[[f32; PANEL]; M]>,
    /// Weighted values, the same.
    pub out: Vec<[[f32; PANEL]; M]>,
    /// Largest score, base 2.
    pub top: [f32; M],
    /// Sum of weights.
    pub sum: [f32; M],
    /// First token that a row sees, and the one after its last.
    pub seen: [(usize, usize); M],
}

impl<const M: usize> Block<M> {
    pub fn new(head_dim: usize) -> Self {
        let zero = vec![[[0.0; PANEL]; M]; head_dim / PANEL];
        Self {
            queries: zero.clone(),
            out: zero,
            top: [f32::NEG_INFINITY; M],
            sum: [0.0; M],
            seen: [(0, 0); M],
        }
    }

    /// Adds the tokens of one slab, the first of them `start`. `V` vectors wide sums.
    #[inline(always)]
    pub fn see<L: Lanes, const V: usize>(&mut self, l: L, tile: &Tile, start: usize) {
        let end = start + TOKENS;
        if self.seen.iter().all(|&(first, last)| last <= start || first >= end) {
            return;
        }
        let mut scores = [[[0.0; PANEL]; M]; TOKENS / PANEL];
        for (panel, scores) in scores.iter_mut().enumerate() {
            add_product::<L, M, V>(l, &self.queries, &tile.keys, TOKENS / 16, panel, scores);
        }
        for row in 0..M {
            self.softmax(l, row, start, &mut scores);
        }
        let width = self.out.len() * PANEL / 16;
        for (panel, out) in self.out.iter_mut().enumerate() {
            add_product::<L, M, V>(l, &scores, &tile.values, width, panel, out);
        }
    }

    /// Scores of one row to weights; what was summed before is scaled to the new maximum.
    #[inline(always)]
    fn softmax<L: Lanes>(
        &mut self,
        l: L,
        row: usize,
        start: usize,
        scores: &mut [[[f32; PANEL]; M]; TOKENS / PANEL],
    ) {
        let (first, last) = self.seen[row];
        if first > start || last < start + TOKENS {
            for (i, score) in scores.iter_mut().flat_map(|panel| &mut panel[row]).enumerate() {
                if start + i < first || start + i >= last {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        let mut top = l.splat(self.top[row]);
        for panel in scores.iter() {
            for x in panel[row].as_chunks::<16>().0 {
                top = l.max(l.get(x), top);
            }
        }
        let top = l.top(top);
        // No token yet: weights of 0, whatever the maximum.
        let base = l.splat(if top == f32::NEG_INFINITY { 0.0 } else { top });
        let mut sum = l.splat(0.0);
        for panel in scores.iter_mut() {
            for x in panel[row].as_chunks_mut::<16>().0 {
                let p = l.exp2(l.sub(l.get(x), base));
                sum = l.add(sum, p);
                l.put(x, p);
            }
        }
        let sum = l.sum(sum);
        if top > self.top[row] {
            let scale = (self.top[row] - top).exp2();
            self.sum[row] *= scale;
            for panel in &mut self.out {
                for x in panel[row].as_chunks_mut::<16>().0 {
                    l.put(x, l.mul(l.get(x), l.splat(scale)));
                }
            }
            self.top[row] = top;
        }
        self.sum[row] += sum;
    }
}

/// `out += a * b`, `a` in panels, `b` `[_][width]` rows of sixteen columns, of which panel `panel`.
#[inline(always)]
fn add_product<L: Lanes, const M: usize, const V: usize>(
    l: L,
    a: &[[[f32; PANEL]; M]],
    b: &[Row<f32>],
    width: usize,
    panel: usize,
    out: &mut [[f32; PANEL]; M],
) {
    for first in (0..PANEL / 16).step_by(V) {
        let mut sums = [[l.splat(0.0); V]; M];
        for row in 0..M {
            for v in 0..V {
                sums[row][v] = l.get(&out[row].as_chunks().0[first + v]);
            }
        }
        let mut rows = b.chunks_exact(width);
        for a in a {
            for (k, b) in (0..PANEL).zip(&mut rows) {
                let b = &b[panel * PANEL / 16 + first..][..V];
                for row in 0..M {
                    for v in 0..V {
                        sums[row][v] = l.fma(l.splat(a[row][k]), l.get(&b[v].0), sums[row][v]);
                    }
                }
            }
        }
        for row in 0..M {
            for v in 0..V {
                l.put(&mut out[row].as_chunks_mut().0[first + v], sums[row][v]);
            }
        }
    }
}
