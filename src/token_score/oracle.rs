//! The meaning of `token_score`, in f64 over the dequantised cache.

use super::Reduce;
use crate::paged_attn::{Keys, attend};
use crate::pages::HeadView;
use std::ops::Range;

/// Query heads in all, and what `scale` stands for.
fn shape(q: &[f32], n: usize, heads: &[HeadView<'_>], scale: f32) -> (usize, f64) {
    let head_dim = heads[0].head_dim();
    let scale = if scale == 0.0 { (head_dim as f64).powf(-0.5) } else { f64::from(scale) };
    (q.len() / (n * head_dim), scale)
}

fn row(q: &[f32], index: usize, head_dim: usize) -> Vec<f64> {
    q[index * head_dim..][..head_dim].iter().map(|&x| x.into()).collect()
}

/// Scores of slots `first[h]..first[h] + count` of each head for rows `q` `[n, H * G, D]` of natural log-sum-exps
/// `lse` `[n, H * G]`: `[H, G, count]` sums, or `[H, count]` maxima. A row whose log-sum-exp is minus infinity gives
/// nothing.
///
/// # Panics
/// If the sizes do not fit one another, or `n` is 0.
#[allow(clippy::too_many_arguments)]
pub fn oracle(
    q: &[f32],
    n: usize,
    lse: &[f32],
    heads: &[HeadView<'_>],
    scale: f32,
    first: &[usize],
    count: usize,
    reduce: Reduce,
) -> Vec<f64> {
    let (head_dim, (q_heads, scale)) = (heads[0].head_dim(), shape(q, n, heads, scale));
    let group = q_heads / heads.len();
    let mut scores = Vec::new();
    for (h, head) in heads.iter().enumerate() {
        let keys = Keys::of(head, head_dim);
        let mut of_head = vec![vec![0f64; count]; if reduce == Reduce::Sum { group } else { 1 }];
        for (i, g) in (0..n).flat_map(|i| (0..group).map(move |g| (i, g))) {
            let index = i * q_heads + h * group + g;
            let (q, lse, end) = (row(q, index, head_dim), f64::from(lse[index]), head.len - n + i);
            if lse == f64::NEG_INFINITY {
                continue;
            }
            for (&slot, k) in keys.slots.iter().zip(keys.k.chunks_exact(head_dim)) {
                if (first[h]..first[h] + count).contains(&slot) && slot <= end {
                    let dot: f64 = k.iter().zip(&q).map(|(&k, q)| f64::from(k) * q).sum();
                    let share = (scale * dot - lse).exp();
                    match reduce {
                        Reduce::Sum => of_head[g][slot - first[h]] += share,
                        Reduce::Max => {
                            let score = &mut of_head[0][slot - first[h]];
                            *score = score.max(share);
                        }
                    }
                }
            }
        }
        scores.extend(of_head.concat());
    }
    scores
}

/// Natural log-sum-exp `[n, H * G]` of each row over the slots of `seen` up to its own, minus infinity where there are
/// none.
///
/// # Panics
/// If the sizes do not fit one another, or `n` is 0.
pub fn oracle_lse(
    q: &[f32],
    n: usize,
    heads: &[HeadView<'_>],
    scale: f32,
    seen: &[Range<usize>],
) -> Vec<f64> {
    let (head_dim, (q_heads, scale)) = (heads[0].head_dim(), shape(q, n, heads, scale));
    let group = q_heads / heads.len();
    let (mut out, mut unused) = (vec![0.0; n * q_heads], vec![0.0; head_dim]);
    for (h, head) in heads.iter().enumerate() {
        let keys = Keys::of(head, head_dim).only(head_dim, seen);
        for (i, g) in (0..n).flat_map(|i| (0..group).map(move |g| (i, g))) {
            let index = i * q_heads + h * group + g;
            let (q, end) = (row(q, index, head_dim), head.len - n + i + 1);
            out[index] = attend(&q, &keys, (0, end), |_, dot| dot * scale, None, &mut unused);
        }
    }
    out
}

impl Keys {
    /// Those whose slots are in `seen`.
    fn only(mut self, head_dim: usize, seen: &[Range<usize>]) -> Self {
        let kept = |&i: &usize| seen.iter().any(|range| range.contains(&self.slots[i]));
        let kept: Vec<usize> = (0..self.slots.len()).filter(kept).collect();
        let rows = |x: &[f32]| -> Vec<f32> {
            kept.iter().flat_map(|i| x[i * head_dim..][..head_dim].iter().copied()).collect()
        };
        (self.k, self.v) = (rows(&self.k), rows(&self.v));
        self.slots = kept.iter().map(|&i| self.slots[i]).collect();
        self
    }
}
