//! The CPU path: partial sorts of (logit, id) packed in 64 bits.

use super::{Sampling, check, penalised};
use crate::error::Result;
use crate::exp::exp;
use crate::rank::key;
use std::cmp::Reverse;

/// Weight of the most probable token.
const ONE: f32 = (1u64 << 40) as f32;

/// The next token after `recent`, whose logits the penalty changes, given 64 random bits (see
/// [`super::draw`]; greedy ignores them).
///
/// # Errors
/// [`crate::Error::Unsupported`] for no logits, too many, too many `recent`, or a field of `sampling` out of range.
pub fn cpu(logits: &[f32], sampling: &Sampling, recent: &[u32], draw: u64) -> Result<u32> {
    check(logits.len(), sampling, recent)?;
    let logits = &*penalised(logits, sampling, recent);
    let max = max(logits);
    let best = logits.iter().position(|&x| x == max).unwrap_or(0) as u32;
    if sampling.temperature == 0.0 || logits[best as usize].is_nan() {
        return Ok(best);
    }
    let kept = truncate(logits, max, sampling);
    let scale = 1.0 / sampling.temperature;
    let weights: Vec<u64> =
        kept.iter().map(|&rank| weight(logits[id(rank) as usize], max, scale)).collect();
    let total: u64 = weights.iter().sum();
    let target = ((u128::from(draw) * u128::from(total)) >> 64) as u64;
    let mut sum = 0;
    let drawn = weights.iter().position(|w| {
        sum += w;
        sum > target
    });
    Ok(drawn.map_or(best, |i| id(kept[i])))
}

/// The largest logit, `-inf` where there is none; in 16 lanes, so that it vectorises.
fn max(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, tail) = logits.as_chunks::<16>();
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = larger(*lane, x);
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

/// The weight `floor(e^((x - max) * scale) * 2^40)`; 0 for NaN.
fn weight(x: f32, max: f32, scale: f32) -> u64 {
    let e = if x == max { 1.0 } else { exp((x - max) * scale) };
    (e * ONE) as u64
}

/// Greater is better: a larger logit, then a lower id.
fn rank(id: usize, x: f32) -> u64 {
    u64::from(key(x)) << 32 | u64::from(!(id as u32))
}

fn id(rank: u64) -> u32 {
    !(rank as u32)
}

/// Ranks of the tokens that top-k, top-p and min-p leave, in id order.
fn truncate(logits: &[f32], max: f32, sampling: &Sampling) -> Vec<u64> {
    let mut kept: Vec<u64> = logits.iter().enumerate().map(|(i, &x)| rank(i, x)).collect();
    let weight = |rank: u64| weight(logits[id(rank) as usize], max, 1.0);
    if (1..kept.len()).contains(&sampling.top_k) {
        kept.select_nth_unstable_by_key(sampling.top_k - 1, |&r| Reverse(r));
        kept.truncate(sampling.top_k);
    }
    if sampling.top_p < 1.0 {
        nucleus(&mut kept, sampling.top_p, weight);
    }
    if sampling.min_p > 0.0 {
        let least = (sampling.min_p * ONE) as u64;
        kept.retain(|&r| weight(r) >= least);
    }
    if kept.len() < logits.len() {
        kept.sort_unstable_by_key(|&r| id(r));
    }
    kept
}

/// Keep the best ranks that together have `top_p` of the weight. Sorts only as far as needed.
fn nucleus(kept: &mut Vec<u64>, top_p: f32, weight: impl Fn(u64) -> u64) {
    let total: u64 = kept.iter().map(|&r| weight(r)).sum();
    let fraction = (top_p * (1u64 << 32) as f32) as u64;
    let target = ((u128::from(total) * u128::from(fraction)) >> 32).max(1) as u64;
    let (mut sorted, mut sum) = (0, 0);
    while sorted < kept.len() {
        let until = (4 * sorted).max(256).min(kept.len());
        kept[sorted..].select_nth_unstable_by_key(until - sorted - 1, |&r| Reverse(r));
        kept[sorted..until].sort_unstable_by_key(|&r| Reverse(r));
        for i in sorted..until {
            sum += weight(kept[i]);
            if sum >= target {
                kept.truncate(i + 1);
                return;
            }
        }
        sorted = until;
    }
}
