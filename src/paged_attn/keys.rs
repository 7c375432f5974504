//! Scores of a slab of 4- or 2-bit keys, in integers, straight from the words of the slab.
//!
//! `q . k` over a group of tokens is `sum (q s) c + sum q m` with the channel's scale `s` and minimum `m`. The
//! products `q s` become signed halves of a common unit (the group's largest is 32767), in the order of the
//! metadata, which is also the order of the codes: one 16-byte unit of scales holds the four pairs `i` of lane
//! `t` that one *quad* (four consecutive slots of a word) wants. A masked line is then an operand of `dot`.
//!
//! Bounds: a lane adds at most 64 products of 15 * 32767, a token four lanes: below 2^27.
//!
//! Rounding `q s` moves a score by about `unit * levels * sqrt(D) / 14`. Its mean over the codes is put right
//! through the zero point; where the rest could exceed 3e-4 (base 2), the remainders are folded once more
//! and a second pass adds them, 65534 times finer.

use super::slabs::{Quads, Slab};
use crate::lanes::{Lanes, Row};
use crate::slab::{Layout, TOKENS};

/// `unit * levels * sqrt(D)` from which a second pass is worth its time.
const COARSE: f32 = 4e-3;
/// Steps of a remainder in one unit.
const FINER: f32 = 65534.0;
/// Products below this add nothing to a score that f32 could show.
const NOTHING: f32 = 1e-30;

/// One head's query folded with the scales of one K group.
#[derive(Clone)]
pub(super) struct Fold {
    /// Signed halves, a row a quad: the products, and their remainders.
    rows: [[Row<i32>; 8]; 2],
    /// What one step of a row is worth.
    unit: f32,
    /// What code 0 scores.
    zero: f32,
    coarse: bool,
}

impl Default for Fold {
    fn default() -> Self {
        Self { rows: [[Row::default(); 8]; 2], unit: 0.0, zero: 0.0, coarse: false }
    }
}

/// Base-2 scores of one slab for `N` heads: `out[head][tile]` tile rows. `queries` `[N][D / 32][2]` rows.
#[inline(always)]
pub(super) fn scores<L: Lanes, const N: usize>(
    l: L,
    slab: &Slab<'_>,
    queries: [&[Row<f32>]; N],
    folds: &mut [[Fold; 2]; 16],
    out: &mut [[Row<f32>; 4]; N],
) {
    let layout = slab.layout;
    let mut coarse = false;
    for group in 0..TOKENS / layout.k_group {
        for (query, fold) in queries.iter().zip(folds.iter_mut()) {
            fold_query(l, slab, group, query, &mut fold[group]);
            coarse |= fold[group].coarse;
        }
    }
    let mut sums = [[[Row::default(); 4]; N]; 2];
    for set in 0..=usize::from(coarse) {
        dots::<L, N>(l, slab, folds, set, &mut sums[set]);
    }
    for g in 0..N {
        for tile in 0..4 {
            let fold = &folds[g][tile * 16 / layout.k_group];
            let zero = l.splat(fold.zero);
            let mut s = l.fma(l.float(l.get_int(&sums[0][g][tile])), l.splat(fold.unit), zero);
            if coarse {
                let step = l.splat(fold.unit / FINER);
                s = l.fma(l.float(l.get_int(&sums[1][g][tile])), step, s);
            }
            l.put(&mut out[g][tile].0, s);
        }
    }
}

/// Where the scales of `quad` lie in the metadata of a group: pairs 0, 1 and pairs 2, 3 of each `t`.
#[inline(always)]
fn meta<L: Lanes>(l: L, slab: &Slab<'_>, at: usize) -> [L::F; 2] {
    [l.half_quads(slab.k_meta, at, 16), l.half_quads(slab.k_meta, at + 8, 16)]
}

