//! Attention of a converted layer from its input to what it adds to the residual stream, and the way back.

use faer::{Mat, MatRef};
use kvwarp::exp::exp;

const LANES: usize = 16;

/// What is trained: rows of queries, each head's elite channels first; those of elite keys; `A`; `B_k`, `B_v`; the output
/// projection. `[rows, columns]` as a model has them.
pub type Weights = [Mat<f32>; 6];

const Q: usize = 0;
const ELITE: usize = 1;
const A: usize = 2;
const B_K: usize = 3;
const B_V: usize = 4;
const O: usize = 5;

/// What is not.
pub struct Block {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Of each row of the queries, elite keys, `B_k` and `B_v`; none: empty.
    pub biases: [Vec<f32>; 4],
    /// Frequencies of the elite pairs, `[kv_heads, r]`.
    pub frequencies: Vec<f32>,
}

/// A text's inputs `[tokens, width]`, and what is wanted of them.
pub struct Example {
    pub g: Mat<f32>,
    pub wanted: Mat<f32>,
}

/// What went through.
struct Pass {
    q: Mat<f32>,
    z: Mat<f32>,
    /// Of each kv head, `[tokens, head_dim]`: elite channels first.
    k: Vec<Mat<f32>>,
    v: Vec<Mat<f32>>,
    /// Of each head, `[keys, queries]`: what a query looks at lies together.
    weights: Vec<Mat<f32>>,
    mixed: Mat<f32>,
    turns: Vec<[f32; 2]>,
    /// Output less what is wanted.
    off: Mat<f32>,
}

impl Block {
    fn pairs(&self) -> usize {
        self.frequencies.len() / self.kv_heads
    }

    /// Mean squared error.
    pub fn error(&self, w: &Weights, example: &Example) -> f64 {
        mean_square(&self.forward(w, example).off)
    }

    /// The same, and its gradient by each weight.
    pub fn gradient(&self, w: &Weights, example: &Example) -> (f64, Weights) {
        let pass = self.forward(w, example);
        let (t, d, group) = (example.g.nrows(), self.head_dim, self.heads / self.kv_heads);
        let scale = 2.0 / (pass.off.nrows() * pass.off.ncols()) as f32;
        let out = &pass.off * faer::Scale(scale);
        let by_mixed = &out * &w[O];
        let mut by_q = Mat::zeros(t, self.heads * d);
        let mut by_k: Vec<Mat<f32>> = (0..self.kv_heads).map(|_| Mat::zeros(t, d)).collect();
        let mut by_v = by_k.clone();
        for (h, p) in pass.weights.iter().enumerate() {
            let (j, mixed) = (h / group, by_mixed.get(.., h * d..(h + 1) * d));
            by_v[j] += p * mixed;
            let by_scores = self.through_softmax(p, &pass.v[j] * mixed.transpose());
            by_q.get_mut(.., h * d..(h + 1) * d).copy_from(by_scores.transpose() * &pass.k[j]);
            by_k[j] += &by_scores * pass.q.get(.., h * d..(h + 1) * d);
        }
        let r = self.pairs();
        let mut by_elite = beside(&by_k, 0..2 * r);
        let back: Vec<_> = pass.turns.iter().map(|&[sin, cos]| [-sin, cos]).collect();
        self.rotate(&mut by_q, (d, group), &back);
        self.rotate(&mut by_elite, (2 * r, 1), &back);
        let (by_rest, by_v) = (beside(&by_k, 2 * r..d), beside(&by_v, 0..d));
        let by_z = &by_rest * &w[B_K] + &by_v * &w[B_V];
        let (g, z) = (&example.g, &pass.z);
        let gradient = [
            by_q.transpose() * g,
            by_elite.transpose() * g,
            by_z.transpose() * g,
            by_rest.transpose() * z,
            by_v.transpose() * z,
            out.transpose() * &pass.mixed,
        ];
        (mean_square(&pass.off), gradient)
    }

