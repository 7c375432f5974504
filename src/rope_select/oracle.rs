//! The meaning, in f64.

use super::{Pairing, check};
use crate::error::Result;

/// `x` `[T, heads, d]` turned in place, token `t` by `positions[t]`. The angle is the f32 product that every
/// path uses: at position 131072 its rounding alone moves an angle by up to 4e-3 radians.
pub fn oracle(
    x: &mut [f64],
    heads: usize,
    d: usize,
    positions: &[i32],
    inv_freq: &[f32],
    pairing: Pairing,
) -> Result<()> {
    check(x.len(), heads, d, positions.len(), inv_freq.len())?;
    for (&position, row) in positions.iter().zip(x.chunks_mut((heads * d).max(1))) {
        for head in row.chunks_mut(d) {
            for (i, &freq) in inv_freq.iter().enumerate() {
                let (sin, cos) = f64::from(position as f32 * freq).sin_cos();
                let (a, b) = pairing.channels(i, d);
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
            }
        }
    }
    Ok(())
}
