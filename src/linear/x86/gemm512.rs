//! Panel times tokens with AVX-512 and VNNI: a vector is 16 rows, one integer or float sum a token.
//!
//! A step multiplies four codes of 16 rows (one vector) by four codes of a token (one broadcast word):
//! 64 products an instruction, and eight tokens keep eight sums in flight, which covers its latency.

use crate::linear::gemm::Tile;
use crate::linear::kind::Quant;
use crate::linear::panel::{Codes, Lanes, ROWS};
use crate::linear::q8::{Block, GROUP};
use std::arch::x86_64::*;

/// Results for the first `tokens` tokens of the group; only on CPUs of [`crate::simd::Level::Avx512`].
pub fn integer_tile(quant: Quant, codes: &Codes, q: &[Block<GROUP>], tokens: usize) -> Tile {
    assert!(q.len() * 8 >= codes.words.len());
    assert!(codes.scale.len() * quant.group == codes.words.len() * 4);
    assert!(codes.offset.len() == codes.scale.len());
    // SAFETY: the level was checked by the caller and the lengths above.
    unsafe {
        match (quant.bias, quant.group, tokens > GROUP / 2) {
            (0, _, true) => affine::<8>(codes, q),
            (0, _, false) => affine::<4>(codes, q),
            (128, _, true) => biased::<8, 7>(codes, q),
            (128, _, false) => biased::<4, 7>(codes, q),
            (8, _, true) => biased::<8, 3>(codes, q),
            (8, _, false) => biased::<4, 3>(codes, q),
            (_, _, true) => halves::<8>(codes, q),
            (_, _, false) => halves::<4>(codes, q),
        }
    }
}

/// Adds the products of `steps` words of codes and of `q` (words of eight tokens each) to `sums`.
///
/// # Safety
/// `words` must hold `steps` vectors, `q` `steps` groups of words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn accumulate<const N: usize, const STEPS: usize>(
    words: *const Lanes<u32>,
    q: *const [[i8; 4]; GROUP],
    mut sums: [__m512i; N],
) -> [__m512i; N] {
    for step in 0..STEPS {
        // SAFETY: `step` is in bounds by this function's contract.
        let (word, q) = unsafe { (_mm512_load_si512(words.add(step).cast()), &*q.add(step)) };
        for (sum, &q) in sums.iter_mut().zip(q) {
            let q = i32::from_le_bytes(q.map(i8::cast_unsigned));
            *sum = _mm512_dpbusd_epi32(*sum, word, _mm512_set1_epi32(q));
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn lanes(values: &Lanes<f32>) -> __m512 {
    // SAFETY: `Lanes` is 64 bytes, aligned to 64.
    unsafe { _mm512_load_ps(values.0.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn tile_of<const N: usize>(sums: [__m512; N]) -> Tile {
    let mut tile = [[0.0; ROWS]; GROUP];
    for (out, sum) in tile.iter_mut().zip(sums) {
        // SAFETY: a row of a tile is 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }
    tile
}

/// Formats with an offset a group of 32.
///
/// # Safety
/// Lengths as [`integer_tile`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn affine<const N: usize>(codes: &Codes, q: &[Block<GROUP>]) -> Tile {
    let mut sums = [_mm512_setzero_ps(); N];
    for (b, (scale, offset)) in codes.scale.iter().zip(&codes.offset).enumerate() {
        // SAFETY: `b` counts blocks of 8 words; `q` has at least as many.
        let (block, dots) = unsafe {
            let block = q.get_unchecked(b);
            let words = codes.words.as_ptr().add(b * 8);
            (block, accumulate::<N, 8>(words, block.q.as_ptr(), [_mm512_setzero_si512(); N]))
        };
        let (scale, offset) = (lanes(scale), lanes(offset));
        for t in 0..N {
            let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), _mm512_set1_ps(block.d[t]));
            sums[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(block.dsum[t]), sums[t]);
            sums[t] = _mm512_fmadd_ps(dot, scale, sums[t]);
        }
    }
    tile_of(sums)
}

/// Formats with a scale a group of 32 and the bias `1 << SHIFT`.
///
/// # Safety
/// Lengths as [`integer_tile`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn biased<const N: usize, const SHIFT: u32>(codes: &Codes, q: &[Block<GROUP>]) -> Tile {
    let mut sums = [_mm512_setzero_ps(); N];
    for (b, scale) in codes.scale.iter().enumerate() {
        // SAFETY: `b` counts blocks of 8 words; `q` has at least as many.
        let (block, dots) = unsafe {
            let block = q.get_unchecked(b);
            let words = codes.words.as_ptr().add(b * 8);
            let bias = |t: usize| _mm512_slli_epi32::<SHIFT>(_mm512_set1_epi32(block.neg[t]));
            (block, accumulate::<N, 8>(words, block.q.as_ptr(), std::array::from_fn(bias)))
        };
        let scale = lanes(scale);
        for t in 0..N {
            let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), _mm512_set1_ps(block.d[t]));
            sums[t] = _mm512_fmadd_ps(dot, scale, sums[t]);
        }
    }
    tile_of(sums)
}

/// Formats with a scale a group of 16 and the bias 32.
///
/// # Safety
/// Lengths as [`integer_tile`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn halves<const N: usize>(codes: &Codes, q: &[Block<GROUP>]) -> Tile {
    let mut sums = [_mm512_setzero_ps(); N];
    for (g, scale) in codes.scale.iter().enumerate() {
        let half = g % 2;
        // SAFETY: `g` counts groups of 4 words, two a block; `q` has at least as many blocks.
        let (block, dots) = unsafe {
            let block = q.get_unchecked(g / 2);
            let (words, q) = (codes.words.as_ptr().add(g * 4), block.q.as_ptr().add(half * 4));
            let neg = &block.neg_half[half];
            let bias = |t: usize| _mm512_slli_epi32::<5>(_mm512_set1_epi32(neg[t]));
            (block, accumulate::<N, 4>(words, q, std::array::from_fn(bias)))
        };
        let scale = lanes(scale);
        for t in 0..N {
            let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), _mm512_set1_ps(block.d[t]));
            sums[t] = _mm512_fmadd_ps(dot, scale, sums[t]);
        }
    }
    tile_of(sums)
}

/// Decoded floats of 16 rows times up to eight tokens; only on CPUs of [`crate::simd::Level::Avx512`].
pub fn float_tile(floats: &[Lanes<f32>], x: &[f32]) -> Tile {
    let tokens = x.len() / floats.len();
    // SAFETY: the level was checked by the caller; rows beyond `tokens` repeat the last one.
    unsafe {
        if tokens > GROUP / 2 {
            float::<8>(floats, x, tokens)
        } else {
            float::<4>(floats, x, tokens)
        }
    }
}

/// # Safety
/// `x` holds `tokens` rows, at least one, of as many floats as the panel has columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn float<const N: usize>(floats: &[Lanes<f32>], x: &[f32], tokens: usize) -> Tile {
    let cols = floats.len();
    let starts: [*const f32; N] = std::array::from_fn(|t| x[t.min(tokens - 1) * cols..].as_ptr());
    let mut sums = [_mm512_setzero_ps(); N];
    for (c, column) in floats.iter().enumerate() {
        let column = lanes(column);
        for (sum, start) in sums.iter_mut().zip(starts) {
            // SAFETY: `c < cols`, the length of a row.
            let x = _mm512_set1_ps(unsafe { *start.add(c) });
            *sum = _mm512_fmadd_ps(column, x, *sum);
        }
    }
    tile_of(sums)
}
