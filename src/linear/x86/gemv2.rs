//! Few tokens with AVX2: formats with blocks of 32, straight from the file's bytes.

use super::avx2::{pairs, widen};
use crate::linear::kind::{WeightType, Weights};
use crate::linear::out::Out;
use crate::linear::q8::{Block, row_blocks};
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes between the weights that are used and those that are fetched; see `gemv512`.
const AHEAD: usize = 4096;

const Q8_0: u8 = 0;
const Q4_0: u8 = 1;
const Q4_1: u8 = 2;

/// `y[.., rows]` for all tokens; false, and nothing done, for other formats. Only on CPUs of
/// [`crate::simd::Level::Avx2`].
pub fn rows(weights: &Weights<'_>, rows: Range<usize>, q: &[Block<1>], y: &Out<'_>) -> bool {
    match weights.kind() {
        WeightType::Q8_0 => tokens::<Q8_0, 34>(weights, rows, q, y),
        WeightType::Q4_0 => tokens::<Q4_0, 18>(weights, rows, q, y),
        WeightType::Q4_1 => tokens::<Q4_1, 20>(weights, rows, q, y),
        _ => return false,
    }
    true
}

fn tokens<const KIND: u8, const BYTES: usize>(
    weights: &Weights<'_>,
    rows: Range<usize>,
    q: &[Block<1>],
    y: &Out<'_>,
) {
    let four = rows.start..rows.start + rows.len() / 4 * 4;
    for (token, q) in q.chunks_exact(row_blocks(weights.cols())).enumerate() {
        block::<KIND, BYTES, 4>(weights, four.clone(), q, token, y);
        block::<KIND, BYTES, 1>(weights, four.end..rows.end, q, token, y);
    }
}

fn block<const KIND: u8, const BYTES: usize, const R: usize>(
    weights: &Weights<'_>,
    rows: Range<usize>,
    q: &[Block<1>],
    token: usize,
    y: &Out<'_>,
) {
    for row in rows.step_by(R) {
        let bytes = std::array::from_fn(|r| weights.row(row + r).as_chunks::<BYTES>().0);
        // SAFETY: the caller checked the level.
        let sums = unsafe { dot::<KIND, BYTES, R>(bytes, q) };
        // SAFETY: rows of different units are disjoint.
        unsafe { y.put(token, row, &sums) };
    }
}

/// Dot products of `R` rows, which lie one after the other, and a token.
///
/// # Safety
/// The CPU must be of level Avx2.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<const KIND: u8, const BYTES: usize, const R: usize>(
    rows: [&[[u8; BYTES]]; R],
    q: &[Block<1>],
) -> [f32; R] {
    let (mut sums, mut offsets) = ([_mm256_setzero_ps(); R], [_mm_setzero_ps(); R]);
    let start = rows[0].as_ptr().cast::<u8>();
    for (b, token) in q.iter().enumerate().take(rows[0].len()) {
        for line in (0..R * BYTES).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(b * R * BYTES + line + AHEAD).cast());
        }
        // SAFETY: the codes of a block are 32 bytes, at its start, which is aligned.
        let codes = unsafe { _mm256_load_si256(token.q.as_ptr().cast()) };
        let bias = match KIND {
            Q4_0 => widen(pairs::<false>(_mm256_set1_epi8(8), codes)),
            _ => _mm256_setzero_si256(),
        };
        let (scale, sum) = (_mm256_set1_ps(token.d[0]), _mm_set1_ps(token.dsum[0]));
        for r in 0..R {
            let (weights, halves) = read::<KIND, BYTES>(&rows[r][b]);
            let dot = match KIND {
                Q8_0 => widen(pairs::<true>(weights, codes)),
                _ => _mm256_sub_epi32(widen(pairs::<false>(weights, codes)), bias),
            };
            let scaled = _mm256_mul_ps(_mm256_broadcastss_ps(halves), scale);
            sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scaled, sums[r]);
            if KIND == Q4_1 {
                offsets[r] = _mm_fmadd_ps(halves, sum, offsets[r]);
            }
        }
    }
    std::array::from_fn(|r| {
        let half = _mm_add_ps(_mm256_castps256_ps128(sums[r]), _mm256_extractf128_ps::<1>(sums[r]));
        let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
        let offset = if KIND == Q4_1 { _mm_movehdup_ps(offsets[r]) } else { _mm_setzero_ps() };
        let sum = _mm_add_ss(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)), offset);
        _mm_cvtss_f32(sum)
    })
}

/// Codes of a block, for `Q8_0` with the bias that [`pairs`] takes off, and d (and m) in the first lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn read<const KIND: u8, const BYTES: usize>(block: &[u8; BYTES]) -> (__m256i, __m128) {
    let halves = i32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    let halves = _mm_cvtph_ps(_mm_cvtsi32_si128(halves));
    let at = if KIND == Q4_1 { 4 } else { 2 };
    if KIND == Q8_0 {
        // SAFETY: the slice holds 32 bytes.
        let codes = unsafe { _mm256_loadu_si256(block[at..][..32].as_ptr().cast()) };
        return (_mm256_xor_si256(codes, _mm256_set1_epi8(-128)), halves);
    }
    // SAFETY: the slice holds 16 bytes.
    let packed = unsafe { _mm_loadu_si128(block[at..][..16].as_ptr().cast()) };
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
    (_mm256_and_si256(both, _mm256_set1_epi8(15)), halves)
}
