//! A converted model as a folder like Hugging Face's: `config.json` with the block of [`crate::config::Elite`],
//! `model.safetensors`, and the vocabulary and chat template of the source.
//!
//! In block `N`, under `model.layers.N.self_attn`:
//!
//! | tensor | what | shape |
//! |---|---|---|
//! | `q_proj` | `W_q`, as in the source | `[heads * D, width]` |
//! | `k_proj` | rows of `W_k` of the elite pairs: of each kv head `r` first halves, `r` second halves | `[kv_heads * 2 r, width]` |
//! | `kv_a_proj` | `A` | `[c, width]` |
//! | `k_b_proj` | `B_K`, rows of the other channels of each kv head, first halves, then second halves; none where all are elite | `[kv_heads * (D - 2 r), c]` |
//! | `v_b_proj` | `B_V` | `[kv_heads * D, c]` |
//!
//! Biases of k and v are those of `k_proj`, `k_b_proj` and `v_b_proj`. Pairs are channels `(j, j + D / 2)` whatever the source
//! has. Matrices of f16 or bf16 that the conversion has not touched stay as they are, others get the elements asked for.

mod config;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use kvwarp::linear::{self, dequantize_row};
use safetensors::tensor::{Dtype, View};

use super::ConvertError;
use crate::config::{Config, Pairing};
use crate::error::{Error, Result};
use crate::gguf::GgmlType;
use crate::model::matrix;
use crate::source::Source;
use crate::weights::{ELITE, Expected, expected, theirs};

/// Elements of matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elements {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// Upper halves of 32-bit floats.
    Bf16,
}

/// Writes `staged`, which was made of the model of `source`, to the folder `out`, all of it or nothing; there must be
/// nothing yet.
///
/// # Errors
/// [`ConvertError::File`].
pub fn write(
    source: &Source,
    staged: &Source,
    elements: Elements,
    out: &Path,
) -> Result<(), ConvertError> {
    let partial = out.with_added_extension("partial");
    let io = |e| Error::io(&partial, e);
    match std::fs::remove_dir_all(&partial) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e).into()),
        _ => {}
    }
    std::fs::create_dir_all(&partial).map_err(io)?;
    for (name, text) in config::files(source, staged)? {
        let path = partial.join(name);
        std::fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
    }
    let path = partial.join("model.safetensors");
    let tensors = expected(&staged.config).map(|e| Written::new(staged, elements, e));
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let elite = staged.config.elite.iter().map(|elite| (ELITE, elite.fingerprint()));
    let metadata = elite.chain([("format", "pt".to_owned())]);
    let metadata: Vec<_> = metadata.map(|(key, value)| (key.to_owned(), value)).collect();
    // The library writes a map as it iterates, which is chance: one is drawn that ascends, so that the same conversion gives
    // the same bytes.
    let drawn = || metadata.iter().cloned().collect::<HashMap<String, String>>();
    let metadata = std::iter::repeat_with(drawn).find(|map| map.keys().is_sorted());
    let named = tensors.into_iter().map(|tensor| (theirs(&tensor.expected.name), tensor));
    safetensors::serialize_to_file(named, metadata, &path)
        .map_err(|e| Error::Safetensors(e.to_string()).at(&path))?;
    std::fs::rename(&partial, out).map_err(|e| Error::io(out, e).into())
}

/// A tensor on its way to the file.
struct Written<'a> {
    expected: Expected,
    shape: Vec<usize>,
    weights: linear::Weights<'a>,
    /// How the file has it.
    kind: GgmlType,
    bytes: &'a [u8],
    to: Dtype,
    /// Rows of a head whose pairs are to be `(j, j + D / 2)` and are `(2 j, 2 j + 1)`.
    turned: Option<usize>,
}

impl<'a> Written<'a> {
    fn new(staged: &'a Source, elements: Elements, expected: Expected) -> Result<Self> {
        let Expected { name, rows, cols } = &expected;
        let tensor = staged.weights.matrix(name, *rows, *cols)?;
        let vector = *rows == 1;
        let to = match (tensor.kind, elements) {
            (GgmlType::F32, _) if vector => Dtype::F32,
            (GgmlType::F16, _) => Dtype::F16,
            (GgmlType::BF16, _) => Dtype::BF16,
            (_, Elements::F32) => Dtype::F32,
            (_, Elements::F16) => Dtype::F16,
            (_, Elements::Bf16) => Dtype::BF16,
        };
        let Config { head_dim, rope, .. } = &staged.config;
        let queries = name.contains("attn_q") && rope.pairing == Pairing::Interleaved;
        Ok(Self {
            shape: if vector { vec![*cols] } else { vec![*rows, *cols] },
            // A bias is turned as the rows of a matrix are.
            weights: match vector {
                true => matrix(&staged.weights, name, 1, *cols)?,
                false => matrix(&staged.weights, name, *rows, *cols)?,
            },
            kind: tensor.kind,
            bytes: tensor.bytes,
            to,
            turned: queries.then_some(*head_dim),
            expected,
        })
    }

    /// Row of the source that is row `i` here.
    fn from(&self, i: usize) -> usize {
        let Some(d) = self.turned else { return i };
        let (head, channel) = (i / d, i % d);
        head * d + 2 * (channel % (d / 2)) + channel / (d / 2)
    }

    /// Row by row in f32, or as they are.
    fn encoded(&self) -> Vec<u8> {
        let Expected { rows, cols, .. } = self.expected;
        let mut out = Vec::with_capacity(self.data_len());
        let mut row = vec![0.0; cols];
        for i in 0..rows {
            // A row that there is, of as many elements.
            let _ = dequantize_row(&self.weights, self.from(i), &mut row);
            if rows == 1 && self.turned.is_some() {
                row = (0..cols).map(|j| row[self.from(j)]).collect();
            }
            match self.to {
                Dtype::F32 => out.extend(row.iter().flat_map(|x| x.to_le_bytes())),
                Dtype::F16 => out.extend(row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
                _ => out.extend(row.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
            }
        }
        out
    }
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        self.to
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let same = matches!(
            (self.kind, self.to),
            (GgmlType::F32, Dtype::F32)
                | (GgmlType::F16, Dtype::F16)
                | (GgmlType::BF16, Dtype::BF16)
        );
        match same && self.turned.is_none() {
            true => Cow::Borrowed(self.bytes),
            false => Cow::Owned(self.encoded()),
        }
    }

    fn data_len(&self) -> usize {
        let element = if self.to == Dtype::F32 { 4 } else { 2 };
        self.shape.iter().product::<usize>() * element
    }
}
