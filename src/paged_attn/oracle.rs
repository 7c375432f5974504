//! The meaning of `paged_attn`, in f64 over the dequantised cache.

use super::Mask;
use crate::pages::HeadView;
use crate::slab::{TOKENS, decode};

/// The tokens that a head really holds: holes and slots past its length left out.
pub(crate) struct Keys {
    /// Slot of each token, ascending.
    pub slots: Vec<usize>,
    /// `[slots.len(), D]`.
    pub k: Vec<f32>,
    /// `[slots.len(), D]`.
    pub v: Vec<f32>,
}

impl Keys {
    /// Dequantise everything that `head` holds, `d` channels a token.
    pub fn of(head: &HeadView<'_>, d: usize) -> Self {
        let mut keys = Self { slots: Vec::new(), k: Vec::new(), v: Vec::new() };
        let (mut k, mut v) = (vec![0.0; TOKENS * d], vec![0.0; TOKENS * d]);
        for i in 0..head.slabs() {
            let Some(slab) = head.slab(i) else { continue };
            decode(slab.layout, slab.bytes, &mut k, &mut v);
            let held = (head.len - i * TOKENS).min(TOKENS);
            keys.slots.extend(i * TOKENS..i * TOKENS + held);
            keys.k.extend_from_slice(&k[..held * d]);
            keys.v.extend_from_slice(&v[..held * d]);
        }
        keys
    }
}

/// One query row over the tokens in slots `from..to`: `out` `[D]`; returns the natural log-sum-exp.
pub(crate) fn attend(
    q: &[f32],
    keys: &Keys,
    from: usize,
    to: usize,
    scale: f64,
    out: &mut [f64],
) -> f64 {
    let d = q.len();
    let first = keys.slots.partition_point(|&s| s < from);
    let last = keys.slots.partition_point(|&s| s < to).max(first);
    let dot = |row: &[f32]| -> f64 {
        row.iter().zip(q).map(|(&k, &q)| f64::from(k) * f64::from(q)).sum::<f64>() * scale
    };
    let scores: Vec<f64> = keys.k[first * d..last * d].chunks_exact(d).map(dot).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    out.fill(0.0);
    for (s, row) in scores.iter().zip(keys.v[first * d..last * d].chunks_exact(d)) {
        let p = (s - max).exp() / sum;
        out.iter_mut().zip(row).for_each(|(o, &v)| *o += p * f64::from(v));
    }
    if scores.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() }
}

/// Decode attention of one sequence: `q` `[H * G, D]` with one [`HeadView`] a kv head, `scale` 0 for
/// `1 / sqrt(D)`. Returns `out` `[H * G, D]` and the natural log-sum-exp `[H * G]`.
pub fn oracle(q: &[f32], heads: &[HeadView<'_>], scale: f32, mask: Mask) -> (Vec<f64>, Vec<f64>) {
    let head_dim = heads[0].head_dim();
    let scale = if scale == 0.0 { (head_dim as f64).powf(-0.5) } else { f64::from(scale) };
    let group = q.len() / (heads.len() * head_dim);
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; heads.len() * group]);
    for (h, head) in heads.iter().enumerate() {
        let keys = Keys::of(head, head_dim);
        for (g, lse) in lse[h * group..][..group].iter_mut().enumerate() {
            let row = h * group + g;
            let at = row * head_dim..(row + 1) * head_dim;
            let o = &mut out[at.clone()];
            *lse = attend(&q[at], &keys, mask.first(head.len), head.len, scale, o);
        }
    }
    (out, lse)
}
