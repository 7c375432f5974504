//! The codec: what the bytes of a slab mean. Scalar and exact; the fast paths are tested against it.

use super::fp8::{fp8, fp8_value};
use super::steps::{self, Steps, finite};
use super::{Format, Layout, Meta, TOKENS};
use half::f16;

/// How the codes of a slab are chosen. The default is KIVI's: a group spans all of its range, each element for itself.
#[derive(Debug, Clone, Copy)]
pub struct Rounding<'a> {
    /// Share of a group's range that 2-bit codes span, in (0, 1]: what lies beyond its ends is clipped, and steps are
    /// finer. More bits span all of it.
    pub range: f32,
    /// `[D, D]` by rows, of which row `j` holds how much of the errors of channels `i < j` of K channel `j` makes up
    /// for ([`super::feedback`]); quantised K only.
    pub feedback: Option<&'a [f16]>,
}

impl Default for Rounding<'_> {
    fn default() -> Self {
        Self { range: 1.0, feedback: None }
    }
}

impl Rounding<'_> {
    /// [`quantise`] within the range, without feedback.
    pub fn quantise(&self, group: &[f16], max_code: u32, codes: &mut [u8]) -> (f16, f16) {
        let group: Vec<f32> = group.iter().map(|x| x.to_f32()).collect();
        let (scale, min) = scale_of(self.span(bounds(&group), max_code), max_code);
        fill_codes(&group, scale.to_f32(), min.to_f32(), max_code, codes);
        (scale, min)
    }

    /// How far above a group's smallest element its minimum may lie, as a share of its range: less than its whole range
    /// is spanned, and feedback moves it.
    fn headroom(&self, max_code: u32) -> f32 {
        if self.range == 1.0 || max_code > 3 { 0.0 } else { 0.2 }
    }

    /// What the codes of a group of these extremes span; all is NaN where they are the wrong way round.
    fn span(&self, (min, max): (f32, f32), max_code: u32) -> (f32, f32) {
        if self.range == 1.0 || max_code > 3 || min > max {
            return (min, max);
        }
        let (middle, reach) = (0.5 * (min + max), 0.5 * self.range);
        ((min - max).mul_add(reach, middle), (max - min).mul_add(reach, middle))
    }
}

/// Quantise one group of at most `max_code + 1` levels: `(scale, min)` and a code for each element.
///
/// All arithmetic is f32 and rounds to nearest even once a step, so that every side gives the same bits.
/// NaN elements are ignored by the minimum and maximum and get code 0.
pub fn quantise(group: &[f16], max_code: u32, codes: &mut [u8]) -> (f16, f16) {
    Rounding::default().quantise(group, max_code, codes)
}

/// Smallest and largest; infinities the wrong way round where all is NaN.
fn bounds(group: &[f32]) -> (f32, f32) {
    let of = |(min, max): (f32, f32), x: &f32| (min.min(*x), max.max(*x));
    group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), of)
}

/// Scale and minimum of codes that span `min` to `max`.
fn scale_of((min, max): (f32, f32), max_code: u32) -> (f16, f16) {
    // Adding 0 turns -0 into 0: whichever zero a minimum returns, the bits are the same.
    (f16::from_f32((max - min) / max_code as f32 + 0.0), f16::from_f32(min + 0.0))
}

fn fill_codes(group: &[f32], scale: f32, min: f32, max_code: u32, codes: &mut [u8]) {
    for (code, x) in codes.iter_mut().zip(group) {
        let q = if scale > 0.0 { ((x - min) / scale).round_ties_even() } else { 0.0 };
        *code = q.max(0.0).min(max_code as f32) as u8;
    }
}

/// Write 64 tokens, `k` and `v` each `[64, D]`, as a slab of `out.len() == layout.slab_bytes()` bytes.
pub fn encode(layout: &Layout, k: &[f16], v: &[f16], out: &mut [u8]) {
    encode_rounded(layout, &Rounding::default(), k, v, out);
}

