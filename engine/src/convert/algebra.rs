//! The linear algebra of a conversion, in f64 on one thread: the same bits whatever the machine has besides.

use faer::linalg::solvers::Solve;
use faer::{Mat, Side};

/// Tokens whose weight what was there before has in least squares: a fit to few tokens changes little.
const PRIOR: f64 = 256.0;
/// Share of the mean of a matrix's diagonal that is added to it before its root is taken.
const RIDGE: f64 = 1e-3;

/// A matrix could not be factorised.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Singular(&'static str);

const NO_EIGENVECTORS: Singular = Singular("a projection has no eigenvectors: is it finite?");

/// `x` `[rows, cols]`.
pub fn matrix<T: From<f32>>(x: &[f32], cols: usize) -> Mat<T> {
    Mat::from_fn(x.len() / cols, cols, |i, j| T::from(x[i * cols + j]))
}

/// Its elements, row by row.
pub fn values(x: &Mat<f64>) -> Vec<f32> {
    let row = |i| (0..x.ncols()).map(move |j| x[(i, j)] as f32);
    (0..x.nrows()).flat_map(row).collect()
}

/// Rows of `x`.
pub fn rows(x: &Mat<f64>, rows: &[usize]) -> Mat<f64> {
    Mat::from_fn(rows.len(), x.ncols(), |i, j| x[(rows[i], j)])
}

/// The rows of each of `parts`, one below the other.
pub fn stacked(parts: &[&Mat<f64>]) -> Mat<f64> {
    let all: Vec<_> =
        parts.iter().flat_map(|part| (0..part.nrows()).map(move |i| (part, i))).collect();
    Mat::from_fn(all.len(), parts[0].ncols(), |i, j| all[i].0[(all[i].1, j)])
}

/// `A` `[c, width]` and `B` `[N, c]` with which `B A` is nearest to `w` `[N, width]` for inputs of the second moment `H`, or
/// 1: `U_c` are the first eigenvectors of `w H w^T`, the directions that hold most of the outputs, and `B A = U_c U_c^T w`.
///
/// # Errors
/// [`Singular`] where an element is not finite.
pub fn factors(
    w: &Mat<f64>,
    moment: Option<&Mat<f64>>,
    c: usize,
) -> Result<[Mat<f64>; 2], Singular> {
    let eigen = gram(w, moment).self_adjoint_eigen(Side::Lower).map_err(|_| NO_EIGENVECTORS)?;
    let (u, n) = (eigen.U(), w.nrows());
    let b = Mat::from_fn(n, c, |i, j| u[(i, n - 1 - j)]);
    Ok([b.transpose() * w, b])
}

/// What [`factors`] keeps of the squared outputs with each element of the latent vector, most first.
///
/// # Errors
/// [`Singular`] where an element is not finite.
pub fn shares(w: &Mat<f64>, moment: Option<&Mat<f64>>) -> Result<Vec<f64>, Singular> {
    let mut shares =
        gram(w, moment).self_adjoint_eigenvalues(Side::Lower).map_err(|_| NO_EIGENVECTORS)?;
    shares.reverse();
    Ok(shares)
}

/// `w H w^T`.
fn gram(w: &Mat<f64>, moment: Option<&Mat<f64>>) -> Mat<f64> {
    match moment {
        Some(moment) => w * moment * w.transpose(),
        None => w * w.transpose(),
    }
}

/// The `W` `[N, width]` with which `W x` is nearest to `y`, and near `before` where `tokens` inputs say little: `inputs` is the
/// sum of `x x^T` over them, `outputs` that of `y x^T`.
///
/// # Errors
/// [`Singular`] where an element is not finite.
pub fn least_squares(
    tokens: usize,
    inputs: &Mat<f64>,
    outputs: &Mat<f64>,
    before: &Mat<f64>,
) -> Result<Mat<f64>, Singular> {
    let n = inputs.nrows();
    let trace: f64 = (0..n).map(|i| inputs[(i, i)]).sum();
    let ridge = PRIOR * trace / (n * tokens.max(1)) as f64;
    let left = Mat::from_fn(n, n, |i, j| inputs[(i, j)] + if i == j { ridge } else { 0.0 });
    let right = Mat::from_fn(n, outputs.nrows(), |i, j| outputs[(j, i)] + ridge * before[(j, i)]);
    let factor = left.llt(Side::Lower);
    let factor = factor.map_err(|_| Singular("inputs of a projection are not finite"))?;
    Ok(factor.solve(&right).transpose().to_owned())
}

/// The lower triangle `L` with `L L^T = x`, which is symmetric and positive, as far as a little more of its diagonal makes
/// it so.
///
/// # Errors
/// [`Singular`] where an element is not finite.
pub fn root(x: &Mat<f64>) -> Result<Mat<f64>, Singular> {
    let n = x.nrows();
    let ridge = RIDGE * (0..n).map(|i| x[(i, i)]).sum::<f64>() / n.max(1) as f64;
    let ridge = ridge.max(f64::MIN_POSITIVE);
    let more = Mat::from_fn(n, n, |i, j| x[(i, j)] + if i == j { ridge } else { 0.0 });
    let factor = more.llt(Side::Lower);
    Ok(factor.map_err(|_| Singular("weights of a projection are not finite"))?.L().to_owned())
}

/// Adds `a^T b` to `sum`.
pub fn add_product(sum: &mut Mat<f64>, a: &Mat<f64>, b: &Mat<f64>) {
    *sum += a.transpose() * b;
}
