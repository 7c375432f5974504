//! A converted layer's attention as it is trained: elite channels of queries first, in the order of the elite keys.

use faer::Mat;

use super::block::{Block, Weights};
use crate::config::{Config, Elite};
use crate::convert::ConvertError;
use crate::convert::algebra::{matrix, stacked, values};
use crate::convert::staged::{Factors, Projections, channels, decoded, put, rank};
use crate::source::Source;

/// Of layer `n` of a staged model.
pub fn read(staged: &Source, n: usize) -> Result<(Block, Weights), ConvertError> {
    let Config { heads, kv_heads, head_dim, width, qkv_bias, .. } = staged.config;
    let [elite, rest] = channels(staged, n);
    let order = order(&staged.config, &[&elite, &rest]);
    let rank = rank(staged, n);
    let of = |part: &str, rows: usize, cols: usize| match rows {
        0 => Ok(Mat::zeros(0, cols)),
        _ => Ok::<_, ConvertError>(matrix::<f32>(
            &decoded(staged, &name(n, part), rows, cols)?,
            cols,
        )),
    };
    let bias = |part: &str, rows: usize| match qkv_bias && rows > 0 {
        true => staged.weights.vector(&format!("{}.bias", name(n, part)), rows),
        false => Ok(Vec::new()),
    };
    let q = of("attn_q", heads * head_dim, width)?;
    let q_bias = bias("attn_q", heads * head_dim)?;
    let q_bias =
        if q_bias.is_empty() { q_bias } else { order.iter().map(|&i| q_bias[i]).collect() };
    let weights = [
        Mat::from_fn(q.nrows(), width, |i, j| q[(order[i], j)]),
        of("attn_k", elite.len(), width)?,
        of("attn_kv_a", rank, width)?,
        of("attn_k_b", rest.len(), rank)?,
        of("attn_v_b", kv_heads * head_dim, rank)?,
        of("attn_output", width, heads * head_dim)?,
    ];
    let biases = [
        q_bias,
        bias("attn_k", elite.len())?,
        bias("attn_k_b", rest.len())?,
        bias("attn_v_b", kv_heads * head_dim)?,
    ];
    let all = staged.config.rope.frequencies(head_dim);
    let pairs = staged.config.elite.iter().flat_map(|elite: &Elite| elite.elite_pairs[n].concat());
    let frequencies = pairs.map(|pair| all[usize::from(pair)]).collect();
    Ok((Block { heads, kv_heads, head_dim, biases, frequencies }, weights))
}

/// Puts trained weights where they were read.
pub fn write(
    source: &Source,
    staged: &mut Source,
    n: usize,
    [q, elite, a, b_k, b_v, o]: &Weights,
) -> Result<(), ConvertError> {
    let [first, rest] = channels(staged, n);
    let order = order(&staged.config, &[&first, &rest]);
    let mut rows = vec![0.0; q.nrows() * q.ncols()];
    for (i, &row) in order.iter().enumerate() {
        (0..q.ncols()).for_each(|j| rows[row * q.ncols() + j] = q[(i, j)]);
    }
    staged.weights.put(&name(n, "attn_q"), q.ncols(), &rows)?;
    let wide = |x: &Mat<f32>| Mat::from_fn(x.nrows(), x.ncols(), |i, j| f64::from(x[(i, j)]));
    let b = stacked(&[&wide(b_k), &wide(b_v)]);
    let factors = Factors { elite: wide(elite), a: wide(a), b };
    put(staged, n, &Projections::of(source, n)?, &factors)?;
    let o = values(&wide(o));
    Ok(staged.weights.put(&name(n, "attn_output"), q.nrows(), &o)?)
}

/// Rows of the queries, each head's elite channels first.
fn order(config: &Config, channels: &[&[usize]; 2]) -> Vec<usize> {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    let of = |h: usize| {
        let kv = h / (heads / kv_heads);
        let own = move |channels: &[usize]| {
            let each = channels.len() / kv_heads;
            let own = channels[kv * each..][..each].iter();
            own.map(|i| i - kv * head_dim + h * head_dim).collect::<Vec<_>>()
        };
        channels.iter().flat_map(|channels| own(channels)).collect::<Vec<_>>()
    };
    (0..heads).flat_map(of).collect()
}

fn name(n: usize, part: &str) -> String {
    format!("blk.{n}.{part}")
}
