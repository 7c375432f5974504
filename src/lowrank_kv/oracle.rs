//! The meaning of `lowrank_kv`, in f64 over the rows as they are stored.

use super::View;
use crate::slab::TOKENS;

/// Attention of the newest token of one sequence: `q` `[H * G, c]`, `q_elite` `[H * G, 2 r]`. Returns the sums of
/// `p z` `[H * G, c]` and the natural log-sum-exp `[H * G]`; zeros and minus infinity where there are no tokens.
///
/// # Panics
/// If the sizes do not fit one another.
pub fn oracle(q: &[f32], q_elite: &[f32], view: &View<'_>, scale: f64) -> (Vec<f64>, Vec<f64>) {
    let shape = view.shape;
    let (rank, elite, q_heads) = (shape.rank(), 2 * shape.pairs(), q.len() / shape.rank());
    let group = q_heads / shape.kv_heads();
    let rows: Vec<_> = (0..view.len)
        .filter_map(|t| Some(shape.read(view.slab(t / TOKENS)?, t % TOKENS)))
        .collect();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![f64::NEG_INFINITY; q_heads]);
    let queries = q.chunks_exact(rank).zip(q_elite.chunks_exact(elite)).enumerate();
    for ((h, (q, q_elite)), out) in queries.zip(out.chunks_exact_mut(rank)) {
        let key = rank + h / group * elite;
        let score = |row: &Vec<f32>| scale * (dot(q, row) + dot(q_elite, &row[key..]));
        let scores: Vec<f64> = rows.iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for (s, row) in scores.iter().zip(&rows) {
            let p = (s - max).exp() / sum;
            out.iter_mut().zip(row).for_each(|(o, &z)| *o += p * f64::from(z));
        }
        lse[h] = max + sum.ln();
    }
    (out, lse)
}
