//! RoPElite (EliteKV, arXiv:2503.01586): in which order pairs of a kv head are worth their rotation.
//!
//! A pair that does not rotate changes the score of query `t` and key `s` by `D_j[t, s] = q_j^T (R_(s-t) - I) k_j / sqrt(D)`,
//! and what is lost with the pairs `E` rotating is the sum of `D_j` over the others: `S - S_E = sum_(j not in E) D_j`, exactly.
//! So the pair that joins `E` is the one without which `sum |S - S_E - D_j|`, over all `s <= t` of all texts and over the
//! query heads that share the keys, is least; the lower one where two are equal. Sets are nested, and whatever the pairs
//! before it, a candidate costs 4 products a score, in tiles of 64: no matrix `[T, T]` is kept.

pub mod oracle;

use kvwarp::rope_select::{Angles, Pairing};
use kvwarp::simd::Level;
use kvwarp::threads::Team;

use crate::watch::{Interrupted, Watch};

/// Keys of a tile.
const TILE: usize = 64;
/// Sums beside each other.
const LANES: usize = TILE / 4;
/// Queries after which sums in f32 are added to those in f64.
const FLUSH: usize = 64;
/// Products of a candidate's part of a score: two of the turned pair, two of the pair as it is.
const TERMS: usize = 4;

/// Shape of a layer's attention, and how it rotates.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// Heads of keys.
    pub kv_heads: usize,
    /// Query heads that share one.
    pub group: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Radians a position of each pair, `[head_dim / 2]`.
    pub inv_freq: &'a [f32],
    /// Which elements a pair is.
    pub pairing: Pairing,
}

