//! Keys and values of a layer: from projections of their own, or from a latent vector (EliteKV, arXiv:2503.01586). The one
//! place that knows which pairs of a head rotate.

use kvwarp::linear::Cpu;
use kvwarp::rope_select::{Angles, Pairing, Selection};

use super::layers::Linear;
use super::rows::project;
use crate::config::{self, Config};
use crate::error::Result;
use crate::profile::{Clock, Launch};
use crate::weights::Weights;

/// How a layer makes keys and values of its input.
pub enum KeysValues<'a> {
    /// `k = W_k h`, `v = W_v h`; every pair rotates.
    Full { k: Linear<'a>, v: Linear<'a> },
    /// `z = A h`; some pairs of `k` are `W_e h` and rotate, the rest is `B_k z` and does not, `v = B_v z`.
    Latent(Box<Latent<'a>>),
}

/// Projections of a converted layer.
pub struct Latent<'a> {
    elite: Linear<'a>,
    a: Linear<'a>,
    /// None where every pair is elite.
    b_k: Option<Linear<'a>>,
    b_v: Linear<'a>,
    /// Channels of k of the rows of `elite` and of `b_k`.
    channels: [Vec<usize>; 2],
    /// Elite pairs, `[kv_heads, each]`.
    pairs: Vec<u8>,
    each: usize,
}

/// Rows on their way to keys and values.
#[derive(Default)]
pub struct Spare {
    elite: Vec<f32>,
    z: Vec<f32>,
    rest: Vec<f32>,
}

impl<'a> KeysValues<'a> {
    /// Those of block `n`.
    pub fn new(weights: &'a Weights, config: &Config, n: usize) -> Result<Self> {
        let Config { width, kv_heads, head_dim, qkv_bias, .. } = *config;
        let kv = kv_heads * head_dim;
        let linear =
            |part, rows, cols, biased| Linear::new(weights, (n, part), [rows, cols], biased);
        let Some(elite) = &config.elite else {
            let full = |part| linear(part, kv, width, qkv_bias);
            return Ok(Self::Full { k: full("attn_k")?, v: full("attn_v")? });
        };
        let (rank, each) = (elite.ranks[n], elite.pairs);
        let rotated = 2 * each * kv_heads;
        let b_k = || linear("attn_k_b", kv - rotated, rank, qkv_bias);
        Ok(Self::Latent(Box::new(Latent {
            elite: linear("attn_k", rotated, width, qkv_bias)?,
            a: linear("attn_kv_a", rank, width, false)?,
            b_k: (kv > rotated).then(b_k).transpose()?,
            b_v: linear("attn_v_b", kv, rank, qkv_bias)?,
            channels: elite.channels(n, head_dim, pairing(config)),
            pairs: elite.elite_pairs[n].concat(),
            each,
        })))
    }

    /// Bytes of the matrices.
    pub fn bytes(&self) -> usize {
        let of = |linear: &Linear<'_>| linear.weights.bytes();
        match self {
            Self::Full { k, v } => of(k) + of(v),
            Self::Latent(latent) => {
                let Latent { elite, a, b_k, b_v, .. } = &**latent;
                [elite, a, b_v].map(of).iter().sum::<usize>() + b_k.as_ref().map_or(0, of)
            }
        }
    }

    /// Queries, keys and values of `rows` rows of the input `h`, none of them rotated yet.
    pub fn project(
        &self,
        (cpu, rows): (&Cpu<'_>, usize),
        (q, h): (&Linear<'_>, &[f32]),
        [to_q, to_k, to_v]: [&mut Vec<f32>; 3],
        spare: &mut Spare,
        clock: &mut Clock,
    ) -> kvwarp::Result<()> {
        let latent = match self {
            Self::Full { k, v } => {
                let qkv = [q, k, v];
                let all = || project(cpu, qkv, h, rows, [to_q, to_k, to_v]);
                return clock.time(|| product(qkv, rows), all);
            }
            Self::Latent(latent) => &**latent,
        };
        let Latent { elite, a, b_k, b_v, channels, .. } = latent;
        let Spare { elite: to_elite, z, rest } = spare;
        for (linear, to) in [(elite, &mut *to_elite), (a, &mut *z)] {
            to.resize(rows * linear.weights.rows(), 0.0);
        }
        let first = [q, elite, a];
        let down = || project(cpu, first, h, rows, [to_q, &mut *to_elite, &mut *z]);
        clock.time(|| product(first, rows), down)?;
        match b_k {
            None => clock.time(|| product([b_v], rows), || project(cpu, [b_v], z, rows, [to_v]))?,
            Some(b_k) => {
                rest.resize(rows * b_k.weights.rows(), 0.0);
                let up = [b_k, b_v];
                let expand = || project(cpu, up, z, rows, [&mut *rest, to_v]);
                clock.time(|| product(up, rows), expand)?;
            }
        }
        let place = || {
            for (from, channels) in [&*to_elite, &*rest].into_iter().zip(channels) {
                let len = channels.len().max(1);
                let wide = to_k.len() / rows;
                for (from, k) in from.chunks_exact(len).zip(to_k.chunks_exact_mut(wide)) {
                    from.iter().zip(channels).for_each(|(x, &channel)| k[channel] = *x);
                }
            }
        };
        clock.time(|| Launch::of("copy"), place);
        Ok(())
    }

    /// Turns the heads of token `token`, `row` `[heads, head_dim]` of queries or keys: those pairs that rotate.
    pub fn rotate(
        &self,
        angles: &Angles,
        token: usize,
        row: &mut [f32],
        pairing: Pairing,
    ) -> kvwarp::Result<()> {
        match self {
            Self::Full { .. } => angles.rotate(token, row, pairing),
            Self::Latent(latent) => {
                let selection = Selection { pairs: &latent.pairs, each: latent.each };
                angles.rotate_selected(token, row, pairing, selection)
            }
        }
    }
}

/// Which channels of a head rotate together, as the kernels name it.
pub fn pairing(config: &Config) -> Pairing {
    match config.rope.pairing {
        config::Pairing::Interleaved => Pairing::Interleaved,
        config::Pairing::HalfSplit => Pairing::Half,
    }
}

/// Projections of `rows` rows of the same input.
pub fn product<const N: usize>(linears: [&Linear<'_>; N], rows: usize) -> Launch {
    super::product(linears.map(|linear| &linear.weights), rows)
}
