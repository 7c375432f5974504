//! [`Lanes`] in two 256-bit registers: lanes `t` = 0, 1 and `t` = 2, 3 of a line.

#[macro_use]
mod sums;

use super::{Kernel, Lanes, Line, Row};
use std::arch::x86_64::*;
use sums::{add_lanes, add_pairs, join, transpose_half};

/// Made only by [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

type I = [__m256i; 2];
type F = [__m256; 2];

/// Methods that are one intrinsic for each register.
macro_rules! ops {
    ($(fn $name:ident($($x:ident: $t:ty),+) -> $out:ty = $f:expr;)+) => {
        $(#[inline(always)]
        fn $name(self, $($x: $t),+) -> $out {
            both!($f, $($x),+)
        })+
    };
}

impl Lanes for Avx2 {
    type I = I;
    type F = F;
    const HEADS: usize = 2;

    ops! {
        fn add_int(a: I, b: I) -> I = _mm256_add_epi32;
        fn and(a: I, b: I) -> I = _mm256_and_si256;
        fn or(a: I, b: I) -> I = _mm256_or_si256;
        fn pack(a: I, b: I) -> I = _mm256_packs_epi32;
        fn float(x: I) -> F = _mm256_cvtepi32_ps;
        fn round(x: F) -> I = _mm256_cvtps_epi32;
        fn add(a: F, b: F) -> F = _mm256_add_ps;
        fn sub(a: F, b: F) -> F = _mm256_sub_ps;
        fn mul(a: F, b: F) -> F = _mm256_mul_ps;
        fn div(a: F, b: F) -> F = _mm256_div_ps;
        fn fma(a: F, b: F, c: F) -> F = _mm256_fmadd_ps;
        fn max(a: F, b: F) -> F = _mm256_max_ps;
        fn min(a: F, b: F) -> F = _mm256_min_ps;
    }

