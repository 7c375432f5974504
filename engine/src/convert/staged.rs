//! A model of which layers are being converted, in memory.

use faer::Mat;
use kvwarp::linear::dequantize_row;

use super::ConvertError;
use super::algebra::{matrix, rows, stacked, values};
use crate::calibration::fingerprint;
use crate::config::{Config, Elite};
use crate::model;
use crate::source::Source;

/// Projections of keys and values of a layer, as the source has them.
pub struct Projections {
    /// `[kv_heads * head_dim, width]`
    pub k: Mat<f64>,
    /// `[kv_heads * head_dim, width]`
    pub v: Mat<f64>,
    /// Of k and v.
    pub biases: Option<[Vec<f32>; 2]>,
}

/// What a converted layer has instead.
pub struct Factors {
    /// Rows of k of the elite pairs, `[2 r kv_heads, width]`.
    pub elite: Mat<f64>,
    /// `[c, width]`
    pub a: Mat<f64>,
    /// Rows of the other channels of k, then of v, `[kv_heads * (2 head_dim - 2 r), c]`.
    pub b: Mat<f64>,
}

impl Projections {
    /// Of layer `n`.
    pub fn of(source: &Source, n: usize) -> Result<Self, ConvertError> {
        let Config { kv_heads, head_dim, width, qkv_bias, .. } = source.config;
        let kv = kv_heads * head_dim;
        let read = |part: &str| decoded(source, &format!("blk.{n}.{part}"), kv, width);
        let bias = |part: &str| source.weights.vector(&format!("blk.{n}.{part}.bias"), kv);
        let biases = || Ok::<_, ConvertError>([bias("attn_k")?, bias("attn_v")?]);
        Ok(Self {
            k: matrix(&read("attn_k")?, width),
            v: matrix(&read("attn_v")?, width),
            biases: qkv_bias.then(biases).transpose()?,
        })
    }

    /// Rows of the elite pairs, and all that has to come from the latent vector; by the channels of [`Elite::channels`].
    pub fn split(&self, [elite, rest]: &[Vec<usize>; 2]) -> [Mat<f64>; 2] {
        [rows(&self.k, elite), stacked(&[&rows(&self.k, rest), &self.v])]
    }
}

/// Elements of a matrix, row by row.
pub fn decoded(
    source: &Source,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<Vec<f32>, ConvertError> {
    let weights = model::matrix(&source.weights, name, rows, cols)?;
    let mut x = vec![0.0; rows * cols];
    let mut each = x.chunks_exact_mut(cols).enumerate();
    each.try_for_each(|(i, row)| dequantize_row(&weights, i, row))?;
    Ok(x)
}

/// `source` again, which is to be converted: layer `n` keeps the rotation of the first `pairs` of `orders[n]`, and [`put`] has
/// to follow.
pub fn open(
    source: &Source,
    orders: &[Vec<Vec<u8>>],
    pairs: usize,
) -> Result<Source, ConvertError> {
    let first = |order: &Vec<u8>| {
        let mut pairs = order[..pairs].to_vec();
        pairs.sort_unstable();
        pairs
    };
    let elite_pairs = orders.iter().map(|layer| layer.iter().map(first).collect()).collect();
    let mut staged = Source::open(source.path())?;
    let mut elite = Elite::new(vec![0; orders.len()], elite_pairs, fingerprint(source));
    elite.factors = source.config.rope.factors.clone();
    staged.config.elite = Some(elite);
    Ok(staged)
}

/// Channels of the elite pairs of layer `n` of a staged model, and the others.
pub fn channels(staged: &Source, n: usize) -> [Vec<usize>; 2] {
    let config = &staged.config;
    let of = |elite: &Elite| elite.channels(n, config.head_dim, model::pairing(config));
    config.elite.as_ref().map(of).unwrap_or_default()
}

/// Elements of the latent vector of layer `n` of a staged model.
pub fn rank(staged: &Source, n: usize) -> usize {
    staged.config.elite.as_ref().map_or(0, |elite| elite.ranks[n])
}

/// Converts layer `n` of a staged model.
pub fn put(
    staged: &mut Source,
    n: usize,
    from: &Projections,
    factors: &Factors,
) -> Result<(), ConvertError> {
    let Config { kv_heads, head_dim, .. } = staged.config;
    let [elite, rest] = channels(staged, n);
    let (weights, name) = (&mut staged.weights, |part: &str| format!("blk.{n}.{part}"));
    let (width, rank, kv) = (factors.a.ncols(), factors.a.nrows(), kv_heads * head_dim);
    let b = values(&factors.b);
    let (b_k, b_v) = b.split_at(rest.len() * rank);
    weights.put(&name("attn_k"), width, &values(&factors.elite))?;
    weights.put(&name("attn_kv_a"), width, &values(&factors.a))?;
    weights.put(&name("attn_v_b"), rank, b_v)?;
    if !rest.is_empty() {
        weights.put(&name("attn_k_b"), rank, b_k)?;
    }
    weights.remove(&name("attn_v"));
    staged.config.elite.iter_mut().for_each(|elite| elite.ranks[n] = rank);
    let Some([k, v]) = &from.biases else { return Ok(()) };
    let pick = |channels: &[usize]| channels.iter().map(|&i| k[i]).collect::<Vec<_>>();
    weights.put(&name("attn_k.bias"), elite.len(), &pick(&elite))?;
    weights.put(&name("attn_v_b.bias"), kv, v)?;
    if !rest.is_empty() {
        weights.put(&name("attn_k_b.bias"), rest.len(), &pick(&rest))?;
    }
    weights.remove(&name("attn_v.bias"));
    Ok(())
}