/// A text as a layer sees it, before RoPE.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// `[tokens, kv_heads, group, head_dim]`
    pub q: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`
    pub k: &'a [f32],
}

/// The first `rounds` pairs of each kv head, those that matter most first; `watch` is given the tokens of a round.
///
/// # Errors
/// [`Interrupted`].
pub fn search(
    heads: Heads<'_>,
    texts: &[Text<'_>],
    rounds: usize,
    team: &Team,
    watch: &mut Watch<'_>,
) -> Result<Vec<Vec<u8>>, Interrupted> {
    let losses = Losses::new(heads, texts, team);
    let mut chosen = vec![Vec::new(); heads.kv_heads];
    for _ in 0..rounds.min(losses.pairs) {
        let all = losses.after(&chosen, team);
        for (chosen, losses) in chosen.iter_mut().zip(all.chunks_exact(losses.pairs)) {
            let best = losses.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
            chosen.extend(best.map(|(j, _)| j as u8));
        }
        watch.step(losses.tokens)?;
    }
    Ok(chosen)
}

/// What is lost of the scores of some texts.
pub struct Losses {
    /// `[texts, kv_heads]`
    terms: Vec<Terms>,
    kv_heads: usize,
    pairs: usize,
    tokens: usize,
}

impl Losses {
    /// Of the layer that sees `texts` so.
    pub fn new(heads: Heads<'_>, texts: &[Text<'_>], team: &Team) -> Self {
        let kv_heads = heads.kv_heads;
        let mut terms: Vec<Option<Terms>> = (0..texts.len() * kv_heads).map(|_| None).collect();
        team.each_chunk(&mut terms, 1, |i, to| {
            to[0] = Some(Terms::new(heads, texts[i / kv_heads], i % kv_heads));
        });
        let terms: Vec<Terms> = terms.into_iter().flatten().collect();
        let tokens = terms.iter().step_by(kv_heads).map(|terms| terms.tokens).sum();
        Self { terms, kv_heads, pairs: heads.head_dim / 2, tokens }
    }

    /// `sum |S - S_E - D_j|` of each kv head and pair `j`, `[kv_heads, pairs]`, where `E` are the pairs `chosen` of each head;
    /// infinite for those.
    pub fn after(&self, chosen: &[Vec<u8>], team: &Team) -> Vec<f64> {
        let Self { terms, kv_heads, pairs, .. } = self;
        let others = |head: usize| others(&chosen[head], *pairs);
        let mut sums = vec![0.0; terms.len() * pairs];
        team.each_chunk(&mut sums, *pairs, |i, sums| {
            add_distances(Level::detect(), &terms[i], &others(i % kv_heads), sums);
        });
        let mut all = vec![f64::INFINITY; kv_heads * pairs];
        for head in 0..*kv_heads {
            for j in others(head) {
                let of_texts = sums[head * pairs + j..].iter().step_by(kv_heads * pairs);
                all[head * pairs + j] = of_texts.sum();
            }
        }
        all
    }
}

/// Pairs that are not among `chosen`, ascending.
fn others(chosen: &[u8], pairs: usize) -> Vec<usize> {
    (0..pairs).filter(|&j| !chosen.contains(&(j as u8))).collect()
}

/// Factors of every `D_j` of the queries that share the keys of one head.
struct Terms {
    tokens: usize,
    /// `[tiles, pairs, TERMS, TILE]`: the tile that is in use stays in the first cache.
    k: Vec<f32>,
    /// `[group, tokens, pairs, TERMS]`
    q: Vec<f32>,
}

impl Terms {
    fn new(heads: Heads<'_>, text: Text<'_>, head: usize) -> Self {
        let Heads { kv_heads, group, head_dim: d, inv_freq, pairing } = heads;
        let (pairs, tokens) = (d / 2, text.k.len() / (kv_heads * d));
        let positions: Vec<i32> = (0..tokens as i32).collect();
        let angles = Angles::new(&positions, inv_freq);
        // The four numbers of each pair of a vector: turned, then as they are.
        let four = |token: usize, x: &[f32]| -> Vec<[f32; TERMS]> {
            let mut turned = x.to_vec();
            // A whole head, and a position that there is.
            let _ = angles.rotate(token, &mut turned, pairing);
            let channels = (0..pairs).map(|j| pairing.channels(j, d));
            channels.map(|(a, b)| [turned[a], turned[b], x[a], x[b]]).collect()
        };
        let tile = pairs * TERMS * TILE;
        let mut k = vec![0.0; tokens.div_ceil(TILE) * tile];
        let mut q = vec![[0.0; TERMS]; group * tokens * pairs];
        let scale = 1.0 / (d as f32).sqrt();
        for token in 0..tokens {
            let key = &text.k[(token * kv_heads + head) * d..][..d];
            for (i, x) in four(token, key).as_flattened().iter().enumerate() {
                k[token / TILE * tile + i * TILE + token % TILE] = *x;
            }
            for g in 0..group {
                let query = &text.q[((token * kv_heads + head) * group + g) * d..][..d];
                let to = &mut q[(g * tokens + token) * pairs..][..pairs];
                for (to, [a, b, c, d]) in to.iter_mut().zip(four(token, query)) {
                    *to = [a * scale, b * scale, -c * scale, -d * scale];
                }
            }
        }
        Self { tokens, k, q: q.into_flattened() }
    }
}

kvwarp::leveled! {
    /// Adds to `sums[j]` what would be lost of all scores if `j` of the pairs `others` rotated too.
    fn add_distances(terms: &Terms, others: &[usize], sums: &mut [f64]) = distances;
}

#[inline(always)]
fn distances(terms: &Terms, others: &[usize], sums: &mut [f64]) {
    let Terms { tokens, k, q } = terms;
    let width = TERMS * sums.len();
    let mut parts = vec![[0.0f32; TILE]; others.len()];
    let mut lanes = vec![[0.0f32; LANES]; others.len()];
    for (first, k) in (0..*tokens).step_by(TILE).zip(k.chunks_exact(width * TILE)) {
        for (row, q) in q.chunks_exact(width).enumerate().filter(|(row, _)| row % tokens >= first) {
            let seen = TILE.min(row % tokens + 1 - first);
            let mut all = [0.0f32; TILE];
            for (part, &j) in parts.iter_mut().zip(others) {
                add_pair(&k[j * TERMS * TILE..], &q[j * TERMS..], part);
                part[seen..].fill(0.0);
                (0..TILE).for_each(|i| all[i] += part[i]);
            }
            for (part, lanes) in parts.iter().zip(&mut lanes) {
                let left = |i: usize| (all[i] - part[i]).abs();
                for (i, lane) in lanes.iter_mut().enumerate() {
                    *lane +=
                        (left(i) + left(i + LANES)) + (left(i + 2 * LANES) + left(i + 3 * LANES));
                }
            }
            if row % FLUSH == FLUSH - 1 {
                flush(others, &mut lanes, sums);
            }
        }
        flush(others, &mut lanes, sums);
    }
}

/// What a pair adds to the scores of a query and the keys `[TERMS, TILE]` of a tile.
#[inline(always)]
fn add_pair(k: &[f32], q: &[f32], part: &mut [f32; TILE]) {
    let (k, q) = (&k[..TERMS * TILE], &q[..TERMS]);
    for (i, part) in part.iter_mut().enumerate() {
        let (turned, plain) = (q[0] * k[i] + q[1] * k[TILE + i], &k[2 * TILE..]);
        *part = turned + (q[2] * plain[i] + q[3] * plain[TILE + i]);
    }
}

fn flush(others: &[usize], lanes: &mut [[f32; LANES]], sums: &mut [f64]) {
    for (&j, lanes) in others.iter().zip(lanes) {
        sums[j] += lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
        lanes.fill(0.0);
    }
}
