//! Slabs as the kernels walk them: lines, metadata, and where a quad of slots lies.

use crate::lanes::{Lanes, Line};
use crate::pages::HeadView;
use crate::slab::{Format, Layout, Meta, Steps, TOKENS};
use std::ops::Range;

/// Most slabs of one format that are worked on together, and slabs a task.
pub(crate) const RUN: usize = 8;

/// One slab, taken apart.
#[derive(Clone, Copy)]
pub(crate) struct Slab<'a> {
    pub layout: &'a Layout,
    /// First token.
    pub start: usize,
    pub k: &'a [Line],
    pub k_meta: &'a [u8],
    pub v: &'a [Line],
    pub v_meta: &'a [u8],
    /// By how much elements are larger than they read.
    pub unit: f32,
    /// Of K and V, where metadata is two-level.
    pub steps: [Steps; 2],
    /// What is read soon after K, as many lines: V, and K of the next slab.
    pub soon: [&'a [Line]; 2],
}

impl<'a> Slab<'a> {
    /// Slab `i` of a head; `None` at a hole.
    pub fn of(head: &HeadView<'a>, i: usize) -> Option<Self> {
        let slab = head.slab(i)?;
        let (layout, bytes) = (slab.layout, slab.bytes);
        let (keys, values) = bytes.split_at(layout.v_codes());
        let (k, k_meta) = keys.split_at(layout.k_meta());
        let (k, none) = (k.as_chunks().0, &[] as &[Line]);
        let start = i * TOKENS;
        let steps = match layout.meta {
            Meta::F16 => [Steps { scale: 0.0, minimum: 0.0, base: 0.0 }; 2],
            Meta::U8 => Steps::of(layout, bytes),
        };
        let (v, v_meta, soon, unit) = (none, &[] as &[u8], [none; 2], 1.0);
        let mut slab = Self { layout, start, k, k_meta, v, v_meta, unit, steps, soon };
        slab.set_values(values);
        slab.soon = [slab.v, none];
        Some(slab)
    }

    /// Asks for line `i` of what is read soon. K and V of a run are not read in the order in which they lie, so
    /// that the hardware would ask late.
    #[inline(always)]
    pub fn fetch<L: Lanes>(&self, l: L, i: usize) {
        for lines in self.soon {
            if let Some(line) = lines.get(i) {
                l.fetch(line);
            }
        }
    }

    /// Asks for the metadata of V.
    #[inline(always)]
    pub fn fetch_meta<L: Lanes>(&self, l: L) {
        self.v_meta.as_chunks().0.iter().for_each(|line| l.fetch(line));
    }

    fn set_values(&mut self, values: &'a [u8]) {
        let (v, v_meta) = values.split_at(self.layout.code_bytes());
        (self.v, self.v_meta) = (v.as_chunks().0, &v_meta[..self.layout.v_meta_bytes()]);
    }

    /// Reads V from `copy`, a copy in which the words of tokens from `held` on are zero: they may hold NaN, which
    /// a weight of 0 does not silence. (Their scores are replaced, so K may hold anything.)
    pub fn hold(&mut self, held: usize, copy: &'a mut Vec<Line>) {
        copy.clear();
        copy.extend_from_slice(self.v);
        copy.extend(self.v_meta.as_chunks::<64>().0);
        let bytes: &mut [u8] = copy.as_flattened_mut();
        let layout = self.layout;
        if layout.format == Format::F16 {
            clear_lines(bytes, held, layout.head_dim);
        }
        for token in held..TOKENS {
            for group in (0..layout.v_meta_bytes()).step_by(4 * TOKENS) {
                let group = group / (4 * TOKENS) * layout.v_group;
                let at = layout.v_scale_at(token, group) - layout.v_meta() + layout.code_bytes();
                bytes[at..at + 2].fill(0);
                bytes[at + layout.v_meta_bytes() / 2..][..2].fill(0);
            }
        }
        self.set_values(bytes);
    }
}

/// Zero the f16 V words of tokens from `held` on.
fn clear_lines(bytes: &mut [u8], held: usize, head_dim: usize) {
    for (tile, tile_bytes) in bytes.chunks_exact_mut(head_dim * 32).enumerate() {
        let mut keep = [0u16; 32]; // [t][w][side][e]
        for (i, keep) in keep.iter_mut().enumerate() {
            let token = 16 * tile + i / 8 * 2 + i % 2 + i / 2 % 2 * 8;
            *keep = if token < held { u16::MAX } else { 0 };
        }
        let keep: &[u8; 64] = bytemuck::cast_ref(&keep);
        if keep.iter().all(|&b| b == 0xFF) {
            continue;
        }
        for line in tile_bytes.as_chunks_mut::<64>().0 {
            line.iter_mut().zip(keep).for_each(|(b, k)| *b &= k);
        }
    }
}

/// Four consecutive pairs `j` of one tile are a *quad*: four slots of a word, or at 8 bits, where a word has but
/// two, the slots of both words of a unit.
#[derive(Clone, Copy)]
pub(crate) struct Quads {
    pub per_tile: usize,
    /// That a word has a part in.
    pub per_word: usize,
    /// Slots of a word that are one quad's.
    pub slots: usize,
    places: &'static Places,
}

/// Tile, and quad within the tile, `[unit][quad of the word][parity of the word]`.
type Places = [[[(u8, u8); 2]; 2]; 32];

/// By bits (2, 4, 8) and D: a table, since the kernels ask for each unit and a division costs as much as eight lines.
static PLACES: [[Places; 4]; 3] = {
    let (mut all, dims) = ([[[[[(0, 0); 2]; 2]; 32]; 4]; 3], [64, 96, 128, 256]);
    let mut i = 0;
    while i < 3 * 4 * 32 * 2 * 2 {
        let (bits, d, unit, h, w) = (i / 512, i / 128 % 4, i / 4 % 32, i / 2 % 2, i % 2);
        let per_tile = dims[d] / 32;
        let quad = match bits {
            0 => (2 * unit + w) * 2 + h,
            1 => 2 * unit + w,
            _ => unit,
        };
        all[bits][d][unit][h][w] = ((quad / per_tile) as u8, (quad % per_tile) as u8);
        i += 1;
    }
    all
};

impl Quads {
    #[inline(always)]
    pub fn of(layout: &Layout) -> Self {
        let bits = layout.format.bits();
        let dim = match layout.head_dim {
            64 => 0,
            96 => 1,
            128 => 2,
            _ => 3,
        };
        Self {
            per_tile: layout.head_dim / 32,
            per_word: (4 / bits).max(1),
            slots: (16 / bits).min(4),
            places: &PLACES[bits.ilog2() as usize - 1][dim],
        }
    }

    /// Tile, and quad within the tile, of quad `h` of a unit's words, for either parity of the word.
    #[inline(always)]
    pub fn places(self, unit: usize, h: usize) -> [(usize, usize); 2] {
        let [(ta, qa), (tb, qb)] = self.places[unit][h];
        [(ta.into(), qa.into()), (tb.into(), qb.into())]
    }

    /// The pairs of its quad that a word of parity `w` holds.
    #[inline(always)]
    pub const fn pairs(self, w: usize) -> Range<usize> {
        if self.slots == 2 { 2 * w..2 * w + 2 } else { 0..4 }
    }

    /// Units after which the quads within the tiles repeat.
    pub const fn period(self) -> usize {
        match (self.per_tile, self.slots) {
            (tile, 2) => tile,
            (3, _) => 3,
            (tile, _) => tile.div_ceil(2 * self.per_word),
        }
    }
}
