//! Rows of f16 slabs moved on the CPU, a tile of 16 tokens at a time.
//!
//! A line of K holds the words of tokens `r` and `r + 8` of a tile side by side, one of V those of the tokens `2 t + e + 8
//! side` for each `t`: as eight words of 64 bits `[t][w]`, each a pair of halves of either side ([`crate::slab`]).

use crate::error::{Error, Result};
use crate::slab::{Format, Layout, TOKENS};

const OP: &str = "kv_gather";
/// Tokens a tile.
const TILE: usize = 16;

/// One line of a slab, `[t][w]`.
type Line = [u64; 8];

/// Where a token lies: the lines of its tile of K and of V, and its row there.
#[derive(Clone, Copy)]
struct Place<'a> {
    keys: &'a [[u8; 64]],
    values: &'a [[u8; 64]],
    row: usize,
}

impl<'a> Place<'a> {
    fn of(ring: &'a [u8], layout: &Layout, slot: usize) -> Self {
        let [keys, values] = [0, layout.v_codes()].map(|section| {
            let at = tile_at(ring.len(), layout, slot) + section;
            ring[at..at + tile_bytes(layout)].as_chunks().0
        });
        Self { keys, values, row: slot % TILE }
    }
}

/// Bytes of the keys of a tile, and of the values.
const fn tile_bytes(layout: &Layout) -> usize {
    TILE * layout.head_dim * 2
}

/// Where the keys of the tile of `slot` begin in a ring of `len` bytes.
const fn tile_at(len: usize, layout: &Layout, slot: usize) -> usize {
    let bytes = layout.slab_bytes();
    slot / TOKENS % (len / bytes) * bytes + slot % TOKENS / TILE * tile_bytes(layout)
}

fn words(line: &[u8; 64]) -> Line {
    bytemuck::cast(*line)
}

/// A tile of these tokens, keys and values.
fn gather(from: &[Place<'_>; TILE], keys: &mut [[u8; 64]], values: &mut [[u8; 64]]) {
    for (i, to) in keys.iter_mut().enumerate() {
        let (unit, r) = (i / 8 * 8, i % 8);
        let [low, high] =
            [from[r], from[r + 8]].map(|x| (words(&x.keys[unit + x.row % 8]), x.row / 8 * 32));
        let mut line: Line = [0; 8];
        for (n, to) in line.iter_mut().enumerate() {
            *to = low.0[n] >> low.1 & 0xFFFF_FFFF | high.0[n] >> high.1 << 32;
        }
        *to = bytemuck::cast(line);
    }
    for (i, to) in values.iter_mut().enumerate() {
        let mut line: Line = [0; 8];
        for (t, pair) in line.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for half in 0..4 {
                let x = &from[2 * t + half % 2 + half / 2 * 8];
                let source = words(&x.values[i]);
                let (at, shift) = (x.row % 8 / 2 * 2, (x.row % 2 + x.row / 8 * 2) * 16);
                for (w, to) in pair.iter_mut().enumerate() {
                    *to |= (source[at + w] >> shift & 0xFFFF) << (16 * half);
                }
            }
        }
        *to = bytemuck::cast(line);
    }
}

/// Move the tokens in `slots` (ascending) of `from_ring`, a ring of f16 slabs of `layout`, to slots 0, 1, ... of
/// `to_ring`. Slab `i` lies at `i % ring_slabs` of either.
///
/// # Errors
/// [`Error::Unsupported`] where a layout is not f16, slots do not ascend or a ring does not hold as many.
pub fn cpu(from_ring: &[u8], layout: &Layout, slots: &[u32], to_ring: &mut [u8]) -> Result<()> {
    let from = Ring::of(layout, from_ring.len())?;
    from.holds("slots", slots.first().copied(), slots)?;
    Ring::of(layout, to_ring.len())?.has_room(0, slots.len())?;
    let mut room = Room::new(layout);
    for first in (0..slots.len()).step_by(TILE) {
        let to = &*to_ring;
        room.fill(|i| match slots.get(first + i) {
            Some(&slot) => Place::of(from_ring, layout, slot as usize),
            None => Place::of(to, layout, first + i),
        });
        room.store(to_ring, layout, first);
    }
    Ok(())
}

