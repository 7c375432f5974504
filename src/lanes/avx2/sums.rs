//! Sums and transpositions across the lanes of registers, and the macros that make intrinsics safe to write.

use super::I;
use std::arch::x86_64::*;

/// One intrinsic: an `Avx2` exists only inside [`super::run`], so the CPU has it.
macro_rules! cpu {
    ($($body:tt)*) => {{
        // SAFETY: an `Avx2` proves the instructions; pointers come from references of the right size.
        unsafe { $($body)* }
    }};
}

/// The same intrinsic on both registers.
macro_rules! both {
    ($f:expr, $($x:expr),+) => { cpu! { [$f($($x[0]),+), $f($($x[1]),+)] } };
}

/// One element of all sixteen.
macro_rules! reduce {
    ($wide:ident, $narrow:ident, $x:expr) => {
        cpu! {
            let x = $wide($x[0], $x[1]);
            let x = $narrow(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = $narrow(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32($narrow(x, _mm_movehdup_ps(x)))
        }
    };
}

/// `[r / 2][r % 2]` of `[w][side]`: sums over `t` of eight lines.
#[inline(always)]
pub(super) fn add_lanes(lines: [I; 8]) -> [__m256i; 4] {
    cpu! {
        let mut out = [_mm256_setzero_si256(); 4];
        for (i, out) in out.iter_mut().enumerate() {
            let [a, b] = [lines[2 * i], lines[2 * i + 1]];
            let (a, b) = (_mm256_add_epi32(a[0], a[1]), _mm256_add_epi32(b[0], b[1]));
            let (low, high) =
                (_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b));
            *out = _mm256_add_epi32(low, high);
        }
        out
    }
}

/// Sums of neighbours, the sums of `a` before those of `b` in each 128-bit lane.
#[inline(always)]
pub(super) fn add_pairs(a: __m256, b: __m256) -> __m256 {
    cpu! { _mm256_add_ps(_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xDD>(a, b)) }
}

#[inline(always)]
pub(super) fn join(low: __m256, high: __m256) -> __m256 {
    cpu! {
        let (a, b) = (
            _mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high));
        _mm256_add_ps(a, b)
    }
}

/// One half of [`Lanes::transpose`]: `t2` and `w` of eight lines, `[side][r]`.
#[inline(always)]
pub(super) fn transpose_half(r: [__m256i; 8]) -> [I; 4] {
    cpu! {
        let mut out = [[r[0]; 2]; 4];
        for w in 0..2 {
            let mut quads = [[r[0]; 2]; 2]; // [r / 4][side] of [t2][r % 4]
            for (i, quad) in quads.iter_mut().enumerate() {
                let r = [r[4 * i], r[4 * i + 1], r[4 * i + 2], r[4 * i + 3]];
                let (a, b) = if w == 0 {
                    (_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpacklo_epi32(r[2], r[3]))
                } else {
                    (_mm256_unpackhi_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[2], r[3]))
                };
                *quad = [_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)];
            }
            for side in 0..2 {
                let (a, b) = (quads[0][side], quads[1][side]);
                out[w][side] = _mm256_permute2x128_si256::<0x20>(a, b);
                out[2 + w][side] = _mm256_permute2x128_si256::<0x31>(a, b);
            }
        }
        out
    }
}