    #[inline(always)]
    fn int(self, x: i32) -> I {
        cpu! { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    fn line(self, line: &Line) -> I {
        let (low, high) = line.split_at(32);
        cpu! {
            [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())]
        }
    }
    #[inline(always)]
    fn get_int(self, row: &Row<i32>) -> I {
        let (low, high) = row.0.split_at(8);
        cpu! { [_mm256_load_si256(low.as_ptr().cast()), _mm256_load_si256(high.as_ptr().cast())] }
    }
    #[inline(always)]
    fn put_int(self, row: &mut Row<i32>, x: I) {
        let (low, high) = row.0.split_at_mut(8);
        cpu! {
            _mm256_store_si256(low.as_mut_ptr().cast(), x[0]);
            _mm256_store_si256(high.as_mut_ptr().cast(), x[1]);
        }
    }
    #[inline(always)]
    fn shr(self, x: I, n: usize) -> I {
        self.shr_halves(x, n, n)
    }
    #[inline(always)]
    fn shl(self, x: I, n: usize) -> I {
        cpu! {
            let n = _mm_cvtsi32_si128(n as i32);
            [_mm256_sll_epi32(x[0], n), _mm256_sll_epi32(x[1], n)]
        }
    }
    #[inline(always)]
    fn shr_halves(self, x: I, low: usize, high: usize) -> I {
        cpu! {
            let (low, high) = (_mm_cvtsi32_si128(low as i32), _mm_cvtsi32_si128(high as i32));
            [_mm256_srl_epi32(x[0], low), _mm256_srl_epi32(x[1], high)]
        }
    }
    #[inline(always)]
    fn dot(self, acc: I, a: I, b: I) -> I {
        self.add_int(acc, both!(_mm256_madd_epi16, a, b))
    }
    #[inline(always)]
    fn narrow(self, a: I, b: I) -> I {
        cpu! {
            let (a, b) = (_mm256_packs_epi32(a[0], a[1]), _mm256_packs_epi32(b[0], b[1]));
            [_mm256_permute4x64_epi64::<0xD8>(a), _mm256_permute4x64_epi64::<0xD8>(b)]
        }
    }
    #[inline(always)]
    fn spread(self, a: I, b: I) -> [I; 4] {
        let [a, b]: [F; 2] = [both!(_mm256_castsi256_ps, a), both!(_mm256_castsi256_ps, b)];
        macro_rules! component {
            ($order:literal) => {{
                let x: F = both!(_mm256_shuffle_ps::<$order>, a, b);
                both!(_mm256_castps_si256, x)
            }};
        }
        [component!(0x00), component!(0x55), component!(0xAA), component!(0xFF)]
    }
    #[inline(always)]
    fn spread_pairs(self, x: I) -> [I; 2] {
        [both!(_mm256_shuffle_epi32::<0xA0>, x), both!(_mm256_shuffle_epi32::<0xF5>, x)]
    }
    #[inline(always)]
    fn double(self, x: I) -> [I; 2] {
        [both!(_mm256_shuffle_epi32::<0x44>, x), both!(_mm256_shuffle_epi32::<0xEE>, x)]
    }
    #[inline(always)]
    fn tokens(self, lines: [I; 8]) -> [I; 2] {
        let q = add_lanes(lines); // [t] of [e][w][side]
        cpu! {
            let mut out = [[q[0]; 2]; 2];
            for half in 0..2 {
                let (a, b) = (q[2 * half], q[2 * half + 1]);
                let even = _mm256_permute2x128_si256::<0x20>(a, b);
                let odd = _mm256_permute2x128_si256::<0x31>(a, b);
                out[0][half] = _mm256_unpacklo_epi32(even, odd);
                out[1][half] = _mm256_unpackhi_epi32(even, odd);
            }
            out
        }
    }
    #[inline(always)]
    fn channels(self, lines: [I; 8]) -> I {
        let q = add_lanes(lines);
        cpu! {
            let a = _mm256_castsi256_ps(_mm256_hadd_epi32(q[0], q[1])); // [e] of r = e, 2 + e; [w]
            let b = _mm256_castsi256_ps(_mm256_hadd_epi32(q[2], q[3]));
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let w0 = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(a, b));
            let w1 = _mm256_castps_si256(_mm256_shuffle_ps::<0xDD>(a, b));
            [_mm256_permutevar8x32_epi32(w0, order), _mm256_permutevar8x32_epi32(w1, order)]
        }
    }
    #[inline(always)]
    fn transpose(self, lines: [I; 8]) -> [I; 8] {
        let [a, b, c, d, e, f, g, h] = lines;
        let [p, q, r, s] = transpose_half([a[0], b[0], c[0], d[0], e[0], f[0], g[0], h[0]]);
        let [t, u, v, w] = transpose_half([a[1], b[1], c[1], d[1], e[1], f[1], g[1], h[1]]);
        [p, q, r, s, t, u, v, w]
    }
    #[inline(always)]
    fn join_low(self, a: I, b: I) -> I {
        [a[0], b[0]]
    }
    #[inline(always)]
    fn join_high(self, a: I, b: I) -> I {
        [a[1], b[1]]
    }
    #[inline(always)]
    fn power(self, n: I) -> F {
        let n = self.shl(self.add_int(n, self.int(127)), 23);
        both!(_mm256_castsi256_ps, n)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        cpu! { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn get(self, row: &[f32; 16]) -> F {
        let (low, high) = row.split_at(8);
        cpu! { [_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())] }
    }
    #[inline(always)]
    fn put(self, row: &mut [f32; 16], x: F) {
        let (low, high) = row.split_at_mut(8);
        cpu! {
            _mm256_storeu_ps(low.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), x[1]);
        }
    }
    #[inline(always)]
    fn abs(self, x: F) -> F {
        both!(_mm256_andnot_ps, self.splat(-0.0), x)
    }
    #[inline(always)]
    fn positive(self, s: F, x: F) -> F {
        let zero = self.splat(0.0);
        let yes = both!(_mm256_cmp_ps::<_CMP_GT_OQ>, s, zero);
        both!(_mm256_and_ps, yes, x)
    }
    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        reduce!(_mm256_add_ps, _mm_add_ps, x)
    }
    #[inline(always)]
    fn top(self, x: F) -> f32 {
        reduce!(_mm256_max_ps, _mm_max_ps, x)
    }
    #[inline(always)]
    fn fetch(self, line: &Line) {
        cpu! { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
    #[inline(always)]
    fn half(self, bytes: &[u8; 32]) -> F {
        let (low, high) = bytes.split_at(16);
        cpu! {
            let low = _mm_loadu_si128(low.as_ptr().cast());
            let high = _mm_loadu_si128(high.as_ptr().cast());
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }
    #[inline(always)]
    fn half_quads(self, bytes: &[u8], at: usize, stride: usize) -> F {
        let mut out = [[0; 2]; 2];
        for (t, quad) in out.as_flattened_mut().iter_mut().enumerate() {
            let mut bytes8 = [0; 8];
            bytes8.copy_from_slice(&bytes[at + t * stride..][..8]);
            *quad = i64::from_le_bytes(bytes8);
        }
        let [[a, b], [c, d]] = out;
        cpu! {
            [_mm256_cvtph_ps(_mm_set_epi64x(b, a)), _mm256_cvtph_ps(_mm_set_epi64x(d, c))]
        }
    }
    #[inline(always)]
    fn half_low(self, x: I) -> F {
        let low = both!(_mm256_and_si256, x, self.int(0xFFFF));
        cpu! {
            let halves = _mm256_permute4x64_epi64::<0xD8>(_mm256_packus_epi32(low[0], low[1]));
            let high = _mm256_extracti128_si256::<1>(halves);
            [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(high)]
        }
    }
    #[inline(always)]
    fn to_half(self, x: F) -> [u16; 16] {
        let mut out = [[0u16; 8]; 2];
        for (out, x) in out.iter_mut().zip(x) {
            cpu! {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                _mm_storeu_si128(out.as_mut_ptr().cast(), halves);
            }
        }
        bytemuck::cast(out)
    }
    #[inline(always)]
    fn tokens_half(self, lines: [F; 8]) -> F {
        let mut out = [lines[0][0]; 2];
        for (half, out) in out.iter_mut().enumerate() {
            let l = &lines[4 * half..4 * half + 4];
            cpu! {
                let add = [
                    _mm256_add_ps(l[0][0], l[0][1]), _mm256_add_ps(l[1][0], l[1][1]),
                    _mm256_add_ps(l[2][0], l[2][1]), _mm256_add_ps(l[3][0], l[3][1]),
                ];
                let sums = join(add_pairs(add[0], add[1]), add_pairs(add[2], add[3]));
                *out = _mm256_permute_ps::<0xD8>(sums);
            }
        }
        out
    }
    #[inline(always)]
    fn channels_half(self, lines: [F; 8]) -> F {
        cpu! {
            let mut sums = [lines[0][0]; 8];
            for (sum, line) in sums.iter_mut().zip(lines) {
                *sum = _mm256_add_ps(line[0], line[1]);
            }
            let [a, b, c, d, e, f, g, h] = sums;
            let x = add_pairs(add_pairs(a, b), add_pairs(c, d)); // [w] of r = 0..4
            let y = add_pairs(add_pairs(e, f), add_pairs(g, h));
            [_mm256_permute2f128_ps::<0x20>(x, y), _mm256_permute2f128_ps::<0x31>(x, y)]
        }
    }
    #[inline(always)]
    fn fan(self, x: F) -> [F; 2] {
        let twice = |x: __m256| {
            cpu! { [_mm256_permute2f128_ps::<0x00>(x, x), _mm256_permute2f128_ps::<0x11>(x, x)] }
        };
        [twice(x[0]), twice(x[1])]
    }
    #[inline(always)]
    fn swap_pairs(self, x: F) -> F {
        both!(_mm256_shuffle_ps::<0x4E>, x, x)
    }
    #[inline(always)]
    fn swap_fours(self, x: F) -> F {
        both!(_mm256_permute2f128_ps::<0x01>, x, x)
    }
}
