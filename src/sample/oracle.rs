//! The meaning, in f64.

use super::{Sampling, check, penalised};
use crate::error::Result;

/// Probability of each token after `recent` under `sampling`, which is not greedy; NaN logits count as `-inf`.
pub fn oracle(logits: &[f32], sampling: &Sampling, recent: &[u32]) -> Result<Vec<f64>> {
    check(logits.len(), sampling, recent)?;
    let logits = &*penalised(logits, sampling, recent);
    let x = |i: usize| if logits[i].is_nan() { f64::NEG_INFINITY } else { f64::from(logits[i]) };
    let max = (0..logits.len()).map(x).fold(f64::NEG_INFINITY, f64::max);
    let e = |i: usize, t: f64| if x(i) == max { 1.0 } else { ((x(i) - max) / t).exp() };

    let mut kept: Vec<usize> = (0..logits.len()).collect();
    kept.sort_by(|&a, &b| x(b).total_cmp(&x(a)).then(a.cmp(&b)));
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k);
    }
    let total: f64 = kept.iter().map(|&i| e(i, 1.0)).sum();
    let mut sum = 0.0;
    let nucleus = kept.iter().position(|&i| {
        sum += e(i, 1.0);
        sum >= total * f64::from(sampling.top_p)
    });
    if let Some(last) = nucleus.filter(|_| sampling.top_p < 1.0) {
        kept.truncate(last + 1);
    }
    kept.retain(|&i| e(i, 1.0) >= f64::from(sampling.min_p));

    let total: f64 = kept.iter().map(|&i| e(i, f64::from(sampling.temperature))).sum();
    let mut out = vec![0.0; logits.len()];
    for i in kept {
        out[i] = e(i, f64::from(sampling.temperature)) / total;
    }
    Ok(out)
}
