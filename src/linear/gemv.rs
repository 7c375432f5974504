//! Few tokens: every row is decoded where it is used.

use super::kind::{Quant, Weights};
use super::out::Out;
use super::panel::with_scratch;
use super::q8::{BLOCK, Block, row_blocks};
use crate::simd::Level;
use crate::threads::Team;
use std::ops::Range;

/// Rows that a worker takes at a time: at least 16 KiB (about 2 us of memory traffic), at most an
/// eighth of its share, in fours for the kernels.
pub(super) fn rows_at_once(weights: &Weights<'_>, team: &Team) -> usize {
    let share = weights.rows().div_ceil(8 * team.workers());
    share.max((16 << 10) / weights.row_bytes()).next_multiple_of(4)
}

/// `y[.., rows]` for all tokens of `x`, with quantised activations where there are some.
pub(super) fn rows(
    level: Level,
    weights: &Weights<'_>,
    rows: Range<usize>,
    x: &[f32],
    q: Option<&[Block<1>]>,
    y: &Out<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(q) = q {
        let done = match level.usable() {
            Level::Avx512 => super::x86::gemv512::rows(weights, rows.clone(), q, y),
            Level::Avx2 => super::x86::gemv2::rows(weights, rows.clone(), q, y),
            Level::Portable => false,
        };
        if done {
            return;
        }
    }
    match (q, weights.kind().quant()) {
        (Some(q), Some(quant)) => integer_rows(level, weights, rows, q, quant, y),
        _ => float_rows(level, weights, rows, x, y),
    }
}

fn integer_rows(
    level: Level,
    weights: &Weights<'_>,
    rows: Range<usize>,
    q: &[Block<1>],
    quant: Quant,
    y: &Out<'_>,
) {
    with_scratch(|scratch| {
        for row in rows {
            scratch.unpack_row(level, weights, row, quant.group);
            let (codes, scale, offset) =
                (&*scratch.row_codes, &*scratch.row_scale, &*scratch.row_offset);
            for (token, q) in q.chunks_exact(row_blocks(weights.cols())).enumerate() {
                let value = integer_dot(level, quant, codes, scale, offset, q);
                // SAFETY: rows of different units are disjoint.
                unsafe { y.put(token, row, &[value]) };
            }
        }
    });
}

fn float_rows(level: Level, weights: &Weights<'_>, rows: Range<usize>, x: &[f32], y: &Out<'_>) {
    with_scratch(|scratch| {
        for row in rows {
            scratch.decode_row(level, weights, row);
            for (token, x) in x.chunks_exact(weights.cols()).enumerate() {
                let value = float_dot(level, &scratch.row, x);
                // SAFETY: rows of different units are disjoint.
                unsafe { y.put(token, row, &[value]) };
            }
        }
    });
}

fn integer_dot(
    level: Level,
    quant: Quant,
    codes: &[u8],
    scale: &[f32],
    offset: &[f32],
    q: &[Block<1>],
) -> f32 {
    match level.usable() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => {
            super::x86::avx2::integer_dot(quant, codes, scale, offset, q)
        }
        _ => integer_dot_plain(quant, codes, scale, offset, q),
    }
}

fn half_dot(codes: &[u8], q: &[[[i8; 4]; 1]]) -> i32 {
    let q = q.as_flattened().as_flattened();
    codes.iter().zip(q).map(|(&code, &q)| i32::from(code) * i32::from(q)).sum()
}

fn integer_dot_plain(
    quant: Quant,
    codes: &[u8],
    scale: &[f32],
    offset: &[f32],
    q: &[Block<1>],
) -> f32 {
    let per_block = BLOCK / quant.group;
    let scales = scale.chunks_exact(per_block).zip(offset.chunks_exact(per_block));
    let mut sum = 0.0;
    for ((codes, (scale, offset)), q) in codes.chunks_exact(BLOCK).zip(scales).zip(q) {
        let first = half_dot(&codes[..16], &q.q[..4]) + quant.bias * q.neg_half[0][0];
        let second = half_dot(&codes[16..], &q.q[4..]) + quant.bias * q.neg_half[1][0];
        sum += if let [first_scale, second_scale] = *scale {
            (first as f32 * first_scale + second as f32 * second_scale) * q.d[0]
        } else {
            (first + second) as f32 * (scale[0] * q.d[0]) + offset[0] * q.dsum[0]
        };
    }
    sum
}

#[inline(always)]
fn float_dot_any(w: &[f32], x: &[f32]) -> f32 {
    const LANES: usize = 64;
    let (w, w_tail) = w.as_chunks::<LANES>();
    let (x, x_tail) = x.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for (w, x) in w.iter().zip(x) {
        for ((sum, w), x) in sums.iter_mut().zip(w).zip(x) {
            *sum += w * x;
        }
    }
    let tail: f32 = w_tail.iter().zip(x_tail).map(|(w, x)| w * x).sum();
    // Halving keeps the rounding error logarithmic and vectorises.
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = sums.split_at_mut(width);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        width /= 2;
    }
    sums[0] + tail
}

crate::simd::leveled! {
    fn float_dot(w: &[f32], x: &[f32]) -> f32 = float_dot_any;
}
