//! The meaning of `paged_attn`, in f64 over the dequantised cache.

use super::Scores;
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
/// `score(slot, q . k)` is a token's score; `sink` is one of a token without value.
pub(crate) fn attend(
    q: &[f64],
    keys: &Keys,
    (from, to): (usize, usize),
    score: impl Fn(usize, f64) -> f64,
    sink: Option<f64>,
    out: &mut [f64],
) -> f64 {
    let d = q.len();
    let first = keys.slots.partition_point(|&s| s < from);
    let last = keys.slots.partition_point(|&s| s < to).max(first);
    let dot = |row: &[f32]| -> f64 { row.iter().zip(q).map(|(&k, &q)| f64::from(k) * q).sum() };
    let rows = keys.k[first * d..last * d].chunks_exact(d);
    let scores: Vec<f64> =
        rows.zip(&keys.slots[first..last]).map(|(row, &slot)| score(slot, dot(row))).collect();
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    out.fill(0.0);
    if max == f64::NEG_INFINITY {
        return max;
    }
    let sum: f64 = scores.iter().copied().chain(sink).map(|s| (s - max).exp()).sum();
    for (s, row) in scores.iter().zip(keys.v[first * d..last * d].chunks_exact(d)) {
        let p = (s - max).exp() / sum;
        out.iter_mut().zip(row).for_each(|(o, &v)| *o += p * f64::from(v));
    }
    max + sum.ln()
}

/// Attention of the newest `q_len` tokens of one sequence: `q` `[q_len, H * G, D]` with one [`HeadView`] a kv
/// head. Returns `out` `[q_len, H * G, D]` and the natural log-sum-exp `[q_len, H * G]`.
///
/// # Panics
/// If the sizes do not fit one another, or `q_len` is 0.
pub fn oracle(
    q: &[f32],
    q_len: usize,
    heads: &[HeadView<'_>],
    scores: &Scores<'_>,
) -> (Vec<f64>, Vec<f64>) {
    let head_dim = heads[0].head_dim();
    let q_heads = q.len() / (q_len * head_dim);
    let group = q_heads / heads.len();
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; q_len * q_heads]);
    for (h, head) in heads.iter().enumerate() {
        let keys = Keys::of(head, head_dim);
        for row in 0..q_len {
            let end = (head.len + row + 1).saturating_sub(q_len);
            let seen = (scores.mask.first(end), end);
            for q_head in h * group..(h + 1) * group {
                let i = row * q_heads + q_head;
                let at = i * head_dim..(i + 1) * head_dim;
                let q = rotated(&q[at.clone()], scores.rotation);
                let score = |slot, dot| scores.of(h, heads.len(), slot, dot, head_dim);
                let sink = scores.sinks.map(|s| f64::from(s[q_head]));
                lse[i] = attend(&q, &keys, seen, score, sink, &mut out[at]);
            }
        }
    }
    (out, lse)
}

fn rotated(q: &[f32], matrix: Option<&[f32]>) -> Vec<f64> {
    let wide = |x: &f32| f64::from(*x);
    let Some(matrix) = matrix else { return q.iter().map(wide).collect() };
    let dot = |row: &[f32]| row.iter().zip(q).map(|(r, q)| wide(r) * wide(q)).sum();
    matrix.chunks_exact(q.len()).map(dot).collect()
}

impl Scores<'_> {
    /// Score of the token in slot `slot` of kv head `h` of `heads`.
    fn of(&self, h: usize, heads: usize, slot: usize, dot: f64, head_dim: usize) -> f64 {
        let scale =
            if self.scale == 0.0 { (head_dim as f64).powf(-0.5) } else { f64::from(self.scale) };
        let norm = self.k_norm.map_or(1.0, |n| f64::from(n[h * (n.len() / heads) + slot]));
        let (score, cap) = (dot * scale * norm, f64::from(self.softcap));
        if cap > 0.0 { cap * (score / cap).tanh() } else { score }
    }
}
