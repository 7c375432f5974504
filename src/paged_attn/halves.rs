//! Scores and weighted sums of f16 slabs.
//!
//! A line of K or V is converted in two halves, `t` = 0, 1 and `t` = 2, 3. Queries are kept in the order of a K
//! line, weights fanned out to that of a V line, and sums across lanes wait until eight lines `r` are done.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use super::slabs::{RUN, Slab};
use crate::lanes::{Lanes, Line, Row};

#[inline(always)]
fn widen<L: Lanes>(l: L, line: &Line) -> [L::F; 2] {
    let halves = line.as_chunks::<32>().0;
    [l.half(&halves[0]), l.half(&halves[1])]
}

/// Base-2 scores of one slab for `N` heads: `out[head * RUN][tile]` tile rows. `queries` `[N][D / 16][2]` rows.
#[inline(always)]
pub(super) fn scores<L: Lanes, const N: usize>(
    l: L,
    slab: &Slab<'_>,
    queries: [&[Row<f32>]; N],
    out: &mut [[Row<f32>; 4]],
) {
    let per_tile = slab.layout.head_dim / 16;
    for (tile, units) in slab.k.as_chunks::<8>().0.chunks_exact(per_tile).enumerate() {
        let mut acc = [[l.splat(0.0); 8]; N];
        for r in 0..8 {
            let mut sums = [l.splat(0.0); N];
            for (j, lines) in units.iter().enumerate() {
                // In the order of addresses, unlike the lines read here: memory answers that much faster.
                slab.fetch(l, (tile * 8 + r) * per_tile + j);
                let [low, high] = widen(l, &lines[r]);
                for g in 0..N {
                    sums[g] = l.fma(low, l.get(&queries[g][2 * j].0), sums[g]);
                    sums[g] = l.fma(high, l.get(&queries[g][2 * j + 1].0), sums[g]);
                }
            }
            for g in 0..N {
                acc[g][r] = sums[g];
            }
        }
        for g in 0..N {
            let scores = l.mul(l.tokens_half(acc[g]), l.splat(slab.unit));
            l.put(&mut out[g * RUN][tile].0, scores);
        }
    }
}

/// Adds `sum p v` to `out` `[N, D]`; `weights[head][slab][tile]` are tile rows of `p`.
#[inline(always)]
pub(super) fn add<L: Lanes, const N: usize>(
    l: L,
    run: &[Slab<'_>],
    weights: [&[[Row<f32>; 4]]; N],
    fanned: &mut Vec<Row<f32>>,
    out: &mut [f32],
) {
    fanned.resize(run.len() * 4 * N * 2, Row::default());
    for s in 0..run.len() {
        for tile in 0..4 {
            for g in 0..N {
                let weights = l.mul(l.get(&weights[g][s][tile].0), l.splat(run[s].unit));
                let [low, high] = l.fan(weights);
                let at = ((s * 4 + tile) * N + g) * 2;
                l.put(&mut fanned[at].0, low);
                l.put(&mut fanned[at + 1].0, high);
            }
        }
    }
    let per_tile = run[0].layout.head_dim / 16;
    for j in (0..per_tile).step_by(2) {
        sum_units::<L, N>(l, run, per_tile, j, fanned, out);
    }
}

/// The channels of units `j` and `j + 1` of each tile.
#[inline(always)]
fn sum_units<L: Lanes, const N: usize>(
    l: L,
    run: &[Slab<'_>],
    per_tile: usize,
    j: usize,
    fanned: &[Row<f32>],
    out: &mut [f32],
) {
    let mut sums = [[[Row::default(); 8]; 2]; N]; // [head][unit][r]
    for r in 0..8 {
        let mut acc = [[[l.splat(0.0); 2]; 2]; N];
        for (s, slab) in run.iter().enumerate() {
            for (tile, units) in slab.v.as_chunks::<8>().0.chunks_exact(per_tile).enumerate() {
                let rows = &fanned[(s * 4 + tile) * N * 2..][..2 * N];
                for k in 0..2 {
                    let [low, high] = widen(l, &units[j + k][r]);
                    for g in 0..N {
                        acc[g][k][0] = l.fma(low, l.get(&rows[2 * g].0), acc[g][k][0]);
                        acc[g][k][1] = l.fma(high, l.get(&rows[2 * g + 1].0), acc[g][k][1]);
                    }
                }
            }
        }
        for g in 0..N {
            for k in 0..2 {
                l.put(&mut sums[g][k][r].0, l.add(acc[g][k][0], acc[g][k][1]));
            }
        }
    }
    for g in 0..N {
        for k in 0..2 {
            let mut lines = [l.splat(0.0); 8];
            for r in 0..8 {
                lines[r] = l.get(&sums[g][k][r].0);
            }
            let channels = &mut out[16 * (g * per_tile + j + k)..][..16];
            if let Some(channels) = channels.first_chunk_mut() {
                l.put(channels, l.add(l.get(channels), l.channels_half(lines)));
            }
        }
    }
}