    fn forward(&self, w: &Weights, example: &Example) -> Pass {
        let (g, d, r) = (&example.g, self.head_dim, self.pairs());
        let group = self.heads / self.kv_heads;
        let row =
            |x: &Mat<f32>, i: usize, bias: usize| biased(x * w[i].transpose(), &self.biases[bias]);
        let (mut q, mut elite) = (row(g, Q, 0), row(g, ELITE, 1));
        let turns = self.turns(g.nrows());
        self.rotate(&mut q, (d, group), &turns);
        self.rotate(&mut elite, (2 * r, 1), &turns);
        let z = g * w[A].transpose();
        let (rest, v) = (row(&z, B_K, 2), row(&z, B_V, 3));
        let key =
            |j: usize| {
                let (own, other) = (elite.get(.., j * 2 * r..), rest.get(.., j * (d - 2 * r)..));
                Mat::from_fn(g.nrows(), d, |t, c| {
                    if c < 2 * r { own[(t, c)] } else { other[(t, c - 2 * r)] }
                })
            };
        let k: Vec<_> = (0..self.kv_heads).map(key).collect();
        let v: Vec<_> =
            (0..self.kv_heads).map(|j| v.get(.., j * d..(j + 1) * d).to_owned()).collect();
        let mut mixed = Mat::zeros(g.nrows(), self.heads * d);
        let mut weights = Vec::new();
        for h in 0..self.heads {
            let scores = &k[h / group] * q.get(.., h * d..(h + 1) * d).transpose();
            let p = self.softmax(scores);
            mixed.get_mut(.., h * d..(h + 1) * d).copy_from(p.transpose() * &v[h / group]);
            weights.push(p);
        }
        let off = &mixed * w[O].transpose() - &example.wanted;
        Pass { q, z, k, v, weights, mixed, turns, off }
    }

    /// Sines and cosines of the elite pairs' angles, `[kv_heads, r, tokens]`.
    fn turns(&self, tokens: usize) -> Vec<[f32; 2]> {
        let of = |frequency: &f32| {
            let frequency = *frequency;
            (0..tokens).map(move |t| <[f32; 2]>::from((t as f32 * frequency).sin_cos()))
        };
        self.frequencies.iter().flat_map(of).collect()
    }

    /// Turns the elite pairs, which are first in each `each` columns.
    fn rotate(&self, x: &mut Mat<f32>, (each, group): (usize, usize), turns: &[[f32; 2]]) {
        let (r, tokens) = (self.pairs(), x.nrows());
        for head in 0..x.ncols() / each {
            for i in 0..r {
                let (a, b) = (head * each + i, head * each + r + i);
                let turns = &turns[(head / group * r + i) * tokens..][..tokens];
                for (t, [sin, cos]) in turns.iter().enumerate() {
                    let (first, second) = (x[(t, a)], x[(t, b)]);
                    x[(t, a)] = first * cos - second * sin;
                    x[(t, b)] = first * sin + second * cos;
                }
            }
        }
    }

    /// Of each column, a query's scores, the rows up to its own.
    fn softmax(&self, mut x: Mat<f32>) -> Mat<f32> {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        for t in 0..x.ncols() {
            let (seen, later) = x.col_as_slice_mut(t).split_at_mut(t + 1);
            let most =
                seen.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
            seen.iter_mut().for_each(|x| *x = exp(scale * (*x - most)));
            let share = 1.0 / seen.iter().sum::<f32>();
            seen.iter_mut().for_each(|x| *x *= share);
            later.fill(0.0);
        }
        x
    }

    /// The gradient by scores of that by their softmax `p`.
    fn through_softmax(&self, p: &Mat<f32>, mut x: Mat<f32>) -> Mat<f32> {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        for t in 0..x.ncols() {
            let (x, p) = (x.col_as_slice_mut(t), p.col_as_slice(t));
            let mean = sum(p, x);
            x.iter_mut().zip(p).for_each(|(x, p)| *x = scale * p * (*x - mean));
        }
        x
    }
}

/// Sum of products, in so many partial sums that the loop vectorises.
fn sum(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        (0..LANES).for_each(|i| sums[i] += a[i] * b[i]);
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    sums.into_iter().chain(rest).sum()
}

fn biased(mut x: Mat<f32>, bias: &[f32]) -> Mat<f32> {
    for (i, bias) in bias.iter().enumerate() {
        (0..x.nrows()).for_each(|t| x[(t, i)] += bias);
    }
    x
}

/// The same columns of each, side by side.
fn beside(parts: &[Mat<f32>], columns: std::ops::Range<usize>) -> Mat<f32> {
    let (rows, each) = (parts[0].nrows(), columns.len());
    let of = |i: usize| -> MatRef<'_, f32> { parts[i / each].as_ref() };
    Mat::from_fn(rows, parts.len() * each, |t, i| of(i)[(t, columns.start + i % each)])
}

fn mean_square(x: &Mat<f32>) -> f64 {
    let columns = x.col_iter().map(|column| column.squared_norm_l2());
    columns.map(f64::from).sum::<f64>() / (x.nrows() * x.ncols()) as f64
}
