//! How many pairs keep their rotation and how long latent vectors are.

use crate::config::Config;

/// Of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Elite pairs of a kv head, `r`.
    pub pairs: usize,
    /// Elements of a latent vector, `c`.
    pub rank: usize,
}

impl Budget {
    /// Elements of the cache of a token in a layer: `2 r` of each kv head and the latent vector that they share.
    pub fn elements(self, config: &Config) -> usize {
        2 * self.pairs * config.kv_heads + self.rank
    }

    /// The longest latent vector that is of use with so many pairs: all that it has to hold, or its input.
    pub fn most(pairs: usize, config: &Config) -> usize {
        let Config { kv_heads, head_dim, width, .. } = *config;
        (kv_heads * (2 * head_dim - 2 * pairs)).min(width)
    }

    /// Why no model of this shape can have it, or have it shared out among layers.
    pub fn refusal(self, config: &Config, by_layer: bool) -> Option<String> {
        let (half, Self { pairs, rank }) = (config.head_dim / 2, self);
        if !(1..=half).contains(&pairs) {
            return Some(format!("{pairs} pairs; a head of this model has 1 to {half}"));
        }
        let most = Self::most(pairs, config);
        if by_layer && !rank.is_multiple_of(STEP) {
            return Some(format!("rank {rank}; layers share out multiples of {STEP}"));
        }
        (!(1..=most).contains(&rank))
            .then(|| format!("rank {rank}; with {pairs} pairs this model has use for 1 to {most}"))
    }
}

/// What ranks of layers that differ are multiples of, and the least of them: what a cache of latents takes.
const STEP: usize = 16;

/// Ranks of layers, together as if each had `rank`: always the layer gets more, up to `most`, of which that takes the most
/// error. `shares[n]` is what each element of its latent vector takes of the error of layer `n`, most first.
pub fn ranks(shares: &[Vec<f64>], rank: usize, most: usize) -> Vec<usize> {
    let mut ranks = vec![STEP; shares.len()];
    let gain = |n: usize, rank: usize| shares[n][rank..][..STEP].iter().sum::<f64>();
    for _ in 0..shares.len() * (rank / STEP - 1) {
        let open = (0..shares.len()).filter(|&n| ranks[n] + STEP <= most);
        // The first of equals.
        let best = open.rev().max_by(|&a, &b| gain(a, ranks[a]).total_cmp(&gain(b, ranks[b])));
        best.into_iter().for_each(|n| ranks[n] += STEP);
    }
    ranks
}

/// What ranks are multiples of: 128 where keys have 1,024 elements and more, 16 in smaller models.
pub fn step(config: &Config) -> usize {
    if config.kv_heads * config.head_dim < 1024 { 16 } else { 128 }
}

/// What pairs are multiples of, where so many fit: as a cache of latents takes them, `r kv_heads` a multiple of 4.
fn pair_step(config: &Config) -> usize {
    [1, 2, 4].into_iter().find(|n| (n * config.kv_heads).is_multiple_of(4)).unwrap_or(4)
}

/// Every rank that is a multiple of [`step`], with as many pairs as fit beside it into `ratio` of the cache of the source,
/// as a cache of latents takes them where so many fit; of those with as many pairs only the longest.
pub fn grid(config: &Config, ratio: f64) -> Vec<Budget> {
    let Config { kv_heads, head_dim, .. } = *config;
    let (all, step, whole) = (2 * kv_heads * head_dim, step(config), pair_step(config));
    let elements = (ratio * all as f64 + 1e-9) as usize;
    let mut grid: Vec<Budget> = Vec::new();
    for rank in (step..=elements).step_by(step) {
        let most = ((elements - rank) / (2 * kv_heads)).min(head_dim / 2);
        let pairs = if most < whole { most } else { most / whole * whole };
        let budget = Budget { pairs, rank };
        if budget.refusal(config, false).is_none() {
            grid.retain(|other| other.pairs != pairs);
            grid.push(budget);
        }
    }
    grid
}
