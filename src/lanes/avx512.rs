//! [`Lanes`] in one 512-bit register.

#[macro_use]
mod sums;

use super::{Kernel, Lanes, Line, Row};
use std::arch::x86_64::*;
use sums::{CHANNELS, TOKENS, add_lanes, add_pairs, dot, gather_lanes};

/// Made only by [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// # Safety
/// The CPU has AVX-512 F, BW, VL, DQ and VNNI, and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512(()));
}

/// Methods that are one intrinsic.
macro_rules! ops {
    ($(fn $name:ident($($x:ident: $t:ty),+) -> $out:ty = $f:expr;)+) => {
        $(#[inline(always)]
        fn $name(self, $($x: $t),+) -> $out {
            cpu! { $f($($x),+) }
        })+
    };
}

impl Lanes for Avx512 {
    type I = __m512i;
    type F = __m512;
    const HEADS: usize = 4;

    ops! {
        fn int(x: i32) -> __m512i = _mm512_set1_epi32;
        fn add_int(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32;
        fn and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512;
        fn or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512;
        fn dot(acc: __m512i, a: __m512i, b: __m512i) -> __m512i = dot;
        fn pack(a: __m512i, b: __m512i) -> __m512i = _mm512_packs_epi32;
        fn join_low(a: __m512i, b: __m512i) -> __m512i = _mm512_shuffle_i32x4::<0x44>;
        fn join_high(a: __m512i, b: __m512i) -> __m512i = _mm512_shuffle_i32x4::<0xEE>;
        fn float(x: __m512i) -> __m512 = _mm512_cvtepi32_ps;
        fn round(x: __m512) -> __m512i = _mm512_cvtps_epi32;
        fn splat(x: f32) -> __m512 = _mm512_set1_ps;
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps;
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps;
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps;
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps;
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps;
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps;
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps;
        fn abs(x: __m512) -> __m512 = _mm512_abs_ps;
        fn sum(x: __m512) -> f32 = _mm512_reduce_add_ps;
        fn top(x: __m512) -> f32 = _mm512_reduce_max_ps;
    }

    #[inline(always)]
    fn line(self, line: &Line) -> __m512i {
        cpu! { _mm512_loadu_si512(line.as_ptr().cast()) }
    }
    #[inline(always)]
    fn get_int(self, row: &Row<i32>) -> __m512i {
        cpu! { _mm512_load_si512(row.0.as_ptr().cast()) }
    }
    #[inline(always)]
    fn put_int(self, row: &mut Row<i32>, x: __m512i) {
        cpu! { _mm512_store_si512(row.0.as_mut_ptr().cast(), x) }
    }
    #[inline(always)]
    fn shr(self, x: __m512i, n: usize) -> __m512i {
        cpu! { _mm512_srl_epi32(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn shl(self, x: __m512i, n: usize) -> __m512i {
        cpu! { _mm512_sll_epi32(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn shr_halves(self, x: __m512i, low: usize, high: usize) -> __m512i {
        cpu! {
            let low = _mm256_set1_epi32(low as i32);
            let n = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), _mm256_set1_epi32(high as i32));
            _mm512_srlv_epi32(x, n)
        }
    }
    #[inline(always)]
    fn narrow(self, a: __m512i, b: __m512i) -> __m512i {
        cpu! {
            let a = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(a));
            _mm512_inserti64x4::<1>(a, _mm512_cvtepi32_epi16(b))
        }
    }
    #[inline(always)]
    fn spread(self, a: __m512i, b: __m512i) -> [__m512i; 4] {
        cpu! {
            let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
            [
                _mm512_castps_si512(_mm512_shuffle_ps::<0x00>(a, b)),
                _mm512_castps_si512(_mm512_shuffle_ps::<0x55>(a, b)),
                _mm512_castps_si512(_mm512_shuffle_ps::<0xAA>(a, b)),
                _mm512_castps_si512(_mm512_shuffle_ps::<0xFF>(a, b)),
            ]
        }
    }
    #[inline(always)]
    fn spread_pairs(self, x: __m512i) -> [__m512i; 2] {
        cpu! { [_mm512_shuffle_epi32::<0xA0>(x), _mm512_shuffle_epi32::<0xF5>(x)] }
    }
    #[inline(always)]
    fn double(self, x: __m512i) -> [__m512i; 2] {
        cpu! { [_mm512_shuffle_epi32::<0x44>(x), _mm512_shuffle_epi32::<0xEE>(x)] }
    }
    #[inline(always)]
    fn tokens(self, [a, b, c, d, e, f, g, h]: [__m512i; 8]) -> [__m512i; 2] {
        let (x, y) = (add_lanes(a, b, c, d), add_lanes(e, f, g, h));
        let [i, j] = [self.get_int(&TOKENS[0]), self.get_int(&TOKENS[1])];
        cpu! { [_mm512_permutex2var_epi32(x, i, y), _mm512_permutex2var_epi32(x, j, y)] }
    }
    #[inline(always)]
    fn channels(self, [a, b, c, d, e, f, g, h]: [__m512i; 8]) -> __m512i {
        let (x, y) = (add_lanes(a, b, c, d), add_lanes(e, f, g, h));
        let [i, j] = [self.get_int(&CHANNELS[0]), self.get_int(&CHANNELS[1])];
        cpu! {
            let side0 = _mm512_permutex2var_epi32(x, i, y);
            _mm512_add_epi32(side0, _mm512_permutex2var_epi32(x, j, y))
        }
    }
    #[inline(always)]
    fn transpose(self, r: [__m512i; 8]) -> [__m512i; 8] {
        let mut out = r;
        for w in 0..2 {
            let quad = |i: usize| {
                cpu! {
                    let pairs = if w == 0 {
                        (_mm512_unpacklo_epi32(r[i], r[i + 1]), _mm512_unpacklo_epi32(r[i + 2], r[i + 3]))
                    } else {
                        (_mm512_unpackhi_epi32(r[i], r[i + 1]), _mm512_unpackhi_epi32(r[i + 2], r[i + 3]))
                    };
                    (_mm512_unpacklo_epi64(pairs.0, pairs.1), _mm512_unpackhi_epi64(pairs.0, pairs.1))
                }
            };
            let ((a0, a1), (b0, b1)) = (quad(0), quad(4)); // [t] of (side, r / 4), r % 4 within
            cpu! {
                let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a0, b0), _mm512_shuffle_i32x4::<0xDD>(a0, b0));
                let (even1, odd1) = (_mm512_shuffle_i32x4::<0x88>(a1, b1), _mm512_shuffle_i32x4::<0xDD>(a1, b1));
                out[w] = _mm512_shuffle_i32x4::<0x88>(even, even1); // t = 0
                out[2 + w] = _mm512_shuffle_i32x4::<0x88>(odd, odd1); // t = 1
                out[4 + w] = _mm512_shuffle_i32x4::<0xDD>(even, even1); // t = 2
                out[6 + w] = _mm512_shuffle_i32x4::<0xDD>(odd, odd1); // t = 3
            }
        }
        out
    }
    #[inline(always)]
    fn power(self, n: __m512i) -> __m512 {
        cpu! {
            let biased = _mm512_add_epi32(n, _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn get(self, row: &[f32; 16]) -> __m512 {
        cpu! { _mm512_loadu_ps(row.as_ptr()) }
    }
    #[inline(always)]
    fn put(self, row: &mut [f32; 16], x: __m512) {
        cpu! { _mm512_storeu_ps(row.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn positive(self, s: __m512, x: __m512) -> __m512 {
        cpu! {
            let yes = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s, _mm512_setzero_ps());
            _mm512_maskz_mov_ps(yes, x)
        }
    }
    #[inline(always)]
    fn sums(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        gather_lanes(reduce4!(_mm512_add_ps, a, b, c, d))
    }
    #[inline(always)]
    fn tops(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        gather_lanes(reduce4!(_mm512_max_ps, a, b, c, d))
    }
    #[inline(always)]
    fn fetch(self, line: &Line) {
        cpu! { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
    #[inline(always)]
    fn half(self, bytes: &[u8; 32]) -> __m512 {
        cpu! { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }
    #[inline(always)]
    fn half_quads(self, bytes: &[u8], at: usize, stride: usize) -> __m512 {
        let bytes = &bytes[at..at + 3 * stride + 8];
        let quad = |t: usize| {
            let mut quad = [0; 8];
            quad.copy_from_slice(&bytes[t * stride..t * stride + 8]);
            i64::from_le_bytes(quad)
        };
        cpu! { _mm512_cvtph_ps(_mm256_set_epi64x(quad(3), quad(2), quad(1), quad(0))) }
    }
    #[inline(always)]
    fn half_pairs(self, line: &Line) -> [__m512; 2] {
        cpu! {
            let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
            let quads = _mm512_permutexvar_epi64(order, self.line(line));
            let odd = _mm512_extracti64x4_epi64::<1>(quads);
            [_mm512_cvtph_ps(_mm512_castsi512_si256(quads)), _mm512_cvtph_ps(odd)]
        }
    }
    #[inline(always)]
    fn half_low(self, x: __m512i) -> __m512 {
        cpu! { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)) }
    }
    #[inline(always)]
    fn to_half(self, x: __m512) -> [u16; 16] {
        let mut out = [0u16; 16];
        cpu! {
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), halves);
        }
        out
    }
    #[inline(always)]
    fn tokens_half(self, [a, b, c, d, e, f, g, h]: [__m512; 8]) -> __m512 {
        let (x, y) = (add_pairs(a, b), add_pairs(c, d)); // [t / 2][w] of [e][side]
        let (z, w) = (add_pairs(e, f), add_pairs(g, h));
        let sums = over_lanes!(_mm512_add_ps, x, y, z, w); // [t][e][side]
        cpu! { _mm512_permute_ps::<0xD8>(sums) }
    }
    #[inline(always)]
    fn channels_half(self, [a, b, c, d, e, f, g, h]: [__m512; 8]) -> __m512 {
        let x = add_pairs(add_pairs(a, b), add_pairs(c, d)); // [t / 2][w] of r = 0..4
        let y = add_pairs(add_pairs(e, f), add_pairs(g, h));
        cpu! {
            let sums = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(x, y), _mm512_shuffle_f32x4::<0xEE>(x, y));
            _mm512_shuffle_f32x4::<0xD8>(sums, sums)
        }
    }
    #[inline(always)]
    fn fan(self, x: __m512) -> [__m512; 2] {
        cpu! { [_mm512_shuffle_f32x4::<0x50>(x, x), _mm512_shuffle_f32x4::<0xFA>(x, x)] }
    }
    #[inline(always)]
    fn swap_pairs(self, x: __m512) -> __m512 {
        cpu! { _mm512_shuffle_ps::<0x4E>(x, x) }
    }
    #[inline(always)]
    fn swap_fours(self, x: __m512) -> __m512 {
        cpu! { _mm512_shuffle_f32x4::<0xB1>(x, x) }
    }
}
