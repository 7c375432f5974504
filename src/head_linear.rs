//! A matrix for each kv head times rows of its query heads: latent queries out of queries, heads out of latent sums.

use crate::error::{Error, Result};
use crate::lanes::{self, Kernel, Lanes};
use crate::simd::Level;
use crate::threads::Team;
use half::f16;

const OP: &str = "head_linear";
/// Rows that a worker takes at a time, and those whose sums are in registers together.
const ROWS: usize = 16;
const AT_ONCE: usize = 4;

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
    let group = weights.group(x.len(), y.len())?;
    let (level, pieces) = (Level::detect(), weights.rows.div_ceil(ROWS));
    // [H][pieces][G][ROWS], so that a worker owns what it writes.
    let mut sums = vec![0.0; weights.kv_heads * pieces * group * ROWS];
    team.each_chunk(&mut sums, group * ROWS, |i, sums| {
        let (head, first) = (i / pieces, i % pieces * ROWS);
        let x = &x[head * group * weights.cols..][..group * weights.cols];
        let rows = weights.rows.min(first + ROWS) - first;
        let at = (head * weights.rows + first) * weights.cols;
        let rows = &weights.data[at..][..rows * weights.cols];
        lanes::dispatch(level, Piece { rows, cols: weights.cols, x, sums });
    });
    for (q_head, y) in y.chunks_exact_mut(weights.rows).enumerate() {
        for (piece, y) in y.chunks_mut(ROWS).enumerate() {
            let at = ((q_head / group * pieces + piece) * group + q_head % group) * ROWS;
            y.copy_from_slice(&sums[at..][..y.len()]);
        }
    }
    Ok(())
}

/// Rows of a matrix, and what of `x` `[G, cols]` meets them: their products go to `sums` `[G, ROWS]`.
struct Piece<'a> {
    rows: &'a [f16],
    cols: usize,
    x: &'a [f32],
    sums: &'a mut [f32],
}

impl Kernel for Piece<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        for (i, rows) in self.rows.chunks(AT_ONCE * self.cols).enumerate() {
            let sums = &mut self.sums[AT_ONCE * i..];
            if rows.len() == AT_ONCE * self.cols {
                dots::<L, AT_ONCE>(l, rows, self.x, sums);
                continue;
            }
            for (n, row) in rows.chunks_exact(self.cols).enumerate() {
                dots::<L, 1>(l, row, self.x, &mut sums[n..]);
            }
        }
    }
}

/// `N` rows with each of `x`.
#[inline(always)]
fn dots<L: Lanes, const N: usize>(l: L, rows: &[f16], x: &[f32], sums: &mut [f32]) {
    let cols = rows.len() / N;
    let wide: [&[[u8; 32]]; N] = std::array::from_fn(|n| {
        bytemuck::cast_slice::<f16, u8>(&rows[n * cols..][..cols]).as_chunks().0
    });
    for (x, sums) in x.chunks_exact(cols).zip(sums.chunks_mut(ROWS)) {
        let (whole, rest) = x.as_chunks::<16>();
        let mut acc = [l.splat(0.0); N];
        for (j, x) in whole.iter().enumerate() {
            let x = l.get(x);
            for (acc, row) in acc.iter_mut().zip(&wide) {
                *acc = l.fma(l.half(&row[j]), x, *acc);
            }
        }
        for (n, (sum, acc)) in sums.iter_mut().zip(acc).enumerate() {
            let row = &rows[n * cols + 16 * whole.len()..][..rest.len()];
            let tail: f32 = row.iter().zip(rest).map(|(w, x)| w.to_f32() * x).sum();
            *sum = l.sum(acc) + tail;
        }
    }
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_head_linear, kvw_head_linear_params, "head_linear"
}
