//! What a token goes through in a layer before and after attention, the same for prompts and steps.

mod latent;

use std::rc::Rc;

use kvwarp::ffi::{KVW_F16, kvw_cache, kvw_kv_pack_params};

use super::metered::Metered;
use super::ops::{FEW_ROWS, Ops, at, params};
use super::platform::{Buffer, Result};
use super::tally::Use;
use super::weights::{Layer, Weights};
use crate::config::Config;
use latent::Spare;

/// Activations, allocated once; `rows` is the most rows of a piece of a prompt or of a step.
pub struct Work {
    /// Residual stream of a step, `[rows, width]` f32.
    pub x: Buffer,
    /// Normalised residual stream, `[rows, width]` f16.
    h: Buffer,
    /// Queries, keys and, where one matrix gives them all, values, `[rows, heads + 1 or 2 kv_heads, D]` f16; of a converted
    /// layer queries, elite keys and latents.
    qkv: Buffer,
    /// Queries once they are rotated, `[rows, heads, D]` f16.
    q: Buffer,
    /// Values of a matrix of their own, `[rows, kv_heads, D]` f16.
    v: Buffer,
    /// What attention gives, `[rows, heads, D]` f16.
    pub mix: Buffer,
    /// `[rows, 2 ffn]` f16
    gate_up: Buffer,
    /// `[rows, ffn]` f16
    act: Buffer,
    /// `[FEW_ROWS, vocab]` f32 of the rows asked for last.
    pub logits: Buffer,
    spare: Option<Spare>,
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
            qkv: halves(weights.layers.iter().map(|l| l.qkv.matrix.rows).max().unwrap_or(0))?,
            q: halves(heads * head_dim)?,
            v: halves(kv_heads * head_dim)?,
            mix: halves(heads * head_dim)?,
            gate_up: halves(2 * ffn)?,
            act: halves(ffn)?,
            logits: Buffer::new(platform, (Use::Activations, "logits"), logits)?,
            spare: Spare::new(platform, config, &weights.layers, [rows, step])?,
            _unpacked: unpacked,
            _zeros: zeros,
        };
        let inv_freq =
            Buffer::of(platform, (Use::Weights, "rope"), bytemuck::cast_slice(&inv_freq))?;
        Ok(Self { config: config.clone(), weights, ops, work, inv_freq, turned })
    }

    /// Queries, keys and values of `tokens` rows of the residual stream `x`, none of them rotated.
    pub fn project(&self, layer: &Layer, x: u64, tokens: usize) -> Result<()> {
        let Config { width, rms_eps, .. } = self.config;
        let Work { h, qkv, v, .. } = &self.work;
        self.ops.rms_norm(x, layer.attn_norm.at(), h.at(), [tokens, width], rms_eps)?;
        self.ops.project(&layer.qkv, h.at(), qkv.at(), tokens)?;
        layer.v.iter().try_for_each(|own| self.ops.project(own, h.at(), v.at(), tokens))
    }

    /// Rotates queries and keys by `positions`, each row's by its own.
    pub fn rotate(&self, layer: &Layer, positions: u64, tokens: usize) -> Result<()> {
        if let Some((latent, spare)) = self.converted(layer) {
            return self.rotate_elite((layer, latent, spare), positions, tokens);
        }
        let Config { heads, kv_heads, head_dim, .. } = self.config;
        let (row, keys) = (self.row_stride(layer), self.keys());
        let params = params!(kvw_rope_select_params {
            pairing: self.pairing(),
            x: at(self.work.qkv.at()),
            out: at(self.queries()),
            rest: at(keys),
            positions: at(positions),
            inv_freq: at(self.inv_freq.at()),
            x_stride: row,
            out_stride: (heads * head_dim) as i64,
            rest_stride: row,
            tokens: tokens as i32,
            heads: (heads + kv_heads) as i32,
            rest_heads: kv_heads as i32,
            head_dim: head_dim as i32,
            hadamard: i32::from(self.turned),
        });
        self.ops.run(|k| &k.rope_select, &params)
    }

    /// Rotated queries, dense.
    pub fn queries(&self) -> u64 {
        self.work.q.at()
    }

    fn keys(&self) -> u64 {
        self.work.qkv.at() + (2 * self.config.heads * self.config.head_dim) as u64
    }

    /// Elements from a row of queries and keys to the next.
    fn row_stride(&self, layer: &Layer) -> i64 {
        layer.qkv.matrix.rows as i64
    }

    fn pairing(&self) -> i32 {
        crate::model::pairing(&self.config) as i32
    }

    /// What writing the keys and values of `tokens` rows needs, but for the op's own numbers.
    pub fn packing(
        &self,
        layer: &Layer,
        op: i32,
        cache: kvw_cache,
        tokens: usize,
    ) -> kvw_kv_pack_params {
        let kv = self.config.kv_heads * self.config.head_dim;
        let (k, row) = match self.converted(layer) {
            Some((_, spare)) => self.expanded(spare),
            None => (self.keys(), self.row_stride(layer)),
        };
        let (v, v_stride) = match layer.v {
            Some(_) => (self.work.v.at(), kv as i64),
            None => (k + 2 * kv as u64, row),
        };
        params!(kvw_kv_pack_params {
            op: op,
            cache: cache,
            k: at(k),
            v: at(v),
            k_stride: row,
            v_stride: v_stride,
            tokens: tokens as i32,
            pairing: self.pairing(),
            dtype: KVW_F16,
        })
    }

    /// Has an append rotate queries and keys by `positions`, which [`Network::rotate`] would do in a launch of its own.
    pub fn rotating(&self, layer: &Layer, params: &mut kvw_kv_pack_params, positions: u64) {
        (params.positions, params.inv_freq) = (at(positions), at(self.inv_freq.at()));
        (params.q, params.q_out) = (at(self.work.qkv.at()), at(self.queries()));
        (params.q_stride, params.q_heads) = (self.row_stride(layer), self.config.heads as i32);
        params.hadamard = i32::from(self.turned);
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
