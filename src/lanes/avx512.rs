//! [`Lanes`] in one 512-bit register.

use super::{Kernel, Lanes, Line, Row};
use std::arch::x86_64::*;

/// Made only by [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// # Safety
/// The CPU has AVX-512 F, BW, VL, DQ and VNNI, and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512(()));
}

/// One intrinsic: an `Avx512` exists only inside [`run`], so the CPU has it.
macro_rules! cpu {
    ($($body:tt)*) => {{
        // SAFETY: an `Avx512` proves the instructions; pointers come from references of the right size.
        unsafe { $($body)* }
    }};
}

/// Sums over the four 128-bit lanes of four vectors: lane `i` of the result belongs to vector `i`.
#[inline(always)]
fn add_lanes(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m512i {
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
fn gather_lanes(x: __m512) -> [f32; 4] {
    let mut out = [0.0; 4];
    cpu! {
        let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
    }
    out
}

/// Sums of neighbours, the sums of `a` before those of `b` in each 128-bit lane.
#[inline(always)]
fn add_pairs(a: __m512, b: __m512) -> __m512 {
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

static TOKENS: [Row<i32>; 2] = [token_indices(0), token_indices(1)];
static CHANNELS: [Row<i32>; 2] = [channel_indices(0), channel_indices(1)];

impl Lanes for Avx512 {
    type I = __m512i;
    type F = __m512;
    const HEADS: usize = 4;

    #[inline(always)]
    fn int(self, x: i32) -> __m512i {
        cpu! { _mm512_set1_epi32(x) }
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
    fn add_int(self, a: __m512i, b: __m512i) -> __m512i {
        cpu! { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        cpu! { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        cpu! { _mm512_or_si512(a, b) }
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
    fn dot(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        cpu! { _mm512_dpwssd_epi32(acc, a, b) }
    }
    #[inline(always)]
    fn pack(self, a: __m512i, b: __m512i) -> __m512i {
        cpu! { _mm512_packs_epi32(a, b) }
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
    fn join_low(self, a: __m512i, b: __m512i) -> __m512i {
        cpu! { _mm512_shuffle_i32x4::<0x44>(a, b) }
    }
    #[inline(always)]
    fn join_high(self, a: __m512i, b: __m512i) -> __m512i {
        cpu! { _mm512_shuffle_i32x4::<0xEE>(a, b) }
    }
    #[inline(always)]
    fn float(self, x: __m512i) -> __m512 {
        cpu! { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512i {
        cpu! { _mm512_cvtps_epi32(x) }
    }
    #[inline(always)]
    fn power(self, n: __m512i) -> __m512 {
        cpu! {
            let biased = _mm512_add_epi32(n, _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        cpu! { _mm512_set1_ps(x) }
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
    fn add(self, a: __m512, b: __m512) -> __m512 {
        cpu! { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        cpu! { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        cpu! { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        cpu! { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        cpu! { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        cpu! { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        cpu! { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, x: __m512) -> __m512 {
        cpu! { _mm512_abs_ps(x) }
    }
    #[inline(always)]
    fn positive(self, s: __m512, x: __m512) -> __m512 {
        cpu! {
            let yes = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s, _mm512_setzero_ps());
            _mm512_maskz_mov_ps(yes, x)
        }
    }
    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        cpu! { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    fn top(self, x: __m512) -> f32 {
        cpu! { _mm512_reduce_max_ps(x) }
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
