//! Weighted sums of 8-, 4- or 2-bit values over a run of slabs, in integers, straight from the words of the slabs.
//!
//! `sum p v` over tokens is `sum (p s) c + sum p m` with the token's scale `s` and minimum `m` in the channel's
//! group. The products `p s` become signed halves of a unit common to the run, the head and the group, so that
//! the sums stay in registers over the whole run.
//!
//! Bounds: a lane adds at most 2 products of 15 or 255 * 32767 a unit of a phase, 32 units a run; a channel eight
//! lanes: below 2^28 at 4 bits; at 8 bits half a run comes to just less than 2^31.
//!
//! Rounding a product is an error in a token's weight. The zero points take the same error (`m / s` is the code
//! of the value 0, negated), so that it multiplies the value and not the code, which may be far larger: the sum
//! moves by 2e-4 of the root of its squared terms at most, 512 errors of half a unit against a term of 32767.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use super::slabs::{Quads, RUN, Slab};
use crate::lanes::{Lanes, Row};
use crate::slab::Layout;
use std::ops::Range;

const NOTHING: f32 = 1e-30;

/// Room for the weights of a run.
#[derive(Default)]
pub(super) struct Weights {
    /// `p s` of one group and block of heads, `[head][slab][tile]`.
    products: Vec<Row<f32>>,
    /// Tile rows of scales, minima and the code of value 0 if there is one, `[group][slab][tile]`.
    meta: Vec<[Row<f32>; 3]>,
    /// The same in units, `[head][group][slab][tile]`.
    steps: Vec<Row<i32>>,
    /// As the words want them, `[slab][unit][quad of the word][head]`.
    pairs: Vec<Row<i32>>,
    /// What a step is worth, `[head][group]`.
    units: [[f32; 8]; 4],
    /// Sums of a quad, `[head][i][r]`.
    sums: [[[Row<i32>; 8]; 4]; 4],
}

