//! Heads that turn a few listed pairs alone (EliteKV, arXiv:2503.01586).

use super::cpu::{Angles, half};
use crate::error::{Error, Result};

const OP: &str = "rope_select";

/// The pairs that heads turn, a list for as many neighbouring heads each. They come first in a head's row, `[r first
/// halves | r second halves | the others]`: element `i` turns with element `r + i`, by the frequency of the pair that
/// the list names in place `i`.
#[derive(Debug, Clone, Copy)]
pub struct Elite<'a> {
    /// `[lists, r]`
    pairs: &'a [i8],
    r: usize,
}

impl<'a> Elite<'a> {
    /// Lists of `r` pairs each, `pairs` `[lists, r]`, of `freqs` frequencies.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a pair without a frequency, [`Error::Len`] where `pairs` is not whole lists.
    pub fn new(pairs: &'a [i8], r: usize, freqs: usize) -> Result<Self> {
        if r == 0 || pairs.is_empty() || !pairs.len().is_multiple_of(r) {
            let need = pairs.len().next_multiple_of(r.max(1)).max(1);
            return Err(Error::Len { op: OP, buffer: "pairs", need, got: pairs.len() });
        }
        match pairs.iter().find(|&&pair| usize::try_from(pair).map_or(true, |pair| pair >= freqs)) {
            Some(pair) => Err(Error::Unsupported {
                op: OP,
                field: "pairs",
                got: pair.to_string(),
                supported: "pairs of the head, from 0 to D / 2 - 1",
            }),
            None => Ok(Self { pairs, r }),
        }
    }

    /// Lists.
    pub const fn lists(&self) -> usize {
        self.pairs.len() / self.r
    }

    /// Rows of `d` elements of `row`, and the list of each.
    fn heads<'x, T>(
        &self,
        row: &'x mut [T],
        d: usize,
    ) -> Result<impl Iterator<Item = (&'x mut [T], &'a [i8])>> {
        let (lists, r, pairs) = (self.lists(), self.r, self.pairs);
        if d < 2 * r || !row.len().is_multiple_of(d * lists) {
            let need = row.len().next_multiple_of(d.max(2 * r) * lists);
            return Err(Error::Len { op: OP, buffer: "row", need, got: row.len() });
        }
        let group = row.len() / (d * lists);
        let heads = row.chunks_exact_mut(d).enumerate();
        Ok(heads.map(move |(h, head)| (head, &pairs[h / group.max(1) * r..][..r])))
    }

    /// The meaning, in f64: the heads of `row` `[heads, d]` turned in place at `position`.
    ///
    /// # Errors
    /// [`Error::Len`] where `row` is not as many heads of `d >= 2 r` elements for each list.
    pub fn oracle(&self, row: &mut [f64], d: usize, position: i32, inv_freq: &[f32]) -> Result<()> {
        for (head, list) in self.heads(row, d)? {
            for (i, &pair) in list.iter().enumerate() {
                let angle = position as f32 * inv_freq[pair as usize];
                let (sin, cos) = f64::from(angle).sin_cos();
                let (a, b) = (head[i], head[self.r + i]);
                (head[i], head[self.r + i]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
        Ok(())
    }

    /// Turn the heads of token `token` of `angles`, `row` `[heads, d]`, in place.
    ///
    /// # Errors
    /// [`Error::Len`] where `row` is not as many heads of `d >= 2 r` elements for each list, or there is no such token.
    pub fn rotate(&self, angles: &Angles, token: usize, row: &mut [f32], d: usize) -> Result<()> {
        let (cos, sin) = angles.of(token)?;
        let (mut of_list, mut at) = (&[] as &[i8], [vec![0.0; self.r], vec![0.0; self.r]]);
        for (head, list) in self.heads(row, d)? {
            if of_list.as_ptr() != list.as_ptr() {
                of_list = list;
                for (i, &pair) in list.iter().enumerate() {
                    (at[0][i], at[1][i]) = (cos[pair as usize], sin[pair as usize]);
                }
            }
            half(&mut head[..2 * self.r], &at[0], &at[1]);
        }
        Ok(())
    }
}
