//! The codec: what the bytes of a slab mean. Scalar and exact; the fast paths are tested against it.

use super::{Format, Layout, TOKENS};
use half::f16;

/// Quantise one group of at most `max_code + 1` levels: `(scale, min)` and a code for each element.
///
/// All arithmetic is f32 and rounds to nearest even once a step, so that every side gives the same bits.
/// NaN elements are ignored by the minimum and maximum and get code 0.
pub fn quantise(group: &[f16], max_code: u32, codes: &mut [u8]) -> (f16, f16) {
    let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
    for x in group {
        min = min.min(x.to_f32());
        max = max.max(x.to_f32());
    }
    // Adding 0 turns -0 into 0: whichever zero a minimum returns, the bits are the same.
    let scale = f16::from_f32((max - min) / max_code as f32 + 0.0);
    let s = scale.to_f32();
    for (code, x) in codes.iter_mut().zip(group) {
        let q = if s > 0.0 { ((x.to_f32() - min) / s).round_ties_even() } else { 0.0 };
        *code = q.max(0.0).min(max_code as f32) as u8;
    }
    (scale, f16::from_f32(min + 0.0))
}

/// Write 64 tokens, `k` and `v` each `[64, D]`, as a slab of `out.len() == layout.slab_bytes()` bytes.
pub fn encode(layout: &Layout, k: &[f16], v: &[f16], out: &mut [u8]) {
    out.fill(0);
    match layout.format {
        Format::F16 => encode_f16(layout, k, v, out),
        Format::Q8 | Format::Q4 | Format::Q2 => {
            encode_k(layout, k, out);
            encode_v(layout, v, out);
        }
    }
}

fn encode_f16(layout: &Layout, k: &[f16], v: &[f16], out: &mut [u8]) {
    for token in 0..TOKENS {
        for channel in 0..layout.head_dim {
            let i = token * layout.head_dim + channel;
            put16(out, layout.k_at(token, channel).0, k[i]);
            put16(out, layout.v_codes() + layout.v_at(token, channel).0, v[i]);
        }
    }
}

fn encode_k(layout: &Layout, k: &[f16], out: &mut [u8]) {
    let (d, g) = (layout.head_dim, layout.k_group);
    let (mut group, mut codes) = (vec![f16::ZERO; g], vec![0u8; g]);
    for first in (0..TOKENS).step_by(g) {
        for channel in 0..d {
            group.iter_mut().enumerate().for_each(|(i, x)| *x = k[(first + i) * d + channel]);
            let (scale, min) = quantise(&group, max_code(layout), &mut codes);
            put16(out, layout.k_scale_at(first, channel), scale);
            put16(out, layout.k_scale_at(first, channel) + 2 * d, min);
            for (i, &code) in codes.iter().enumerate() {
                put_code(out, layout.k_at(first + i, channel), code);
            }
        }
    }
}

fn encode_v(layout: &Layout, v: &[f16], out: &mut [u8]) {
    let mut codes = vec![0u8; layout.v_group];
    for (token, row) in v.chunks_exact(layout.head_dim).enumerate() {
        for (g, group) in row.chunks(layout.v_group).enumerate() {
            let first = g * layout.v_group;
            let (scale, min) = quantise(group, max_code(layout), &mut codes);
            put16(out, layout.v_scale_at(token, first), scale);
            put16(out, layout.v_scale_at(token, first) + layout.v_meta_bytes() / 2, min);
            for (i, &code) in codes[..group.len()].iter().enumerate() {
                let (byte, shift) = layout.v_at(token, first + i);
                put_code(out, (layout.v_codes() + byte, shift), code);
            }
        }
    }
}

/// Read a slab back as `k` and `v`, each `[64, D]` f32.
pub fn decode(layout: &Layout, slab: &[u8], k: &mut [f32], v: &mut [f32]) {
    for token in 0..TOKENS {
        for channel in 0..layout.head_dim {
            k[token * layout.head_dim + channel] = k_value(layout, slab, token, channel);
            v[token * layout.head_dim + channel] = v_value(layout, slab, token, channel);
        }
    }
}

/// K of one token and channel.
pub fn k_value(layout: &Layout, slab: &[u8], token: usize, channel: usize) -> f32 {
    let at = layout.k_at(token, channel);
    match layout.format {
        Format::F16 => get16(slab, at.0),
        _ => {
            let scale = layout.k_scale_at(token, channel);
            let min = scale + 2 * layout.head_dim;
            f32::from(get_code(layout, slab, at)) * get16(slab, scale) + get16(slab, min)
        }
    }
}

/// V of one token and channel.
pub fn v_value(layout: &Layout, slab: &[u8], token: usize, channel: usize) -> f32 {
    let (byte, shift) = layout.v_at(token, channel);
    let at = (layout.v_codes() + byte, shift);
    match layout.format {
        Format::F16 => get16(slab, at.0),
        _ => {
            let scale = layout.v_scale_at(token, channel);
            let min = scale + layout.v_meta_bytes() / 2;
            f32::from(get_code(layout, slab, at)) * get16(slab, scale) + get16(slab, min)
        }
    }
}

const fn max_code(layout: &Layout) -> u32 {
    (1 << layout.format.bits()) - 1
}

fn put16(out: &mut [u8], at: usize, x: f16) {
    out[at..at + 2].copy_from_slice(&x.to_le_bytes());
}

fn get16(slab: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([slab[at], slab[at + 1]]).to_f32()
}

/// Codes of 2, 4 and 8 bits never straddle a byte.
fn put_code(out: &mut [u8], (byte, shift): (usize, usize), code: u8) {
    out[byte + shift / 8] |= code << (shift % 8);
}

fn get_code(layout: &Layout, slab: &[u8], (byte, shift): (usize, usize)) -> u8 {
    slab[byte + shift / 8] >> (shift % 8) & max_code(layout) as u8
}
