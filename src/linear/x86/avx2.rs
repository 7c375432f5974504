//! Kernels with AVX2 and FMA: products of bytes in pairs (`maddubs`), whose 16-bit sums must not
//! saturate.
//!
//! Nibbles stay below 2 * 15 * 127 * 8 = 30480 over a group of 32, so their pairs are widened once a group;
//! codes of Q6_K (2 * 63 * 127 = 16002) are widened at once; those of Q8_0 lose their bias, and their
//! sign moves to the activation (2 * 128 * 127 = 32512).

use crate::linear::gemm::Tile;
use crate::linear::kind::Quant;
use crate::linear::panel::{Codes, Lanes, ROWS};
use crate::linear::q8::{BLOCK, Block, GROUP};
use std::arch::x86_64::*;

/// Tokens that fit the sixteen registers.
const FEW: usize = 4;

/// Pairs of products of codes and activations.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub fn pairs<const SIGNED: bool>(codes: __m256i, q: __m256i) -> __m256i {
    if SIGNED {
        let w = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w))
    } else {
        _mm256_maddubs_epi16(codes, q)
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub fn widen(pairs: __m256i) -> __m256i {
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// One decoded row times one token; only on CPUs of [`crate::simd::Level::Avx2`].
pub fn integer_dot(
    quant: Quant,
    codes: &[u8],
    scale: &[f32],
    offset: &[f32],
    q: &[Block<1>],
) -> f32 {
    assert!(scale.len() * quant.group == codes.len() && offset.len() == scale.len());
    assert!(codes.len() <= q.len() * BLOCK);
    // SAFETY: the level was checked by the caller and the lengths above.
    unsafe {
        if quant.bias == 128 {
            dot::<true>(quant, codes, scale, offset, q)
        } else {
            dot::<false>(quant, codes, scale, offset, q)
        }
    }
}

/// # Safety
/// The CPU must be of level Avx2.
#[target_feature(enable = "avx2,fma")]
unsafe fn dot<const SIGNED: bool>(
    quant: Quant,
    codes: &[u8],
    scale: &[f32],
    offset: &[f32],
    q: &[Block<1>],
) -> f32 {
    let per_block = BLOCK / quant.group;
    let bias = if SIGNED { 0 } else { quant.bias };
    let (mut sums, mut offsets) = (_mm256_setzero_ps(), 0.0);
    let scales = scale.chunks_exact(per_block).zip(offset.chunks_exact(per_block));
    for ((codes, (scale, offset)), block) in codes.as_chunks::<BLOCK>().0.iter().zip(scales).zip(q)
    {
        // SAFETY: codes and activations of a block are 32 bytes.
        let (codes, bytes) = unsafe {
            (_mm256_loadu_si256(codes.as_ptr().cast()), _mm256_load_si256(block.q.as_ptr().cast()))
        };
        // A half's bias goes to the first of its four lanes.
        let [first, second] = block.neg_half.map(|neg| bias * neg[0]);
        let start = _mm256_setr_epi32(first, 0, 0, 0, second, 0, 0, 0);
        let dots = _mm256_add_epi32(start, widen(pairs::<SIGNED>(codes, bytes)));
        let scale = match *scale {
            [first, second] => _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first)),
            _ => _mm256_set1_ps(scale[0]),
        };
        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(block.d[0]));
        sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, sums);
        offsets += offset[0] * block.dsum[0];
    }
    let mut lanes = [0f32; 8];
    // SAFETY: eight floats.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums) };
    lanes.iter().sum::<f32>() + offsets
}

/// A panel times a group of tokens, of which `tokens` count; only on CPUs of
/// [`crate::simd::Level::Avx2`].
pub fn integer_tile(quant: Quant, codes: &Codes, q: &[Block<GROUP>], tokens: usize) -> Tile {
    assert!(codes.words.len() <= q.len() * (BLOCK / 4));
    assert!(codes.scale.len() * quant.group == codes.words.len() * 4);
    assert!(codes.offset.len() == codes.scale.len());
    let mut tile = [[0.0; ROWS]; GROUP];
    for first in (0..tokens.min(GROUP)).step_by(FEW) {
        for row in [0, ROWS / 2] {
            // SAFETY: the level was checked by the caller and the lengths above.
            unsafe {
                match quant.bias {
                    0 => integer::<8, 0>(codes, q, first, row, &mut tile),
                    8 => integer::<8, 8>(codes, q, first, row, &mut tile),
                    32 => integer::<4, 32>(codes, q, first, row, &mut tile),
                    _ => integer::<8, 128>(codes, q, first, row, &mut tile),
                }
            }
        }
    }
    tile
}

