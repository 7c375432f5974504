//! [`Lanes`] as plain arrays, for every architecture.

use super::{Lanes, Line, Row};
use half::f16;

#[derive(Clone, Copy)]
pub(super) struct Portable;

type I = [i32; 16];
type F = [f32; 16];

/// `f(i)` for each lane.
macro_rules! lanes {
    ($i:ident => $body:expr) => {{
        let mut out = [Default::default(); 16];
        for ($i, out) in out.iter_mut().enumerate() {
            *out = $body;
        }
        out
    }};
}

/// Exact, and free of branches: [`f16::to_f32`] asks the CPU for its features each time.
#[inline(always)]
fn widen(x: u16) -> f32 {
    let x = u32::from(x);
    let magnitude = f32::from_bits((x & 0x7FFF) << 13) * f32::from_bits((127 + 112) << 23);
    let special = if x & 0x7C00 == 0x7C00 { 0x7F80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (x & 0x8000) << 16)
}

#[inline(always)]
fn halves(x: i32) -> (i32, i32) {
    (i32::from(x as i16), x >> 16)
}

#[inline(always)]
fn join(low: i32, high: i32) -> i32 {
    (low & 0xFFFF) | high << 16
}

/// Lane of `[t][w][side]`.
const fn at(t: usize, w: usize, side: usize) -> usize {
    4 * t + 2 * w + side
}

impl Lanes for Portable {
    type I = I;
    type F = F;
    const HEADS: usize = 1;

