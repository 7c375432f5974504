//! f16 slabs to quantised ones with any [`Rounding`] and metadata, bit for bit what [`encode_rounded`] gives: sixteen
//! tokens of a channel (K) or channels of a token (V) at a time.
//!
//! [`encode_rounded`]: crate::slab::encode_rounded

use crate::lanes::{Kernel, Lanes, Row};
use crate::slab::{Coder, Layout, Rounding, TOKENS, max_code};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// One slab to pack: f16 `from`, and `to` of `layout`.
pub(super) struct PackRounded<'a> {
    pub from: &'a [u8],
    pub to: &'a mut [u8],
    pub layout: &'a Layout,
    pub rounding: &'a Rounding<'a>,
}

impl Kernel for PackRounded<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { from, to, layout, rounding } = self;
        let d = layout.head_dim;
        let (k, v) = from.split_at(TOKENS * d * 2);
        to.fill(0);
        // K: a line of tokens a channel. V: a line of channels a token.
        let mut lines = Lines::new(d, TOKENS);
        each_pair(d, |f, side, lane, tile, j| {
            let (token, channel) = (16 * tile + lane / 4 + 8 * side, 8 * j + lane % 4 * 2);
            let halves = two(k, f, side, lane);
            lines.x[channel * 4 + token / 16].0[token % 16] = halves[0];
            lines.x[(channel + 1) * 4 + token / 16].0[token % 16] = halves[1];
        });
        lines.keys(l, layout, rounding, to);
        let codes = &mut to[..layout.code_bytes()];
        words(layout, codes, |e, side, lane, tile, j| {
            let (token, channel) = (16 * tile + lane / 4 + 8 * side, 8 * j + lane % 4 * 2 + e);
            lines.codes[channel * TOKENS + token]
        });
        let mut lines = Lines::new(TOKENS, d);
        each_pair(d, |f, side, lane, tile, j| {
            let (token, channel) = (16 * tile + lane % 4 * 2 + 8 * side, 8 * j + lane / 4);
            let halves = two(v, f, side, lane);
            lines.x[token * (d / 16) + channel / 16].0[channel % 16] = halves[0];
            lines.x[(token + 1) * (d / 16) + channel / 16].0[channel % 16] = halves[1];
        });
        lines.values(l, layout, rounding, to);
        let codes = &mut to[layout.v_codes()..][..layout.code_bytes()];
        words(layout, codes, |e, side, lane, tile, j| {
            let (token, channel) = (16 * tile + lane % 4 * 2 + 8 * side + e, 8 * j + lane / 4);
            lines.codes[token * d + channel]
        });
    }
}

/// Pair `f` of a side and lane of an f16 section.
#[inline(always)]
fn two(section: &[u8], f: usize, side: usize, lane: usize) -> [f32; 2] {
    let at = (f / 2 * 32 + lane) * 16 + f % 2 * 8 + side * 4;
    [0, 2].map(|n| f16::from_le_bytes([section[at + n], section[at + n + 1]]).to_f32())
}

/// `body(f, side, lane, tile, j)` for every pair of a section.
#[inline(always)]
fn each_pair(d: usize, mut body: impl FnMut(usize, usize, usize, usize, usize)) {
    for tile in 0..TOKENS / 16 {
        for j in 0..d / 8 {
            for lane in 0..32 {
                body(tile * (d / 8) + j, 0, lane, tile, j);
                body(tile * (d / 8) + j, 1, lane, tile, j);
            }
        }
    }
}

/// Codes `code(e, side, lane, tile, j)` into the words of a section of zeros.
#[inline(always)]
fn words(
    layout: &Layout,
    section: &mut [u8],
    code: impl Fn(usize, usize, usize, usize, usize) -> u8,
) {
    let (bits, slots) = (layout.format.bits(), 16 / layout.format.bits());
    let words: &mut [[u8; 4]] = section.as_chunks_mut().0;
    each_pair(layout.head_dim, |f, side, lane, tile, j| {
        let (word, slot) = (f / slots, f % slots);
        let pair = [0, 1].map(|e| u32::from(code(e, side, lane, tile, j)));
        let at = &mut words[(word / 2 * 32 + lane) * 4 + word % 2 * 2 + side];
        let sum = u32::from_le_bytes(*at) | (pair[0] | pair[1] << 16) << (slot * bits);
        *at = sum.to_le_bytes();
    });
}

/// Elements and codes of K or V, lines that are vectors long.
struct Lines {
    /// Vectors of a line.
    len: usize,
    x: Vec<Row<f32>>,
    codes: Vec<u8>,
}

impl Lines {
    fn new(lines: usize, len: usize) -> Self {
        let x = vec![Row::default(); lines * len / 16];
        Self { len: len / 16, x, codes: vec![0; lines * len] }
    }