/// Eight rows from `row` and four tokens from `first`; a scale every `STEPS` words of codes.
///
/// # Safety
/// The CPU must be of level Avx2; lengths as [`integer_tile`] checks them.
#[target_feature(enable = "avx2,fma")]
unsafe fn integer<const STEPS: usize, const BIAS: i32>(
    codes: &Codes,
    q: &[Block<GROUP>],
    first: usize,
    row: usize,
    tile: &mut Tile,
) {
    let parts = BLOCK / 4 / STEPS;
    let mut sums = [_mm256_setzero_ps(); FEW];
    for (group, (scale, offset)) in codes.scale.iter().zip(&codes.offset).enumerate() {
        let part = group % parts;
        let block = &q[group / parts];
        let neg = if parts == 1 { &block.neg } else { &block.neg_half[part] };
        let words = &codes.words[group * STEPS..][..STEPS];
        let mut dots = [_mm256_setzero_si256(); FEW];
        for (words, q) in words.iter().zip(&block.q[part * STEPS..]) {
            // SAFETY: eight words from `row`, which is 0 or 8.
            let words = unsafe { _mm256_load_si256(words.0.as_ptr().add(row).cast()) };
            for (dot, q) in dots.iter_mut().zip(&q[first..]) {
                let q = _mm256_set1_epi32(i32::from_le_bytes(q.map(i8::cast_unsigned)));
                let pairs = match BIAS {
                    128 => pairs::<true>(words, q),
                    _ => pairs::<false>(words, q),
                };
                *dot = match BIAS {
                    0 | 8 => _mm256_add_epi16(*dot, pairs),
                    _ => _mm256_add_epi32(*dot, widen(pairs)),
                };
            }
        }
        let (scale, offset) = (eight(scale, row), eight(offset, row));
        for (t, sum) in sums.iter_mut().enumerate() {
            let token = first + t;
            let dot = if matches!(BIAS, 0 | 8) { widen(dots[t]) } else { dots[t] };
            let bias = if BIAS == 128 { 0 } else { BIAS * neg[token] };
            let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dot, _mm256_set1_epi32(bias)));
            let scaled = _mm256_mul_ps(dot, _mm256_set1_ps(block.d[token]));
            *sum = _mm256_fmadd_ps(scaled, scale, *sum);
            if BIAS == 0 {
                *sum = _mm256_fmadd_ps(offset, _mm256_set1_ps(block.dsum[token]), *sum);
            }
        }
    }
    for (out, sum) in tile[first..].iter_mut().zip(sums) {
        // SAFETY: eight floats from `row`, which is 0 or 8, of 16.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(row), sum) };
    }
}

/// Values of the eight rows from `row`, which is 0 or 8.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn eight(values: &Lanes<f32>, row: usize) -> __m256 {
    // SAFETY: `values` are 16 floats, aligned to 64 bytes; the slice has eight.
    unsafe { _mm256_load_ps(values.0[row..][..8].as_ptr()) }
}

/// Decoded floats of 16 rows times up to eight tokens; only on CPUs of [`crate::simd::Level::Avx2`].
pub fn float_tile(floats: &[Lanes<f32>], x: &[f32]) -> Tile {
    let (cols, tokens) = (floats.len(), x.len() / floats.len());
    let mut tile = [[0.0; ROWS]; GROUP];
    for (first, tile) in (0..tokens).step_by(FEW).zip(tile.as_chunks_mut().0) {
        // Tokens beyond the last repeat it.
        let x = std::array::from_fn(|t| &x[(first + t).min(tokens - 1) * cols..][..cols]);
        // SAFETY: the level was checked by the caller, the rows of `x` are as long as `floats`.
        unsafe { float(floats, x, tile) };
    }
    tile
}

/// # Safety
/// The CPU must be of level Avx2; each `x` holds a float for each of `floats`.
#[target_feature(enable = "avx2,fma")]
unsafe fn float(floats: &[Lanes<f32>], x: [&[f32]; FEW], tile: &mut [[f32; ROWS]; FEW]) {
    let mut sums = [[_mm256_setzero_ps(); 2]; FEW];
    for (c, column) in floats.iter().enumerate() {
        let halves = [eight(column, 0), eight(column, 8)];
        for (sums, x) in sums.iter_mut().zip(x) {
            // SAFETY: by this function's contract.
            let x = _mm256_set1_ps(unsafe { *x.get_unchecked(c) });
            for (sum, half) in sums.iter_mut().zip(halves) {
                *sum = _mm256_fmadd_ps(half, x, *sum);
            }
        }
    }
    for (out, sums) in tile.iter_mut().zip(sums) {
        for (out, sum) in out.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            // SAFETY: eight floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}
