//! Panel times tokens with AVX-512 and VNNI: a vector is 16 rows, one integer or float sum a token.
//!
//! A step multiplies four codes of 16 rows (one vector) by four codes of a token (one broadcast word):
//! 64 products an instruction, and eight tokens keep eight sums in flight, which covers its latency.

use crate::linear::gemm::Tile;
use crate::linear::kind::Quant;
use crate::linear::panel::{Codes, Lanes, ROWS};
use crate::linear::q8::{BLOCK, Block, GROUP};
use std::arch::x86_64::*;

/// Results for the first `tokens` tokens of the group; only on CPUs of [`crate::simd::Level::Avx512`].
pub fn integer_tile(quant: Quant, codes: &Codes, q: &[Block<GROUP>], tokens: usize) -> Tile {
    assert!(codes.words.len() <= q.len() * (BLOCK / 4));
    assert!(codes.scale.len() * quant.group == codes.words.len() * 4);
    assert!(codes.offset.len() == codes.scale.len());
    // SAFETY: the level was checked by the caller and the lengths above.
    unsafe {
        match (quant.bias, tokens > GROUP / 2) {
            (0, true) => integer::<8, 8, 0>(codes, q),
            (0, false) => integer::<4, 8, 0>(codes, q),
            (8, true) => integer::<8, 8, 3>(codes, q),
            (8, false) => integer::<4, 8, 3>(codes, q),
            (32, true) => integer::<8, 4, 5>(codes, q),
            (32, false) => integer::<4, 4, 5>(codes, q),
            (_, true) => integer::<8, 8, 7>(codes, q),
            (_, false) => integer::<4, 8, 7>(codes, q),
        }
    }
}

/// `N` tokens; a scale every `STEPS` words of codes; bias `1 << SHIFT`, or offsets where `SHIFT` is 0.
/// Sums of a group start at minus the bias times the sum of its activations.
///
/// # Safety
/// Lengths as [`integer_tile`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn integer<const N: usize, const STEPS: usize, const SHIFT: u32>(
    codes: &Codes,
    q: &[Block<GROUP>],
) -> Tile {
    let parts = BLOCK / 4 / STEPS;
    let mut sums = [_mm512_setzero_ps(); N];
    for (group, (scale, offset)) in codes.scale.iter().zip(&codes.offset).enumerate() {
        let part = group % parts;
        // SAFETY: there are `parts` groups to a block, and a block for every group.
        let block = unsafe { q.get_unchecked(group / parts) };
        let neg = if parts == 1 { &block.neg } else { &block.neg_half[part] };
        let mut dots: [__m512i; N] = std::array::from_fn(|t| match SHIFT {
            0 => _mm512_setzero_si512(),
            _ => _mm512_slli_epi32::<SHIFT>(_mm512_set1_epi32(neg[t])),
        });
        for step in 0..STEPS {
            // SAFETY: there are `STEPS` words of codes to a group.
            let word = unsafe { codes.words.get_unchecked(group * STEPS + step) };
            // SAFETY: `Lanes` is 64 bytes, aligned to 64.
            let word = unsafe { _mm512_load_si512(word.0.as_ptr().cast()) };
            for (dot, q) in dots.iter_mut().zip(block.q[part * STEPS + step]) {
                let q = i32::from_le_bytes(q.map(i8::cast_unsigned));
                *dot = _mm512_dpbusd_epi32(*dot, word, _mm512_set1_epi32(q));
            }
        }
        let (scale, offset) = (lanes(scale), lanes(offset));
        for t in 0..N {
            let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), _mm512_set1_ps(block.d[t]));
            sums[t] = _mm512_fmadd_ps(dot, scale, sums[t]);
            if SHIFT == 0 {
                sums[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(block.dsum[t]), sums[t]);
            }
        }
    }
    tile_of(sums)
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
