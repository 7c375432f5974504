//! Matrices in f16, turned by Hadamard matrices of 32 or as they are.

use half::f16;
use kvwarp::hadamard;
use kvwarp::linear;
use rayon::prelude::*;

/// Which sides of a matrix are turned by Hadamard matrices of 32.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turned {
    No,
    /// Outputs: 32 rows at a time.
    Rows,
    /// Inputs: 32 columns at a time.
    Columns,
}

/// Rows `first .. first + rows` in f16.
pub fn decoded(
    part: &linear::Weights<'_>,
    first: usize,
    rows: usize,
    turned: Turned,
) -> kvwarp::Result<Vec<f16>> {
    let cols = part.cols();
    let mut halves = vec![f16::ZERO; rows * cols];
    let blocks = halves.par_chunks_mut(hadamard::BLOCK * cols).enumerate();
    blocks.try_for_each(|(block, halves)| {
        let mut x = vec![0.0; halves.len()];
        for (i, row) in x.chunks_exact_mut(cols).enumerate() {
            linear::dequantize_row(part, first + block * hadamard::BLOCK + i, row)?;
        }
        match turned {
            Turned::No => {}
            Turned::Rows => turn_rows(&mut x, cols),
            Turned::Columns => hadamard::values(&mut x),
        }
        halves.iter_mut().zip(x).for_each(|(half, x)| *half = f16::from_f32(x));
        Ok::<_, kvwarp::Error>(())
    })?;
    Ok(halves)
}

/// Turns each column of `x` `[32, cols]`.
fn turn_rows(x: &mut [f32], cols: usize) {
    let mut column = [0.0; hadamard::BLOCK];
    for c in 0..cols {
        column.iter_mut().zip(x[c..].iter().step_by(cols)).for_each(|(to, x)| *to = *x);
        hadamard::values(&mut column);
        x[c..].iter_mut().step_by(cols).zip(column).for_each(|(to, x)| *to = x);
    }
}
