//! Decoding weight rows: to floats, and to byte codes with float scales.

use super::kind::{Quant, WeightType};

/// Codes are decoded to floats in pieces of this many elements: the largest block.
const PIECE: usize = 256;

/// Exact conversion of a half float, written so that it vectorises without F16C: the multiplication
/// rebiases the exponent and normalises subnormals; inf and NaN get their exponent back.
#[inline(always)]
pub(super) fn f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = if magnitude >= 0x7c00 << 13 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | u32::from(bits & 0x8000) << 16)
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Nibbles to bytes: low nibbles first, then high ones. `HALF` bytes to twice as many.
#[inline(always)]
fn nibbles<const HALF: usize>(packed: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(HALF);
    for ((&byte, low), high) in packed[..HALF].iter().zip(low).zip(&mut high[..HALF]) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// Scale and minimum of group `g` (of 8) in the 12 bytes of 6-bit numbers of a Q4_K block: groups 0
/// to 3 have a byte each, 4 to 7 a nibble each and the top two bits of those bytes.
#[inline(always)]
fn q4k_scale_min(packed: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        (packed[g] & 63, packed[g + 4] & 63)
    } else {
        let (scale_top, min_top) = (packed[g - 4] >> 6, packed[g] >> 6);
        (packed[g + 4] & 15 | scale_top << 4, packed[g + 4] >> 4 | min_top << 4)
    }
}

#[inline(always)]
fn q4k(block: &[u8; 144], codes: &mut [u8; 256], scale: &mut [f32; 8], offset: &mut [f32; 8]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (g, (scale, offset)) in scale.iter_mut().zip(offset).enumerate() {
        let (s, m) = q4k_scale_min(&block[4..16], g);
        (*scale, *offset) = (d * f32::from(s), -(dmin * f32::from(m)));
    }
    for (packed, codes) in block[16..].as_chunks::<32>().0.iter().zip(codes.chunks_exact_mut(64)) {
        nibbles::<32>(packed, codes);
    }
}

#[inline(always)]
fn q6k(block: &[u8; 210], codes: &mut [u8; 256], scale: &mut [f32; 16]) {
    let d = half_at(block, 208);
    for (scale, &s) in scale.iter_mut().zip(&block[192..208]) {
        *scale = d * f32::from(s.cast_signed());
    }
    let (low, high) = (block[..128].as_chunks::<64>().0, block[128..192].as_chunks::<32>().0);
    for ((low, high), codes) in low.iter().zip(high).zip(codes.as_chunks_mut::<128>().0) {
        nibbles::<64>(low, codes);
        for (quarter, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, &pairs) in codes.iter_mut().zip(high) {
                *code |= (pairs >> (2 * quarter) & 3) << 4;
            }
        }
    }
}

/// Walks whole blocks with sizes known to the compiler; without them nothing below vectorises.
#[inline(always)]
fn each_block<const BYTES: usize, const CODES: usize, const GROUPS: usize>(
    bytes: &[u8],
    codes: &mut [u8],
    scale: &mut [f32],
    offset: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [u8; CODES], &mut [f32; GROUPS], &mut [f32; GROUPS]),
) {
    let blocks = bytes.as_chunks().0.iter().zip(codes.as_chunks_mut().0);
    let scales = scale.as_chunks_mut().0.iter_mut().zip(offset.as_chunks_mut().0);
    for ((block, codes), (scale, offset)) in blocks.zip(scales) {
        decode(block, codes, scale, offset);
    }
}

/// Decodes whole blocks to codes, one scale a group and one offset a group (0 in formats without).
#[inline(always)]
fn unpack_any(
    kind: WeightType,
    bytes: &[u8],
    codes: &mut [u8],
    scale: &mut [f32],
    offset: &mut [f32],
) {
    match kind {
        WeightType::Q8_0 => {
            each_block::<34, 32, 1>(bytes, codes, scale, offset, |block, codes, scale, offset| {
                (scale[0], offset[0]) = (half_at(block, 0), 0.0);
                codes.iter_mut().zip(&block[2..]).for_each(|(code, q)| *code = q ^ 128);
            });
        }
        WeightType::Q4_0 => {
            each_block::<18, 32, 1>(bytes, codes, scale, offset, |block, codes, scale, offset| {
                (scale[0], offset[0]) = (half_at(block, 0), 0.0);
                nibbles::<16>(&block[2..], codes);
            });
        }
        WeightType::Q4_1 => {
            each_block::<20, 32, 1>(bytes, codes, scale, offset, |block, codes, scale, offset| {
                (scale[0], offset[0]) = (half_at(block, 0), half_at(block, 2));
                nibbles::<16>(&block[4..], codes);
            });
        }
        WeightType::Q4K => each_block::<144, 256, 8>(bytes, codes, scale, offset, q4k),
        WeightType::Q6K => {
            each_block::<210, 256, 16>(
                bytes,
                codes,
                scale,
                offset,
                |block, codes, scale, offset| {
                    q6k(block, codes, scale);
                    offset.fill(0.0);
                },
            );
        }
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => {}
    }
}

#[inline(always)]
fn dequantize_any(kind: WeightType, bytes: &[u8], out: &mut [f32]) {
    let halves = || bytes.as_chunks().0.iter().map(|&half| u16::from_le_bytes(half));
    match kind {
        WeightType::F32 => {
            let words = bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word));
            out.iter_mut().zip(words).for_each(|(out, word)| *out = word);
        }
        WeightType::F16 => out.iter_mut().zip(halves()).for_each(|(out, half)| *out = f16(half)),
        WeightType::BF16 => {
            let widen = |half| f32::from_bits(u32::from(half) << 16);
            out.iter_mut().zip(halves()).for_each(|(out, half)| *out = widen(half));
        }
        _ => dequantize_codes(kind, bytes, out),
    }
}

#[inline(always)]
fn dequantize_codes(kind: WeightType, bytes: &[u8], out: &mut [f32]) {
    let Some(Quant { group, bias }) = kind.quant() else { return };
    let (mut codes, mut scale, mut offset) = ([0u8; PIECE], [0f32; 16], [0f32; 16]);
    let piece_bytes = PIECE / kind.block() * kind.block_bytes();
    for (bytes, out) in bytes.chunks(piece_bytes).zip(out.chunks_mut(PIECE)) {
        unpack_any(kind, bytes, &mut codes, &mut scale, &mut offset);
        let halves = codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0);
        for (half, (codes, out)) in halves.enumerate() {
            let (scale, offset) = (scale[half * 16 / group], offset[half * 16 / group]);
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = (i32::from(code) - bias) as f32 * scale + offset;
            }
        }
    }
}

crate::simd::leveled! {
    /// Decodes a row to `cols` codes, `cols / group` scales and as many offsets.
    pub(super) fn unpack(
        kind: WeightType, bytes: &[u8], codes: &mut [u8], scale: &mut [f32], offset: &mut [f32],
    ) = unpack_any;
}

crate::simd::leveled! {
    /// Decodes a row to `cols` floats.
    pub(super) fn dequantize(kind: WeightType, bytes: &[u8], out: &mut [f32]) = dequantize_any;
}