    #[inline(always)]
    fn int(self, x: i32) -> I {
        [x; 16]
    }
    #[inline(always)]
    fn line(self, line: &Line) -> I {
        let words = line.as_chunks::<4>().0;
        lanes!(i => i32::from_le_bytes(words[i]))
    }
    #[inline(always)]
    fn get_int(self, row: &Row<i32>) -> I {
        row.0
    }
    #[inline(always)]
    fn put_int(self, row: &mut Row<i32>, x: I) {
        row.0 = x;
    }
    #[inline(always)]
    fn add_int(self, a: I, b: I) -> I {
        lanes!(i => a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        lanes!(i => a[i] & b[i])
    }
    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        lanes!(i => a[i] | b[i])
    }
    #[inline(always)]
    fn shr(self, x: I, n: usize) -> I {
        lanes!(i => ((x[i] as u32) >> n) as i32)
    }
    #[inline(always)]
    fn shl(self, x: I, n: usize) -> I {
        lanes!(i => x[i] << n)
    }
    #[inline(always)]
    fn shr_halves(self, x: I, low: usize, high: usize) -> I {
        lanes!(i => ((x[i] as u32) >> if i < 8 { low } else { high }) as i32)
    }
    #[inline(always)]
    fn dot(self, acc: I, a: I, b: I) -> I {
        lanes!(i => {
            let ((a0, a1), (b0, b1)) = (halves(a[i]), halves(b[i]));
            acc[i].wrapping_add(a0 * b0).wrapping_add(a1 * b1)
        })
    }
    #[inline(always)]
    fn pack(self, a: I, b: I) -> I {
        let clamp = |x: i32| x.clamp(-32768, 32767);
        lanes!(i => {
            let (from, i) = (if i % 4 < 2 { &a } else { &b }, i / 4 * 4 + i % 2 * 2);
            join(clamp(from[i]), clamp(from[i + 1]))
        })
    }
    #[inline(always)]
    fn narrow(self, a: I, b: I) -> I {
        lanes!(i => {
            let from = if i < 8 { &a } else { &b };
            join(from[i % 8 * 2], from[i % 8 * 2 + 1])
        })
    }
    #[inline(always)]
    fn spread(self, a: I, b: I) -> [I; 4] {
        let mut out = [a; 4];
        for (component, out) in out.iter_mut().enumerate() {
            *out = lanes!(i => if i % 4 < 2 { a[i / 4 * 4 + component] } else { b[i / 4 * 4 + component] });
        }
        out
    }
    #[inline(always)]
    fn spread_pairs(self, x: I) -> [I; 2] {
        [0, 1].map(|component| lanes!(i => x[i / 2 * 2 + component]))
    }
    #[inline(always)]
    fn double(self, x: I) -> [I; 2] {
        let half = |first: usize| lanes!(i => x[i / 4 * 4 + first + i % 2]);
        [half(0), half(2)]
    }
    #[inline(always)]
    fn tokens(self, lines: [I; 8]) -> [I; 2] {
        let mut out = [[0; 16]; 2];
        for (w, out) in out.iter_mut().enumerate() {
            for (r, line) in lines.iter().enumerate() {
                for side in 0..2 {
                    let lane = r / 2 * 4 + side * 2 + r % 2;
                    out[lane] = (0..4).map(|t| line[at(t, w, side)]).sum();
                }
            }
        }
        out
    }
    #[inline(always)]
    fn channels(self, lines: [I; 8]) -> I {
        lanes!(i => {
            let (w, line) = (i / 8, &lines[i % 8]);
            (0..4).map(|t| line[at(t, w, 0)] + line[at(t, w, 1)]).sum()
        })
    }
    #[inline(always)]
    fn transpose(self, lines: [I; 8]) -> [I; 8] {
        let mut out = [[0; 16]; 8];
        for (k, out) in out.iter_mut().enumerate() {
            *out = lanes!(i => lines[i % 8][at(k / 2, k % 2, i / 8)]);
        }
        out
    }
    #[inline(always)]
    fn join_low(self, a: I, b: I) -> I {
        lanes!(i => if i < 8 { a[i] } else { b[i - 8] })
    }
    #[inline(always)]
    fn join_high(self, a: I, b: I) -> I {
        lanes!(i => if i < 8 { a[i + 8] } else { b[i] })
    }
    #[inline(always)]
    fn float(self, x: I) -> F {
        lanes!(i => x[i] as f32)
    }
    #[inline(always)]
    fn round(self, x: F) -> I {
        lanes!(i => x[i].round_ties_even() as i32)
    }
    #[inline(always)]
    fn power(self, n: I) -> F {
        lanes!(i => f32::from_bits((n[i].wrapping_add(127) as u32) << 23))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 16]
    }
    #[inline(always)]
    fn get(self, row: &[f32; 16]) -> F {
        *row
    }
    #[inline(always)]
    fn put(self, row: &mut [f32; 16], x: F) {
        *row = x;
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        lanes!(i => a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        lanes!(i => a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        lanes!(i => a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        lanes!(i => a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        lanes!(i => a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn fused(self, a: F, b: F, c: F) -> F {
        lanes!(i => a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        lanes!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn abs(self, x: F) -> F {
        lanes!(i => x[i].abs())
    }
    #[inline(always)]
    fn positive(self, s: F, x: F) -> F {
        lanes!(i => if s[i] > 0.0 { x[i] } else { 0.0 })
    }
    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        let mut half: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
        for width in [4, 2, 1] {
            (0..width).for_each(|i| half[i] += half[i + width]);
        }
        half[0]
    }
    #[inline(always)]
    fn top(self, x: F) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn half(self, bytes: &[u8; 32]) -> F {
        let halves = bytes.as_chunks::<2>().0;
        lanes!(i => widen(u16::from_le_bytes(halves[i])))
    }
    #[inline(always)]
    fn half_quads(self, bytes: &[u8], from: usize, stride: usize) -> F {
        let mut quads = [0; 32];
        for (t, quad) in quads.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            quad.copy_from_slice(&bytes[from + t * stride..][..8]);
        }
        self.half(&quads)
    }
    #[inline(always)]
    fn half_low(self, x: I) -> F {
        lanes!(i => widen(x[i] as u16))
    }
    #[inline(always)]
    fn to_half(self, x: F) -> [u16; 16] {
        lanes!(i => f16::from_f32(x[i]).to_bits())
    }
    #[inline(always)]
    fn tokens_half(self, lines: [F; 8]) -> F {
        lanes!(i => {
            let (line, side) = (&lines[i / 4 * 2 + i % 2], i / 2 % 2);
            (0..4).map(|k| line[4 * k + 2 * side] + line[4 * k + 2 * side + 1]).sum()
        })
    }
    #[inline(always)]
    fn channels_half(self, lines: [F; 8]) -> F {
        lanes!(i => {
            let (line, w) = (&lines[i % 8], i / 8);
            (0..4).map(|k| line[4 * w + k] + line[8 + 4 * w + k]).sum()
        })
    }
    #[inline(always)]
    fn fan(self, x: F) -> [F; 2] {
        let half = |first: usize| lanes!(i => x[(first + i / 8) * 4 + i % 4]);
        [half(0), half(2)]
    }
    #[inline(always)]
    fn swap_pairs(self, x: F) -> F {
        lanes!(i => x[i ^ 2])
    }
    #[inline(always)]
    fn swap_fours(self, x: F) -> F {
        lanes!(i => x[i ^ 4])
    }
}
