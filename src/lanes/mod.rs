//! Sixteen 32-bit lanes, one 64-byte line of a slab: the vector on which the CPU paths over slabs are written
//! once. Each [`Level`] has its own implementation.
//!
//! A line of a code section holds the words of lanes `t` = 0..3 of one `r` ([`crate::slab`]): word
//! `4 t + 2 w + side`, `w` the parity of the word number. A *tile row* is the sixteen tokens of a tile in the
//! order in which V wants them, `[t][side][e]`, token `2 t + e + 8 side`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::simd::Level;

/// `$body` with a constant `$n`, the number of heads of a block: at most [`Lanes::HEADS`] of the lanes `L`.
macro_rules! with_heads {
    ($heads:expr, $n:ident => $body:expr) => {{
        // Larger blocks than a level uses are not even compiled.
        if L::HEADS >= 4 && $heads == 4 {
            const $n: usize = 4;
            $body
        } else if L::HEADS >= 3 && $heads == 3 {
            const $n: usize = 3;
            $body
        } else if L::HEADS >= 2 && $heads == 2 {
            const $n: usize = 2;
            $body
        } else {
            const $n: usize = 1;
            $body
        }
    }};
}
pub(crate) use with_heads;

/// Sixteen elements in memory, on a cache line of their own.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Row<T>(pub [T; 16]);

impl<T: Copy + Default> Default for Row<T> {
    fn default() -> Self {
        Self([T::default(); 16])
    }
}

/// 64 bytes of a slab.
pub(crate) type Line = [u8; 64];

/// The vector operations. A value of the type is proof that the CPU has the instructions, so they are safe.
pub(crate) trait Lanes: Copy {
    /// Integers, or 32 halves.
    type I: Copy;
    /// Floats.
    type F: Copy;
    /// Query heads whose accumulators fit the registers together.
    const HEADS: usize;

