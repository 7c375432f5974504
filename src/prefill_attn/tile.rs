//! A slab as f32, in the order in which the matrix kernel wants it: keys `[D][64]`, values `[64][D]`.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use crate::lanes::{Lanes, Line, Row};
use crate::paged_attn::plain::Room;
use crate::paged_attn::slabs::{Quads, Slab};
use crate::pages::HeadView;
use crate::slab::{Format, TOKENS};

/// One decoded slab.
#[derive(Default)]
pub(crate) struct Tile {
    /// `[D][64]`: a row is a tile of tokens.
    pub keys: Vec<Row<f32>>,
    /// `[64][D]`: a row is sixteen channels.
    pub values: Vec<Row<f32>>,
    /// Scales, then minima, in the order of the slab.
    meta: Vec<Row<f32>>,
    room: Room,
}

impl Tile {
    /// Decodes `slab` of `head`. Values of tokens past the head's length become 0: they may be NaN, which no weight
    /// silences.
    #[inline(always)]
    pub fn decode<L: Lanes>(&mut self, l: L, slab: Slab<'_>, head: &HeadView<'_>) {
        let held = (head.len - slab.start).min(TOKENS);
        let mut room = std::mem::take(&mut self.room);
        let slab = plain(l, slab, head, &mut room);
        self.keys(l, &slab);
        self.values(l, &slab);
        self.values[held * slab.layout.head_dim / 16..].fill(Row::default());
        self.room = room;
    }

    /// Decodes the keys of `slab` of `head` alone.
    #[inline(always)]
    pub fn decode_keys<L: Lanes>(&mut self, l: L, slab: Slab<'_>, head: &HeadView<'_>) {
        let mut room = std::mem::take(&mut self.room);
        self.keys(l, &plain(l, slab, head, &mut room));
        self.room = room;
    }

    #[inline(always)]
    fn keys<L: Lanes>(&mut self, l: L, slab: &Slab<'_>) {
        self.keys.resize(TOKENS * slab.layout.head_dim / 16, Row::default());
        if slab.layout.format == Format::F16 {
            self.half_keys(l, slab);
        } else {
            self.convert_meta(l, slab.k_meta);
            self.code_keys(l, slab);
        }
    }

    #[inline(always)]
    fn values<L: Lanes>(&mut self, l: L, slab: &Slab<'_>) {
        self.values.resize(TOKENS * slab.layout.head_dim / 16, Row::default());
        if slab.layout.format == Format::F16 {
            self.half_values(l, slab);
        } else {
            self.convert_meta(l, slab.v_meta);
            self.code_values(l, slab);
        }
    }

    #[inline(always)]
    fn convert_meta<L: Lanes>(&mut self, l: L, meta: &[u8]) {
        let halves = meta.as_chunks::<32>().0;
        self.meta.resize(halves.len(), Row::default());
        for (row, halves) in self.meta.iter_mut().zip(halves) {
            l.put(&mut row.0, l.half(halves));
        }
    }

    /// Scale and minimum at `at`, an index into the scales.
    #[inline(always)]
    fn scale<L: Lanes>(&self, l: L, at: usize, stride: usize) -> [L::F; 2] {
        let meta = self.meta.as_slice();
        let (scale, min) = (at, at + stride);
        [l.splat(meta[scale / 16].0[scale % 16]), l.splat(meta[min / 16].0[min % 16])]
    }

    #[inline(always)]
    fn half_keys<L: Lanes>(&mut self, l: L, slab: &Slab<'_>) {
        let per_tile = slab.layout.head_dim / 16;
        for (unit, lines) in slab.k.as_chunks::<8>().0.iter().enumerate() {
            let (tile, j) = (unit / per_tile, unit % per_tile * 2);
            let words = transposed(l, lines); // [t][w] of [side][r]
            for k in 0..8 {
                let channel = 8 * (j + k % 2) + k / 2 * 2;
                let half = |x| l.mul(l.half_low(x), l.splat(slab.unit));
                l.put(&mut self.keys[channel * 4 + tile].0, half(words[k]));
                let high = half(l.shr(words[k], 16));
                l.put(&mut self.keys[(channel + 1) * 4 + tile].0, high);
            }
        }
    }

