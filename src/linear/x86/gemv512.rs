//! Few tokens with AVX-512 and VNNI: 64 weights of a row at a time, straight from the file's bytes.

use super::units512::{Q4_0, Q4_1, Q4K, Q6K, Q8_0, Unit};
use crate::linear::kind::{WeightType, Weights};
use crate::linear::out::Out;
use crate::linear::q8::{Block, row_blocks};
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes between the weights that are used and those that are fetched, about 300 ns at 12 GB/s. Four
/// rows are read at once but fetched as what they are, one run of memory: the hardware prefetcher
/// does not follow four short streams, and left alone this loop reaches a third of the bandwidth.
const AHEAD: usize = 4096;

/// `y[.., rows]` for all tokens; false, and nothing done, for float formats. Only on CPUs of
/// [`crate::simd::Level::Avx512`].
pub fn rows(weights: &Weights<'_>, rows: Range<usize>, q: &[Block<1>], y: &Out<'_>) -> bool {
    match weights.kind() {
        WeightType::Q4_0 => tokens::<Q4_0>(weights, rows, q, y),
        WeightType::Q4_1 => tokens::<Q4_1>(weights, rows, q, y),
        WeightType::Q8_0 => tokens::<Q8_0>(weights, rows, q, y),
        WeightType::Q4K => tokens::<Q4K>(weights, rows, q, y),
        WeightType::Q6K => tokens::<Q6K>(weights, rows, q, y),
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => return false,
    }
    true
}

/// Weights of one call: four rows at a time while there are, and two tokens.
fn tokens<U: Unit>(weights: &Weights<'_>, rows: Range<usize>, q: &[Block<1>], y: &Out<'_>) {
    let stride = row_blocks(weights.cols());
    let tokens = q.len() / stride;
    for token in (0..tokens).step_by(2) {
        let q = &q[token * stride..];
        let four = rows.start..rows.start + rows.len() / 4 * 4;
        if tokens - token >= 2 {
            block::<U, 4, 2>(weights, four.clone(), q, token, y);
            block::<U, 1, 2>(weights, four.end..rows.end, q, token, y);
        } else {
            block::<U, 4, 1>(weights, four.clone(), q, token, y);
            block::<U, 1, 1>(weights, four.end..rows.end, q, token, y);
        }
    }
}

fn block<U: Unit, const R: usize, const N: usize>(
    weights: &Weights<'_>,
    rows: Range<usize>,
    q: &[Block<1>],
    token: usize,
    y: &Out<'_>,
) {
    let stride = row_blocks(weights.cols());
    let q: [&[Block<1>]; N] = std::array::from_fn(|t| &q[t * stride..][..stride]);
    for row in rows.step_by(R) {
        let bytes: [&[u8]; R] = std::array::from_fn(|r| weights.row(row + r));
        // SAFETY: the caller checked the level; rows and activations are whole and of equal length.
        let sums = unsafe { dot::<U, R, N>(bytes, q) };
        for (t, sums) in sums.iter().enumerate() {
            // SAFETY: rows of different units are disjoint.
            unsafe { y.put(token + t, row, sums) };
        }
    }
}

/// Dot products of `R` rows and `N` tokens.
///
/// # Safety
/// The CPU must be of level Avx512. Every row holds whole blocks, every `q` as many blocks of 32 as
/// a row, rounded up to an even number.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn dot<U: Unit, const R: usize, const N: usize>(
    rows: [&[u8]; R],
    q: [&[Block<1>]; N],
) -> [[f32; R]; N] {
    let mut sums = [[_mm512_setzero_ps(); N]; R];
    let units = rows[0].len() / U::BYTES;
    let rest = rows[0].len() - units * U::BYTES;
    // Half a unit may be left, one block of 32: it is read beside a block of zeros.
    let mut padded = [[0u8; 68]; R];
    for (padded, row) in padded.iter_mut().zip(rows) {
        padded[..rest].copy_from_slice(&row[units * U::BYTES..]);
    }
    for unit in 0..units + usize::from(rest > 0) {
        let whole = unit < units;
        let start = |r: usize| match whole {
            true => rows[r].as_ptr().wrapping_add(unit * U::BYTES),
            false => padded[r].as_ptr(),
        };
        for line in (0..R * U::BYTES).step_by(64) {
            let used = rows[0].as_ptr().wrapping_add(unit * R * U::BYTES + line);
            _mm_prefetch::<_MM_HINT_T0>(used.wrapping_add(AHEAD).cast());
        }
        // SAFETY: each row holds `units` whole units; no unit of 32-blocks is larger than `padded`.
        unsafe { step::<U, R, N>(std::array::from_fn(start), q, unit, &mut sums) };
    }
    std::array::from_fn(|t| std::array::from_fn(|r| _mm512_reduce_add_ps(sums[r][t])))
}

/// Adds one unit of each row to `sums`.
///
/// # Safety
/// `rows` are readable for `U::BYTES`, `q` has the blocks that belong to `unit`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn step<U: Unit, const R: usize, const N: usize>(
    rows: [*const u8; R],
    q: [&[Block<1>]; N],
    unit: usize,
    sums: &mut [[__m512; N]; R],
) {
    // SAFETY: by this function's contract.
    let scales = unsafe { rows.map(|row| U::scales(row)) };
    for i in 0..U::PAIRS {
        let at = 2 * (unit * U::PAIRS + i);
        // SAFETY: the pair of blocks at `at` belongs to this unit.
        let token = |t: usize| unsafe { tokens_at(q[t].as_ptr().add(at), U::BIAS, U::OFFSET) };
        let q: [Tokens; N] = std::array::from_fn(token);
        for r in 0..R {
            // SAFETY: `i` is below `PAIRS`.
            let w = unsafe { U::pair(rows[r], scales[r], i) };
            for (q, sum) in q.iter().zip(&mut sums[r]) {
                let dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(q.start, w.codes, q.codes));
                *sum = _mm512_fmadd_ps(_mm512_mul_ps(dot, q.scale), w.scale, *sum);
                if U::OFFSET {
                    *sum = _mm512_fmadd_ps(w.offset, q.sum, *sum);
                }
            }
        }
    }
}

/// 64 activations of a token.
struct Tokens {
    codes: __m512i,
    /// Minus the weights' bias times the codes: where integer sums start.
    start: __m512i,
    /// Scales of the two blocks, each in its eight lanes.
    scale: __m512,
    /// Scaled sums of the two blocks, each in one lane.
    sum: __m512,
}

/// # Safety
/// `q` is followed by a second block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn tokens_at(q: *const Block<1>, bias: i8, offset: bool) -> Tokens {
    // SAFETY: by this function's contract.
    let (a, b) = unsafe { (&*q, &*q.add(1)) };
    // SAFETY: the codes of a block are 32 bytes.
    let codes = unsafe {
        let low = _mm512_castsi256_si512(_mm256_loadu_si256(a.q.as_ptr().cast()));
        _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(b.q.as_ptr().cast()))
    };
    let zero = _mm512_setzero_si512();
    let start = if bias == 0 {
        zero
    } else {
        _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(bias), codes))
    };
    let scale = _mm512_mask_mov_ps(_mm512_set1_ps(a.d[0]), 0xff00, _mm512_set1_ps(b.d[0]));
    let sum = if offset {
        let first = _mm512_maskz_mov_ps(0x0001, _mm512_set1_ps(a.dsum[0]));
        _mm512_mask_mov_ps(first, 0x0100, _mm512_set1_ps(b.dsum[0]))
    } else {
        _mm512_setzero_ps()
    };
    Tokens { codes, start, scale, sum }
}
