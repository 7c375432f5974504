//! What a token goes through in a layer before and after attention, the same for prompts and steps.

use std::rc::Rc;

use kvwarp::ffi::{self, KVW_F16, kvw_cache, kvw_kv_pack_params};

use super::metered::Metered;
use super::ops::{FEW_ROWS, Ops, at, params};
use super::platform::{Buffer, Result};
use super::tally::Use;
use super::weights::{Layer, Weights};
use crate::config::{Config, Pairing};

/// Activations, allocated once; `rows` is the most rows of a piece of a prompt or of a step.
pub struct Work {
    /// Residual stream of a step, `[rows, width]` f32.
    pub x: Buffer,
    /// Normalised residual stream, `[rows, width]` f16.
    h: Buffer,
    /// Queries and keys, `[rows, heads + kv_heads, D]` f16.
    qk: Buffer,
    /// Queries of more than one row, `[rows, heads, D]` f16.
    q: Buffer,
    /// `[rows, kv_heads, D]` f16
    pub v: Buffer,
    /// What attention gives, `[rows, heads, D]` f16.
    pub mix: Buffer,
    /// `[rows, 2 ffn]` f16
    gate_up: Buffer,
    /// `[rows, ffn]` f16
    act: Buffer,
    /// `[FEW_ROWS, vocab]` f32 of the rows asked for last.
    pub logits: Buffer,
    _unpacked: Buffer,
    _zeros: Buffer,
}

/// The weights and constants of a model, and what its layers work with.
pub struct Network {
    pub config: Config,
    pub weights: Weights,
    pub ops: Ops,
    pub work: Work,
    /// `[D / 2]` f32
    inv_freq: Buffer,
    /// Queries and keys are turned by Hadamard matrices.
    turned: bool,
}

impl Network {
    /// With room for pieces of `rows` rows, at most `step` of them in a step.
    pub fn new(
        platform: &Rc<Metered>,
        config: &Config,
        weights: Weights,
        turned: bool,
        [rows, step]: [usize; 2],
    ) -> Result<Self> {
        let Config { width, ffn, heads, kv_heads, head_dim, vocab, .. } = *config;
        let halves = |elements: usize| {
            Buffer::new(platform, (Use::Activations, "activations"), 2 * rows * elements)
        };
        let unpacked = Buffer::new(
            platform,
            (Use::Scratch, "an unpacked matrix"),
            weights.unpacked_bytes().max(1),
        )?;
        let zeros = Buffer::zeroed(platform, (Use::Activations, "activations"), 4 * rows)?;
        let inv_freq = config.rope.frequencies(head_dim);
        let ops = Ops { platform: Rc::clone(platform), unpacked: unpacked.at(), zeros: zeros.at() };
        let logits = FEW_ROWS.min(step) * vocab * 4;
        let work = Work {
            x: Buffer::new(platform, (Use::Activations, "activations"), step * width * 4)?,
            h: halves(width)?,
            qk: halves((heads + kv_heads) * head_dim)?,
            q: halves(heads * head_dim)?,
            v: halves(kv_heads * head_dim)?,
            mix: halves(heads * head_dim)?,
            gate_up: halves(2 * ffn)?,
            act: halves(ffn)?,
            logits: Buffer::new(platform, (Use::Activations, "logits"), logits)?,
            _unpacked: unpacked,
            _zeros: zeros,
        };
        let inv_freq =
            Buffer::of(platform, (Use::Weights, "rope"), bytemuck::cast_slice(&inv_freq))?;
        Ok(Self { config: config.clone(), weights, ops, work, inv_freq, turned })
    }

    /// Queries, keys and values of `tokens` rows of the residual stream `x`, queries and keys rotated by `positions`.
    pub fn project(&self, layer: &Layer, x: u64, positions: u64, tokens: usize) -> Result<()> {
        let Config { width, rms_eps, heads, kv_heads, .. } = self.config;
        let Work { h, qk, v, q, .. } = &self.work;
        self.ops.rms_norm(x, layer.attn_norm.at(), h.at(), [tokens, width], rms_eps)?;
        self.ops.project(&layer.qk, h.at(), qk.at(), tokens)?;
        self.ops.project(&layer.v, h.at(), v.at(), tokens)?;
        if tokens == 1 {
            // One row is dense with its keys: both in one launch.
            return self.rope(qk.at(), qk.at(), positions, heads + kv_heads, 1);
        }
        self.rope(qk.at(), q.at(), positions, heads, tokens)?;
        self.rope(self.keys(), self.keys(), positions, kv_heads, tokens)
    }

