//! Tokens into ring slabs, ring slabs into packed ones, on the host.

use super::quantise::Pack;
use super::rounded::PackRounded;
use crate::lanes;
use crate::simd::Level;
use crate::slab::{Format, Layout, Meta, Rounding, TOKENS, encode};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Most channels a head.
const MAX_D: usize = 256;

/// Rows of f32 with a distance between them: one head of many tokens.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The first row starts at its first element.
    pub data: &'a [f32],
    /// Elements between rows, at least D.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    fn row(&self, i: usize, d: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..d]
    }
}

/// Write one token of one head, `k` and `v` `[D]`, at `slot` of a ring of f16 slabs. Values are rounded to
/// f16, those beyond its range to +-65504.
pub fn append(ring: &mut [u8], layout_f16: &Layout, slot: usize, k: &[f32], v: &[f32]) {
    let slab = ring_slab(ring, layout_f16, slot / TOKENS);
    let d = layout_f16.head_dim;
    let (mut k16, mut v16) = ([f16::ZERO; MAX_D], [f16::ZERO; MAX_D]);
    round(k, &mut k16[..d]);
    round(v, &mut v16[..d]);
    let token = slot % TOKENS;
    for (channel, pair) in k16[..d].as_chunks::<2>().0.iter().enumerate() {
        put(slab, layout_f16.k_at(token, 2 * channel).0, pair[0]);
        put(slab, layout_f16.k_at(token, 2 * channel).0 + 2, pair[1]);
    }
    for (channel, &x) in v16[..d].iter().enumerate() {
        put(slab, layout_f16.v_codes() + layout_f16.v_at(token, channel).0, x);
    }
}

/// Write `n` tokens of one head at `first_slot` and after.
pub fn fill(
    ring: &mut [u8],
    layout_f16: &Layout,
    first_slot: usize,
    k: Rows<'_>,
    v: Rows<'_>,
    n: usize,
) {
    let d = layout_f16.head_dim;
    for i in 0..n {
        append(ring, layout_f16, first_slot + i, k.row(i, d), v.row(i, d));
    }
}

/// Pack one f16 slab into `to`, a slab of `layout`: a copy for f16, otherwise what [`encode`] gives.
///
/// [`encode`]: crate::slab::encode
pub fn pack(from_f16: &[u8], to: &mut [u8], layout: &Layout) {
    pack_at(Level::detect(), from_f16, to, layout, &Rounding::default());
}

/// [`pack`] with codes chosen as [`encode_rounded`] chooses them.
///
/// [`encode_rounded`]: crate::slab::encode_rounded
pub fn pack_rounded(from_f16: &[u8], to: &mut [u8], layout: &Layout, rounding: &Rounding) {
    pack_at(Level::detect(), from_f16, to, layout, rounding);
}

/// [`pack_rounded`] with the instructions of `level`, or of the best one below it that this CPU has.
pub fn pack_at(level: Level, from_f16: &[u8], to: &mut [u8], layout: &Layout, rounding: &Rounding) {
    let plain = rounding.range == 1.0 && rounding.feedback.is_none();
    match (layout.format, layout.meta) {
        (Format::F16, _) => to.copy_from_slice(&from_f16[..to.len()]),
        (Format::Fp8, _) => pack_elements(from_f16, to, layout),
        (_, Meta::F16) if plain => lanes::dispatch(level, Pack { from: from_f16, to, layout }),
        _ => lanes::dispatch(level, PackRounded { from: from_f16, to, layout, rounding }),
    }
}

/// [`pack`] of fp8, by the codec itself.
fn pack_elements(from_f16: &[u8], to: &mut [u8], layout: &Layout) {
    let (d, from) = (layout.head_dim, Layout { format: Format::F16, ..*layout });
    let (mut k, mut v) = (vec![f16::ZERO; TOKENS * d], vec![f16::ZERO; TOKENS * d]);
    for (i, (k, v)) in k.iter_mut().zip(&mut v).enumerate() {
        *k = get(from_f16, from.k_at(i / d, i % d).0);
        *v = get(from_f16, from.v_codes() + from.v_at(i / d, i % d).0);
    }
    encode(layout, &k, &v, to);
}

/// One decode step of one head, as `KVW_PACK_APPEND` does it: write token `len - 1`, and where that makes a
/// slab leave the window, pack it into `leaving`.
///
/// `leaving` is the slab's layout and bytes exactly when `packed_slabs(len) > packed_slabs(len - 1)`; `None`
/// there means a hole. In a ring of `ring_slabs(window)` the new token may take the place of the leaving
/// slab's first one, so the slab is packed before the token is written, unless it holds that token itself.
pub fn step(
    ring: &mut [u8],
    layout_f16: &Layout,
    window: usize,
    len: usize,
    (k, v): (&[f32], &[f32]),
    leaving: Option<(&Layout, &mut [u8])>,
) {
    if window == 0 {
        append(ring, layout_f16, len - 1, k, v);
    }
    if let Some((layout, to)) = leaving {
        let slab = (len - window) / TOKENS - 1;
        pack(ring_slab(ring, layout_f16, slab), to, layout);
    }
    if window > 0 {
        append(ring, layout_f16, len - 1, k, v);
    }
}

/// The ring's bytes of slab `index`.
fn ring_slab<'a>(ring: &'a mut [u8], layout_f16: &Layout, index: usize) -> &'a mut [u8] {
    let bytes = layout_f16.slab_bytes();
    let slot = index % (ring.len() / bytes);
    &mut ring[slot * bytes..][..bytes]
}

fn round(from: &[f32], to: &mut [f16]) {
    let max = f16::MAX.to_f32();
    let mut clamped = [0.0; MAX_D];
    for (to, x) in clamped.iter_mut().zip(from) {
        *to = x.clamp(-max, max);
    }
    to.convert_from_f32_slice(&clamped[..to.len()]);
}

pub(super) fn put(slab: &mut [u8], at: usize, x: f16) {
    slab[at..at + 2].copy_from_slice(&x.to_le_bytes());
}

pub(super) fn get(slab: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([slab[at], slab[at + 1]])
}
