//! The activation of the feed-forward block: `silu(gate) * up`, `silu(x) = x / (1 + e^-x)`.

use crate::error::{Error, Result};
use crate::exp::exp;

fn check(gate: usize, up: usize) -> Result<()> {
    if up != gate {
        return Err(Error::Len { op: "swiglu", buffer: "up", need: gate, got: up });
    }
    Ok(())
}

/// The meaning, in f64, element by element.
pub fn oracle(gate: f64, up: f64) -> f64 {
    gate / (1.0 + (-gate).exp()) * up
}

/// `gate = silu(gate) * up`, element by element; relative error below 1e-6.
///
/// # Errors
/// [`Error::Len`] when the two differ in length.
pub fn cpu(gate: &mut [f32], up: &[f32]) -> Result<()> {
    check(gate.len(), up.len())?;
    for (gate, &up) in gate.iter_mut().zip(up) {
        // Below -88 the quotient is under 1e-36 and `e^-x` would overflow. A NaN fails the comparison and stays.
        let x = if *gate < -88.0 { -88.0 } else { *gate };
        *gate = x / (1.0 + exp(-x)) * up;
    }
    Ok(())
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_swiglu, kvw_swiglu_params, "swiglu"
}
