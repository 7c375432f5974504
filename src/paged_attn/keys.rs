//! Scores of a slab of 8-, 4- or 2-bit keys, in integers, straight from the words of the slab.
//!
//! `q . k` over a group of tokens is `sum (q s) c + sum q m` with the channel's scale `s` and minimum `m`. The
//! products `q s` become signed halves of a common unit (the group's largest is 32767), in the order of the
//! metadata, which is also the order of the codes: one 16-byte unit of scales holds the four pairs `i` of lane
//! `t` that one *quad* (four consecutive slots of a word) wants. A masked line is then an operand of `dot`.
//!
//! Bounds: a lane adds at most 64 products of 255 * 32767, a token four lanes: below 2^31.
//!
//! Rounding `q s` moves a score by about `unit * levels * sqrt(D) / 14`. Its mean over the codes is put right
//! through the zero point; where the rest could exceed 3e-4 (base 2), the remainders are folded once more
//! and a second pass adds them, 65534 times finer.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use super::slabs::{Quads, RUN, Slab};
use crate::lanes::{Lanes, Row};
use crate::slab::{Layout, TOKENS};

/// `unit * levels * sqrt(D)` from which a second pass is worth its time.
const COARSE: f32 = 4e-3;
/// Steps of a remainder in one unit.
const FINER: f32 = 65534.0;
/// Products below this add nothing to a score that f32 could show.
const NOTHING: f32 = 1e-30;

/// One head's query folded with the scales of one K group.
#[derive(Clone, Copy)]
struct Fold {
    /// `q s`, as `queries`.
    products: [Row<f32>; 16],
    /// Signed halves, a row a quad: the products, and their remainders.
    rows: [[Row<i32>; 8]; 2],
    /// What one step of a row is worth.
    unit: f32,
    /// What code 0 scores.
    zero: f32,
    coarse: bool,
}

/// Room for the queries of a block of heads, `[K group][head]`, and for sums `[head][r]`.
pub(super) struct Folds {
    folds: [[Fold; 4]; 2],
    lines: [[Row<i32>; 8]; 4],
}

impl Default for Folds {
    fn default() -> Self {
        const FOLD: Fold = Fold {
            products: [Row([0.0; 16]); 16],
            rows: [[Row([0; 16]); 8]; 2],
            unit: 0.0,
            zero: 0.0,
            coarse: false,
        };
        Self { folds: [[FOLD; 4]; 2], lines: [[Row::default(); 8]; 4] }
    }
}

/// Base-2 scores of one slab for `N` heads: `out[head * RUN][tile]` tile rows. `queries` `[N][D / 32][2]` rows.
#[inline(always)]
pub(super) fn scores<L: Lanes, const N: usize>(
    l: L,
    slab: &Slab<'_>,
    queries: [&[Row<f32>]; N],
    room: &mut Folds,
    out: &mut [[Row<f32>; 4]],
) {
    let Folds { folds, lines } = room;
    let mut coarse = false;
    for (group, folds) in folds.iter_mut().enumerate().take(TOKENS / slab.layout.k_group) {
        coarse |= fold_queries(l, slab, group, queries, folds);
    }
    let mut sums = [[Row::default(); 4]; N];
    dots::<L, N>(l, slab, folds, 0, lines, &mut sums);
    for g in 0..N {
        for tile in 0..4 {
            let fold = &folds[k_group(slab, tile)][g];
            let sum = l.float(l.get_int(&sums[g][tile]));
            l.put(&mut out[g * RUN][tile].0, l.fma(sum, l.splat(fold.unit), l.splat(fold.zero)));
        }
    }
    if coarse {
        add_remainders::<L, N>(l, slab, folds, lines, out);
    }
}

#[inline(always)]
fn add_remainders<L: Lanes, const N: usize>(
    l: L,
    slab: &Slab<'_>,
    folds: &[[Fold; 4]; 2],
    lines: &mut [[Row<i32>; 8]; 4],
    out: &mut [[Row<f32>; 4]],
) {
    let mut sums = [[Row::default(); 4]; N];
    dots::<L, N>(l, slab, folds, 1, lines, &mut sums);
    for g in 0..N {
        for tile in 0..4 {
            let step = l.splat(folds[k_group(slab, tile)][g].unit / FINER);
            let (sum, row) = (l.float(l.get_int(&sums[g][tile])), &mut out[g * RUN][tile].0);
            l.put(row, l.fma(sum, step, l.get(row)));
        }
    }
}

/// The K group of a tile.
#[inline(always)]
fn k_group(slab: &Slab<'_>, tile: usize) -> usize {
    if slab.layout.k_group == TOKENS { 0 } else { tile / 2 }
}

/// Folds `N` queries with one group's scales; whether any of them is coarse.
#[inline(always)]
fn fold_queries<L: Lanes, const N: usize>(
    l: L,
    slab: &Slab<'_>,
    group: usize,
    queries: [&[Row<f32>]; N],
    folds: &mut [Fold; 4],
) -> bool {
    let Layout { head_dim, format, .. } = *slab.layout;
    let levels = ((1 << format.bits()) - 1) as f32;
    let (mut top, mut zero) = ([l.splat(0.0); 4], [l.splat(0.0); 4]);
    // A line of metadata holds a quad's pairs 0, 1 and pairs 2, 3 of each `t`.
    let (scales, mins) = slab.k_meta[group * head_dim * 4..][..head_dim * 4].split_at(head_dim * 2);
    let meta = scales.as_chunks::<64>().0.iter().zip(mins.as_chunks::<64>().0);
    for (quad, (scale, min)) in meta.enumerate() {
        let (scale, min) = (l.half_pairs(scale), l.half_pairs(min));
        for i in 0..2 {
            for g in 0..N {
                let q = l.get(&queries[g][2 * quad + i].0);
                let product = l.mul(q, scale[i]);
                l.put(&mut folds[g].products[2 * quad + i].0, product);
                top[g] = l.max(l.abs(product), top[g]);
                zero[g] = l.fma(q, min[i], zero[g]);
            }
        }
    }
    let limit = COARSE / (levels * (head_dim as f32).sqrt());
    let top = l.tops(top);
    let mut coarse = false;
    for g in 0..N {
        let fold = &mut folds[g];
        fold.unit = top[g] / 32767.0;
        fold.coarse = fold.unit > limit;
        coarse |= fold.coarse;
        let rest = round_products(l, head_dim, top[g], fold);
        let mean = if fold.coarse { 0.0 } else { 0.5 * levels * fold.unit };
        zero[g] = l.fma(rest, l.splat(mean), zero[g]);
    }
    let zero = l.sums(zero);
    for g in 0..N {
        folds[g].zero = zero[g];
    }
    coarse
}

