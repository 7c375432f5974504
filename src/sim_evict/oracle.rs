//! The meaning, in f64 over the dequantised cache, as plainly as the papers have it.

use super::{Anchor, Lag, Reference};
use crate::pages::HeadView;
use crate::slab::{TOKENS, k_bounds, k_value, v_value};
use std::ops::Range;

/// A token's channels, of K or of V; `None` in a hole.
fn token(head: &HeadView<'_>, slot: usize, values: bool) -> Option<Vec<f64>> {
    let slab = head.slab(slot / TOKENS)?;
    let value = if values { v_value } else { k_value };
    let of = |c| f64::from(value(slab.layout, slab.bytes, slot % TOKENS, c));
    Some((0..head.head_dim()).map(of).collect())
}

/// What a group of K that lies whole in `slots` can say of the channels of the token in `slot`.
fn bounds(head: &HeadView<'_>, slot: usize, slots: &Range<usize>) -> Option<Vec<(f64, f64)>> {
    let slab = head.slab(slot / TOKENS)?;
    let first = slot - slot % slab.layout.k_group;
    if first < slots.start || first + slab.layout.k_group > slots.end {
        return None;
    }
    let of = |c| k_bounds(slab.layout, slab.bytes, slot % TOKENS, c);
    let pairs: Option<Vec<_>> = (0..head.head_dim()).map(of).collect();
    Some(pairs?.into_iter().map(|(low, high)| (f64::from(low), f64::from(high))).collect())
}

/// Smallest and largest of each channel in `slots`; infinities the wrong way round where there is no number.
fn extremes(
    head: &HeadView<'_>,
    slots: Range<usize>,
    values: bool,
    reference: Reference,
) -> Vec<(f64, f64)> {
    let mut all = vec![(f64::INFINITY, f64::NEG_INFINITY); head.head_dim()];
    for slot in slots.clone() {
        let from_meta = match reference {
            Reference::Metadata if !values => bounds(head, slot, &slots),
            _ => None,
        };
        let plain = || token(head, slot, values).map(|x| x.into_iter().map(|x| (x, x)).collect());
        let Some(of_token): Option<Vec<_>> = from_meta.or_else(plain) else { continue };
        for ((low, high), x) in all.iter_mut().zip(of_token) {
            (*low, *high) = (low.min(x.0), high.max(x.1));
        }
    }
    all
}

/// Deviation of the scaled channels of each token in `slots`; NaN in a hole.
fn deviations(
    head: &HeadView<'_>,
    slots: Range<usize>,
    values: bool,
    extremes: &[(f64, f64)],
) -> Vec<f64> {
    let live = |(low, high): (f64, f64)| high - low > 0.0 && high - low < f64::INFINITY;
    let of_token = |slot| {
        let Some(x) = token(head, slot, values) else { return f64::NAN };
        let scaled = x.iter().zip(extremes).filter(|(_, e)| live(**e));
        let scaled: Vec<f64> = scaled.map(|(x, (low, high))| (x - low) / (high - low)).collect();
        if scaled.len() < 2 {
            return 0.0;
        }
        let mean = scaled.iter().sum::<f64>() / scaled.len() as f64;
        let squares: f64 = scaled.iter().map(|x| (x - mean).powi(2)).sum();
        (squares / (scaled.len() - 1) as f64).sqrt()
    };
    slots.map(of_token).collect()
}

/// NaN stays NaN and takes no part.
fn softmax(x: &[f64]) -> Vec<f64> {
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = x.iter().map(|x| (x - top).exp()).collect();
    let sum: f64 = weights.iter().filter(|w| !w.is_nan()).sum();
    weights.iter().map(|w| w / sum).collect()
}

/// LagKV's scores `[partitions, lag]`.
pub fn lag(head: &HeadView<'_>, lag: &Lag) -> Vec<f64> {
    let mut scores = Vec::new();
    for p in 0..lag.partitions {
        let first = lag.first + p * lag.lag;
        let (target, after) = (first..first + lag.lag, first + lag.lag..first + 2 * lag.lag);
        let softmaxes = [false, true].map(|values| {
            let extremes = extremes(head, after.clone(), values, lag.reference);
            softmax(&deviations(head, target.clone(), values, &extremes))
        });
        let sum = softmaxes[0].iter().zip(&softmaxes[1]);
        scores.extend(sum.map(|(k, v)| k + f64::from(lag.v_weight) * v));
    }
    scores
}

/// Lengths of the keys in `slots`; NaN in a hole.
pub fn key_norms(head: &HeadView<'_>, slots: Range<usize>) -> Vec<f64> {
    let square = |x: Vec<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    slots.map(|slot| token(head, slot, false).map_or(f64::NAN, square)).collect()
}

/// Bits of which heads would keep each token: every head's tokens sorted.
pub fn bits(scores: &[f32], heads: usize, keep: usize, tokens: usize) -> Vec<u32> {
    let mut bits = vec![0; tokens];
    for h in 0..heads {
        let score = |i: &usize| scores[h * tokens + i];
        let mut order: Vec<usize> = (0..tokens).collect();
        order.sort_by(|a, b| match (score(a).is_nan(), score(b).is_nan()) {
            (false, false) => (score(b) + 0.0).total_cmp(&(score(a) + 0.0)),
            (a, b) => a.cmp(&b),
        });
        order.iter().take(keep).for_each(|&i| bits[i] |= 1 << h);
    }
    bits
}

/// Representatives: the candidates sorted, distances counted bit by bit.
pub fn representatives(
    bits: &[u32],
    heads: usize,
    candidates: &[u32],
    anchor: Anchor,
    count: usize,
) -> Vec<u32> {
    let anchor = anchor.of(bits, heads);
    let bit = |x: u32, h: usize| x >> h & 1;
    let distance =
        |c: u32| (0..heads).filter(|&h| bit(bits[c as usize], h) != bit(anchor, h)).count();
    let mut order = candidates.to_vec();
    order.sort_by_key(|&c| (distance(c), c));
    let n = order.len();
    let mut chosen: Vec<u32> = match count {
        _ if count >= n => order,
        0 => Vec::new(),
        1 => vec![order[0]],
        _ => (0..count).map(|j| order[j * (n - 1) / (count - 1)]).collect(),
    };
    chosen.sort_unstable();
    chosen
}