    fn int(self, x: i32) -> Self::I;
    fn line(self, line: &Line) -> Self::I;
    fn get_int(self, row: &Row<i32>) -> Self::I;
    fn put_int(self, row: &mut Row<i32>, x: Self::I);
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Logical shifts of each 32-bit lane, `n < 32`.
    fn shr(self, x: Self::I, n: usize) -> Self::I;
    fn shl(self, x: Self::I, n: usize) -> Self::I;
    /// Lanes 0..8 shifted by `low`, 8..16 by `high`.
    fn shr_halves(self, x: Self::I, low: usize, high: usize) -> Self::I;
    /// `acc + a.low * b.low + a.high * b.high` a lane, of signed halves.
    fn dot(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// For each four lanes of `a` and of `b`: eight saturated halves, `a`'s first.
    fn pack(self, a: Self::I, b: Self::I) -> Self::I;
    /// The sixteen lanes of `a`, then of `b`, as halves in order.
    fn narrow(self, a: Self::I, b: Self::I) -> Self::I;
    /// Element `i` of each four lanes: of `a` into the lower two, of `b` into the upper two.
    fn spread(self, a: Self::I, b: Self::I) -> [Self::I; 4];
    /// Elements 0, 0, 2, 2 of each four lanes, and 1, 1, 3, 3.
    fn spread_pairs(self, x: Self::I) -> [Self::I; 2];
    /// The lower two of each four lanes twice, and the upper two.
    fn double(self, x: Self::I) -> [Self::I; 2];
    /// `[t][w][side]` of lines `r`, summed over `t`: the tile rows of `w` = 0 and 1, `r = 2 t + e`.
    fn tokens(self, lines: [Self::I; 8]) -> [Self::I; 2];
    /// `[t][w][side]` of lines `r`, summed over `t` and `side`: `[w][r]`.
    fn channels(self, lines: [Self::I; 8]) -> Self::I;
    /// `[t][w][side]` of lines `r` to `[side][r]` of `2 t + w`.
    fn transpose(self, lines: [Self::I; 8]) -> [Self::I; 8];
    /// The lower eight lanes of both, the upper eight of both.
    fn join_low(self, a: Self::I, b: Self::I) -> Self::I;
    fn join_high(self, a: Self::I, b: Self::I) -> Self::I;
    fn float(self, x: Self::I) -> Self::F;
    /// To nearest, ties to even.
    fn round(self, x: Self::F) -> Self::I;
    /// `2^n` for `n` in -126..=127, 0 for -127.
    fn power(self, n: Self::I) -> Self::F;

    fn splat(self, x: f32) -> Self::F;
    fn get(self, row: &[f32; 16]) -> Self::F;
    fn put(self, row: &mut [f32; 16], x: Self::F);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the CPU can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b + c`, fused everywhere: one rounding.
    #[inline(always)]
    fn fused(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.fma(a, b, c)
    }
    /// `a` where `a > b` (`a < b`), else `b`: a NaN gives `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, x: Self::F) -> Self::F;
    /// `x` where `s > 0`, else 0.
    fn positive(self, s: Self::F, x: Self::F) -> Self::F;
    fn sum(self, x: Self::F) -> f32;
    fn top(self, x: Self::F) -> f32;
    /// [`Lanes::sum`] and [`Lanes::top`] of four.
    #[inline(always)]
    fn sums(self, [a, b, c, d]: [Self::F; 4]) -> [f32; 4] {
        [self.sum(a), self.sum(b), self.sum(c), self.sum(d)]
    }
    #[inline(always)]
    fn tops(self, [a, b, c, d]: [Self::F; 4]) -> [f32; 4] {
        [self.top(a), self.top(b), self.top(c), self.top(d)]
    }
    /// Asks for a line that is needed soon.
    #[inline(always)]
    fn fetch(self, _line: &Line) {}
    /// Sixteen f16.
    fn half(self, bytes: &[u8; 32]) -> Self::F;
    /// Four f16 from `at + stride * t` on, for each `t`: a tile row where `t` strides.
    fn half_quads(self, bytes: &[u8], at: usize, stride: usize) -> Self::F;
    /// The even and the odd fours of f16 of a line.
    #[inline(always)]
    fn half_pairs(self, line: &Line) -> [Self::F; 2] {
        [self.half_quads(line, 0, 16), self.half_quads(line, 8, 16)]
    }
    /// The f16 in the low half of each lane.
    fn half_low(self, x: Self::I) -> Self::F;
    /// Rounded to f16, ties to even.
    fn to_half(self, x: Self::F) -> [u16; 16];
    /// `[t / 2][w][side][e]` of lines `r`, summed over all but `side`: a tile row.
    fn tokens_half(self, lines: [Self::F; 8]) -> Self::F;
    /// `[t / 2][w][side][e]` of lines `r`, summed over all but `w`: `[w][r]`.
    fn channels_half(self, lines: [Self::F; 8]) -> Self::F;
    /// A tile row as the two halves of a line of f16 want it: `[t][w][side][e]`, `t` = 0, 1 and 2, 3.
    fn fan(self, x: Self::F) -> [Self::F; 2];
    /// Neighbouring pairs of lanes exchanged (`side`), neighbouring fours (`w`).
    fn swap_pairs(self, x: Self::F) -> Self::F;
    fn swap_fours(self, x: Self::F) -> Self::F;

    /// `2^x` for `x <= 0`, relative error below 2e-7, 0 below -126.5.
    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        let x = self.max(self.splat(-127.0), x);
        let n = self.round(x);
        let r = self.sub(x, self.float(n));
        let mut p = self.splat(1.540_353e-4);
        // ln(2)^k / k!
        const LN_2: f32 = std::f32::consts::LN_2;
        for c in [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, LN_2, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        self.mul(p, self.power(n))
    }
}

/// Work written once over [`Lanes`]; `run` must be `#[inline(always)]`, as must be everything below it.
pub(crate) trait Kernel {
    fn run<L: Lanes>(self, l: L);
}

/// Run `kernel` at `level`, or at the best one below it that this CPU has.
pub(crate) fn dispatch<K: Kernel>(level: Level, kernel: K) {
    match level.usable() {
        // SAFETY: the level is usable.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::run(kernel) },
        // SAFETY: the level is usable.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::run(kernel) },
        _ => kernel.run(portable::Portable),
    }
}
