//! Activations in 8 bits: blocks of 32 with a float scale and their sums.
//!
//! `d = max |x| / 127` and `q = round_half_even(x / d)`. A block that holds a NaN or an infinity gets
//! `d = NaN`, so every product with it is NaN; one whose largest magnitude is below 1e-30 is zero.

use crate::simd::Level;
use crate::threads::Team;

/// Elements a block.
pub(super) const BLOCK: usize = 32;
/// Tokens that the matrix kernel takes together.
pub(super) const GROUP: usize = 8;

/// One block of `G` tokens, in the order in which kernels read it: four bytes of each token at a time.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Block<const G: usize> {
    pub q: [[[i8; 4]; G]; BLOCK / 4],
    /// Scales.
    pub d: [f32; G],
    /// Sum of the 32 codes times the scale: what a weight offset multiplies.
    pub dsum: [f32; G],
    /// Minus the sum of the codes: what a weight bias multiplies.
    pub neg: [i32; G],
    /// The same for each half of the block.
    pub neg_half: [[i32; G]; 2],
}

impl<const G: usize> Block<G> {
    pub const ZERO: Self = Self {
        q: [[[0; 4]; G]; BLOCK / 4],
        d: [0.0; G],
        dsum: [0.0; G],
        neg: [0; G],
        neg_half: [[0; G]; 2],
    };

    #[inline(always)]
    fn set(&mut self, token: usize, x: &[f32; BLOCK]) {
        let largest = x.iter().fold(0u32, |top, x| top.max(x.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        let (d, inverse) = match largest {
            _ if !largest.is_finite() => (f32::NAN, 0.0),
            _ if largest < 1e-30 => (0.0, 0.0),
            _ => (largest / 127.0, 127.0 / largest),
        };
        let mut q = [0i32; BLOCK];
        for (q, &x) in q.iter_mut().zip(x) {
            *q = round(x * inverse);
        }
        if d.is_nan() {
            q = [0; BLOCK];
        }
        let half = |part: &[i32]| -part.iter().sum::<i32>();
        let (first, second) = (half(&q[..16]), half(&q[16..]));
        for (out, q) in self.q.iter_mut().zip(q.chunks_exact(4)) {
            out[token] = [q[0] as i8, q[1] as i8, q[2] as i8, q[3] as i8];
        }
        self.d[token] = d;
        self.dsum[token] = d * -(first + second) as f32;
        self.neg[token] = first + second;
        self.neg_half[0][token] = first;
        self.neg_half[1][token] = second;
    }
}

/// Rounds half to even; exact for `|x| < 2^22`. Adding 1.5 * 2^23 leaves the integer in the mantissa.
#[inline(always)]
fn round(x: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC).to_bits().cast_signed() - MAGIC.to_bits().cast_signed()
}

/// `x` is up to `G` rows of `cols`; `out` the blocks of one row, then padding.
#[inline(always)]
fn quantize_group<const G: usize>(x: &[f32], cols: usize, out: &mut [Block<G>]) {
    out.fill(Block::ZERO);
    for (token, x) in x.chunks_exact(cols).enumerate() {
        for (x, block) in x.as_chunks::<BLOCK>().0.iter().zip(&mut *out) {
            block.set(token, x);
        }
    }
}

crate::simd::leveled! {
    fn quantize_one(x: &[f32], cols: usize, out: &mut [Block<1>]) = quantize_group::<1>;
}
crate::simd::leveled! {
    fn quantize_eight(x: &[f32], cols: usize, out: &mut [Block<GROUP>]) = quantize_group::<GROUP>;
}

/// Blocks of a row of activations: an even number, so that kernels may take two at a time.
pub(super) const fn row_blocks(cols: usize) -> usize {
    cols.div_ceil(BLOCK).next_multiple_of(2)
}

/// Quantises `x` (`[n, cols]`), a token at a time: `row_blocks(cols)` blocks each.
pub(super) fn rows(level: Level, x: &[f32], cols: usize, out: &mut Vec<Block<1>>) {
    let stride = row_blocks(cols);
    out.resize(x.len() / cols * stride, Block::ZERO);
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(stride)) {
        quantize_one(level, x, cols, out);
    }
}

/// Quantises `x` (`[n, cols]`), [`GROUP`] tokens at a time: `row_blocks(cols)` blocks each, unused
/// tokens of the last group zero.
pub(super) fn groups(
    level: Level,
    team: &Team,
    x: &[f32],
    cols: usize,
    out: &mut Vec<Block<GROUP>>,
) {
    let stride = row_blocks(cols);
    out.resize((x.len() / cols).div_ceil(GROUP) * stride, Block::ZERO);
    team.each_chunk(out, stride, |group, out| {
        let x = &x[group * GROUP * cols..];
        quantize_eight(level, &x[..x.len().min(GROUP * cols)], cols, out);
    });
}
