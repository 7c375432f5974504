//! The meaning: tokens read one by one and encoded anew.

use crate::slab::{Layout, TOKENS, encode};
use half::f16;

/// The slabs that hold the tokens of `slots` of the f16 slabs in `ring`, in order; zeros after the last.
///
/// # Panics
/// If the ring does not hold the slots.
pub fn oracle(ring: &[u8], layout: &Layout, slots: &[u32]) -> Vec<u8> {
    let (d, bytes) = (layout.head_dim, layout.slab_bytes());
    let half = |at: usize| f16::from_le_bytes([ring[at], ring[at + 1]]);
    let mut out = Vec::new();
    for slots in slots.chunks(TOKENS) {
        let mut rows = [vec![f16::ZERO; TOKENS * d], vec![f16::ZERO; TOKENS * d]];
        for (to, &slot) in slots.iter().enumerate() {
            let (slab, token) = (slot as usize / TOKENS * bytes, slot as usize % TOKENS);
            for c in 0..d {
                rows[0][to * d + c] = half(slab + layout.k_at(token, c).0);
                rows[1][to * d + c] = half(slab + layout.v_codes() + layout.v_at(token, c).0);
            }
        }
        let mut slab = vec![0; bytes];
        encode(layout, &rows[0], &rows[1], &mut slab);
        out.extend(slab);
    }
    out
}
