//! Views of a model's weights, by layer.

use kvwarp::linear::{WeightType, Weights as Matrix};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// A projection: a matrix in the file's own format, and a bias where the model has one.
pub struct Linear<'a> {
    pub weights: Matrix<'a>,
    pub bias: Option<Vec<f32>>,
}

/// One transformer block.
pub struct Layer<'a> {
    pub attn_norm: Vec<f32>,
    pub q: Linear<'a>,
    pub k: Linear<'a>,
    pub v: Linear<'a>,
    pub o: Linear<'a>,
    pub ffn_norm: Vec<f32>,
    pub gate: Linear<'a>,
    pub up: Linear<'a>,
    pub down: Linear<'a>,
}

impl<'a> Layer<'a> {
    /// Block `n`.
    pub fn new(weights: &'a Weights, config: &Config, n: usize) -> Result<Self> {
        let Config { width, ffn, heads, kv_heads, head_dim, .. } = *config;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let name = |part: &str| format!("blk.{n}.{part}");
        let norm = |part: &str| weights.vector(&name(part), width);
        let linear = |part: &str, rows, cols, biased: bool| {
            let bias = || weights.vector(&name(&format!("{part}.bias")), rows);
            let weights = matrix(weights, &name(part), rows, cols)?;
            Ok::<_, Error>(Linear { weights, bias: biased.then(bias).transpose()? })
        };
        Ok(Self {
            attn_norm: norm("attn_norm")?,
            q: linear("attn_q", q, width, config.qkv_bias)?,
            k: linear("attn_k", kv, width, config.qkv_bias)?,
            v: linear("attn_v", kv, width, config.qkv_bias)?,
            o: linear("attn_output", width, q, false)?,
            ffn_norm: norm("ffn_norm")?,
            gate: linear("ffn_gate", ffn, width, false)?,
            up: linear("ffn_up", ffn, width, false)?,
            down: linear("ffn_down", width, ffn, false)?,
        })
    }

    /// Bytes of its matrices.
    pub fn bytes(&self) -> usize {
        let Self { q, k, v, o, gate, up, down, .. } = self;
        [q, k, v, o, gate, up, down].iter().map(|linear| linear.weights.bytes()).sum()
    }
}

/// A matrix that `linear` can multiply.
pub fn matrix<'a>(
    weights: &'a Weights,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<Matrix<'a>> {
    let tensor = weights.matrix(name, rows, cols)?;
    let Some(kind) = WeightType::from_ggml(tensor.kind.id()) else {
        let known: Vec<_> = WeightType::ALL.iter().map(|kind| format!("{kind:?}")).collect();
        let (found, known) = (tensor.kind, known.join(", "));
        return Err(Error::Weights(format!(
            "tensor `{name}` has type {found:?}; supported: {known}"
        )));
    };
    Matrix::new(kind, rows, cols, tensor.bytes)
        .map_err(|e| Error::Weights(format!("tensor `{name}`: {e}")))
}
