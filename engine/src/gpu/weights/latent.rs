//! Projections of a converted layer (EliteKV, arXiv:2503.01586), in f16, in the kernels' order: a head of queries or keys
//! is its elite pairs, first halves then second halves, then its other channels.
//!
//! A token's row is `[z, elite keys]`, `c` then `2 r kv_heads` elements, each part filled up to a multiple of 8. One product
//! makes keys and values of rows: elite elements pass through it. Where latents are attended to as they are, `B_K` is
//! transposed and `B_V` as it lies in the file.

use half::f16;
use kvwarp::ffi::{KVW_F16, KVW_F32};
use kvwarp::hadamard;
use kvwarp::linear::dequantize_row;

use super::{Linear, Matrix, Upload};
use crate::config::{Config, Elite};
use crate::gpu::platform::{Buffer, Result};
use crate::gpu::tally::Use;
use crate::model::{matrix, pairing};

/// What addresses and strides of rows are multiples of, in elements.
const ALIGNED: usize = 8;

/// A converted layer, beside its first product: queries, elite keys and `z` of the layer's input.
pub struct Latent {
    /// Elite pairs of each head, `[kv_heads, r]` i8.
    pub pairs: Buffer,
    pub rank: usize,
    /// Keys, then values, `[kv_heads, D]` each, of a row; turned where the cache has them so.
    pub up: Linear,
    /// Where latents are kept.
    pub absorbed: Option<Absorbed>,
}

/// Matrices of each head.
pub struct Absorbed {
    /// `B_K'`, `[kv_heads, c, skip..D]` f16: of a head's elements from `skip` on, those of elite pairs 0.
    pub b_k: Buffer,
    pub skip: usize,
    /// `[kv_heads, D, c]` f16
    pub b_v: Buffer,
    /// `[kv_heads, D]` f32
    pub bias: Option<Buffer>,
}

impl Latent {
    /// Elements of a row, and the first of its elite keys.
    pub fn row(&self) -> [usize; 2] {
        [self.up.matrix.cols, self.rank.next_multiple_of(ALIGNED)]
    }
}

/// Numbers of a layer.
#[derive(Clone, Copy)]
struct Shape {
    width: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    /// Elite elements of a head.
    elite: usize,
    rank: usize,
}

impl Shape {
    fn of(config: &Config, elite: &Elite, n: usize) -> Self {
        let Config { width, heads, kv_heads, head_dim: d, .. } = *config;
        Self { width, heads, kv_heads, d, elite: 2 * elite.pairs, rank: elite.ranks[n] }
    }

    fn others(self) -> usize {
        self.d - self.elite
    }

    /// Elements of z in a row.
    fn z(self) -> usize {
        self.rank.next_multiple_of(ALIGNED)
    }

    fn row(self) -> usize {
        self.z() + (self.kv_heads * self.elite).next_multiple_of(ALIGNED)
    }
}

/// Tensors of a layer as f32 rows, with biases where the model has them; empty where nobody looks at them.
struct Parts {
    b_k: Vec<f32>,
    b_v: Vec<f32>,
    b_k_bias: Vec<f32>,
    b_v_bias: Vec<f32>,
}