/// Move the token in slot `slots[i]` to slot `first + i`, for each `i`, within one ring of f16 slabs of `layout` whose
/// slab `i` lies at `i % ring_slabs`. Slots ascend from `first` or later.
///
/// # Errors
/// As [`cpu`].
pub fn compact(ring: &mut [u8], layout: &Layout, first: usize, slots: &[u32]) -> Result<()> {
    let shape = Ring::of(layout, ring.len())?;
    let before = u32::try_from(first).map_err(|_| Error::TooBig { op: OP, size: first })?;
    shape.holds("slots", Some(before), slots)?;
    let (end, mut room) = (first + slots.len(), Room::new(layout));
    for tile in (first / TILE * TILE..end).step_by(TILE) {
        let from = &*ring;
        room.fill(|i| {
            let moved = (tile + i).checked_sub(first).and_then(|i| slots.get(i));
            Place::of(from, layout, moved.map_or(tile + i, |&slot| slot as usize))
        });
        room.store(ring, layout, tile);
    }
    Ok(())
}

/// Slabs of a ring.
struct Ring(usize);

impl Ring {
    fn of(layout: &Layout, bytes: usize) -> Result<Self> {
        let unsupported =
            |field, got, supported| Error::Unsupported { op: OP, field, got, supported };
        if layout.format != Format::F16 {
            return Err(unsupported("layout", format!("{:?}", layout.format), "F16"));
        }
        let slabs = bytes / layout.slab_bytes();
        if slabs == 0 {
            return Err(unsupported("ring", format!("{bytes} bytes"), "whole slabs"));
        }
        Ok(Self(slabs))
    }

    /// Whether `slots` ascend, none is before `first`, and all from `first` on are in the ring at once.
    fn holds(&self, field: &'static str, first: Option<u32>, slots: &[u32]) -> Result<()> {
        let (Some(first), Some(&last)) = (first, slots.last()) else { return Ok(()) };
        if slots[0] < first || !slots.is_sorted_by(|a, b| a < b) {
            let got = "not".to_owned();
            return Err(Error::Unsupported {
                op: OP,
                field,
                got,
                supported: "ascending from first",
            });
        }
        let need = last as usize / TOKENS - first as usize / TOKENS + 1;
        if need > self.0 {
            return Err(Error::Len { op: OP, buffer: "ring", need, got: self.0 });
        }
        Ok(())
    }

    fn has_room(&self, first: usize, tokens: usize) -> Result<()> {
        let need = (first + tokens).div_ceil(TOKENS);
        if need > self.0 {
            return Err(Error::Len { op: OP, buffer: "to_ring", need, got: self.0 });
        }
        Ok(())
    }
}

/// A tile on its way.
struct Room {
    keys: Vec<[u8; 64]>,
    values: Vec<[u8; 64]>,
}

impl Room {
    fn new(layout: &Layout) -> Self {
        let lines = || vec![[0; 64]; tile_bytes(layout) / 64];
        Self { keys: lines(), values: lines() }
    }

    fn fill<'a>(&mut self, place: impl FnMut(usize) -> Place<'a>) {
        gather(&std::array::from_fn(place), &mut self.keys, &mut self.values);
    }

    fn store(&self, ring: &mut [u8], layout: &Layout, slot: usize) {
        let at = tile_at(ring.len(), layout, slot);
        for (section, lines) in [(0, &self.keys), (layout.v_codes(), &self.values)] {
            ring[at + section..][..tile_bytes(layout)].copy_from_slice(lines.as_flattened());
        }
    }
}
