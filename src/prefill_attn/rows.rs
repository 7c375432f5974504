//! `M` query rows of one kv head (tokens times heads), and their products with the keys of a slab.
//!
//! A matrix of a block is cut into panels of 32 columns, `[panel][M][32]`, so that a product is a loop over
//! the panels of its left factor with `M` x 32 sums in registers.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use crate::lanes::{Kernel, Lanes, Row};
use crate::slab::TOKENS;

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

/// Of the tokens of a slab, base 2.
pub(crate) type Scores<const M: usize> = [[[f32; PANEL]; M]; TOKENS / PANEL];

/// Query rows; those that nobody set see nothing.
pub(crate) struct Rows<const M: usize> {
    /// Scaled queries, `[D / 32][M][32]`.
    queries: Vec<[[f32; PANEL]; M]>,
    /// First token that a row sees, and the one after its last.
    pub seen: [(usize, usize); M],
}

impl<const M: usize> Rows<M> {
    pub fn new(head_dim: usize) -> Self {
        Self { queries: vec![[[0.0; PANEL]; M]; head_dim / PANEL], seen: [(0, 0); M] }
    }

    /// Row `row` is `q`, `[D]`, times `scale`.
    pub fn set(&mut self, row: usize, q: &[f32], scale: f32) {
        for (to, from) in self.queries.iter_mut().zip(q.as_chunks::<PANEL>().0) {
            to[row] = from.map(|x| x * scale);
        }
    }

    /// Whether some row sees one of the tokens of a slab that starts with token `start`.
    #[inline(always)]
    pub fn see(&self, start: usize) -> bool {
        self.seen.iter().any(|&(first, last)| last > start && first < start + TOKENS)
    }

    /// Scores of the 64 tokens from `start` on, whose `keys` are `[D][64]`; minus infinity where a row does not see a
    /// token. `V` vectors wide sums.
    #[inline(always)]
    pub fn scores<L: Lanes, const V: usize>(
        &self,
        l: L,
        keys: &[Row<f32>],
        start: usize,
    ) -> Scores<M> {
        let mut scores = [[[0.0; PANEL]; M]; TOKENS / PANEL];
        for (panel, scores) in scores.iter_mut().enumerate() {
            add_product::<L, M, V>(l, &self.queries, keys, TOKENS / 16, panel, scores);
        }
        for (row, &(first, last)) in self.seen.iter().enumerate() {
            if first > start || last < start + TOKENS {
                for (i, score) in scores.iter_mut().flat_map(|panel| &mut panel[row]).enumerate() {
                    if start + i < first || start + i >= last {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
        scores
    }
}

/// Work on blocks of `M` rows with sums `V` vectors wide; `run` as that of a [`Kernel`].
pub(crate) trait Blocked {
    fn run<L: Lanes, const M: usize, const V: usize>(self, l: L);
}

/// [`Blocked`] work with sums that fill the registers.
pub(crate) struct Blocks<B>(pub B);

impl<B: Blocked> Kernel for Blocks<B> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        // 24 of 32, 12 pairs of 16, 2 fours of 16.
        if L::HEADS >= 4 {
            self.0.run::<L, 12, 2>(l);
        } else if L::HEADS >= 2 {
            self.0.run::<L, 6, 1>(l);
        } else {
            self.0.run::<L, 2, 1>(l);
        }
    }
}

/// `out += a * b`, `a` in panels, `b` `[_][width]` rows of sixteen columns, of which panel `panel`.
#[inline(always)]
pub(super) fn add_product<L: Lanes, const M: usize, const V: usize>(
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
