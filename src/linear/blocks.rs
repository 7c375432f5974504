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

/// Nibbles to bytes: low nibbles first, then high ones.
#[inline(always)]
fn nibbles(packed: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(packed.len());
    for ((&byte, low), high) in packed.iter().zip(low).zip(high) {
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
fn q4k(block: &[u8], codes: &mut [u8], scale: &mut [f32], offset: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (g, (scale, offset)) in scale.iter_mut().zip(offset).enumerate() {
        let (s, m) = q4k_scale_min(&block[4..16], g);
        (*scale, *offset) = (d * f32::from(s), -(dmin * f32::from(m)));
    }
    for (packed, codes) in block[16..144].chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        nibbles(packed, codes);
    }
}

#[inline(always)]
fn q6k(block: &[u8], codes: &mut [u8], scale: &mut [f32]) {
    let d = half_at(block, 208);
    for (scale, &s) in scale.iter_mut().zip(&block[192..208]) {
        *scale = d * f32::from(s.cast_signed());
    }
    let halves = block[..128].chunks_exact(64).zip(block[128..192].chunks_exact(32));
    for ((low, high), codes) in halves.zip(codes.chunks_exact_mut(128)) {
        nibbles(low, codes);
        for (quarter, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, &pairs) in codes.iter_mut().zip(high) {
                *code |= (pairs >> (2 * quarter) & 3) << 4;
            }
        }
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
    let Some(Quant { group, bias }) = kind.quant() else { return };
    let groups = kind.block() / group;
    if bias != 0 {
        offset.fill(0.0);
    }
    let blocks = bytes.chunks_exact(kind.block_bytes()).zip(codes.chunks_exact_mut(kind.block()));
    let scales = scale.chunks_exact_mut(groups).zip(offset.chunks_exact_mut(groups));
    for ((block, codes), (scale, offset)) in blocks.zip(scales) {
        match kind {
            WeightType::Q8_0 => {
                scale[0] = half_at(block, 0);
                codes.iter_mut().zip(&block[2..34]).for_each(|(code, q)| *code = q ^ 128);
            }
            WeightType::Q4_0 => {
                scale[0] = half_at(block, 0);
                nibbles(&block[2..18], codes);
            }
            WeightType::Q4_1 => {
                (scale[0], offset[0]) = (half_at(block, 0), half_at(block, 2));
                nibbles(&block[4..20], codes);
            }
            WeightType::Q4K => q4k(block, codes, scale, offset),
            WeightType::Q6K => q6k(block, codes, scale),
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => {}
        }
    }
}

#[inline(always)]
fn dequantize_any(kind: WeightType, bytes: &[u8], out: &mut [f32]) {
    let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match kind {
        WeightType::F32 => {
            let words = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            out.iter_mut().zip(words).for_each(|(out, word)| *out = word);
        }
        WeightType::F16 => out.iter_mut().zip(pairs()).for_each(|(out, h)| *out = f16(h)),
        WeightType::BF16 => out
            .iter_mut()
            .zip(pairs())
            .for_each(|(out, h)| *out = f32::from_bits(u32::from(h) << 16)),
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
        let groups = codes.chunks_exact(group).zip(out.chunks_exact_mut(group));
        for ((codes, out), (&scale, &offset)) in groups.zip(scale.iter().zip(&offset)) {
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