/// [`encode`] with codes chosen otherwise.
pub fn encode_rounded(layout: &Layout, rounding: &Rounding, k: &[f16], v: &[f16], out: &mut [u8]) {
    out.fill(0);
    match layout.format {
        Format::F16 | Format::Fp8 => encode_elements(layout, k, v, out),
        Format::Q8 | Format::Q4 | Format::Q2 => {
            encode_k(layout, rounding, k, out);
            encode_v(layout, rounding, v, out);
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

/// Writes scales and minima of groups; `steps` where metadata is two-level.
pub(crate) struct Coder<'a> {
    layout: &'a Layout,
    rounding: &'a Rounding<'a>,
    steps: Option<Steps>,
}

impl<'a> Coder<'a> {
    /// For K (0) or V (1) whose groups, as they come, have these [`bounds`].
    pub(crate) fn new(
        layout: &'a Layout,
        rounding: &'a Rounding<'a>,
        which: usize,
        groups: impl Iterator<Item = (f32, f32)>,
        out: &mut [u8],
    ) -> Self {
        let steps = (layout.meta == Meta::U8).then(|| {
            let groups: Vec<_> = groups.map(finite).collect();
            Steps::over(&groups, rounding.headroom(max_code(layout)), max_code(layout))
        });
        if let Some(steps) = steps {
            let half = steps::BYTES / 2;
            out[layout.steps() + which * half..][..half].copy_from_slice(&steps.to_bytes());
        }
        Self { layout, rounding, steps }
    }

    /// Scale and minimum of a group of these bounds, which go to byte `scale` and `minima` later.
    pub(crate) fn put(
        &self,
        bounds: (f32, f32),
        (scale, minima): (usize, usize),
        out: &mut [u8],
    ) -> (f32, f32) {
        let max_code = max_code(self.layout);
        if let Some(steps) = &self.steps {
            let bytes = steps.bytes(self.rounding.span(finite(bounds), max_code), max_code);
            (out[scale], out[scale + minima]) = bytes;
            return (steps.scale(bytes.0), steps.minimum(bytes.1));
        }
        let (s, min) = scale_of(self.rounding.span(bounds, max_code), max_code);
        put16(out, scale, s);
        put16(out, scale + minima, min);
        (s.to_f32(), min.to_f32())
    }
}

fn encode_k(layout: &Layout, rounding: &Rounding, k: &[f16], out: &mut [u8]) {
    let (d, g) = (layout.head_dim, layout.k_group);
    let group = |i: usize| -> Vec<f32> {
        let (first, channel) = (i / d * g, i % d);
        (first..first + g).map(|token| k[token * d + channel].to_f32()).collect()
    };
    let groups = 0..TOKENS / g * d;
    let coder = Coder::new(layout, rounding, 0, groups.clone().map(|i| bounds(&group(i))), out);
    let mut codes = vec![0u8; g];
    let mut errors = vec![0.0; d * g]; // of the channels before this one, in its tokens
    for i in groups {
        let (first, channel) = (i / d * g, i % d);
        let raw = group(i);
        let wanted = match rounding.feedback {
            Some(rows) => made_up(&raw, &rows[channel * d..][..channel], &errors),
            None => raw.clone(),
        };
        let at = (layout.k_scale_at(first, channel), layout.k_minima());
        let (s, min) = coder.put(bounds(&wanted), at, out);
        fill_codes(&wanted, s, min, max_code(layout), &mut codes);
        for (t, &code) in codes.iter().enumerate() {
            put_code(out, layout.k_at(first + t, channel), code);
            let error = raw[t] - f32::from(code).mul_add(s, min);
            errors[channel * g + t] = if error.is_nan() { 0.0 } else { error };
        }
    }
}

/// A channel of `group` plus its share of the errors of those before it, `[weights.len(), group.len()]`, within the
/// range of f16.
fn made_up(group: &[f32], weights: &[f16], errors: &[f32]) -> Vec<f32> {
    let mut wanted = group.to_vec();
    for (weight, errors) in weights.iter().zip(errors.chunks_exact(group.len())) {
        let weight = weight.to_f32();
        wanted.iter_mut().zip(errors).for_each(|(x, e)| *x = weight.mul_add(*e, *x));
    }
    let max = f16::MAX.to_f32();
    wanted.iter_mut().for_each(|x| *x = x.clamp(-max, max));
    wanted
}

fn encode_v(layout: &Layout, rounding: &Rounding, v: &[f16], out: &mut [u8]) {
    let rows = || v.chunks_exact(layout.head_dim);
    let wide = |group: &[f16]| -> Vec<f32> { group.iter().map(|x| x.to_f32()).collect() };
    let groups = rows().flat_map(|row| row.chunks(layout.v_group));
    let coder = Coder::new(layout, rounding, 1, groups.map(|group| bounds(&wide(group))), out);
    let mut codes = vec![0u8; layout.v_group];
    for (token, row) in rows().enumerate() {
        for (g, group) in row.chunks(layout.v_group).enumerate() {
            let (first, group) = (g * layout.v_group, wide(group));
            let at = (layout.v_scale_at(token, first), layout.v_meta_bytes() / 2);
            let (s, min) = coder.put(bounds(&group), at, out);
            fill_codes(&group, s, min, max_code(layout), &mut codes);
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

/// The smallest and the largest that codes of the group of K of `token` can stand for in `channel`; `None` where there are
/// no groups.
pub fn k_bounds(layout: &Layout, slab: &[u8], token: usize, channel: usize) -> Option<(f32, f32)> {
    let at = layout.k_scale_at(token, channel);
    let (scale, min) = (at, at + layout.k_minima());
    let (scale, min) = match (layout.format, layout.meta) {
        (Format::F16 | Format::Fp8, _) => return None,
        (_, Meta::F16) => (get16(slab, scale), get16(slab, min)),
        (_, Meta::U8) => {
            let steps = Steps::of(layout, slab)[0];
            (steps.scale(slab[scale]), steps.minimum(slab[min]))
        }
    };
    Some((min, (max_code(layout) as f32).mul_add(scale, min)))
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

pub(crate) const fn max_code(layout: &Layout) -> u32 {
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
