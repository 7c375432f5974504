//! Row-wise steps between the kernels.

use std::sync::{Mutex, PoisonError};

use kvwarp::linear::{Cpu, matmul_many};
use kvwarp::threads::Team;

use super::layers::Linear;

/// Rows that a thread takes at a time: enough work to pay for handing it out.
const GRAIN: usize = 16;

/// Row `i` of `rows` equal ones.
pub fn row(data: &[f32], i: usize, rows: usize) -> &[f32] {
    let len = data.len() / rows;
    &data[i * len..(i + 1) * len]
}

/// Calls `body` with every row of `data` and its number, the team sharing them.
pub fn each_row(
    team: &Team,
    data: &mut [f32],
    rows: usize,
    body: impl Fn(usize, &mut [f32]) -> kvwarp::Result<()> + Sync,
) -> kvwarp::Result<()> {
    let (len, failed) = (data.len() / rows, Mutex::new(Ok(())));
    if rows <= GRAIN {
        return data.chunks_exact_mut(len).enumerate().try_for_each(|(i, row)| body(i, row));
    }
    team.each_chunk(data, GRAIN * len, |piece, data| {
        let mut rows = data.chunks_exact_mut(len).enumerate();
        let done = rows.try_for_each(|(i, row)| body(piece * GRAIN + i, row));
        if done.is_err() {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = done;
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Projections of the same rows `x`, biases added.
pub fn project<const N: usize>(
    cpu: &Cpu<'_>,
    linears: [&Linear<'_>; N],
    x: &[f32],
    rows: usize,
    outs: [&mut Vec<f32>; N],
) -> kvwarp::Result<()> {
    let mut products = Vec::with_capacity(N);
    let mut biases = Vec::new();
    for (linear, out) in linears.into_iter().zip(outs) {
        products.push((&linear.weights, &mut out[..]));
        biases.push(linear.bias.as_deref());
    }
    matmul_many(cpu, &mut products, x, rows)?;
    for ((_, out), bias) in products.into_iter().zip(biases) {
        if let Some(bias) = bias {
            out.chunks_exact_mut(bias.len()).for_each(|out| residual(out, bias));
        }
    }
    Ok(())
}

/// Adds what a block gave to the residual stream.
pub fn residual(x: &mut [f32], add: &[f32]) {
    x.iter_mut().zip(add).for_each(|(x, add)| *x += add);
}
