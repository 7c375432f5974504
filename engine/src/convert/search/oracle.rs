//! What [`super::search`] means, in f64 and as the paper says it: for each candidate all scores, with the chosen pairs and
//! the candidate turned.

use super::{Heads, Text};

/// Mean of `|S_(E + j) - S|` over the `group * T * T` scores of one kv head's queries, masked ones being 0, for every pair
/// `j`, with the pairs `chosen` turned; infinite for those.
pub fn distances(heads: Heads<'_>, text: Text<'_>, head: usize, chosen: &[u8]) -> Vec<f64> {
    let full = scores(heads, text, head, &|_| true);
    let mean = |some: Vec<f64>| {
        let sum: f64 = some.iter().zip(&full).map(|(a, b)| (a - b).abs()).sum();
        sum / full.len() as f64
    };
    let far = |j: usize| match chosen.contains(&(j as u8)) {
        true => f64::INFINITY,
        false => mean(scores(heads, text, head, &|i| i == j || chosen.contains(&(i as u8)))),
    };
    (0..heads.head_dim / 2).map(far).collect()
}

/// The first `rounds` pairs of one kv head.
pub fn search(heads: Heads<'_>, texts: &[Text<'_>], head: usize, rounds: usize) -> Vec<u8> {
    let mut chosen = Vec::new();
    for _ in 0..rounds {
        let mut sums = vec![0.0; heads.head_dim / 2];
        for text in texts {
            let tokens = tokens(heads, *text) as f64;
            let far = distances(heads, *text, head, &chosen);
            sums.iter_mut().zip(far).for_each(|(sum, x)| *sum += x * tokens * tokens);
        }
        let best = sums.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
        chosen.extend(best.map(|(j, _)| j as u8));
    }
    chosen
}

fn tokens(heads: Heads<'_>, text: Text<'_>) -> usize {
    text.k.len() / (heads.kv_heads * heads.head_dim)
}

/// `q . k / sqrt(D)` of all queries of a kv head and all keys, the pairs `turned` turned; `[group, T, T]`, 0 where masked.
fn scores(
    heads: Heads<'_>,
    text: Text<'_>,
    head: usize,
    turned: &dyn Fn(usize) -> bool,
) -> Vec<f64> {
    let Heads { kv_heads, group, head_dim: d, inv_freq, pairing } = heads;
    let turn = |position: usize, x: &[f32]| -> Vec<f64> {
        let mut x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for j in (0..d / 2).filter(|&j| turned(j)) {
            let (sin, cos) = f64::from(position as f32 * inv_freq[j]).sin_cos();
            let (a, b) = pairing.channels(j, d);
            (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
        }
        x
    };
    let n = tokens(heads, text);
    let keys: Vec<_> = (0..n).map(|s| turn(s, &text.k[(s * kv_heads + head) * d..][..d])).collect();
    let mut out = vec![0.0; group * n * n];
    for g in 0..group {
        for t in 0..n {
            let q = turn(t, &text.q[((t * kv_heads + head) * group + g) * d..][..d]);
            for (s, key) in keys.iter().enumerate().take(t + 1) {
                let dot: f64 = q.iter().zip(key).map(|(a, b)| a * b).sum();
                out[(g * n + t) * n + s] = dot / (d as f64).sqrt();
            }
        }
    }
    out
}
