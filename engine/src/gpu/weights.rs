//! A model's weights on the device.
//!
//! f16 and bf16 stay as they are, f32 becomes f16. Matrices in blocks stay in blocks, in the kernels' planes, or become
//! f16 ([`Stored`]). Projections of the same input are one matrix: q above k above v, gate above up.
//!
//! A converted layer has latents in place of k and v ([`Latent`]).
//!
//! Where the cache keeps values turned by Hadamard matrices of 32 ([`kvwarp::hadamard::values`]), the turn is in the rows of
//! v and in the columns of o: in f32, before they are rounded to f16.

mod latent;
mod turned;

use std::rc::Rc;

use kvwarp::ffi::{self, KVW_BF16, KVW_F16, KVW_F32};
use kvwarp::hadamard;
use kvwarp::linear::{self, WeightType};

use super::metered::Metered;
use super::platform::{Buffer, Result};
use super::tally::Use;
use crate::config::Config;
use crate::model::matrix;
use crate::source::Source;
use crate::spec::CacheSpec;
pub use latent::Latent;
use turned::{Turned, decoded};

/// Elements that are turned into f16 and sent together.
const PIECE: usize = 1 << 23;

/// How matrices that a GGUF file has in blocks are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// As f16.
    F16,
    /// In blocks.
    Blocks,
}

/// `[rows, cols]` of `KVW_*` elements.
pub struct Matrix {
    pub buffer: Buffer,
    pub dtype: i32,
    pub rows: usize,
    pub cols: usize,
}

/// A projection.
pub struct Linear {
    pub matrix: Matrix,
    /// `[1, rows]` f32
    pub bias: Option<Matrix>,
}

/// One transformer block.
pub struct Layer {
    pub attn_norm: Buffer,
    /// Rows of q, then of k, then of v where all three have the same elements.
    pub qkv: Linear,
    /// v where it has elements of its own.
    pub v: Option<Linear>,
    /// Of a converted layer, in place of k and v.
    pub latent: Option<Latent>,
    pub o: Matrix,
    pub ffn_norm: Buffer,
    /// Rows of gate, then of up.
    pub gate_up: Linear,
    pub down: Matrix,
}

/// Everything.
pub struct Weights {
    pub embedding: Rc<Matrix>,
    pub layers: Vec<Layer>,
    pub output_norm: Buffer,
    /// The embedding where the model ties them.
    pub output: Rc<Matrix>,
}

impl Weights {
    /// Uploads those of `source` as its cache has keys and values. `progress` is given bytes of the file that are done and
    /// those in all.
    pub fn new(
        platform: &Rc<Metered>,
        source: &Source,
        stored: Stored,
        spec: &CacheSpec,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let total = source.weights.iter().map(|tensor| tensor.bytes.len()).sum();
        let mut upload = Upload { platform, source, stored, done: 0, total, progress };
        let Config { vocab, width, layers, tied_embeddings, .. } = source.config;
        let embedding = Rc::new(upload.matrix(&["token_embd"], &[vocab], width, &[Turned::No])?);
        let layers = (0..layers).map(|n| upload.layer(n, spec)).collect::<Result<_>>()?;
        let output = match tied_embeddings {
            true => Rc::clone(&embedding),
            false => Rc::new(upload.matrix(&["output"], &[vocab], width, &[Turned::No])?),
        };
        let output_norm = upload.vector("output_norm", width)?;
        Ok(Self { embedding, layers, output_norm, output })
    }

    /// Bytes of the largest matrix that products of many rows unpack; the output's never have that many.
    pub fn unpacked_bytes(&self) -> usize {
        let of = |l: &Layer| {
            let all = [&l.qkv.matrix, &l.o, &l.gate_up.matrix, &l.down].into_iter();
            all.chain(l.v.as_ref().map(|v| &v.matrix)).map(Matrix::unpacked_bytes).max()
        };
        self.layers.iter().filter_map(of).max().unwrap_or(0)
    }
}