impl Upload<'_> {
    /// Layer `n`: its first product, and the rest.
    pub(super) fn converted(
        &mut self,
        (n, elite): (usize, &Elite),
        turned: bool,
        absorbs: bool,
    ) -> Result<(Linear, Latent)> {
        let config = &self.source.config;
        let shape = Shape::of(config, elite, n);
        let order = elite.order(n, shape.d, pairing(config));
        let down = self.down(n, shape, &order)?;
        let (kv, others) = (shape.kv_heads * shape.d, shape.kv_heads * shape.others());
        let name = |part: &str| format!("blk.{n}.{part}");
        let mut b_k = || match others {
            0 => Ok((Vec::new(), Vec::new())),
            rows => self.rows(&name("attn_k_b"), rows, shape.rank),
        };
        let (b_k, b_k_bias) = b_k()?;
        let (b_v, b_v_bias) = self.rows(&name("attn_v_b"), kv, shape.rank)?;
        let parts = Parts { b_k, b_v, b_k_bias, b_v_bias };
        let up = self.up(shape, &parts, turned)?;
        let absorbed = absorbs.then(|| self.absorbed(shape, &parts)).transpose()?;
        let what = (Use::Weights, "elite pairs");
        let pairs = Buffer::of(self.platform, what, &elite.elite_pairs[n].concat())?;
        Ok((down, Latent { pairs, rank: shape.rank, up, absorbed }))
    }

    /// Queries, elite keys and z of a layer's input.
    fn down(&mut self, n: usize, shape: Shape, order: &[Vec<usize>]) -> Result<Linear> {
        let Shape { width, heads, kv_heads, d, elite, rank, .. } = shape;
        let name = |part: &str| format!("blk.{n}.{part}");
        let (q, mut bias) = self.rows(&name("attn_q"), heads * d, width)?;
        let (keys, key_bias) = self.rows(&name("attn_k"), kv_heads * elite, width)?;
        let a = self.unbiased(&name("attn_kv_a"), rank, width)?;
        let channel = |i: usize| i / d * d + order[i / d * kv_heads / heads][i % d];
        let rows = (heads * d + kv_heads * elite + rank).next_multiple_of(ALIGNED);
        let matrix = self.made(rows, width, || {
            let queries = (0..heads * d).flat_map(|i| &q[channel(i) * width..][..width]);
            let all = queries.chain(&keys).chain(&a).map(|&x| f16::from_f32(x));
            all.chain(std::iter::repeat(f16::ZERO)).take(rows * width).collect()
        })?;
        if !bias.is_empty() {
            bias = (0..heads * d).map(|i| bias[channel(i)]).chain(key_bias).collect();
            bias.resize(rows, 0.0);
        }
        Ok(Linear { matrix, bias: self.bias(bias)? })
    }

    /// Keys and values of rows.
    fn up(&mut self, shape: Shape, parts: &Parts, turned: bool) -> Result<Linear> {
        let Shape { kv_heads, d, elite, rank, .. } = shape;
        let (others, row) = (shape.others(), shape.row());
        let mut bias = Vec::new();
        if !parts.b_v_bias.is_empty() {
            for h in 0..kv_heads {
                bias.extend(std::iter::repeat_n(0.0, elite));
                bias.extend(parts.b_k_bias.iter().skip(h * others).take(others));
            }
            bias.extend(&parts.b_v_bias);
        }
        let turn = |x: &mut [f32]| {
            let (k, v) = x.split_at_mut(kv_heads * d);
            hadamard::keys(k, d);
            hadamard::values(v);
        };
        if turned && !bias.is_empty() {
            turn(&mut bias);
        }
        let rows = 2 * kv_heads * d;
        let matrix = self.made(rows, row, || {
            let mut all = vec![f16::ZERO; rows * row];
            let mut column = vec![0.0; rows];
            for j in 0..row {
                column.fill(0.0);
                if j < rank {
                    for (i, x) in column[..kv_heads * d].iter_mut().enumerate() {
                        let (h, e) = (i / d, i % d);
                        *x = if e < elite {
                            0.0
                        } else {
                            parts.b_k[(h * others + e - elite) * rank + j]
                        };
                    }
                    let values = parts.b_v.iter().skip(j).step_by(rank);
                    column[kv_heads * d..].iter_mut().zip(values).for_each(|(to, x)| *to = *x);
                } else if let Some(i) = j.checked_sub(shape.z()).filter(|i| *i < kv_heads * elite) {
                    column[i / elite * d + i % elite] = 1.0;
                }
                if turned {
                    turn(&mut column);
                }
                let to = all.iter_mut().skip(j).step_by(row);
                to.zip(&column).for_each(|(to, &x)| *to = f16::from_f32(x));
            }
            all
        })?;
        Ok(Linear { matrix, bias: self.bias(bias)? })
    }

    /// What makes latent queries, and heads of latent sums.
    fn absorbed(&mut self, shape: Shape, parts: &Parts) -> Result<Absorbed> {
        let Shape { kv_heads, d, elite, rank, .. } = shape;
        let (others, skip) = (shape.others(), (elite / ALIGNED * ALIGNED).min(d - ALIGNED));
        let b_k = self.made(kv_heads * rank, d - skip, || {
            let element = |i: usize| {
                let (h, c, e) =
                    (i / (d - skip) / rank, i / (d - skip) % rank, skip + i % (d - skip));
                let other = e.checked_sub(elite);
                other.map_or(0.0, |other| parts.b_k[(h * others + other) * rank + c])
            };
            (0..kv_heads * rank * (d - skip)).map(|i| f16::from_f32(element(i))).collect()
        })?;
        let b_v = self
            .made(kv_heads * d, rank, || parts.b_v.iter().map(|&x| f16::from_f32(x)).collect())?;
        let bias = self.bias(parts.b_v_bias.clone())?.map(|bias| bias.buffer);
        Ok(Absorbed { b_k: b_k.buffer, skip, b_v: b_v.buffer, bias })
    }

    /// A projection's rows as f32, `[rows, cols]`, and its bias.
    fn rows(&mut self, name: &str, rows: usize, cols: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let all = self.unbiased(name, rows, cols)?;
        let bias = match self.source.config.qkv_bias {
            true => self.source.weights.vector(&format!("{name}.bias"), rows)?,
            false => Vec::new(),
        };
        Ok((all, bias))
    }

    /// The same of one that has no bias.
    fn unbiased(&mut self, name: &str, rows: usize, cols: usize) -> Result<Vec<f32>> {
        let part = matrix(&self.source.weights, name, rows, cols)?;
        self.note(part.bytes());
        let mut all = vec![0.0; if self.platform.holds() { rows * cols } else { 0 }];
        for (i, row) in all.chunks_exact_mut(cols).enumerate() {
            dequantize_row(&part, i, row)?;
        }
        Ok(all)
    }

    /// A matrix of these elements, made where somebody looks at them.
    fn made(
        &mut self,
        rows: usize,
        cols: usize,
        elements: impl FnOnce() -> Vec<f16>,
    ) -> Result<Matrix> {
        let buffer = Buffer::new(self.platform, (Use::Weights, "weights"), 2 * rows * cols)?;
        if self.platform.holds() {
            self.platform.write(buffer.at(), bytemuck::cast_slice(&elements()))?;
        }
        Ok(Matrix { buffer, dtype: KVW_F16, rows, cols })
    }

    fn bias(&mut self, bias: Vec<f32>) -> Result<Option<Matrix>> {
        if bias.is_empty() {
            return Ok(None);
        }
        let what = (Use::Weights, "biases");
        let buffer = Buffer::of(self.platform, what, bytemuck::cast_slice(&bias))?;
        Ok(Some(Matrix { buffer, dtype: KVW_F32, rows: 1, cols: bias.len() }))
    }
}
