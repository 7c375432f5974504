//! How AVX-512 reads 64 consecutive weights of each quantised format.

use std::arch::x86_64::*;

/// 64 weights: a value is `(code - bias) * scale + offset`, with scale and offset of the dword lane
/// that holds the code.
pub struct Pair {
    pub codes: __m512i,
    pub scale: __m512,
    pub offset: __m512,
}

/// A run of whole blocks that holds a multiple of 64 weights.
pub trait Unit {
    /// Bytes of a unit.
    const BYTES: usize;
    /// Blocks of 64 weights in it.
    const PAIRS: usize;
    /// Subtracted from every code.
    const BIAS: i8;
    /// Whether offsets are other than zero.
    const OFFSET: bool;
    /// Decoded scales of the unit.
    type Scales: Copy;

    /// # Safety
    /// `unit` must be readable for `BYTES` bytes; the CPU must have the instructions.
    unsafe fn scales(unit: *const u8) -> Self::Scales;

    /// # Safety
    /// As [`Unit::scales`]; `i` below `PAIRS`.
    unsafe fn pair(unit: *const u8, scales: Self::Scales, i: usize) -> Pair;
}

/// The upper eight dword lanes: the second block of a pair.
const SECOND: __mmask16 = 0xff00;

macro_rules! simd_fn {
    ($($body:tt)*) => {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
        $($body)*
    };
}

simd_fn! {
/// Lanes 0..8 take float `first`, lanes 8..16 float `first + step` of `values`.
fn spread(values: __m512, first: usize, step: usize) -> __m512 {
    let low = _mm512_set1_epi32(first as i32);
    _mm512_permutexvar_ps(_mm512_mask_add_epi32(low, SECOND, low, _mm512_set1_epi32(step as i32)), values)
}
}

simd_fn! {
/// The four half floats in `bits`, in lanes 0..4.
fn halves(bits: u64) -> __m512 {
    _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128(bits.cast_signed())))
}
}

simd_fn! {
/// Nibbles of two runs of 16 bytes: low ones then high ones of the first, then of the second.
unsafe fn nibbles(first: *const u8, second: *const u8) -> __m512i {
    // SAFETY: both are readable for 16 bytes by this function's contract.
    let (first, second) = unsafe { (_mm_loadu_si128(first.cast()), _mm_loadu_si128(second.cast())) };
    let both = _mm512_broadcast_i32x4(first);
    let both = _mm512_mask_broadcast_i32x4(both, SECOND, second);
    let shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15))
}
}

/// Two blocks of Q4_1.
pub struct Q4_1;

impl Unit for Q4_1 {
    const BYTES: usize = 40;
    const PAIRS: usize = 1;
    const BIAS: i8 = 0;
    const OFFSET: bool = true;
    type Scales = ();

    #[inline(always)]
    unsafe fn scales(_: *const u8) {}

    simd_fn! {
    unsafe fn pair(unit: *const u8, (): (), _: usize) -> Pair {
        // SAFETY: two blocks of 20 bytes: d, m, 16 bytes of nibbles.
        unsafe {
            let first = u64::from(unit.cast::<u32>().read_unaligned());
            let second = u64::from(unit.add(20).cast::<u32>().read_unaligned());
            let dm = halves(first | second << 32);
            let codes = nibbles(unit.add(4), unit.add(24));
            Pair { codes, scale: spread(dm, 0, 2), offset: spread(dm, 1, 2) }
        }
    }
    }
}

/// Two blocks of Q4_0.
pub struct Q4_0;

impl Unit for Q4_0 {
    const BYTES: usize = 36;
    const PAIRS: usize = 1;
    const BIAS: i8 = 8;
    const OFFSET: bool = false;
    type Scales = ();

    #[inline(always)]
    unsafe fn scales(_: *const u8) {}

    simd_fn! {
    unsafe fn pair(unit: *const u8, (): (), _: usize) -> Pair {
        // SAFETY: two blocks of 18 bytes: d, 16 bytes of nibbles.
        unsafe {
            let first = u64::from(unit.cast::<u16>().read_unaligned());
            let second = u64::from(unit.add(18).cast::<u16>().read_unaligned());
            let scale = spread(halves(first | second << 16), 0, 1);
            let codes = nibbles(unit.add(2), unit.add(20));
            Pair { codes, scale, offset: _mm512_setzero_ps() }
        }
    }
    }
}

/// Two blocks of Q8_0.
pub struct Q8_0;

impl Unit for Q8_0 {
    const BYTES: usize = 68;
    const PAIRS: usize = 1;
    const BIAS: i8 = -128; // 128 as an unsigned byte
    const OFFSET: bool = false;
    type Scales = ();

    #[inline(always)]
    unsafe fn scales(_: *const u8) {}

