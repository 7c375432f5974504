//! The CPU path: sines once a token, then two fused multiplies a channel.

use super::{Pairing, Selection, check};
use crate::error::{Error, Result};

const OP: &str = "rope_select";

/// Sines and cosines of some positions, computed once and used for every layer, for queries and keys.
#[derive(Debug, Clone, Default)]
pub struct Angles {
    pairs: usize,
    /// `[T, pairs]`
    cos: Vec<f32>,
    /// `[T, pairs]`
    sin: Vec<f32>,
}

impl Angles {
    /// Angles of `positions` `[T]` at `inv_freq` `[D / 2]`.
    pub fn new(positions: &[i32], inv_freq: &[f32]) -> Self {
        let angles = positions.iter().flat_map(|&p| inv_freq.iter().map(move |f| p as f32 * f));
        let (sin, cos) = angles.map(f32::sin_cos).unzip();
        Self { pairs: inv_freq.len(), cos, sin }
    }

    /// Cosines and sines of token `token`.
    pub(super) fn of(&self, token: usize) -> Result<(&[f32], &[f32])> {
        let at = token * self.pairs..(token + 1) * self.pairs;
        let both = self.cos.get(at.clone()).zip(self.sin.get(at));
        let got = self.cos.len() / self.pairs.max(1);
        both.ok_or(Error::Len { op: OP, buffer: "positions", need: token + 1, got })
    }

    /// Turn the heads of token `token`, `row` `[heads, D]`, in place.
    ///
    /// # Errors
    /// [`Error::Len`] when `row` is not whole heads or there is no such token.
    pub fn rotate(&self, token: usize, row: &mut [f32], pairing: Pairing) -> Result<()> {
        let (cos, sin) = self.of_heads(token, row)?;
        for head in row.chunks_exact_mut(2 * self.pairs) {
            match pairing {
                Pairing::Interleaved => interleaved(head, cos, sin),
                Pairing::Half => half(head, cos, sin),
            }
        }
        Ok(())
    }

    /// Turn only the pairs of `selection` in the heads of token `token`, `row` `[heads, D]`, in place; `heads` is a multiple
    /// of the kv heads, those of one kv head stand together.
    ///
    /// # Errors
    /// As [`Angles::rotate`]; [`Error::Len`] when the heads cannot be shared among the kv heads.
    pub fn rotate_selected(
        &self,
        token: usize,
        row: &mut [f32],
        pairing: Pairing,
        selection: Selection<'_>,
    ) -> Result<()> {
        let (cos, sin) = self.of_heads(token, row)?;
        let (d, heads) = (2 * self.pairs, row.len() / (2 * self.pairs));
        let kv_heads = selection.pairs.len() / selection.each.max(1);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let need = heads * selection.each.max(1);
            return Err(Error::Len { op: OP, buffer: "pairs", need, got: selection.pairs.len() });
        }
        for (h, head) in row.chunks_exact_mut(d).enumerate() {
            let first = h / (heads / kv_heads) * selection.each;
            for &pair in &selection.pairs[first..first + selection.each] {
                let i = usize::from(pair);
                let (a, b) = pairing.channels(i, d);
                let (x, y) = (head[a], head[b]);
                (head[a], head[b]) = (x * cos[i] - y * sin[i], x * sin[i] + y * cos[i]);
            }
        }
        Ok(())
    }

    /// Cosines and sines of `token`, where `row` is whole heads.
    fn of_heads(&self, token: usize, row: &[f32]) -> Result<(&[f32], &[f32])> {
        let d = 2 * self.pairs;
        if d == 0 || !row.len().is_multiple_of(d) {
            let need = row.len().next_multiple_of(d.max(1));
            return Err(Error::Len { op: OP, buffer: "row", need, got: row.len() });
        }
        self.of(token)
    }
}

fn interleaved(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (pairs, _) = head.as_chunks_mut::<2>();
    for (([a, b], cos), sin) in pairs.iter_mut().zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    }
}

pub(super) fn half(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    }
}

/// Turn `x` `[T, heads, d]` in place: token `t` stands at `positions[t]`.
///
/// # Errors
/// [`Error::Len`] when `x` or `inv_freq` `[d / 2]` has another size.
pub fn cpu(
    x: &mut [f32],
    heads: usize,
    d: usize,
    positions: &[i32],
    inv_freq: &[f32],
    pairing: Pairing,
) -> Result<()> {
    check(x.len(), heads, d, positions.len(), inv_freq.len())?;
    if x.is_empty() {
        return Ok(());
    }
    let angles = Angles::new(positions, inv_freq);
    let mut rows = x.chunks_exact_mut(heads * d).enumerate();
    rows.try_for_each(|(token, row)| angles.rotate(token, row, pairing))
}
