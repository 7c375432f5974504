//! Rows of a converted layer on their way to attention: expanded into keys and values, or attended to as they are.

use std::rc::Rc;

use kvwarp::device::Pieces;
use kvwarp::ffi::{
    KVW_LOWRANK_APPEND, KVW_LOWRANK_ATTEND, KVW_LOWRANK_PACK, KVW_LOWRANK_READ, KVW_ROPE_HALF,
    kvw_latent,
};

use super::Network;
use crate::config::Config;
use crate::gpu::metered::Metered;
use crate::gpu::ops::{at, params};
use crate::gpu::platform::{Buffer, Result};
use crate::gpu::tally::Use;
use crate::gpu::weights::{Latent, Layer};

/// What the layers of a converted model work with.
pub struct Spare {
    /// Rows `[z, elite keys]`, each of its layer's length, f16.
    rows: Buffer,
    /// Keys and values of rows, `[rows, 2, kv_heads, D]` f16.
    kv: Buffer,
    /// Latent queries of a step, then what attention gives them, `[rows, heads, c]` f16; of a byte where nothing is absorbed.
    latent: [Buffer; 2],
    /// `[D / 2]` f32 zeros: frequencies of what does not turn.
    still: Buffer,
}

impl Spare {
    /// For pieces of `rows` rows, at most `step` of them in a step; `None` where no layer is converted.
    pub fn new(
        platform: &Rc<Metered>,
        config: &Config,
        layers: &[Layer],
        [rows, step]: [usize; 2],
    ) -> Result<Option<Self>> {
        let latents = || layers.iter().filter_map(|layer| layer.latent.as_ref());
        let Some(row) = latents().map(|latent| latent.row()[0]).max() else { return Ok(None) };
        let Config { heads, kv_heads, head_dim, .. } = *config;
        let absorbed = latents().filter(|latent| latent.absorbed.is_some());
        let rank = absorbed.map(|latent| latent.rank).max().unwrap_or(0);
        let activations = (Use::Activations, "latents");
        let halves = |elements: usize| Buffer::new(platform, activations, (2 * elements).max(1));
        Ok(Some(Self {
            // What a part is filled up with is multiplied by zeros.
            rows: Buffer::zeroed(platform, activations, 2 * rows * row)?,
            kv: halves(rows * 2 * kv_heads * head_dim)?,
            latent: [halves(step * heads * rank)?, halves(step * heads * rank)?],
            still: Buffer::zeroed(platform, (Use::Weights, "rope"), 2 * head_dim)?,
        }))
    }
}

impl Network {
    /// Rotates elite pairs by `positions`, each row's by its own: queries become dense, elite keys part of their rows.
    pub(super) fn rotate_elite(
        &self,
        (layer, latent, spare): (&Layer, &Latent, &Spare),
        positions: u64,
        tokens: usize,
    ) -> Result<()> {
        let Config { heads, kv_heads, head_dim, .. } = self.config;
        let ([row, elite], pairs) = (latent.row(), latent.pairs.bytes() / kv_heads);
        let elite_pairs = params!(kvw_rope_select_params {
            pairing: KVW_ROPE_HALF,
            x: at(self.work.qkv.at()),
            out: at(self.queries()),
            rest: at(spare.rows.at() + 2 * elite as u64),
            pairs: at(latent.pairs.at()),
            positions: at(positions),
            inv_freq: at(self.inv_freq.at()),
            x_stride: self.row_stride(layer),
            out_stride: (heads * head_dim) as i64,
            rest_stride: row as i64,
            tokens: tokens as i32,
            heads: (heads + kv_heads) as i32,
            rest_heads: kv_heads as i32,
            head_dim: head_dim as i32,
            elite: pairs as i32,
            lists: kv_heads as i32,
        });
        self.ops.run(|k| &k.rope_select, &elite_pairs)?;
        if !self.turned {
            return Ok(());
        }
        let hadamard = params!(kvw_rope_select_params {
            pairing: KVW_ROPE_HALF,
            x: at(self.queries()),
            out: at(self.queries()),
            positions: at(positions),
            inv_freq: at(spare.still.at()),
            x_stride: (heads * head_dim) as i64,
            out_stride: (heads * head_dim) as i64,
            tokens: tokens as i32,
            heads: heads as i32,
            head_dim: head_dim as i32,
            hadamard: 1,
        });
        self.ops.run(|k| &k.rope_select, &hadamard)
    }

    /// Makes keys and values of the rows of a layer; of nothing where it has keys and values of its own.
    pub fn expand(&self, layer: &Layer, tokens: usize) -> Result<()> {
        let Some((latent, spare)) = self.converted(layer) else { return Ok(()) };
        self.ops.platform.copy(&Pieces {
            to: spare.rows.at(),
            from: self.z(latent),
            to_pitch: 2 * latent.row()[0],
            from_pitch: 2 * layer.qkv.matrix.rows,
            width: 2 * latent.rank,
            rows: tokens,
        })?;
        self.ops.project(&latent.up, spare.rows.at(), spare.kv.at(), tokens)
    }

    /// Writes rows of `tokens` tokens into a cache, at most `most` of a sequence; `firsts` as the op has it.
    pub fn put(
        &self,
        layer: &Layer,
        cache: kvw_latent,
        firsts: u64,
        [tokens, most]: [usize; 2],
    ) -> Result<()> {
        let Some((latent, spare)) = self.converted(layer) else { return Ok(()) };
        let z = (self.z(latent), self.row_stride(layer));
        self.move_rows((latent, spare), KVW_LOWRANK_APPEND, cache, firsts, z, [tokens, most])
    }

