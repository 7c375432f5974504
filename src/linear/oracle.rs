//! The meaning of `linear`, in f64.

use super::blocks;
use super::kind::Weights;
use crate::simd::Level;

/// `y[t, r] = sum_c x[t, c] w[r, c]` over the decoded weights: `x` is `[n, cols]`, the answer `[n, rows]`.
#[must_use]
pub fn matmul(weights: &Weights<'_>, x: &[f64], n: usize) -> Vec<f64> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut y = vec![0.0; n * rows];
    let mut row = vec![0.0; cols];
    for r in 0..rows {
        blocks::dequantize(Level::Portable, weights.kind(), weights.row(r), &mut row);
        for (t, x) in x.chunks_exact(cols).take(n).enumerate() {
            let products = x.iter().zip(&row).map(|(&x, &w)| x * f64::from(w));
            y[t * rows + r] = products.sum();
        }
    }
    y
}

/// What 8-bit activations stand for: each block of 32 (the last may be shorter) rounded to multiples of
/// its largest magnitude / 127, in f64 but for the scale, which is f32.
#[must_use]
pub fn quantized_activations(x: &[f32], cols: usize) -> Vec<f64> {
    let block = |x: &[f32]| {
        let largest = x.iter().fold(0f32, |top, x| top.max(x.abs()));
        let finite = x.iter().all(|x| x.is_finite());
        let (d, inverse) = match largest {
            _ if !finite => (f32::NAN, 0.0),
            _ if largest < 1e-30 => (0.0, 0.0),
            _ => (largest / 127.0, 127.0 / largest),
        };
        let value = move |x: &f32| f64::from((x * inverse).round_ties_even()) * f64::from(d);
        x.iter().map(value).collect::<Vec<_>>()
    };
    x.chunks_exact(cols).flat_map(|row| row.chunks(32).flat_map(block)).collect()
}