    simd_fn! {
    unsafe fn pair(unit: *const u8, (): (), _: usize) -> Pair {
        // SAFETY: two blocks of 34 bytes: d, 32 codes.
        unsafe {
            let first = u64::from(unit.cast::<u16>().read_unaligned());
            let second = u64::from(unit.add(34).cast::<u16>().read_unaligned());
            let scale = spread(halves(first | second << 16), 0, 1);
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(unit.add(2).cast()));
            let both = _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(unit.add(36).cast()));
            let codes = _mm512_xor_si512(both, _mm512_set1_epi8(-128));
            Pair { codes, scale, offset: _mm512_setzero_ps() }
        }
    }
    }
}

/// One block of Q4_K.
pub struct Q4K;

impl Unit for Q4K {
    const BYTES: usize = 144;
    const PAIRS: usize = 4;
    const BIAS: i8 = 0;
    const OFFSET: bool = true;
    /// Scales of the eight groups, then their offsets.
    type Scales = __m512;

    simd_fn! {
    unsafe fn scales(unit: *const u8) -> __m512 {
        // SAFETY: d, dmin and 12 bytes of 6-bit numbers are the first 16 bytes of the block.
        let (dm, [a, b, c]) = unsafe {
            let dm = u64::from(unit.cast::<u32>().read_unaligned());
            (dm, unit.add(4).cast::<[u32; 3]>().read_unaligned())
        };
        // Bytes 0..4 hold scales 0..4, bytes 4..8 minima 0..4, bytes 8..12 nibbles of both for 4..8;
        // the top bits of the first eight bytes complete those.
        let (low6, low4, top2) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
        let (scale_high, min_high) = (c & low4 | a >> 2 & top2, c >> 4 & low4 | b >> 2 & top2);
        let scales = u64::from(a & low6) | u64::from(scale_high) << 32;
        let mins = u64::from(b & low6) | u64::from(min_high) << 32;
        let bytes = _mm_set_epi64x(mins.cast_signed(), scales.cast_signed());
        // dmin changes its sign (bit 15 of the second half float): offsets are -dmin * m.
        let factors = spread(halves(dm ^ 0x8000_0000), 0, 1);
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), factors)
    }
    }

    simd_fn! {
    unsafe fn pair(unit: *const u8, scales: __m512, i: usize) -> Pair {
        // SAFETY: nibbles are bytes 16..144, 32 for each pair.
        let packed = unsafe { _mm256_loadu_si256(unit.add(16 + 32 * i).cast()) };
        let shift = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
        let codes = _mm512_srlv_epi64(_mm512_broadcast_i64x4(packed), shift);
        let codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
        Pair { codes, scale: spread(scales, 2 * i, 1), offset: spread(scales, 2 * i + 8, 1) }
    }
    }
}

/// One block of Q6_K.
pub struct Q6K;

impl Unit for Q6K {
    const BYTES: usize = 210;
    const PAIRS: usize = 4;
    const BIAS: i8 = 32;
    const OFFSET: bool = false;
    /// Scales of the 16 groups.
    type Scales = __m512;

    simd_fn! {
    unsafe fn scales(unit: *const u8) -> __m512 {
        // SAFETY: 16 signed bytes at 192, then d.
        let (bytes, d) = unsafe {
            (_mm_loadu_si128(unit.add(192).cast()), unit.add(208).cast::<u16>().read_unaligned())
        };
        let scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        _mm512_mul_ps(scales, spread(halves(u64::from(d)), 0, 0))
    }
    }

    simd_fn! {
    unsafe fn pair(unit: *const u8, scales: __m512, i: usize) -> Pair {
        let (half, high) = (i / 2, i64::from(i as u8 % 2));
        // SAFETY: a half has 64 bytes of low nibbles (from 0) and 32 of bit pairs (from 128).
        let (low, pairs) = unsafe {
            let pairs = _mm256_loadu_si256(unit.add(128 + 32 * half).cast());
            (_mm512_loadu_si512(unit.add(64 * half).cast()), _mm512_broadcast_i64x4(pairs))
        };
        let low = _mm512_srlv_epi64(low, _mm512_set1_epi64(4 * high));
        let low = _mm512_and_si512(low, _mm512_set1_epi8(15));
        let (a, b) = (4 * high, 4 * high + 2);
        let pairs = _mm512_srlv_epi64(pairs, _mm512_set_epi64(b, b, b, b, a, a, a, a));
        let pairs = _mm512_and_si512(pairs, _mm512_set1_epi8(3));
        let codes = _mm512_or_si512(low, _mm512_slli_epi64::<4>(pairs));
        let group = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        let group = _mm512_add_epi32(group, _mm512_set1_epi32(4 * i as i32));
        Pair { codes, scale: _mm512_permutexvar_ps(group, scales), offset: _mm512_setzero_ps() }
    }
    }
}
