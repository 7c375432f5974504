//! Where rounding errors of K matter: weights by which later channels make up for the errors of earlier ones.
//!
//! The error of a score is `q . e`, `e` that of the key, and its mean square over queries `e^T H e` with
//! `H = E[q q^T]`. With `H = M^T diag(w) M`, `M` unit lower triangular, that is `sum_j w_j (e_j + sum_{i<j} M_ji e_i)^2`:
//! channel `j` rounds `x_j + sum_{i<j} M_ji e_i` instead of `x_j`, and each term is left with a single rounding
//! (as GPTQ, arXiv:2210.17323, and QuIP, arXiv:2307.13304, do to weights).

use half::f16;

/// Share of the mean of its diagonal that is added to `H`: errors count a little in every direction, and the
/// decomposition exists.
const DAMPING: f64 = 0.05;

/// `M - 1` of `h` `[D, D]`, symmetric, in f16 by rows; zeros where `h` is zero or not finite.
///
/// # Panics
/// If `h` is not square.
pub fn feedback(h: &[f64]) -> Vec<f16> {
    let d = h.len().isqrt();
    assert_eq!(d * d, h.len(), "a square matrix");
    let mean = (0..d).map(|i| h[i * d + i]).sum::<f64>() / d as f64;
    let mut rows = vec![f16::ZERO; d * d];
    if !(mean > 0.0 && h.iter().all(|x| x.is_finite())) {
        return rows;
    }
    // Backwards over the channels: eliminating the last leaves the Schur complement of the others.
    let mut left: Vec<f64> = h.iter().map(|x| x / mean).collect();
    (0..d).for_each(|i| left[i * d + i] += DAMPING);
    for j in (0..d).rev() {
        let row: Vec<f64> = left[j * d..j * d + j].iter().map(|x| x / left[j * d + j]).collect();
        for i in 0..j {
            for n in 0..j {
                left[i * d + n] -= left[j * d + i] * row[n];
            }
        }
        let weights = rows[j * d..].iter_mut().zip(&row);
        weights.for_each(|(weight, x)| *weight = f16::from_f64(*x));
    }
    rows
}
