//! A matrix for each kv head times rows of its query heads: latent queries out of queries, heads out of latent sums.

use crate::error::{Error, Result};
use crate::simd::{Level, leveled};
use crate::threads::Team;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::cell::RefCell;

const OP: &str = "head_linear";

/// The matrices, `[H, rows, cols]`.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    data: &'a [f16],
    kv_heads: usize,
    rows: usize,
    cols: usize,
}

impl<'a> Weights<'a> {
    /// `kv_heads` matrices of `rows` times `cols`.
    ///
    /// # Errors
    /// [`Error::Len`] if `data` holds another number of elements or none.
    pub fn new(data: &'a [f16], kv_heads: usize, rows: usize, cols: usize) -> Result<Self> {
        let need = (kv_heads * rows * cols).max(1);
        if data.len() != need {
            return Err(Error::Len { op: OP, buffer: "weight", need, got: data.len() });
        }
        Ok(Self { data, kv_heads, rows, cols })
    }

    /// Query heads a kv head of `x` `[heads, cols]`, `y` `[heads, rows]`.
    fn group(&self, x: usize, y: usize) -> Result<usize> {
        let heads = x / self.cols;
        if heads == 0 || !heads.is_multiple_of(self.kv_heads) || x != heads * self.cols {
            let need = x.next_multiple_of(self.kv_heads * self.cols).max(self.kv_heads * self.cols);
            return Err(Error::Len { op: OP, buffer: "x", need, got: x });
        }
        if y != heads * self.rows {
            return Err(Error::Len { op: OP, buffer: "y", need: heads * self.rows, got: y });
        }
        Ok(heads / self.kv_heads)
    }

    fn row(&self, head: usize, row: usize) -> &'a [f16] {
        &self.data[(head * self.rows + row) * self.cols..][..self.cols]
    }
}

/// The meaning, in f64: `y[h G + g] = W[h] x[h G + g]`, one token.
///
/// # Errors
/// [`Error::Len`] where the sizes do not fit.
pub fn oracle(weights: &Weights<'_>, x: &[f32], y: &mut [f64]) -> Result<()> {
    let group = weights.group(x.len(), y.len())?;
    for (i, y) in y.iter_mut().enumerate() {
        let (q_head, row) = (i / weights.rows, i % weights.rows);
        let x = &x[q_head * weights.cols..][..weights.cols];
        let products = weights.row(q_head / group, row).iter().zip(x);
        *y = products.map(|(w, &x)| w.to_f64() * f64::from(x)).sum();
    }
    Ok(())
}

/// The same of `x` `[H * G, cols]` into `y` `[H * G, rows]`, f32 sums.
///
/// # Errors
/// [`Error::Len`] where the sizes do not fit.
pub fn cpu(team: &Team, weights: &Weights<'_>, x: &[f32], y: &mut [f32]) -> Result<()> {
    /// Rows that a worker takes at a time.
    const ROWS: usize = 16;
    let group = weights.group(x.len(), y.len())?;
    let (level, pieces) = (Level::detect(), weights.rows.div_ceil(ROWS));
    // [H][pieces][G][ROWS], so that a worker owns what it writes.
    let mut sums = vec![0.0; weights.kv_heads * pieces * group * ROWS];
    team.each_chunk(&mut sums, group * ROWS, |i, sums| {
        let (head, first) = (i / pieces, i % pieces * ROWS);
        let x = &x[head * group * weights.cols..][..group * weights.cols];
        for row in first..weights.rows.min(first + ROWS) {
            multiply(level, weights.row(head, row), x, &mut sums[row - first..]);
        }
    });
    for (q_head, y) in y.chunks_exact_mut(weights.rows).enumerate() {
        for (piece, y) in y.chunks_mut(ROWS).enumerate() {
            let at = ((q_head / group * pieces + piece) * group + q_head % group) * ROWS;
            y.copy_from_slice(&sums[at..][..y.len()]);
        }
    }
    Ok(())
}

leveled! {
    /// Dot products of a row with each of `x` `[G, cols]`, into every 16th of `sums`.
    fn multiply(row: &[f16], x: &[f32], sums: &mut [f32]) = dots;
}

#[inline(always)]
fn dots(row: &[f16], x: &[f32], sums: &mut [f32]) {
    thread_local! {
        static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    WIDE.with(|wide| {
        let mut wide = wide.borrow_mut();
        wide.resize(row.len(), 0.0);
        row.convert_to_f32_slice(&mut wide);
        for (x, sum) in x.chunks_exact(row.len()).zip(sums.iter_mut().step_by(16)) {
            *sum = dot(&wide, x);
        }
    });
}

/// Sixteen running sums, so that the loop vectorises and the rounding error stays small.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[i] += a * b;
    }
    sums.iter().sum()
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_head_linear, kvw_head_linear_params, "head_linear"
}