#[inline(always)]
fn fold_query<L: Lanes>(l: L, slab: &Slab<'_>, group: usize, query: &[Row<f32>], fold: &mut Fold) {
    let Layout { head_dim, format, .. } = *slab.layout;
    let levels = ((1 << format.bits()) - 1) as f32;
    let (mut top, mut zero, mut rest) = (l.splat(0.0), l.splat(0.0), l.splat(0.0));
    for (quad, q) in query.as_chunks::<2>().0.iter().enumerate() {
        let at = group * head_dim * 4 + quad * 64;
        let (scale, min) = (meta(l, slab, at), meta(l, slab, at + 2 * head_dim));
        for i in 0..2 {
            let q = l.get(&q[i].0);
            top = l.max(l.abs(l.mul(q, scale[i])), top);
            zero = l.fma(q, min[i], zero);
        }
    }
    let top = l.top(top);
    fold.unit = top / 32767.0;
    fold.coarse = fold.unit * levels * (head_dim as f32).sqrt() > COARSE;
    let steps = l.splat(if top > NOTHING { 32767.0 / top } else { 0.0 });
    for (quad, q) in query.as_chunks::<2>().0.iter().enumerate() {
        let scale = meta(l, slab, group * head_dim * 4 + quad * 64);
        let x0 = l.mul(l.mul(l.get(&q[0].0), scale[0]), steps);
        let x1 = l.mul(l.mul(l.get(&q[1].0), scale[1]), steps);
        let (n0, n1) = (l.round(x0), l.round(x1));
        l.put_int(&mut fold.rows[0][quad], l.pack(n0, n1));
        let (x0, x1) = (l.sub(x0, l.float(n0)), l.sub(x1, l.float(n1)));
        rest = l.add(rest, l.add(x0, x1));
        if fold.coarse {
            let finer = l.splat(FINER);
            let (n0, n1) = (l.round(l.mul(x0, finer)), l.round(l.mul(x1, finer)));
            l.put_int(&mut fold.rows[1][quad], l.pack(n0, n1));
        } else {
            l.put_int(&mut fold.rows[1][quad], l.int(0));
        }
    }
    let mean = if fold.coarse { 0.0 } else { 0.5 * levels * fold.unit };
    fold.zero = l.sum(l.fma(rest, l.splat(mean), zero));
}

/// Adds the dot products of every token's codes with row set `set` to `sums[head][tile]`.
#[inline(always)]
fn dots<L: Lanes, const N: usize>(
    l: L,
    slab: &Slab<'_>,
    folds: &[[Fold; 2]; 16],
    set: usize,
    sums: &mut [[Row<i32>; 4]; N],
) {
    let quads = Quads::of(slab.layout);
    // At D = 96 the two quads of a word may lie in different tiles: one at a time.
    if quads.per_word == 2 && quads.per_tile != 3 {
        unit_dots::<L, N, 8>(l, slab, folds, set, sums);
    } else {
        unit_dots::<L, N, 4>(l, slab, folds, set, sums);
    }
}

#[inline(always)]
fn unit_dots<L: Lanes, const N: usize, const SLOTS: usize>(
    l: L,
    slab: &Slab<'_>,
    folds: &[[Fold; 2]; 16],
    set: usize,
    sums: &mut [[Row<i32>; 4]; N],
) {
    let (quads, bits) = (Quads::of(slab.layout), slab.layout.format.bits());
    let group = |tile: usize| tile * 16 / slab.layout.k_group;
    let mask = l.int(((1 << bits) - 1) * 0x0001_0001);
    for (unit, lines) in slab.k.as_chunks::<8>().0.iter().enumerate() {
        for first in (0..quads.per_word).step_by(SLOTS / 4) {
            let mut rows = [[l.int(0); SLOTS]; N];
            for g in 0..N {
                for h in 0..SLOTS / 4 {
                    let [(ta, qa), (tb, qb)] = quads.places(unit, first + h);
                    let a = l.get_int(&folds[g][group(ta)].rows[set][qa]);
                    let b = l.get_int(&folds[g][group(tb)].rows[set][qb]);
                    let spread = l.spread(a, b);
                    for i in 0..4 {
                        rows[g][4 * h + i] = spread[i];
                    }
                }
            }
            let mut acc = [[l.int(0); 8]; N];
            for (r, line) in lines.iter().enumerate() {
                let line = l.shr(l.line(line), first * 4 * bits);
                for slot in 0..SLOTS {
                    let codes = l.and(l.shr(line, slot * bits), mask);
                    for g in 0..N {
                        acc[g][r] = l.dot(acc[g][r], codes, rows[g][slot]);
                    }
                }
            }
            let [(ta, _), (tb, _)] = quads.places(unit, first);
            for g in 0..N {
                let [a, b] = l.tokens(acc[g]);
                let sum = l.add_int(l.get_int(&sums[g][ta]), a);
                l.put_int(&mut sums[g][ta], sum);
                let sum = l.add_int(l.get_int(&sums[g][tb]), b);
                l.put_int(&mut sums[g][tb], sum);
            }
        }
    }
}
