//! Attention to latents as they are: `B_K` is absorbed by the query, `B_V` follows the sum (EliteKV, arXiv:2503.01586).
//!
//! The pairs that do not turn score `q . (B_K z + b) = (B_K' q) . z + q . b`. The last term is the same for all tokens, so
//! softmax does not see it; and as weights add up to 1, the bias of `B_V` is added once to what they weigh.
//!
//! `W_q` stays in the mapped file as it is: the few queries of a step are put into the kernels' order, elite pairs apart,
//! rather than its rows.

use half::f16;
use kvwarp::head_linear;
use kvwarp::linear::dequantize_row;
use kvwarp::lowrank_kv::{self, View};
use kvwarp::threads::Team;

use super::keys::Latent;
use super::layers::Linear;
use crate::profile::{Clock, Launch};

/// Matrices of a layer, in f16.
pub struct Absorbed {
    /// `B_K'` of each head, `[kv_heads, c, D - 2 r]`; empty where every pair is elite.
    b_k: Vec<f16>,
    /// `B_V` of each head, `[kv_heads, D, c]`.
    b_v: Vec<f16>,
    rank: usize,
}

/// Buffers of a step; heads of a kv head stand together, whatever the row.
#[derive(Default)]
pub struct Scratch {
    /// `[rows, heads, 2 r]`
    elite: Vec<f32>,
    /// `[kv_heads, rows, G, D - 2 r]`
    rest: Vec<f32>,
    /// Latent queries, then latent sums, `[kv_heads, rows, G, c]`.
    latent: Vec<f32>,
    /// Those of a row, `[heads, c]`.
    query: Vec<f32>,
    sum: Vec<f32>,
    /// `[kv_heads, rows, G, D]`
    heads: Vec<f32>,
    attention: lowrank_kv::Scratch,
}

/// Rows of a matrix.
fn rows(linear: &Linear<'_>) -> kvwarp::Result<Vec<f16>> {
    let (mut all, mut row) = (Vec::new(), vec![0.0; linear.weights.cols()]);
    for i in 0..linear.weights.rows() {
        dequantize_row(&linear.weights, i, &mut row)?;
        all.extend(row.iter().map(|&x| f16::from_f32(x)));
    }
    Ok(all)
}

impl Absorbed {
    /// Of a layer.
    pub fn new(latent: &Latent<'_>) -> kvwarp::Result<Self> {
        let (rank, b_v) = (latent.b_v.weights.cols(), rows(&latent.b_v)?);
        let mut b_k = Vec::new();
        if let Some(linear) = &latent.b_k {
            let all = rows(linear)?;
            for head in all.chunks_exact(all.len() / latent.kv_heads()) {
                let column = |i| head.iter().skip(i).step_by(rank);
                b_k.extend((0..rank).flat_map(column));
            }
        }
        Ok(Self { b_k, b_v, rank })
    }
}

impl Latent<'_> {
    /// Attention of the heads of each of `views`, a row each: `q` `[rows, heads, D]`, elite pairs turned; into `mix`, of the
    /// same shape.
    pub fn attend(
        &self,
        team: &Team,
        (q, mix): (&[f32], &mut [f32]),
        views: &[View<'_>],
        scratch: &mut Scratch,
        clock: &mut Clock,
    ) -> kvwarp::Result<()> {
        let (absorbed, d) = (self.absorbed()?, self.head_dim());
        let (rows, rank, elite) = (views.len(), absorbed.rank, 2 * self.pairs());
        let (kv_heads, group) = (self.kv_heads(), q.len() / (rows * self.kv_heads() * d));
        // Of kv head, row and query head: where its queries lie, and where its place is among all of the kv head.
        let places = || {
            let of = move |h, row| (0..group).map(move |g| (h, (row * kv_heads + h) * group + g));
            (0..kv_heads).flat_map(move |h| (0..rows).flat_map(move |row| of(h, row)))
        };
        let Scratch { elite: q_elite, rest, latent, query, sum, heads, attention } = scratch;
        let split = || {
            q_elite.resize(q.len() / d * elite, 0.0);
            rest.clear();
            for (h, at) in places() {
                let head = &q[at * d..][..d];
                let [turned, others] = self.channels.each_ref().map(|channels| {
                    let each = channels.len() / kv_heads;
                    channels[h * each..][..each].iter().map(move |channel| head[channel - h * d])
                });
                let to = &mut q_elite[at * elite..][..elite];
                to.iter_mut().zip(turned).for_each(|(to, x)| *to = x);
                rest.extend(others);
            }
        };
        clock.time(|| Launch::of("copy"), split);
        latent.clear();
        latent.resize(q.len() / d * rank, 0.0);
        let product =
            |weights: &[f16]| Launch { bytes: 2 * weights.len(), ..Launch::of("head_linear") };
        if !absorbed.b_k.is_empty() {
            let b_k = head_linear::Weights::new(&absorbed.b_k, kv_heads, rank, d - elite)?;
            let multiply = || head_linear::cpu(team, &b_k, rest, latent);
            clock.time(|| product(&absorbed.b_k), multiply)?;
        }
        let all = kv_heads * group;
        let mut attend = || {
            query.resize(all * rank, 0.0);
            sum.resize(all * rank, 0.0);
            for (row, view) in views.iter().enumerate() {
                each_head((rows, row), (group, rank), latent, query, |of_all, of_row| {
                    of_row.copy_from_slice(of_all)
                });
                let q_elite = &q_elite[row * all * elite..][..all * elite];
                let scale = 1.0 / (d as f32).sqrt();
                lowrank_kv::cpu(team, query, q_elite, view, scale, sum, attention)?;
                each_head((rows, row), (group, rank), latent, sum, |of_all, of_row| {
                    of_all.copy_from_slice(of_row)
                });
            }
            Ok::<_, kvwarp::Error>(())
        };
        let read = || views.iter().map(|view| view.slabs() * view.shape.slab_bytes()).sum();
        clock.time(|| Launch { bytes: read(), ..Launch::of("lowrank_kv") }, &mut attend)?;
        heads.resize(q.len(), 0.0);
        let b_v = head_linear::Weights::new(&absorbed.b_v, kv_heads, d, rank)?;
        clock.time(|| product(&absorbed.b_v), || head_linear::cpu(team, &b_v, latent, heads))?;
        let join = || {
            for ((h, at), head) in places().zip(heads.chunks_exact(d)) {
                let to = &mut mix[at * d..][..d];
                to.copy_from_slice(head);
                if let Some(bias) = &self.b_v.bias {
                    to.iter_mut().zip(&bias[h * d..]).for_each(|(to, bias)| *to += bias);
                }
            }
        };
        clock.time(|| Launch::of("copy"), join);
        Ok(())
    }
}

/// The heads of row `row` of `all` `[kv_heads, rows, G, len]`, each kv head's with those of `one` `[kv_heads, G, len]`.
fn each_head(
    (rows, row): (usize, usize),
    (group, len): (usize, usize),
    all: &mut [f32],
    one: &mut [f32],
    body: impl Fn(&mut [f32], &mut [f32]),
) {
    let each = all.chunks_exact_mut(group * len).skip(row).step_by(rows);
    each.zip(one.chunks_exact_mut(group * len)).for_each(|(of_all, of_row)| body(of_all, of_row));
}
