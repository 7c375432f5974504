//! From scores to tokens.

use kvwarp::{sim_evict, token_select};

use super::{Refine, Share};

/// What a layer has read, and which of it each head still holds. Tokens are counted from the first of the read.
pub struct Scored {
    /// Tokens read.
    pub n: usize,
    /// `[heads, n]`, higher is kept; those of protected tokens are not looked at.
    pub scores: Vec<f32>,
    /// Oldest and newest tokens that stay.
    pub protects: (usize, usize),
    /// Of each head, ascending; the first of them lies in its slot of `first`.
    pub held: Vec<Vec<u32>>,
    /// By head.
    pub first: Vec<usize>,
}

impl Scored {
    /// Kv heads.
    pub fn heads(&self) -> usize {
        self.first.len()
    }

    /// Tokens that are chosen among.
    pub fn open(&self) -> usize {
        self.n - (self.protects.0 + self.protects.1).min(self.n)
    }

    /// Of those, the fewest that a head holds.
    pub fn holds(&self) -> usize {
        let fewest = self.held.iter().map(Vec::len).min().unwrap_or(0);
        fewest.saturating_sub(self.n - self.open())
    }

    /// Scores of head `h` of the tokens that are chosen among.
    pub fn of(&self, h: usize) -> &[f32] {
        &self.scores[h * self.n..(h + 1) * self.n][self.protects.0.min(self.n)..][..self.open()]
    }

    /// The best `k` of head `h` beside those protected, ascending.
    pub fn best(&self, h: usize, k: usize) -> Vec<u32> {
        self.protected(token_select::top_k(self.of(h), k))
    }

    /// The same, some of them representatives of what is dropped.
    pub fn refined(&self, h: usize, k: usize, refine: &Refine) -> Vec<u32> {
        let (heads, open) = (self.heads(), self.open());
        let spread = refine.share.of(k.min(open));
        let mut chosen = token_select::top_k(self.of(h), k - spread);
        let held = self.held[h].iter().filter_map(|&i| i.checked_sub(self.protects.0 as u32));
        let others = held.filter(|i| (*i as usize) < open && chosen.binary_search(i).is_err());
        let others: Vec<u32> = others.collect();
        let all: Vec<f32> = (0..heads).flat_map(|h| self.of(h)).copied().collect();
        let mut bits = vec![0; open];
        sim_evict::bits(&all, heads, k - spread, &mut bits);
        chosen.extend(sim_evict::representatives(&bits, heads, &others, refine.anchor, spread));
        chosen.sort_unstable();
        self.protected(chosen)
    }

    /// Adds the protected tokens to chosen ones, which are counted from the first that is not.
    pub fn protected(&self, chosen: Vec<u32>) -> Vec<u32> {
        let ((sink, _), open, n) = (self.protects, self.open(), self.n as u32);
        let sink = sink.min(self.n) as u32;
        let chosen = chosen.into_iter().map(|i| i + sink);
        (0..sink).chain(chosen).chain(sink + open as u32..n).collect()
    }

    /// Slots of `kept`, ascending tokens that head `h` holds, which it then holds alone.
    pub fn narrow(&mut self, h: usize, kept: Vec<u32>) -> Vec<u32> {
        let held = std::mem::replace(&mut self.held[h], kept);
        let mut slots = held.iter().zip(self.first[h] as u32..);
        let slot = |token: &u32| slots.find(|(held, _)| *held == token).map(|(_, slot)| slot);
        self.held[h].iter().filter_map(slot).collect()
    }
}

/// Most tokens of `n` that a head keeps of `share` of `read`, the protected ones among them.
pub fn kept(share: Share, read: usize, n: usize) -> usize {
    share.of(read).min(n)
}
