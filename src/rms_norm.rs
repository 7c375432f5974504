//! Root mean square layer normalisation: `out = x * weight / sqrt(mean(x^2) + eps)`, a row a token.

use crate::error::{Error, Result};

fn check(x: usize, weight: usize, out: usize) -> Result<()> {
    let op = "rms_norm";
    if weight == 0 || !x.is_multiple_of(weight) {
        let need = x.next_multiple_of(weight.max(1));
        return Err(Error::Len { op, buffer: "x", need, got: x });
    }
    if out != x {
        return Err(Error::Len { op, buffer: "out", need: x, got: out });
    }
    Ok(())
}

/// The meaning, in f64: `x`, `out` `[T, width]`, `weight` `[width]`.
pub fn oracle(x: &[f32], weight: &[f32], eps: f32, out: &mut [f64]) -> Result<()> {
    check(x.len(), weight.len(), out.len())?;
    for (row, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = 1.0 / (squares / weight.len() as f64 + f64::from(eps)).sqrt();
        for ((out, &x), &w) in out.iter_mut().zip(row).zip(weight) {
            *out = f64::from(x) * scale * f64::from(w);
        }
    }
    Ok(())
}

/// Rows of `x` `[T, width]` normalised and scaled by `weight` `[width]` into `out` `[T, width]`.
///
/// # Errors
/// [`Error::Len`] when `x` is not whole rows or `out` has another size.
pub fn cpu(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<()> {
    check(x.len(), weight.len(), out.len())?;
    for (row, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let scale = 1.0 / (sum_of_squares(row) / weight.len() as f32 + eps).sqrt();
        for ((out, &x), &w) in out.iter_mut().zip(row).zip(weight) {
            *out = x * scale * w;
        }
    }
    Ok(())
}

/// Sixteen running sums, so that the loop vectorises and the rounding error stays small.
fn sum_of_squares(row: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    let (blocks, tail) = row.as_chunks::<16>();
    for block in blocks {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(tail) {
        *sum += x * x;
    }
    sums.iter().sum()
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_rms_norm, kvw_rms_norm_params, "rms_norm"
}