    #[inline(always)]
    fn half_values<L: Lanes>(&mut self, l: L, slab: &Slab<'_>) {
        let per_tile = slab.layout.head_dim / 16;
        for (unit, lines) in slab.v.as_chunks::<8>().0.iter().enumerate() {
            let (tile, j) = (unit / per_tile, unit % per_tile);
            let words = transposed(l, lines); // [t][w] of [side][r]
            for t in 0..4 {
                let (a, b) = (words[2 * t], words[2 * t + 1]);
                let token = 16 * tile + 2 * t;
                let low = l.join_low(a, b); // side 0, [w][r]
                let high = l.join_high(a, b);
                for (token, pair) in [(token, low), (token + 8, high)] {
                    let half = |x| l.mul(l.half_low(x), l.splat(slab.unit));
                    l.put(&mut self.values[token * per_tile + j].0, half(pair));
                    let odd = half(l.shr(pair, 16));
                    l.put(&mut self.values[(token + 1) * per_tile + j].0, odd);
                }
            }
        }
    }

    #[inline(always)]
    fn code_keys<L: Lanes>(&mut self, l: L, slab: &Slab<'_>) {
        let layout = slab.layout;
        let (quads, bits, d) = (Quads::of(layout), layout.format.bits(), layout.head_dim);
        let mask = l.int((1 << bits) - 1);
        for (unit, lines) in slab.k.as_chunks::<8>().0.iter().enumerate() {
            let words = transposed(l, lines); // [t][w] of [side][r]
            for h in 0..quads.per_word {
                let places = quads.places(unit, h);
                for k in 0..8 {
                    let (t, (tile, quad)) = (k / 2, places[k % 2]);
                    let meta = tile * 16 / layout.k_group * 2 * d + quad * 32 + t * 8;
                    for i in quads.pairs(k % 2) {
                        let word = l.shr(words[k], bits * (4 * h + i) % 16);
                        let channel = 8 * (4 * quad + i) + 2 * t;
                        for (e, codes) in [word, l.shr(word, 16)].into_iter().enumerate() {
                            let [scale, min] = self.scale(l, meta + 2 * i + e, d);
                            let x = l.fma(l.float(l.and(codes, mask)), scale, min);
                            l.put(&mut self.keys[(channel + e) * 4 + tile].0, x);
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn code_values<L: Lanes>(&mut self, l: L, slab: &Slab<'_>) {
        let layout = slab.layout;
        let (quads, bits, rows) = (Quads::of(layout), layout.format.bits(), layout.head_dim / 16);
        let mask = l.int((1 << bits) - 1);
        for (unit, lines) in slab.v.as_chunks::<8>().0.iter().enumerate() {
            let words = transposed(l, lines); // [t][w] of [side][r]
            for h in 0..quads.per_word {
                let places = quads.places(unit, h);
                for k in 0..8 {
                    let (t, (tile, quad)) = (k / 2, places[k % 2]);
                    let group = quad * 32 / layout.v_group;
                    let meta = ((tile * 4 + t) * layout.v_groups() + group) * 4;
                    let sides = [l.join_low(words[k], words[k]), l.join_high(words[k], words[k])];
                    for (side, word) in sides.into_iter().enumerate() {
                        let token = 16 * tile + 2 * t + 8 * side;
                        for i in quads.pairs(k % 2).step_by(2) {
                            let at = bits * (4 * h + i) % 16;
                            let pair = l.shr_halves(word, at, at + bits);
                            let row = (4 * quad + i) / 2;
                            for (e, codes) in [pair, l.shr(pair, 16)].into_iter().enumerate() {
                                let at = meta + 2 * side + e;
                                let [scale, min] = self.scale(l, at, TOKENS * layout.v_groups());
                                let x = l.fma(l.float(l.and(codes, mask)), scale, min);
                                l.put(&mut self.values[(token + e) * rows + row].0, x);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The slab as the decoders read it. Not a call of theirs: what an instruction set is given for must be inlined, and a closure
/// this large is not.
#[inline(always)]
fn plain<'a, L: Lanes>(
    l: L,
    mut slab: Slab<'a>,
    head: &HeadView<'a>,
    room: &'a mut Room,
) -> Slab<'a> {
    let (lines, _) = room.lines(slab.layout, 1);
    slab.make_plain(l, head.pools.plain_layout(slab.layout.format), lines);
    slab
}

#[inline(always)]
fn transposed<L: Lanes>(l: L, lines: &[Line; 8]) -> [L::I; 8] {
    let mut words = [l.int(0); 8];
    for r in 0..8 {
        words[r] = l.line(&lines[r]);
    }
    l.transpose(words)
}