/// `rows` from `products`, the largest of which is `top`; returns sums of the remainders.
#[inline(always)]
fn round_products<L: Lanes>(l: L, head_dim: usize, top: f32, fold: &mut Fold) -> L::F {
    let steps = l.splat(if top > NOTHING { 32767.0 / top } else { 0.0 });
    let mut rest = l.splat(0.0);
    for quad in 0..head_dim / 32 {
        let x0 = l.mul(l.get(&fold.products[2 * quad].0), steps);
        let x1 = l.mul(l.get(&fold.products[2 * quad + 1].0), steps);
        let (n0, n1) = (l.round(x0), l.round(x1));
        l.put_int(&mut fold.rows[0][quad], l.pack(n0, n1));
        let (x0, x1) = (l.sub(x0, l.float(n0)), l.sub(x1, l.float(n1)));
        rest = l.add(rest, l.add(x0, x1));
        let finer = l.splat(if fold.coarse { FINER } else { 0.0 });
        let (n0, n1) = (l.round(l.mul(x0, finer)), l.round(l.mul(x1, finer)));
        l.put_int(&mut fold.rows[1][quad], l.pack(n0, n1));
    }
    rest
}

/// Adds the dot products of every token's codes with row set `set` to `sums[head][tile]`.
#[inline(always)]
fn dots<L: Lanes, const N: usize>(
    l: L,
    slab: &Slab<'_>,
    folds: &[[Fold; 4]; 2],
    set: usize,
    acc: &mut [[Row<i32>; 8]; 4],
    sums: &mut [[Row<i32>; 4]; N],
) {
    let quads = Quads::of(slab.layout);
    // At D = 96 the two quads of a word may lie in different tiles: one at a time.
    if quads.per_word == 2 && quads.per_tile != 3 {
        unit_dots::<L, N, 8>(l, slab, folds, set, acc, sums);
    } else if quads.slots == 2 {
        unit_dots::<L, N, 2>(l, slab, folds, set, acc, sums);
    } else {
        unit_dots::<L, N, 4>(l, slab, folds, set, acc, sums);
    }
}

#[inline(always)]
fn unit_dots<L: Lanes, const N: usize, const SLOTS: usize>(
    l: L,
    slab: &Slab<'_>,
    folds: &[[Fold; 4]; 2],
    set: usize,
    acc: &mut [[Row<i32>; 8]; 4],
    sums: &mut [[Row<i32>; 4]; N],
) {
    let (quads, bits) = (Quads::of(slab.layout), slab.layout.format.bits());
    let mask = l.int(((1 << bits) - 1) * 0x0001_0001);
    for (unit, lines) in slab.k.as_chunks::<8>().0.iter().enumerate() {
        for first in (0..quads.per_word).step_by(SLOTS.div_ceil(4)) {
            let mut rows = [[l.int(0); SLOTS]; N];
            for g in 0..N {
                if SLOTS == 2 {
                    let (tile, quad) = quads.places(unit, 0)[0];
                    let row = l.get_int(&folds[k_group(slab, tile)][g].rows[set][quad]);
                    rows[g][..2].copy_from_slice(&l.spread_pairs(row));
                }
                for h in 0..SLOTS / 4 {
                    let [(ta, qa), (tb, qb)] = quads.places(unit, first + h);
                    let a = l.get_int(&folds[k_group(slab, ta)][g].rows[set][qa]);
                    let b = l.get_int(&folds[k_group(slab, tb)][g].rows[set][qb]);
                    let spread = l.spread(a, b);
                    for i in 0..4 {
                        rows[g][4 * h + i] = spread[i];
                    }
                }
            }
            for (r, line) in lines.iter().enumerate() {
                slab.fetch(l, unit * 8 + r);
                let line = l.shr(l.line(line), first * 4 * bits);
                let mut dots = [l.int(0); N];
                for slot in 0..SLOTS {
                    let codes = l.and(l.shr(line, slot * bits), mask);
                    for g in 0..N {
                        dots[g] = l.dot(dots[g], codes, rows[g][slot]);
                    }
                }
                for g in 0..N {
                    l.put_int(&mut acc[g][r], dots[g]);
                }
            }
            let [(ta, _), (tb, _)] = quads.places(unit, first);
            for g in 0..N {
                let mut of_head = [l.int(0); 8];
                for r in 0..8 {
                    of_head[r] = l.get_int(&acc[g][r]);
                }
                let [a, b] = l.tokens(of_head);
                let sum = l.add_int(l.get_int(&sums[g][ta]), a);
                l.put_int(&mut sums[g][ta], sum);
                let sum = l.add_int(l.get_int(&sums[g][tb]), b);
                l.put_int(&mut sums[g][tb], sum);
            }
        }
    }
}
