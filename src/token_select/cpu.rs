//! Pooling and exact selection on the CPU.
//!
//! Selection is by rank keys ([`crate::rank`]): a histogram of their high bits finds the bin in which the k-th best
//! lies, so that only that bin is searched.

use super::Pool;
use crate::rank::{key, value};
use crate::simd::Level;
use std::cmp::Reverse;

/// Bits of a key below those that the histogram counts: sign, exponent and two bits of the mantissa.
const LOW: u32 = 21;
/// Columns that are pooled together.
const BLOCK: usize = 64;

/// `[G, n]` scores to `out` `[n]`: each row pooled over windows of `width` around a column, then summed over rows in
/// order; sums in f32, windows from the left. `width` is odd (an even one counts as the next odd one); 1 and `Avg` is
/// the plain sum over rows. Rows that are missing count as none.
pub fn pool(scores: &[f32], group: usize, kind: Pool, width: usize, out: &mut [f32]) {
    let rows = &scores[..scores.len().min(group * out.len())];
    out.fill(0.0);
    for row in rows.chunks_exact(out.len().max(1)) {
        match kind {
            Pool::Avg => add_means(Level::detect(), row, width / 2, out),
            Pool::Max => add_maxima(Level::detect(), row, width / 2, out),
        }
    }
}

crate::simd::leveled! {
    fn add_means(row: &[f32], reach: usize, out: &mut [f32]) = means;
}

crate::simd::leveled! {
    fn add_maxima(row: &[f32], reach: usize, out: &mut [f32]) = maxima;
}

#[inline(always)]
fn means(row: &[f32], reach: usize, out: &mut [f32]) {
    let width = (2 * reach + 1) as f32;
    windows(row, reach, |a, b| a + b, |x, out| *out += x / width, out);
}

#[inline(always)]
fn maxima(row: &[f32], reach: usize, out: &mut [f32]) {
    windows(row, reach, f32::max, |x, out| *out += x, out);
}

/// Calls `put` with what `both` makes of each window, `reach` columns to either side of its column.
#[inline(always)]
fn windows(
    row: &[f32],
    reach: usize,
    both: impl Fn(f32, f32) -> f32,
    put: impl Fn(f32, &mut f32),
    out: &mut [f32],
) {
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let first = block * BLOCK;
        let inner = first.checked_sub(reach).and_then(|i| row.get(i..first + BLOCK + reach));
        if let Some(around) = inner {
            let mut x = [0.0; BLOCK];
            x.copy_from_slice(&around[..BLOCK]);
            for offset in 1..=2 * reach {
                for (x, &y) in x.iter_mut().zip(&around[offset..][..BLOCK]) {
                    *x = both(*x, y);
                }
            }
            x.iter().zip(out).for_each(|(&x, out)| put(x, out));
            continue;
        }
        for (i, out) in (first..).zip(out) {
            let window = &row[i.saturating_sub(reach)..row.len().min(i + reach + 1)];
            put(window[1..].iter().fold(window[0], |a, &b| both(a, b)), out);
        }
    }
}

/// Key of the `k`-th best, `k` from 1 to their number, and how many rank before its like.
fn cut(scores: &[f32], k: usize) -> (u32, usize) {
    let mut bins = [0usize; 1 << (32 - LOW)];
    scores.iter().for_each(|&x| bins[(key(x) >> LOW) as usize] += 1);
    let (mut bin, mut before) = (bins.len() - 1, 0);
    while before + bins[bin] < k {
        before += bins[bin];
        bin -= 1;
    }
    let keys = scores.iter().map(|&x| key(x));
    let mut of_bin: Vec<u32> = keys.filter(|key| (key >> LOW) as usize == bin).collect();
    let (better, &mut cut, _) =
        of_bin.select_nth_unstable_by_key(k - before - 1, |&key| Reverse(key));
    (cut, before + better.iter().filter(|&&key| key > cut).count())
}

/// Ascending indices of the `k` best scores, of all where there are fewer: ties to the lower index, NaN last.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let k = k.min(scores.len());
    if k == 0 {
        return Vec::new();
    }
    let (cut, before) = cut(scores, k);
    let (mut kept, mut at, mut ties) = (vec![0; k + 1], 0, k - before);
    for (i, &x) in scores.iter().enumerate() {
        let key = key(x);
        let tie = key == cut && ties > 0;
        // Without a branch: which scores stay is hard to foretell.
        kept[at] = i as u32;
        at += usize::from(key > cut || tie);
        ties -= usize::from(tie);
    }
    kept.truncate(k);
    kept
}

/// The `k`-th best score, counted from 1; `None` where there is none. NaN ranks last.
pub fn kth(scores: &[f32], k: usize) -> Option<f32> {
    (1..=scores.len()).contains(&k).then(|| value(cut(scores, k).0))
}

/// Ascending indices of the scores that rank before `threshold`: the larger ones, and where it is NaN all that are not.
pub fn above(scores: &[f32], threshold: f32) -> Vec<u32> {
    let (cut, scores) = (key(threshold), scores.iter().enumerate());
    scores.filter(|(_, x)| key(**x) > cut).map(|(i, _)| i as u32).collect()
}
