//! The codec: what the bytes of a slab mean. Scalar and exact; the fast paths are tested against it.

use super::fp8::{fp8, fp8_value};
use super::steps::{self, Steps, extremes};
use super::{Format, Layout, Meta, TOKENS};
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
    fill_codes(group, s, min, max_code, codes);
    (scale, f16::from_f32(min + 0.0))
}

fn fill_codes(group: &[f16], scale: f32, min: f32, max_code: u32, codes: &mut [u8]) {
    for (code, x) in codes.iter_mut().zip(group) {
        let q = if scale > 0.0 { ((x.to_f32() - min) / scale).round_ties_even() } else { 0.0 };
        *code = q.max(0.0).min(max_code as f32) as u8;
    }
}

/// Write 64 tokens, `k` and `v` each `[64, D]`, as a slab of `out.len() == layout.slab_bytes()` bytes.
pub fn encode(layout: &Layout, k: &[f16], v: &[f16], out: &mut [u8]) {
    out.fill(0);
    match layout.format {
        Format::F16 | Format::Fp8 => encode_elements(layout, k, v, out),
        Format::Q8 | Format::Q4 | Format::Q2 => {
            encode_k(layout, k, out);
            encode_v(layout, v, out);
        }
    }
}

fn encode_elements(layout: &Layout, k: &[f16], v: &[f16], out: &mut [u8]) {
    for token in 0..TOKENS {
        for channel in 0..layout.head_dim {
            let i = token * layout.head_dim + channel;
            let (byte, shift) = layout.v_at(token, channel);
            let v_at = (layout.v_codes() + byte, shift);
            for (at, x) in [(layout.k_at(token, channel), k[i]), (v_at, v[i])] {
                match layout.format {
                    Format::F16 => put16(out, at.0, x),
                    _ => put_code(out, at, fp8(x.to_f32())),
                }
            }
        }
    }
}

/// Writes codes, scales and minima of groups; `steps` where metadata is two-level.
struct Coder<'a> {
    layout: &'a Layout,
    steps: Option<Steps>,
}

impl<'a> Coder<'a> {
    /// For K (0) or V (1) whose groups have these extremes.
    fn new(layout: &'a Layout, which: usize, groups: &[(f32, f32)], out: &mut [u8]) -> Self {
        let steps = (layout.meta == Meta::U8).then(|| Steps::over(groups, max_code(layout)));
        if let Some(steps) = steps {
            let half = steps::BYTES / 2;
            out[layout.steps() + which * half..][..half].copy_from_slice(&steps.to_bytes());
        }
        Self { layout, steps }
    }

    /// Codes of a group; scale and minimum go to byte `scale` and `minima` later.
    fn code(&self, group: &[f16], codes: &mut [u8], scale: usize, minima: usize, out: &mut [u8]) {
        let max_code = max_code(self.layout);
        let Some(steps) = &self.steps else {
            let (s, min) = quantise(group, max_code, codes);
            put16(out, scale, s);
            return put16(out, scale + minima, min);
        };
        let bytes = steps.bytes(extremes(group), max_code);
        (out[scale], out[scale + minima]) = bytes;
        let (s, min) = (steps.scale(bytes.0), steps.minimum(bytes.1));
        fill_codes(group, s, min, max_code, codes);
    }
}

fn encode_k(layout: &Layout, k: &[f16], out: &mut [u8]) {
    let (d, g) = (layout.head_dim, layout.k_group);
    let group = |i: usize| -> Vec<f16> {
        let (first, channel) = (i / d * g, i % d);
        (first..first + g).map(|token| k[token * d + channel]).collect()
    };
    let groups: Vec<_> = (0..TOKENS / g * d).map(|i| extremes(&group(i))).collect();
    let coder = Coder::new(layout, 0, &groups, out);
    let mut codes = vec![0u8; g];
    for i in 0..groups.len() {
        let (first, channel) = (i / d * g, i % d);
        let scale = layout.k_scale_at(first, channel);
        coder.code(&group(i), &mut codes, scale, layout.k_minima(), out);
        for (i, &code) in codes.iter().enumerate() {
            put_code(out, layout.k_at(first + i, channel), code);
        }
    }
}

fn encode_v(layout: &Layout, v: &[f16], out: &mut [u8]) {
    let rows = || v.chunks_exact(layout.head_dim);
    let groups: Vec<_> = rows().flat_map(|row| row.chunks(layout.v_group)).map(extremes).collect();
    let coder = Coder::new(layout, 1, &groups, out);
    let mut codes = vec![0u8; layout.v_group];
    for (token, row) in rows().enumerate() {
        for (g, group) in row.chunks(layout.v_group).enumerate() {
            let first = g * layout.v_group;
            let scale = layout.v_scale_at(token, first);
            coder.code(group, &mut codes, scale, layout.v_meta_bytes() / 2, out);
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
    let scale = layout.k_scale_at(token, channel);
    value(layout, slab, layout.k_at(token, channel), 0, (scale, scale + layout.k_minima()))
}

/// V of one token and channel.
pub fn v_value(layout: &Layout, slab: &[u8], token: usize, channel: usize) -> f32 {
    let (byte, shift) = layout.v_at(token, channel);
    let scale = layout.v_scale_at(token, channel);
    let meta = (scale, scale + layout.v_meta_bytes() / 2);
    value(layout, slab, (layout.v_codes() + byte, shift), 1, meta)
}

/// The element at `at`, of K (0) or V (1); bytes of its scale and minimum.
fn value(
    layout: &Layout,
    slab: &[u8],
    at: (usize, usize),
    which: usize,
    (scale, min): (usize, usize),
) -> f32 {
    match (layout.format, layout.meta) {
        (Format::F16, _) => get16(slab, at.0),
        (Format::Fp8, _) => fp8_value(get_code(layout, slab, at)),
        (_, Meta::F16) => {
            f32::from(get_code(layout, slab, at)) * get16(slab, scale) + get16(slab, min)
        }
        (_, Meta::U8) => {
            let steps = Steps::of(layout, slab)[which];
            let code = f32::from(get_code(layout, slab, at));
            code * steps.scale(slab[scale]) + steps.minimum(slab[min])
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