struct Upload<'a> {
    platform: &'a Rc<Metered>,
    source: &'a Source,
    stored: Stored,
    done: usize,
    total: usize,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl Upload<'_> {
    fn layer(&mut self, n: usize, spec: &CacheSpec) -> Result<Layer> {
        let Config { width, ffn, heads, head_dim, .. } = self.source.config;
        let (q, turned) = (heads * head_dim, spec.hadamard);
        let name = |part: &str| format!("blk.{n}.{part}");
        let side = |turned_side| if turned { turned_side } else { Turned::No };
        let (qkv, v, latent) = match &self.source.config.elite {
            None => {
                let (qkv, v) = self.projections(n, side(Turned::Rows))?;
                (qkv, v, None)
            }
            Some(elite) => {
                let (down, latent) = self.converted((n, elite), turned, spec.latent)?;
                (down, None, Some(latent))
            }
        };
        let (gate_up, no) = ([name("ffn_gate"), name("ffn_up")], [Turned::No; 2]);
        let gate_up = gate_up.each_ref().map(String::as_str);
        Ok(Layer {
            attn_norm: self.vector(&name("attn_norm"), width)?,
            qkv,
            v,
            latent,
            o: self.matrix(&[&name("attn_output")], &[width], q, &[side(Turned::Columns)])?,
            ffn_norm: self.vector(&name("ffn_norm"), width)?,
            gate_up: Linear { matrix: self.matrix(&gate_up, &[ffn, ffn], width, &no)?, bias: None },
            down: self.matrix(&[&name("ffn_down")], &[width], ffn, &no[..1])?,
        })
    }

    /// q above k, above v where all three have the same elements; and v where it has its own, `turned` or not.
    fn projections(&mut self, n: usize, turned: Turned) -> Result<(Linear, Option<Linear>)> {
        let Config { width, heads, kv_heads, head_dim, .. } = self.source.config;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let names = ["attn_q", "attn_k", "attn_v"].map(|part| format!("blk.{n}.{part}"));
        let (rows, sides) = ([q, kv, kv], [Turned::No, Turned::No, turned]);
        let kept = [0, 1, 2].map(|i| self.kept(&names[i], sides[i]));
        let joined = if kept.iter().all(|dtype| *dtype == kept[0]) { 3 } else { 2 };
        let mut some = |i: std::ops::Range<usize>| {
            self.linear(&names[i.clone()], &rows[i.clone()], width, &sides[i])
        };
        Ok((some(0..joined)?, (joined < 3).then(|| some(joined..3)).transpose()?))
    }

    /// Type of the elements that a matrix has on the device; `None` for a matrix that no kernel knows.
    fn kept(&self, name: &str, turned: Turned) -> Option<i32> {
        let kind = WeightType::from_ggml(self.source.weights.get(name)?.kind.id())?;
        Some(match kind {
            _ if turned != Turned::No => KVW_F16,
            WeightType::BF16 => KVW_BF16,
            kind => blocks(kind).filter(|_| self.stored == Stored::Blocks).unwrap_or(KVW_F16),
        })
    }

    fn vector(&mut self, name: &str, length: usize) -> Result<Buffer> {
        let x = self.source.weights.vector(name, length)?;
        Buffer::of(self.platform, (Use::Weights, "norms"), bytemuck::cast_slice(&x))
    }

    /// Projections one above the other, with their biases where the model has them.
    fn linear(
        &mut self,
        names: &[String],
        rows: &[usize],
        cols: usize,
        turned: &[Turned],
    ) -> Result<Linear> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let matrix = self.matrix(&names, rows, cols, turned)?;
        if !self.source.config.qkv_bias {
            return Ok(Linear { matrix, bias: None });
        }
        let mut bias = Vec::new();
        for ((name, &rows), turned) in names.iter().zip(rows).zip(turned) {
            let mut part = self.source.weights.vector(&format!("{name}.bias"), rows)?;
            if *turned == Turned::Rows {
                hadamard::values(&mut part);
            }
            bias.extend(part);
        }
        let buffer =
            Buffer::of(self.platform, (Use::Weights, "biases"), bytemuck::cast_slice(&bias))?;
        let bias = Matrix { buffer, dtype: KVW_F32, rows: 1, cols: bias.len() };
        Ok(Linear { matrix, bias: Some(bias) })
    }

    /// Matrices of `cols` columns, one above the other; f16 where their elements differ.
    fn matrix(
        &mut self,
        names: &[&str],
        rows: &[usize],
        cols: usize,
        turned: &[Turned],
    ) -> Result<Matrix> {
        let weights = &self.source.weights;
        let parts = names.iter().zip(rows).map(|(name, &rows)| matrix(weights, name, rows, cols));
        let parts = parts.collect::<crate::error::Result<Vec<_>>>()?;
        let kept: Vec<_> = names.iter().zip(turned).map(|(name, t)| self.kept(name, *t)).collect();
        let dtype = kept[0].filter(|_| kept.iter().all(|dtype| *dtype == kept[0]));
        let bytes: Vec<_> =
            names.iter().filter_map(|name| weights.get(name)).map(|t| t.bytes).collect();
        let as_they_are = turned.iter().all(|turned| *turned == Turned::No)
            && parts.iter().all(|part| part.kind() == WeightType::F16);
        let rows = rows.iter().sum();
        let buffer = match dtype {
            Some(KVW_BF16) => self.raw(&bytes)?,
            None | Some(KVW_F16) if !as_they_are => self.halves(&parts, turned)?,
            Some(dtype) if dtype != KVW_F16 && self.platform.holds() => {
                let bytes = bytes.concat();
                let all = linear::Weights::new(parts[0].kind(), rows, cols, &bytes)?;
                self.raw(&[&linear::planes(&all)])?
            }
            // Planes have as many bytes as blocks.
            _ => self.raw(&bytes)?,
        };
        Ok(Matrix { buffer, dtype: dtype.unwrap_or(KVW_F16), rows, cols })
    }

    fn note(&mut self, bytes: usize) {
        self.done += bytes;
        (self.progress)(self.done, self.total);
    }

    /// As it lies in the file.
    fn raw(&mut self, parts: &[&[u8]]) -> Result<Buffer> {
        let bytes = parts.iter().map(|part| part.len()).sum();
        let buffer = Buffer::new(self.platform, (Use::Weights, "weights"), bytes)?;
        let mut at = buffer.at();
        for piece in parts.iter().flat_map(|part| part.chunks(2 * PIECE)) {
            self.platform.write(at, piece)?;
            at += piece.len() as u64;
            self.note(piece.len());
        }
        Ok(buffer)
    }

    /// As f16.
    fn halves(&mut self, parts: &[linear::Weights<'_>], turned: &[Turned]) -> Result<Buffer> {
        let elements: usize = parts.iter().map(|part| part.rows() * part.cols()).sum();
        let buffer = Buffer::new(self.platform, (Use::Weights, "weights"), 2 * elements)?;
        let mut at = buffer.at();
        for (part, &turned) in parts.iter().zip(turned).filter(|_| self.platform.holds()) {
            let blocks = (PIECE / (part.cols() * hadamard::BLOCK)).max(1);
            let step = blocks * hadamard::BLOCK;
            for first in (0..part.rows()).step_by(step) {
                let rows = step.min(part.rows() - first);
                let halves = decoded(part, first, rows, turned)?;
                self.platform.write(at, bytemuck::cast_slice(&halves))?;
                at += 2 * halves.len() as u64;
                self.note(rows * (part.bytes() / part.rows()));
            }
        }
        Ok(buffer)
    }
}

/// The kernels' type of matrices in blocks.
fn blocks(kind: WeightType) -> Option<i32> {
    match kind {
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => None,
        WeightType::Q8_0 => Some(ffi::KVW_Q8_0),
        WeightType::Q4_0 => Some(ffi::KVW_Q4_0),
        WeightType::Q4_1 => Some(ffi::KVW_Q4_1),
        WeightType::Q4K => Some(ffi::KVW_Q4_K),
        WeightType::Q6K => Some(ffi::KVW_Q6_K),
    }
}
