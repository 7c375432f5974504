//! Sums across the lanes of registers, and the macros that make intrinsics safe to write.

use super::Row;
use std::arch::asm;
use std::arch::x86_64::*;

/// One intrinsic: an `Avx512` exists only inside [`super::run`], so the CPU has it.
macro_rules! cpu {
    ($($body:tt)*) => {{
        // SAFETY: an `Avx512` proves the instructions; pointers come from references of the right size.
        unsafe { $($body)* }
    }};
}

/// `vpdpwssd`. As an intrinsic, LLVM may split it into a multiplication and an addition to shorten a chain
/// of sums; the kernels keep several chains at once and want half the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn dot(mut acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: registers only.
    unsafe {
        asm!("vpdpwssd {acc}, {a}, {b}", acc = inout(zmm_reg) acc, a = in(zmm_reg) a,
            b = in(zmm_reg) b, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// Sums over the four 128-bit lanes of four vectors: lane `i` of the result belongs to vector `i`.
#[inline(always)]
pub(super) fn add_lanes(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m512i {
    cpu! {
        let ab = _mm512_add_epi32(
            _mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xDD>(a, b));
        let cd = _mm512_add_epi32(
            _mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xDD>(c, d));
        _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(ab, cd), _mm512_shuffle_i32x4::<0xDD>(ab, cd))
    }
}

/// The same of floats, and for any operation.
macro_rules! over_lanes {
    ($op:ident, $a:expr, $b:expr, $c:expr, $d:expr) => {
        cpu! {
            let ab = $op(
                _mm512_shuffle_f32x4::<0x88>($a, $b), _mm512_shuffle_f32x4::<0xDD>($a, $b));
            let cd = $op(
                _mm512_shuffle_f32x4::<0x88>($c, $d), _mm512_shuffle_f32x4::<0xDD>($c, $d));
            $op(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xDD>(ab, cd))
        }
    };
}

/// One vector of four results, each in all elements of its 128-bit lane.
macro_rules! reduce4 {
    ($op:ident, $a:expr, $b:expr, $c:expr, $d:expr) => {{
        let x = over_lanes!($op, $a, $b, $c, $d);
        cpu! {
            let x = $op(x, _mm512_permute_ps::<0x4E>(x));
            $op(x, _mm512_permute_ps::<0xB1>(x))
        }
    }};
}

/// The first element of each 128-bit lane.
#[inline(always)]
pub(super) fn gather_lanes(x: __m512) -> [f32; 4] {
    let mut out = [0.0; 4];
    cpu! {
        let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
    }
    out
}

/// Sums of neighbours, the sums of `a` before those of `b` in each 128-bit lane.
#[inline(always)]
pub(super) fn add_pairs(a: __m512, b: __m512) -> __m512 {
    cpu! { _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b)) }
}

/// Indices for `permutex2var` into `[r][w][side]`, for result lanes in `[t][side][e]`.
const fn token_indices(w: i32) -> Row<i32> {
    let mut idx = [0; 16];
    let mut i = 0;
    while i < 16 {
        let (t, side, e) = (i / 4, i / 2 % 2, i % 2);
        idx[i as usize] = 4 * (2 * t + e) + 2 * w + side;
        i += 1;
    }
    Row(idx)
}

/// The same for result lanes in `[w][r]`.
const fn channel_indices(side: i32) -> Row<i32> {
    let mut idx = [0; 16];
    let mut i = 0;
    while i < 16 {
        idx[i as usize] = 4 * (i % 8) + 2 * (i / 8) + side;
        i += 1;
    }
    Row(idx)
}

pub(super) static TOKENS: [Row<i32>; 2] = [token_indices(0), token_indices(1)];
pub(super) static CHANNELS: [Row<i32>; 2] = [channel_indices(0), channel_indices(1)];