    /// Rotates `heads` heads of rows of queries and keys.
    fn rope(&self, x: u64, out: u64, positions: u64, heads: usize, tokens: usize) -> Result<()> {
        let row = self.row_stride();
        let dense = out == self.work.q.at();
        let params = params!(kvw_rope_select_params {
            pairing: self.pairing(),
            x: at(x),
            out: at(out),
            positions: at(positions),
            inv_freq: at(self.inv_freq.at()),
            x_stride: row,
            out_stride: if dense { (heads * self.config.head_dim) as i64 } else { row },
            tokens: tokens as i32,
            heads: heads as i32,
            head_dim: self.config.head_dim as i32,
            hadamard: i32::from(self.turned),
        });
        self.ops.run(|k| &k.rope_select, &params)
    }

    /// Queries of `tokens` rows, dense.
    pub fn queries(&self, tokens: usize) -> u64 {
        if tokens == 1 { self.work.qk.at() } else { self.work.q.at() }
    }

    fn keys(&self) -> u64 {
        self.work.qk.at() + (2 * self.config.heads * self.config.head_dim) as u64
    }

    /// Elements from a row of queries and keys to the next.
    fn row_stride(&self) -> i64 {
        ((self.config.heads + self.config.kv_heads) * self.config.head_dim) as i64
    }

    fn pairing(&self) -> i32 {
        match self.config.rope.pairing {
            Pairing::Interleaved => ffi::KVW_ROPE_INTERLEAVED,
            Pairing::HalfSplit => ffi::KVW_ROPE_HALF,
        }
    }

    /// What writing the keys and values of `tokens` rows needs, but for the op's own numbers.
    pub fn packing(&self, op: i32, cache: kvw_cache, tokens: usize) -> kvw_kv_pack_params {
        params!(kvw_kv_pack_params {
            op: op,
            cache: cache,
            k: at(self.keys()),
            v: at(self.work.v.at()),
            k_stride: self.row_stride(),
            v_stride: (self.config.kv_heads * self.config.head_dim) as i64,
            tokens: tokens as i32,
            pairing: self.pairing(),
            dtype: KVW_F16,
        })
    }

    /// Adds what attention gave and the feed-forward block to `tokens` rows of the residual stream `x`.
    pub fn finish(&self, layer: &Layer, x: u64, tokens: usize) -> Result<()> {
        let Config { width, ffn, rms_eps, .. } = self.config;
        let Work { h, mix, gate_up, act, .. } = &self.work;
        self.ops.add(&layer.o, mix.at(), x, tokens)?;
        self.ops.rms_norm(x, layer.ffn_norm.at(), h.at(), [tokens, width], rms_eps)?;
        self.ops.project(&layer.gate_up, h.at(), gate_up.at(), tokens)?;
        let params = params!(kvw_swiglu_params {
            tokens: tokens as i32,
            gate: at(gate_up.at()),
            up: at(gate_up.at() + 2 * ffn as u64),
            out: at(act.at()),
            in_stride: 2 * ffn as i64,
            width: ffn as i32,
        });
        self.ops.run(|k| &k.swiglu, &params)?;
        self.ops.add(&layer.down, act.at(), x, tokens)
    }

    /// Logits of at most [`FEW_ROWS`] rows of the residual stream `x`.
    pub fn logits(&self, x: u64, tokens: usize) -> Result<()> {
        let Config { width, rms_eps, .. } = self.config;
        let Work { h, logits, .. } = &self.work;
        let norm = self.weights.output_norm.at();
        self.ops.rms_norm(x, norm, h.at(), [tokens, width], rms_eps)?;
        self.ops.logits(&self.weights.output, h.at(), logits.at(), tokens)
    }
}
