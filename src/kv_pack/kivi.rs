//! KIVI's own schedule on slabs.

use super::cpu::{get, pack, put};
use crate::slab::{Format, Layout, Meta, TOKENS, quantise};
use half::f16;
use std::ops::Range;

/// Tokens whose K, and tokens whose V, are quantised once `len` tokens are held: K in whole windows, V all
/// but the newest `window`. `window` is KIVI's residual length, at least 1.
pub const fn boundaries(len: usize, window: usize) -> (usize, usize) {
    (len / window * window, len.saturating_sub(window))
}

/// Within slab `index`: quantise K of tokens `done.0 .. goal.0` and V of tokens `done.1 .. goal.1`.
///
/// `ring` is the f16 slab in the ring, `to` the table's slab of `layout`. Codes, scales and minima go to
/// `to`, the rest of which stays; the dequantised f16 values replace those in `ring`. A table slab in f16
/// is copied once all its V is due, any other has f16 scales and minima. `done.0` and `goal.0` are multiples of the group.
pub fn advance(
    index: usize,
    done: (usize, usize),
    goal: (usize, usize),
    ring: &mut [u8],
    to: &mut [u8],
    layout: &Layout,
) {
    let within = |from: usize, until: usize| {
        let clamp = |t: usize| t.saturating_sub(index * TOKENS).min(TOKENS);
        clamp(from)..clamp(until)
    };
    let (k, v) = (within(done.0, goal.0), within(done.1, goal.1));
    if layout.format == Format::F16 {
        if v.end == TOKENS && !v.is_empty() {
            pack(ring, to, layout);
        }
        return;
    }
    let from = Layout { format: Format::F16, meta: Meta::F16, ..*layout };
    for first in k.step_by(layout.k_group) {
        for channel in 0..layout.head_dim {
            let tokens = first..first + layout.k_group;
            let at = |t| (from.k_at(t, channel).0, layout.k_at(t, channel));
            let scale = layout.k_scale_at(first, channel);
            group(ring, to, layout, tokens, at, (scale, scale + layout.k_minima()));
        }
    }
    for token in v {
        for first in (0..layout.head_dim).step_by(layout.v_group) {
            let channels = first..(first + layout.v_group).min(layout.head_dim);
            let at = |c| {
                let (byte, shift) = layout.v_at(token, c);
                (from.v_codes() + from.v_at(token, c).0, (layout.v_codes() + byte, shift))
            };
            let scale = layout.v_scale_at(token, first);
            group(ring, to, layout, channels, at, (scale, scale + layout.v_meta_bytes() / 2));
        }
    }
}

/// Quantise one group: `at` gives an element's byte in the ring and its bits in `to`, `meta` the bytes of
/// scale and minimum.
fn group(
    ring: &mut [u8],
    to: &mut [u8],
    layout: &Layout,
    elements: Range<usize>,
    at: impl Fn(usize) -> (usize, (usize, usize)),
    meta: (usize, usize),
) {
    let values: Vec<f16> = elements.clone().map(|i| get(ring, at(i).0)).collect();
    let mut codes = [0; 256];
    let max_code = (1u32 << layout.format.bits()) - 1;
    let (scale, min) = quantise(&values, max_code, &mut codes);
    put(to, meta.0, scale);
    put(to, meta.1, min);
    for (i, &code) in elements.zip(&codes) {
        let (ring_at, (byte, shift)) = at(i);
        let (byte, shift) = (byte + shift / 8, shift % 8);
        to[byte] = to[byte] & !((max_code as u8) << shift) | code << shift;
        let value = f32::from(code) * scale.to_f32() + min.to_f32();
        put(ring, ring_at, f16::from_f32(value.clamp(-65504.0, 65504.0)));
    }
}
