//! KVCrush: which heads would keep a token, and who stands for those that are not kept.

use crate::sample::draw;
use crate::token_select::top_k;

/// The bits that distances are measured from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// Each bit that more than half of the tokens have.
    Mean,
    /// Bits drawn from a seed.
    Random(u64),
    /// Of every odd head: 0101...
    Alternate,
    /// None.
    Zeros,
    /// All.
    Ones,
}

impl Anchor {
    /// Its bits for tokens of these bits, of `heads` heads.
    pub(super) fn of(self, bits: &[u32], heads: usize) -> u32 {
        let majority =
            |h: usize| bits.iter().filter(|&&b| b >> h & 1 == 1).count() * 2 > bits.len();
        let anchor = match self {
            Anchor::Mean => (0..heads.min(32)).fold(0, |a, h| a | u32::from(majority(h)) << h),
            Anchor::Random(seed) => (draw(seed, 0) >> 32) as u32,
            Anchor::Alternate => 0xAAAA_AAAA,
            Anchor::Zeros => 0,
            Anchor::Ones => u32::MAX,
        };
        anchor & of_heads(heads)
    }
}

/// A bit for each of `heads` heads, 32 at most.
const fn of_heads(heads: usize) -> u32 {
    if heads >= 32 { u32::MAX } else { (1 << heads) - 1 }
}

/// `out[i]` gets bit `h` where the score of token `i` is among the `keep` best of head `h`, ties to the lower index.
///
/// `scores` `[heads, out.len()]`; heads past 32 have no bit.
pub fn bits(scores: &[f32], heads: usize, keep: usize, out: &mut [u32]) {
    out.fill(0);
    for (h, row) in scores.chunks_exact(out.len().max(1)).take(heads.min(32)).enumerate() {
        top_k(row, keep).into_iter().for_each(|i| out[i as usize] |= 1 << h);
    }
}

/// Ascending indices of `count` of the `candidates` (ascending indices into `bits`): in order of (Hamming distance to
/// the anchor, index) they are evenly spaced from the first to the last. All of them where there are no more.
///
/// A single one is the first. Deterministic: [`Anchor::Random`] depends on its seed alone.
pub fn representatives(
    bits: &[u32],
    heads: usize,
    candidates: &[u32],
    anchor: Anchor,
    count: usize,
) -> Vec<u32> {
    if count >= candidates.len() {
        return candidates.to_vec();
    }
    let (anchor, mask) = (anchor.of(bits, heads), of_heads(heads));
    let distance = |c: u32| {
        let bits = bits.get(c as usize).copied().unwrap_or(0);
        ((bits ^ anchor) & mask).count_ones() as usize
    };
    // A counting sort without the sort: `next[d]` is the place of the next candidate at distance d.
    let mut next = [0; 34];
    candidates.iter().for_each(|&c| next[distance(c) + 1] += 1);
    (1..next.len()).for_each(|d| next[d] += next[d - 1]);
    let mut place = |c: u32| {
        let next = &mut next[distance(c)];
        *next += 1;
        *next - 1
    };
    let chosen = |&&c: &&u32| is_spaced(place(c), candidates.len(), count);
    candidates.iter().filter(chosen).copied().collect()
}

/// Whether `place` is one of `count` evenly spaced ones of `all`: `floor(j (all - 1) / (count - 1))` for a `j`.
fn is_spaced(place: usize, all: usize, count: usize) -> bool {
    if count < 2 {
        return count == 1 && place == 0;
    }
    let (steps, gaps) = (all - 1, count - 1);
    (place * gaps).div_ceil(steps) * steps / gaps == place
}