    /// Makes keys and values of `tokens` tokens that a cache of one sequence holds, the newest by its length.
    pub fn unfold(
        &self,
        layer: &Layer,
        cache: kvw_latent,
        firsts: u64,
        tokens: usize,
    ) -> Result<()> {
        let Some((latent, spare)) = self.converted(layer) else { return Ok(()) };
        let z = (spare.rows.at(), latent.row()[0] as i64);
        self.move_rows((latent, spare), KVW_LOWRANK_READ, cache, firsts, z, [tokens; 2])?;
        self.ops.project(&latent.up, spare.rows.at(), spare.kv.at(), tokens)
    }

    /// Packs slabs of a layer of `cache`, `[moves, 2]` entries at an address.
    pub fn pack(
        &self,
        cache: kvw_latent,
        (at_moves, moves): (u64, usize),
        range: f32,
    ) -> Result<()> {
        let params = params!(kvw_lowrank_kv_params {
            op: KVW_LOWRANK_PACK,
            cache: cache,
            moves: at(at_moves),
            tokens: moves as i32,
            range: range,
        });
        self.ops.run(|k| &k.lowrank_kv, &params)
    }

    /// Into a cache or out of it: z at an address with a stride, elite keys as part of their rows.
    fn move_rows(
        &self,
        (latent, spare): (&Latent, &Spare),
        op: i32,
        cache: kvw_latent,
        firsts: u64,
        (z, z_stride): (u64, i64),
        [tokens, most]: [usize; 2],
    ) -> Result<()> {
        let [row, elite] = latent.row();
        let params = params!(kvw_lowrank_kv_params {
            op: op,
            cache: cache,
            z: at(z),
            k: at(spare.rows.at() + 2 * elite as u64),
            cu_tokens: at(firsts),
            z_stride: z_stride,
            k_stride: row as i64,
            tokens: tokens as i32,
            max_tokens: most as i32,
        });
        self.ops.run(|k| &k.lowrank_kv, &params)
    }

    /// Attention of the newest `each` tokens of each sequence of `cache` to latents as they are, with at most `slabs` slabs;
    /// `scratch` is as large as [`Network::latent_attention`] needs.
    pub fn attend_to_latents(
        &self,
        layer: &Layer,
        cache: kvw_latent,
        [each, slabs]: [usize; 2],
        scratch: &Buffer,
    ) -> Result<()> {
        let Some((latent, spare)) = self.converted(layer) else { return Ok(()) };
        let Some(absorbed) = &latent.absorbed else { return Ok(()) };
        let Config { heads, kv_heads, head_dim, .. } = self.config;
        let (tokens, [q, sums]) =
            (cache.seqs as usize * each, spare.latent.each_ref().map(Buffer::at));
        let others = head_dim - absorbed.skip;
        let product = params!(kvw_head_linear_params {
            tokens: tokens as i32,
            weight: at(absorbed.b_k.at()),
            x: at(self.queries() + 2 * absorbed.skip as u64),
            y: at(q),
            x_stride: (heads * head_dim) as i64,
            x_head_stride: head_dim as i32,
            kv_heads: kv_heads as i32,
            q_heads: heads as i32,
            rows: latent.rank as i32,
            cols: others as i32,
        });
        self.ops.run(|k| &k.head_linear, &product)?;
        let params = kvwarp::ffi::kvw_lowrank_kv_params {
            q: at(q),
            q_elite: at(self.queries()),
            out: at(sums),
            workspace: at(scratch.at()),
            workspace_bytes: scratch.bytes(),
            ..self.latent_attention(cache, [each, slabs])
        };
        self.ops.run(|k| &k.lowrank_kv, &params)?;
        let heads_of = params!(kvw_head_linear_params {
            tokens: tokens as i32,
            weight: at(absorbed.b_v.at()),
            x: at(sums),
            y: at(self.work.mix.at()),
            bias: at(absorbed.bias.as_ref().map_or(0, Buffer::at)),
            x_stride: (heads * latent.rank) as i64,
            x_head_stride: latent.rank as i32,
            kv_heads: kv_heads as i32,
            q_heads: heads as i32,
            rows: head_dim as i32,
            cols: latent.rank as i32,
        });
        self.ops.run(|k| &k.head_linear, &heads_of)
    }

    /// Numbers of attention to latents; its pointers are null.
    pub fn latent_attention(
        &self,
        cache: kvw_latent,
        [each, slabs]: [usize; 2],
    ) -> kvwarp::ffi::kvw_lowrank_kv_params {
        let Config { heads, head_dim, .. } = self.config;
        params!(kvw_lowrank_kv_params {
            op: KVW_LOWRANK_ATTEND,
            cache: cache,
            q_elite_stride: (heads * head_dim) as i64,
            head_stride: head_dim as i32,
            q_heads: heads as i32,
            max_slabs: slabs as i32,
            scale: 1.0 / (head_dim as f32).sqrt(),
            q_len: each as i32,
        })
    }

    pub(super) fn converted<'a>(&'a self, layer: &'a Layer) -> Option<(&'a Latent, &'a Spare)> {
        layer.latent.as_ref().zip(self.work.spare.as_ref())
    }

    /// Keys of rows, dense, with values behind them; and elements from a row to the next.
    pub(super) fn expanded(&self, spare: &Spare) -> (u64, i64) {
        (spare.kv.at(), (2 * self.config.kv_heads * self.config.head_dim) as i64)
    }

    /// z of the first row, where the layer's first product has left it.
    fn z(&self, latent: &Latent) -> u64 {
        let Config { heads, head_dim, .. } = self.config;
        self.work.qkv.at() + 2 * (heads * head_dim + 2 * latent.pairs.bytes()) as u64
    }
}
