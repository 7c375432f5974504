//! Keys and values of a layer: from projections of their own, or from a latent vector (EliteKV, arXiv:2503.01586). The one
//! place that knows which pairs of a head rotate, and where their channels lie.

use std::sync::OnceLock;

use half::f16;
use kvwarp::linear::Cpu;
use kvwarp::rope_select::{Angles, Elite, Pairing, Selection};
use kvwarp::threads::Team;

use super::absorb::Absorbed;
use super::layers::Linear;
use super::rows::{each_row, project};
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
    pub(super) b_k: Option<Linear<'a>>,
    pub(super) b_v: Linear<'a>,
    /// Channels of k of the rows of `elite` and of `b_k`.
    pub(super) channels: [Vec<usize>; 2],
    /// Elite pairs, `[kv_heads, each]`.
    pairs: Vec<u8>,
    each: usize,
    /// Made when latents are first attended to as they are.
    absorbed: OnceLock<Absorbed>,
}

/// Rows on their way to keys and values.
#[derive(Default)]
pub struct Spare {
    /// `[rows, kv_heads, 2 each]`
    pub elite: Vec<f32>,
    /// `[rows, c]`
    pub z: Vec<f32>,
    rest: Vec<f32>,
}

impl Spare {
    /// Rounds what a cache of latents holds as it does.
    pub fn round(&mut self) {
        let half = |x: &mut f32| *x = f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32();
        self.z.iter_mut().chain(&mut self.elite).for_each(half);
    }
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
            absorbed: OnceLock::new(),
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
        match self {
            Self::Full { k, v } => {
                let qkv = [q, k, v];
                let all = || project(cpu, qkv, h, rows, [to_q, to_k, to_v]);
                clock.time(|| product(qkv, rows), all)
            }
            Self::Latent(latent) => {
                latent.down((cpu, rows), (q, h), to_q, spare, clock)?;
                latent.up((cpu, rows), [to_k, to_v], spare, clock)
            }
        }
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

    /// Of a converted layer.
    pub fn latent(&self) -> Option<&Latent<'a>> {
        match self {
            Self::Full { .. } => None,
            Self::Latent(latent) => Some(latent),
        }
    }
}

impl Latent<'_> {
    /// Queries, elite pairs of keys and latent vectors of `rows` rows of the input `h`, none of them rotated yet.
    pub fn down(
        &self,
        (cpu, rows): (&Cpu<'_>, usize),
        (q, h): (&Linear<'_>, &[f32]),
        to_q: &mut Vec<f32>,
        spare: &mut Spare,
        clock: &mut Clock,
    ) -> kvwarp::Result<()> {
        let (Self { elite, a, .. }, Spare { elite: to_elite, z, .. }) = (self, spare);
        for (linear, to) in [(elite, &mut *to_elite), (a, &mut *z)] {
            to.resize(rows * linear.weights.rows(), 0.0);
        }
        let first = [q, elite, a];
        clock.time(|| product(first, rows), || project(cpu, first, h, rows, [to_q, to_elite, z]))
    }

    /// Keys and values of the elite pairs and latent vectors in `spare`.
    pub fn up(
        &self,
        (cpu, rows): (&Cpu<'_>, usize),
        [to_k, to_v]: [&mut Vec<f32>; 2],
        spare: &mut Spare,
        clock: &mut Clock,
    ) -> kvwarp::Result<()> {
        let Self { b_k, b_v, channels, .. } = self;
        let Spare { elite, z, rest } = spare;
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
            for (from, channels) in [&*elite, &*rest].into_iter().zip(channels) {
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

    /// Turns elite pairs of keys, a row of `keys` a token of `angles` from `first` on.
    pub fn rotate(
        &self,
        team: &Team,
        (angles, first): (&Angles, usize),
        keys: &mut [f32],
        rows: usize,
    ) -> kvwarp::Result<()> {
        let (pairs, d): (&[i8], _) = (bytemuck::cast_slice(&self.pairs), 2 * self.each);
        let elite = Elite::new(pairs, self.each, self.head_dim() / 2)?;
        each_row(team, keys, rows, |i, row| elite.rotate(angles, first + i, row, d))
    }

    /// Its matrices as latents are attended to with them.
    pub fn absorbed(&self) -> kvwarp::Result<&Absorbed> {
        if let Some(absorbed) = self.absorbed.get() {
            return Ok(absorbed);
        }
        let absorbed = Absorbed::new(self)?;
        Ok(self.absorbed.get_or_init(|| absorbed))
    }

    /// Elite pairs of a head.
    pub fn pairs(&self) -> usize {
        self.each
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.pairs.len() / self.each
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.b_v.weights.rows() / self.kv_heads()
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
