//! f16 slabs to 8-, 4- or 2-bit ones, a line at a time, bit for bit what [`crate::slab::encode`] gives.
//!
//! Both sides keep lane `t` and row `r` of an element, so a line of f16 only turns into codes of the line of the
//! same `r` (of the unit that holds its words): minima, codes and their places need no transposition.

use crate::lanes::{Kernel, Lanes, Line, Row};
use crate::slab::{Layout, TOKENS};
use std::ops::Range;

/// One slab to pack: f16 `from`, and `to` of `layout`.
pub(super) struct Pack<'a> {
    pub from: &'a [u8],
    pub to: &'a mut [u8],
    pub layout: &'a Layout,
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { from, to, layout } = self;
        let d = layout.head_dim;
        let (k, v) = from.split_at(TOKENS * d * 2);
        let mut words = Words { lines: [Row::default(); 256], layout };
        to.fill(0);
        let tiles = layout.k_group / 16;
        for group in 0..4 / tiles {
            for unit in 0..d / 16 {
                let tiles = group * tiles..(group + 1) * tiles;
                let meta = words.quantise(l, k.as_chunks().0, tiles, unit..unit + 1, true);
                let at = layout.k_meta() + group * d * 4 + unit / 2 * 64 + unit % 2 * 8;
                put_k_meta(&mut to[at..], &meta[0]);
                put_k_meta(&mut to[at + 2 * d..], &meta[1]);
            }
        }
        words.write(&mut to[..layout.code_bytes()]);
        for tile in 0..4 {
            for group in 0..layout.v_groups() {
                let first = group * layout.v_group;
                let units = first / 16..d.min(first + layout.v_group) / 16;
                let meta = words.quantise(l, v.as_chunks().0, tile..tile + 1, units, false);
                for t in 0..4 {
                    let at = layout.v_meta() + ((tile * 4 + t) * layout.v_groups() + group) * 8;
                    put_halves(&mut to[at..], &meta[0].as_flattened()[t * 8..][..4]);
                    let at = at + layout.v_meta_bytes() / 2;
                    put_halves(&mut to[at..], &meta[1].as_flattened()[t * 8..][..4]);
                }
            }
        }
        words.write(&mut to[layout.v_codes()..][..layout.code_bytes()]);
    }
}

/// `[t][w][side][e]` of two pairs `j` to the metadata's `[t]`, 16 bytes apart, of `[w][e]`.
#[inline(always)]
fn put_k_meta(to: &mut [u8], halves: &[[u16; 16]; 2]) {
    for (t, of_t) in halves.as_flattened().as_chunks::<8>().0.iter().enumerate() {
        put_halves(&mut to[t * 16..], &[of_t[0], of_t[1], of_t[4], of_t[5]]);
    }
}

#[inline(always)]
fn put_halves(to: &mut [u8], halves: &[u16]) {
    for (to, x) in to.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
        *to = x.to_le_bytes();
    }
}

/// A code section being filled.
struct Words<'a> {
    lines: [Row<i32>; 256],
    layout: &'a Layout,
}

impl Words<'_> {
    /// Quantises the elements of some tiles and units of a section of f16 `lines`; a group is what shares a lane
    /// but for `side` (K) or `w` (V). Returns scales and minima `[t][w][side][e]` as f16.
    #[inline(always)]
    fn quantise<L: Lanes>(
        &mut self,
        l: L,
        lines: &[Line],
        tiles: Range<usize>,
        units: Range<usize>,
        sides: bool,
    ) -> [[[u16; 16]; 2]; 2] {
        let per_tile = self.layout.head_dim / 16;
        let levels = l.splat(((1 << self.layout.format.bits()) - 1) as f32);
        let (mut low, mut high) = ([l.splat(f32::INFINITY); 2], [l.splat(f32::NEG_INFINITY); 2]);
        for tile in tiles.clone() {
            for unit in units.clone() {
                for line in &lines[(tile * per_tile + unit) * 8..][..8] {
                    let halves = line.as_chunks::<32>().0;
                    for half in 0..2 {
                        let x = l.half(&halves[half]);
                        low[half] = l.min(x, low[half]);
                        high[half] = l.max(x, high[half]);
                    }
                }
            }
        }
        let (mut meta, mut scale) = ([[[0; 16]; 2]; 2], low);
        for half in 0..2 {
            let (a, b) = (low[half], high[half]);
            let (c, d) = if sides {
                (l.swap_pairs(a), l.swap_pairs(b))
            } else {
                (l.swap_fours(a), l.swap_fours(b))
            };
            (low[half], high[half]) = (l.min(a, c), l.max(b, d));
            // Adding 0 turns -0 into 0, as the codec does: no order of minima shows.
            let zero = l.splat(0.0);
            let step = l.div(l.sub(high[half], low[half]), levels);
            meta[0][half] = l.to_half(l.add(step, zero));
            meta[1][half] = l.to_half(l.add(low[half], zero));
            scale[half] = l.half(bytemuck::cast_ref(&meta[0][half]));
        }
        for tile in tiles {
            for unit in units.clone() {
                for (r, line) in lines[(tile * per_tile + unit) * 8..][..8].iter().enumerate() {
                    let halves = line.as_chunks::<32>().0;
                    let mut codes = [l.int(0); 2];
                    for half in 0..2 {
                        let x = l.sub(l.half(&halves[half]), low[half]);
                        let x = l.positive(scale[half], l.div(x, scale[half]));
                        codes[half] = l.round(l.min(l.max(x, l.splat(0.0)), levels));
                    }
                    self.place(l, tile, unit, r, l.narrow(codes[0], codes[1]));
                }
            }
        }
        meta
    }

    /// Codes `[t][w][side]` (pairs) of pairs `j = 2 unit + w` of a tile into their words.
    #[inline(always)]
    fn place<L: Lanes>(&mut self, l: L, tile: usize, unit: usize, r: usize, codes: L::I) {
        const KEEP: [Row<i32>; 2] = [
            Row([-1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0]),
            Row([0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1]),
        ];
        let (bits, pairs) = (self.layout.format.bits(), self.layout.head_dim / 8);
        let slots = 16 / bits;
        for (w, codes) in l.double(codes).into_iter().enumerate() {
            let f = tile * pairs + 2 * unit + w;
            let (word, slot) = (f / slots, f % slots);
            let row = &mut self.lines[word / 2 * 8 + r];
            let codes = l.and(l.shl(codes, bits * slot), l.get_int(&KEEP[word % 2]));
            let sum = l.or(l.get_int(row), codes);
            l.put_int(row, sum);
        }
    }

    /// Moves the words out.
    #[inline(always)]
    fn write(&mut self, to: &mut [u8]) {
        for (to, row) in to.as_chunks_mut::<64>().0.iter_mut().zip(&mut self.lines) {
            for (to, word) in to.as_chunks_mut::<4>().0.iter_mut().zip(&mut row.0) {
                *to = std::mem::take(word).to_le_bytes();
            }
        }
    }
}
