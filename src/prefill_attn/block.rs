//! Blocks of `M` query rows: scores, online softmax, values.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use super::rows::{PANEL, Rows, Scores, add_product};
use super::tile::Tile;
use crate::lanes::Lanes;

/// `M` query rows and what they have seen so far.
pub(crate) struct Block<const M: usize> {
    pub rows: Rows<M>,
    /// Weighted values, `[D / 32][M][32]`; none where only log-sum-exps are wanted.
    pub out: Vec<[[f32; PANEL]; M]>,
    /// Largest score, base 2.
    pub top: [f32; M],
    /// Sum of weights.
    pub sum: [f32; M],
}

impl<const M: usize> Block<M> {
    /// Of `values` channels, 0 or D.
    pub fn new(head_dim: usize, values: usize) -> Self {
        Self {
            rows: Rows::new(head_dim),
            out: vec![[[0.0; PANEL]; M]; values / PANEL],
            top: [f32::NEG_INFINITY; M],
            sum: [0.0; M],
        }
    }

    /// Natural log-sum-exp of a row's scores so far.
    pub fn lse(&self, row: usize) -> f32 {
        (self.top[row] + self.sum[row].log2()) * std::f32::consts::LN_2
    }

    /// Adds the tokens of one slab, the first of them `start`. `V` vectors wide sums.
    #[inline(always)]
    pub fn see<L: Lanes, const V: usize>(&mut self, l: L, tile: &Tile, start: usize) {
        if !self.rows.see(start) {
            return;
        }
        let mut scores = self.rows.scores::<L, V>(l, &tile.keys, start);
        for row in 0..M {
            self.softmax(l, row, &mut scores);
        }
        let width = self.out.len() * PANEL / 16;
        for (panel, out) in self.out.iter_mut().enumerate() {
            add_product::<L, M, V>(l, &scores, &tile.values, width, panel, out);
        }
    }

    /// Scores of one row to weights; what was summed before is scaled to the new maximum.
    #[inline(always)]
    fn softmax<L: Lanes>(&mut self, l: L, row: usize, scores: &mut Scores<M>) {
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