/// Adds `sum p v` to `out` `[N, D]`; `weights[head][slab][tile]` are tile rows of `p`.
#[inline(always)]
pub(super) fn add<L: Lanes, const N: usize>(
    l: L,
    run: &[Slab<'_>],
    weights: [&[[Row<f32>; 4]]; N],
    w: &mut Weights,
    out: &mut [f32],
) {
    let layout = run[0].layout;
    grow(&mut w.products, N * RUN * 4);
    grow(&mut w.steps, N * layout.v_groups() * RUN * 4);
    grow(&mut w.meta, layout.v_groups() * RUN * 4);
    convert_meta(l, run, &mut w.meta);
    for group in 0..layout.v_groups() {
        weigh(l, run, group, weights, w, out);
    }
    arrange::<L, N>(l, run, w);
    let quads = Quads::of(layout);
    for phase in 0..quads.period() {
        for h in 0..quads.per_word {
            if quads.slots == 4 {
                sum_quad::<L, N, 4>(l, run, 0..run.len(), phase, h, w, out);
                continue;
            }
            for first in (0..run.len()).step_by(RUN / 2) {
                let slabs = first..run.len().min(first + RUN / 2);
                sum_quad::<L, N, 2>(l, run, slabs, phase, h, w, out);
            }
        }
    }
}

#[inline(always)]
fn grow<T: Clone + Default>(rows: &mut Vec<T>, n: usize) {
    if rows.len() < n {
        rows.resize(n, T::default());
    }
}

#[inline(always)]
fn convert_meta<L: Lanes>(l: L, run: &[Slab<'_>], meta: &mut [[Row<f32>; 3]]) {
    let layout = run[0].layout;
    let (groups, levels) = (layout.v_groups(), ((1 << layout.format.bits()) - 1) as f32);
    for (s, slab) in run.iter().enumerate() {
        let (scales, mins) = slab.v_meta.split_at(layout.v_meta_bytes() / 2);
        for tile in 0..4 {
            for group in 0..groups {
                let at = tile * groups * 32 + group * 8;
                let scale = l.half_quads(scales, at, groups * 8);
                let min = l.half_quads(mins, at, groups * 8);
                let origin = l.div(l.sub(l.splat(0.0), min), scale);
                let origin = l.min(l.max(origin, l.splat(0.0)), l.splat(levels));
                let rows = &mut meta[(group * RUN + s) * 4 + tile];
                l.put(&mut rows[0].0, scale);
                l.put(&mut rows[1].0, min);
                l.put(&mut rows[2].0, origin);
            }
        }
    }
}

/// Steps and unit of one group, and its zero points.
#[inline(always)]
fn weigh<L: Lanes, const N: usize>(
    l: L,
    run: &[Slab<'_>],
    group: usize,
    weights: [&[[Row<f32>; 4]]; N],
    w: &mut Weights,
    out: &mut [f32],
) {
    let layout = run[0].layout;
    let meta = &w.meta[group * RUN * 4..][..run.len() * 4];
    let (mut top, mut zero) = ([l.splat(0.0); 4], [l.splat(0.0); 4]);
    for (i, [scale, min, _]) in meta.iter().enumerate() {
        let (scale, min) = (l.get(&scale.0), l.get(&min.0));
        for g in 0..N {
            let p = l.get(&weights[g].as_flattened()[i].0);
            let product = l.mul(p, scale);
            top[g] = l.max(product, top[g]);
            zero[g] = l.fma(p, min, zero[g]);
            l.put(&mut w.products[g * RUN * 4 + i].0, product);
        }
    }
    let channels = group * layout.v_group..layout.head_dim.min((group + 1) * layout.v_group);
    let top = l.tops(top);
    for g in 0..N {
        let top = top[g];
        let unit = top / 32767.0;
        let per_unit = l.splat(if top > NOTHING { 32767.0 / top } else { 0.0 });
        let mut rest = l.splat(0.0);
        let products = &w.products[g * RUN * 4..][..run.len() * 4];
        let steps = &mut w.steps[(g * layout.v_groups() + group) * RUN * 4..][..run.len() * 4];
        for ((step, product), [_, _, origin]) in steps.iter_mut().zip(products).zip(meta) {
            let x = l.mul(l.get(&product.0), per_unit);
            let n = l.round(x);
            rest = l.fma(l.sub(x, l.float(n)), l.get(&origin.0), rest);
            l.put_int(step, n);
        }
        w.units[g][group] = unit;
        zero[g] = l.fma(rest, l.splat(unit), zero[g]);
    }
    let zero = l.sums(zero);
    for g in 0..N {
        out[g * layout.head_dim..][channels.clone()].iter_mut().for_each(|o| *o += zero[g]);
    }
}

/// `pairs` from `steps`.
#[inline(always)]
fn arrange<L: Lanes, const N: usize>(l: L, run: &[Slab<'_>], w: &mut Weights) {
    let layout = run[0].layout;
    let (quads, units) = (Quads::of(layout), run[0].v.len() / 8);
    grow(&mut w.pairs, RUN * units * quads.per_word * N);
    let mut at = 0;
    for s in 0..run.len() {
        for unit in 0..units {
            for h in 0..quads.per_word {
                let [(ta, qa), (tb, qb)] = quads.places(unit, h);
                let (ga, gb) = (v_group(layout, qa), v_group(layout, qb));
                for g in 0..N {
                    let first = g * layout.v_groups();
                    let a = l.get_int(&w.steps[((first + ga) * RUN + s) * 4 + ta]);
                    let b = l.get_int(&w.steps[((first + gb) * RUN + s) * 4 + tb]);
                    l.put_int(&mut w.pairs[at], l.pack(a, b));
                    at += 1;
                }
            }
        }
    }
}

/// The group of a quad's channels.
#[inline(always)]
fn v_group(layout: &Layout, quad: usize) -> usize {
    match layout.v_group {
        32 => quad,
        64 => quad / 2,
        128 => quad / 4,
        _ => 0,
    }
}

/// Adds the values of `slabs` in the channels of quad `h` of the words of units `phase`, `phase + period`, ...
#[inline(always)]
fn sum_quad<L: Lanes, const N: usize, const SLOTS: usize>(
    l: L,
    run: &[Slab<'_>],
    slabs: Range<usize>,
    phase: usize,
    h: usize,
    w: &mut Weights,
    out: &mut [f32],
) {
    let layout = run[0].layout;
    let (quads, bits, units) = (Quads::of(layout), layout.format.bits(), run[0].v.len() / 8);
    let mask = l.int(((1 << bits) - 1) * 0x0001_0001);
    let Weights { pairs, sums, units: worth, .. } = w;
    for r in 0..8 {
        let mut acc = [[l.int(0); SLOTS]; N];
        for s in slabs.clone() {
            let slab = &run[s];
            for unit in (phase..units).step_by(quads.period()) {
                let line = l.shr(l.line(&slab.v[unit * 8 + r]), 4 * bits * h);
                let pairs = &pairs[((s * units + unit) * quads.per_word + h) * N..][..N];
                for i in 0..SLOTS {
                    let codes = l.and(l.shr(line, bits * i), mask);
                    for g in 0..N {
                        acc[g][i] = l.dot(acc[g][i], codes, l.get_int(&pairs[g]));
                    }
                }
            }
        }
        for g in 0..N {
            for i in 0..SLOTS {
                l.put_int(&mut sums[g][i][r], acc[g][i]);
            }
        }
    }
    let [(_, a), (_, b)] = quads.places(phase, h);
    for g in 0..N {
        for i in 0..SLOTS {
            let mut lines = [l.int(0); 8];
            for r in 0..8 {
                lines[r] = l.get_int(&sums[g][i][r]);
            }
            let mut sum = [0.0; 16]; // [w][r]
            l.put(&mut sum, l.float(l.channels(lines)));
            for (w, (quad, sum)) in [a, b].into_iter().zip(sum.as_chunks::<8>().0).enumerate() {
                let (unit, j) =
                    (worth[g][v_group(layout, quad)], 4 * quad + quads.pairs(w).start + i);
                let channels = &mut out[g * layout.head_dim + 8 * j..][..8];
                channels.iter_mut().zip(sum).for_each(|(o, s)| *o += s * unit);
            }
        }
    }
}
