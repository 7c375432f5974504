//! Views of a model's weights, by layer.

use kvwarp::linear::{WeightType, Weights as Matrix};

use super::keys::KeysValues;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// A projection: a matrix in the file's own format, and a bias where the model has one.
pub struct Linear<'a> {
    pub weights: Matrix<'a>,
    pub bias: Option<Vec<f32>>,
}

impl<'a> Linear<'a> {
    /// `part` of block `n`, `[rows, cols]`.
    pub fn new(
        weights: &'a Weights,
        (n, part): (usize, &str),
        [rows, cols]: [usize; 2],
        biased: bool,
    ) -> Result<Self> {
        let name = format!("blk.{n}.{part}");
        let bias = || weights.vector(&format!("{name}.bias"), rows);
        let weights = matrix(weights, &name, rows, cols)?;
        Ok(Self { weights, bias: biased.then(bias).transpose()? })
    }
}

/// One transformer block.
pub struct Layer<'a> {
    pub attn_norm: Vec<f32>,
    pub q: Linear<'a>,
    pub kv: KeysValues<'a>,
    pub o: Linear<'a>,
    pub ffn_norm: Vec<f32>,
    pub gate: Linear<'a>,
    pub up: Linear<'a>,
    pub down: Linear<'a>,
}

impl<'a> Layer<'a> {
    /// Block `n`.
    pub fn new(weights: &'a Weights, config: &Config, n: usize) -> Result<Self> {
        let Config { width, ffn, heads, head_dim, .. } = *config;
        let q = heads * head_dim;
        let norm = |part: &str| weights.vector(&format!("blk.{n}.{part}"), width);
        let linear = |part: &str, rows, cols| Linear::new(weights, (n, part), [rows, cols], false);
        Ok(Self {
            attn_norm: norm("attn_norm")?,
            q: Linear::new(weights, (n, "attn_q"), [q, width], config.qkv_bias)?,
            kv: KeysValues::new(weights, config, n)?,
            o: linear("attn_output", width, q)?,
            ffn_norm: norm("ffn_norm")?,
            gate: linear("ffn_gate", ffn, width)?,
            up: linear("ffn_up", ffn, width)?,
            down: linear("ffn_down", width, ffn)?,
        })
    }

    /// Bytes of its matrices.
    pub fn bytes(&self) -> usize {
        let Self { q, kv, o, gate, up, down, .. } = self;
        let others: usize =
            [q, o, gate, up, down].iter().map(|linear| linear.weights.bytes()).sum();
        others + kv.bytes()
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
