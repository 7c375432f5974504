//! The meaning of `token_select`: windows in f64, and a sort.

use super::Pool;

/// `[G, n]` scores to `[n]`: each row pooled over windows of `width` (odd) around a column, then summed over rows.
///
/// # Panics
/// If `scores` does not hold `group` rows.
pub fn oracle_pool(scores: &[f32], group: usize, kind: Pool, width: usize) -> Vec<f64> {
    let n = scores.len() / group;
    let window = |row: &[f32], i: usize| -> f64 {
        let of = row[i.saturating_sub(width / 2)..n.min(i + width / 2 + 1)].iter();
        match kind {
            Pool::Avg => of.map(|&x| f64::from(x)).sum::<f64>() / width as f64,
            Pool::Max => of.map(|&x| f64::from(x)).fold(f64::NAN, f64::max),
        }
    };
    (0..n).map(|i| scores.chunks_exact(n).map(|row| window(row, i)).sum()).collect()
}

/// Ascending indices of the `k` best: the larger score first, ties to the lower index, NaN last.
pub fn oracle_top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let score = |i: u32| scores[i as usize];
    order.sort_by(|&a, &b| {
        let (x, y) = (score(a), score(b));
        let ranked = y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()));
        ranked.then(a.cmp(&b))
    });
    order.truncate(k);
    order.sort_unstable();
    order
}
