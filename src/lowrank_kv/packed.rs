//! Full slabs in 4 or 2 bits: codes in the place of elements, then scales and minima of 64 tokens of each channel.

use super::{COLUMN, COLUMN_BYTES, Shape, TILE, check_len};
use crate::error::{Error, Result};
use crate::lanes::{self, Kernel, Lanes, Row};
use crate::simd::Level;
use crate::slab::{Format, Rounding, TOKENS};
use half::f16;

/// Bytes of a column's scales and minima.
const META: usize = 4 * COLUMN;

struct Unpack<'a>(Shape, (Format, &'a [u8]), &'a mut [u8]);

impl Kernel for Unpack<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self(shape, packed, out) = self;
        for (tile, out) in out.chunks_exact_mut(shape.tile_bytes()).enumerate() {
            shape.spread(l, packed, tile, out);
        }
    }
}

/// Bits of a code.
const fn bits(format: Format) -> usize {
    if matches!(format, Format::Q4) { 4 } else { 2 }
}

impl Shape {
    /// Bytes of a slab: 128 an element of a row in f16, 36 in q4, 20 in q2.
    pub const fn bytes(self, format: Format) -> usize {
        if matches!(format, Format::F16) {
            return self.slab_bytes();
        }
        self.slab_bytes() / 16 * bits(format) + self.width() / COLUMN * META
    }

    /// Packs a full slab. 2-bit codes span `range` of what their 64 tokens do, in (0, 1].
    ///
    /// # Errors
    /// [`Error::Len`] where the sizes do not fit, [`Error::Unsupported`] for other formats than q4 and q2.
    pub fn pack(self, format: Format, slab: &[u8], range: f32, out: &mut [u8]) -> Result<()> {
        if !matches!(format, Format::Q4 | Format::Q2) {
            let (field, got, supported) = ("format", format!("{format:?}"), "q4, q2");
            return Err(Error::Unsupported { op: super::OP, field, got, supported });
        }
        check_len("slab", self.slab_bytes(), slab.len())?;
        check_len("out", self.bytes(format), out.len())?;
        out.fill(0);
        let (rounding, max_code) = (Rounding { range, feedback: None }, (1 << bits(format)) - 1);
        let rows: Vec<_> = (0..TOKENS).map(|token| self.read((Format::F16, slab), token)).collect();
        for channel in 0..self.width() {
            let group = rows.iter().map(|row| f16::from_f32(row[channel])).collect::<Vec<_>>();
            let mut codes = [0; TOKENS];
            let (scale, minimum) = rounding.quantise(&group, max_code, &mut codes);
            for (i, x) in [scale, minimum].into_iter().enumerate() {
                let at = self.meta_at(format, channel) + i * META / 2;
                out[at..at + 2].copy_from_slice(&x.to_le_bytes());
            }
            for (token, code) in codes.into_iter().enumerate() {
                let (byte, shift) = self.code_at(format, token, channel);
                out[byte] |= code << shift;
            }
        }
        Ok(())
    }

    /// A packed slab as it would be in f16.
    ///
    /// # Errors
    /// [`Error::Len`] where the sizes do not fit.
    pub fn unpack(self, level: Level, packed: (Format, &[u8]), out: &mut [u8]) -> Result<()> {
        check_len("slab", self.bytes(packed.0), packed.1.len())?;
        check_len("out", self.slab_bytes(), out.len())?;
        lanes::dispatch(level, Unpack(self, packed, out));
        Ok(())
    }

    pub(super) fn read_packed(self, format: Format, slab: &[u8], token: usize) -> Vec<f32> {
        let half = |at: usize| f16::from_le_bytes([slab[at], slab[at + 1]]).to_f64();
        let element = |channel| {
            let (byte, shift) = self.code_at(format, token, channel);
            let code = slab[byte] >> shift & ((1 << bits(format)) - 1);
            let meta = self.meta_at(format, channel);
            // Exact before it is rounded.
            f16::from_f64(f64::from(code) * half(meta) + half(meta + META / 2)).to_f32()
        };
        (0..self.width()).map(element).collect()
    }

    /// Tile `tile` of a packed slab as it would be in f16, two tokens of a column at a time.
    #[inline(always)]
    pub(super) fn spread<L: Lanes>(
        self,
        l: L,
        (format, slab): (Format, &[u8]),
        tile: usize,
        out: &mut [u8],
    ) {
        let bits = bits(format);
        let codes = &slab[tile * self.tile_bytes() / 16 * bits..];
        let meta = slab[self.slab_bytes() / 16 * bits..].as_chunks::<META>().0;
        // Even channels lie in the lower half of a word, odd ones in the upper; where they lie there their scale takes back.
        let shift = |i: usize| i % COLUMN / 2 * bits;
        let mask = |odd: usize| {
            let one = |i: usize| if i % 2 == odd { ((1 << bits) - 1) << shift(i) } else { 0 };
            l.get_int(&Row(std::array::from_fn(one)))
        };
        let ([even, odd], mut down) = ([mask(0), mask(1)], [0.0; 16]);
        for (i, down) in down.iter_mut().enumerate() {
            *down = 1.0 / (1 << shift(i)) as f32;
        }
        for (column, out) in out.chunks_exact_mut(COLUMN_BYTES).enumerate() {
            let mut both = [0.0; 16];
            l.put(&mut both, l.half(&meta[column]));
            let [scales, minima] = [0, COLUMN].map(|at| {
                let mut twice = [0.0; 16];
                twice[..COLUMN].copy_from_slice(&both[at..at + COLUMN]);
                twice[COLUMN..].copy_from_slice(&both[at..at + COLUMN]);
                l.get(&twice)
            });
            let scales = l.mul(scales, l.get(&down));
            let codes = &codes[column * TILE * bits..][..TILE * bits];
            let word = |token: usize| {
                let bytes = &codes[token * bits..][..bits];
                let low = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
                let high = if bits == 4 { u16::from_le_bytes([bytes[2], bytes[3]]) } else { 0 };
                l.int((low | u32::from(high) << 16) as i32)
            };
            for (pair, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let words = l.join_low(word(2 * pair), word(2 * pair + 1));
                let codes = l.or(l.and(words, even), l.and(l.shr(words, 4 * bits), odd));
                let halves = l.to_half(l.fused(l.float(codes), scales, minima));
                out.copy_from_slice(bytemuck::cast_slice(&halves));
            }
        }
    }

    /// Byte and shift of a code.
    const fn code_at(self, format: Format, token: usize, channel: usize) -> (usize, usize) {
        let (bits, i) = (bits(format), channel % COLUMN);
        let word = (token / TILE * self.width() / COLUMN + channel / COLUMN) * TILE + token % TILE;
        let bit = i % 2 * 4 * bits + i / 2 * bits;
        (word * bits + bit / 8, bit % 8)
    }

    /// Byte of a channel's scale.
    const fn meta_at(self, format: Format, channel: usize) -> usize {
        let column = channel / COLUMN * META + channel % COLUMN * 2;
        self.slab_bytes() / 16 * bits(format) + column
    }
}
