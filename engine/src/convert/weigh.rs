//! What an error of a key's or value's channel costs: factors lose least of what attention gives, not of keys and values.
//!
//! With weights `p` of the keys that a query sees, an error `e_i` of values changes what the layer adds by `sum p_i W_o e_i`, an
//! error `f_i` of keys by `sum p_i (q . f_i / sqrt(D)) W_o (v_i - o)`. Where errors of different tokens have nothing to do with
//! each other, both squares have the mean `sum p_i^2` times
//! - `e^T M_o e`, `M_o` the sum of `W_o^T W_o` over the query heads that share the values;
//! - `f^T M_q f / D` times `m`, `M_q` the sum of `E[q q^T]` over those heads, `m` the mean of `|W_o (v - o)|^2` over them, taken as
//!   `trace(M_o E[v v^T])` over their number.

use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, Par};

use super::ConvertError;
use super::algebra::{factors, matrix, root, rows, shares};
use super::staged::{Projections, decoded};
use crate::config::Config;
use crate::source::Source;

/// How errors of a layer's keys and values count.
pub struct Weights<'a> {
    /// Second moment of the layer's input, `E[h h^T]`.
    moment: &'a Mat<f64>,
    /// `L` with `L L^T` the weights: of the channels of each kv head's keys that come from the latent vector, then of each kv
    /// head's values.
    roots: Vec<Mat<f64>>,
}

impl<'a> Weights<'a> {
    /// Of layer `n`; `rest` are the channels of keys that come from the latent vector.
    pub fn new(
        source: &Source,
        n: usize,
        from: &Projections,
        moment: &'a Mat<f64>,
        rest: &[usize],
    ) -> Result<Self, ConvertError> {
        let Config { width, heads, kv_heads, head_dim: d, .. } = source.config;
        let (group, inner) = (source.config.group(), heads * d);
        let q = matrix::<f64>(&decoded(source, &format!("blk.{n}.attn_q"), inner, width)?, width);
        let o =
            matrix::<f64>(&decoded(source, &format!("blk.{n}.attn_output"), width, inner)?, inner);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..kv_heads {
            let own = rest.iter().filter(|&&i| i / d == head).map(|i| i % d);
            let own: Vec<_> = own.collect();
            let (mut of_o, mut of_q) = (Mat::zeros(d, d), Mat::zeros(own.len(), own.len()));
            for h in head * group..(head + 1) * group {
                let o = o.get(.., h * d..(h + 1) * d);
                of_o += o.transpose() * o;
                let q = rows(&q, &own.iter().map(|i| h * d + i).collect::<Vec<_>>());
                of_q += &q * moment * q.transpose();
            }
            let v = from.v.get(head * d..(head + 1) * d, ..);
            let spread = (&of_o * (v * moment * v.transpose())).diagonal().column_vector().sum();
            if !own.is_empty() {
                keys.push(root(&(of_q * (spread / (group * d) as f64)))?);
            }
            values.push(root(&of_o)?);
        }
        Ok(Self { moment, roots: keys.into_iter().chain(values).collect() })
    }

    /// `A` `[c, width]` and `B` `[N, c]` with which `B A` is nearest to `w`, whose rows are those channels.
    pub fn factors(&self, w: &Mat<f64>, c: usize) -> Result<[Mat<f64>; 2], ConvertError> {
        let [a, b] = factors(&self.weighed(w), Some(self.moment), c)?;
        let back = each(&self.roots, &b, |root, part| {
            solve_upper_triangular_in_place(root.transpose(), part.as_mut(), Par::Seq);
        });
        Ok([a, back])
    }

    /// What [`Self::factors`] keeps with each element of the latent vector, most first.
    pub fn shares(&self, w: &Mat<f64>) -> Result<Vec<f64>, ConvertError> {
        Ok(shares(&self.weighed(w), Some(self.moment))?)
    }

    fn weighed(&self, w: &Mat<f64>) -> Mat<f64> {
        each(&self.roots, w, |root, part| *part = root.transpose() * &*part)
    }
}

/// `w` with the rows of each root turned.
fn each(roots: &[Mat<f64>], w: &Mat<f64>, turn: impl Fn(&Mat<f64>, &mut Mat<f64>)) -> Mat<f64> {
    let (mut out, mut first) = (w.clone(), 0);
    for root in roots {
        let rows = first..first + root.nrows();
        let mut part = w.get(rows.clone(), ..).to_owned();
        turn(root, &mut part);
        out.get_mut(rows.clone(), ..).copy_from(&part);
        first = rows.end;
    }
    out
}
