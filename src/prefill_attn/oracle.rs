//! The meaning of `prefill_attn`, in f64 over the dequantised cache.

use super::Mask;
use crate::paged_attn::{Keys, attend};
use crate::pages::HeadView;

/// Attention of the newest `n` tokens of one sequence: `q` `[n, H * G, D]`, one [`HeadView`] a kv head, `scale` 0
/// for `1 / sqrt(D)`. Returns `out` `[n, H * G, D]` and the natural log-sum-exp `[n, H * G]`.
pub fn oracle(
    q: &[f32],
    n: usize,
    heads: &[HeadView<'_>],
    scale: f32,
    mask: Mask,
) -> (Vec<f64>, Vec<f64>) {
    let head_dim = heads[0].head_dim();
    let scale = if scale == 0.0 { (head_dim as f64).powf(-0.5) } else { f64::from(scale) };
    let q_heads = q.len() / (n * head_dim);
    let group = q_heads / heads.len();
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; n * q_heads]);
    for (h, head) in heads.iter().enumerate() {
        let keys = Keys::of(head, head_dim);
        for row in 0..n {
            let end = head.len - n + row + 1;
            for q_head in h * group..(h + 1) * group {
                let i = row * q_heads + q_head;
                let at = i * head_dim..(i + 1) * head_dim;
                let q: Vec<f64> = q[at.clone()].iter().map(|&x| x.into()).collect();
                let seen = (mask.first(end), end);
                lse[i] = attend(&q, &keys, seen, |_, dot| dot * scale, None, &mut out[at]);
            }
        }
    }
    (out, lse)
}
