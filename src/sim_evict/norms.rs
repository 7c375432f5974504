//! Lengths of keys on the CPU.

use super::{OP, check_len, unsupported};
use crate::error::Result;
use crate::lanes::{self, Kernel, Lanes};
use crate::paged_attn::check_head;
use crate::paged_attn::slabs::Slab;
use crate::pages::HeadView;
use crate::prefill_attn::tile::Tile;
use crate::simd::Level;
use crate::slab::TOKENS;
use std::ops::Range;

/// `out[i]` = the length of the key in slot `slots.start + i`; NaN in a hole.
///
/// # Errors
/// [`crate::Error::Unsupported`] where the head does not hold the slots, [`crate::Error::Len`] for another size of `out`.
pub fn key_norms(head: &HeadView<'_>, slots: Range<usize>, out: &mut [f32]) -> Result<()> {
    key_norms_at(Level::detect(), head, slots, out)
}

/// [`key_norms`] with the instructions of `level`, or of the best one below it that this CPU has.
pub fn key_norms_at(
    level: Level,
    head: &HeadView<'_>,
    slots: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    check_len(slots.len(), out.len())?;
    check_head(OP, head)?;
    if slots.end > head.len {
        return unsupported("slots", slots.end, "up to the tokens held");
    }
    if !slots.is_empty() {
        lanes::dispatch(level, Norms { head, slots, out });
    }
    Ok(())
}

struct Norms<'a> {
    head: &'a HeadView<'a>,
    slots: Range<usize>,
    out: &'a mut [f32],
}

impl Kernel for Norms<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let mut tile = Tile::default();
        for i in self.slots.start / TOKENS..self.slots.end.div_ceil(TOKENS) {
            let mut norms = [f32::NAN; TOKENS];
            if let Some(slab) = Slab::of(self.head, i) {
                tile.decode_keys(l, slab, self.head);
                for (t, norms) in norms.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    let mut sum = l.splat(0.0);
                    for rows in tile.keys.as_chunks::<4>().0 {
                        let x = l.get(&rows[t].0);
                        sum = l.fma(x, x, sum);
                    }
                    l.put(norms, sum);
                    *norms = norms.map(f32::sqrt);
                }
            }
            let from = self.slots.start.max(i * TOKENS);
            let until = self.slots.end.min((i + 1) * TOKENS);
            let to = &mut self.out[from - self.slots.start..until - self.slots.start];
            to.copy_from_slice(&norms[from - i * TOKENS..until - i * TOKENS]);
        }
    }
}