    #[inline(always)]
    fn keys<L: Lanes>(&mut self, l: L, layout: &Layout, rounding: &Rounding, to: &mut [u8]) {
        let (d, vectors) = (layout.head_dim, layout.k_group / 16);
        let groups = (0..TOKENS / layout.k_group).flat_map(|g| (0..d).map(move |c| (g, c)));
        let at = |(g, c): (usize, usize)| c * 4 + g * vectors;
        let raw = groups.clone().map(|group| bounds(l, &self.x[at(group)..][..vectors]));
        let coder = Coder::new(layout, rounding, 0, raw, to);
        let mut errors = vec![Row::default(); d * vectors];
        let mut weights = vec![0.0; d];
        for (g, c) in groups {
            let raw = &self.x[at((g, c))..][..vectors];
            let mut wanted = [Row::default(); 4];
            wanted[..vectors].copy_from_slice(raw);
            if let Some(rows) = rounding.feedback {
                rows[c * d..][..c].convert_to_f32_slice(&mut weights[..c]);
                make_up(l, &mut wanted[..vectors], &weights[..c], &errors);
            }
            let scale = layout.k_scale_at(g * layout.k_group, c);
            let span = bounds(l, &wanted[..vectors]);
            let meta = coder.put(span, (scale, layout.k_minima()), to);
            for v in 0..vectors {
                let codes = code(l, &wanted[v], meta, max_code(layout));
                let error = &mut errors[c * vectors + v].0;
                for (t, error) in error.iter_mut().enumerate() {
                    self.codes[(at((g, c)) + v) * 16 + t] = codes.0[t] as u8;
                    let e = raw[v].0[t] - (codes.0[t] as f32).mul_add(meta.0, meta.1);
                    *error = if e.is_nan() { 0.0 } else { e };
                }
            }
        }
    }

    #[inline(always)]
    fn values<L: Lanes>(&mut self, l: L, layout: &Layout, rounding: &Rounding, to: &mut [u8]) {
        let (len, group) = (self.len, layout.v_group / 16);
        let groups = (0..TOKENS).flat_map(|t| (0..len).step_by(group).map(move |g| (t, g)));
        let at = |(t, g): (usize, usize)| t * len + g..t * len + len.min(g + group);
        let bounds_of = |lines: &Self, of: (usize, usize)| bounds(l, &lines.x[at(of)]);
        let coder =
            Coder::new(layout, rounding, 1, groups.clone().map(|of| bounds_of(self, of)), to);
        for of in groups {
            let scale = layout.v_scale_at(of.0, of.1 * 16);
            let meta = coder.put(bounds_of(self, of), (scale, layout.v_meta_bytes() / 2), to);
            for i in at(of) {
                let codes = code(l, &self.x[i], meta, max_code(layout));
                let to = self.codes[i * 16..][..16].iter_mut();
                to.zip(codes.0).for_each(|(to, code)| *to = code as u8);
            }
        }
    }
}

/// Smallest and largest, NaN left out.
#[inline(always)]
fn bounds<L: Lanes>(l: L, group: &[Row<f32>]) -> (f32, f32) {
    let (mut low, mut high) = (l.splat(f32::INFINITY), l.splat(f32::NEG_INFINITY));
    for x in group {
        let x = l.get(&x.0);
        (low, high) = (l.min(x, low), l.max(x, high));
    }
    (-l.top(l.sub(l.splat(0.0), low)), l.top(high))
}

/// Adds `weights` of the errors of the channels before; within the range of f16, NaN stays.
#[inline(always)]
fn make_up<L: Lanes>(l: L, wanted: &mut [Row<f32>], weights: &[f32], errors: &[Row<f32>]) {
    let n = wanted.len();
    let mut sum = [l.splat(0.0); 4];
    (0..n).for_each(|v| sum[v] = l.get(&wanted[v].0));
    for (weight, errors) in weights.iter().zip(errors.chunks_exact(n)) {
        let weight = l.splat(*weight);
        for v in 0..n {
            sum[v] = l.fused(weight, l.get(&errors[v].0), sum[v]);
        }
    }
    let max = f16::MAX.to_f32();
    let saturated = |x| l.max(l.splat(-max), l.min(l.splat(max), x));
    (0..n).for_each(|v| l.put(&mut wanted[v].0, saturated(sum[v])));
}

/// Codes of sixteen elements.
#[inline(always)]
fn code<L: Lanes>(l: L, x: &Row<f32>, (scale, min): (f32, f32), max_code: u32) -> Row<i32> {
    let (scale, zero) = (l.splat(scale), l.splat(0.0));
    let q = l.positive(scale, l.div(l.sub(l.get(&x.0), l.splat(min)), scale));
    let mut codes = Row::default();
    l.put_int(&mut codes, l.round(l.min(l.max(q, zero), l.splat(max_code as f32))));
    codes
}
