//! What a step is told: one block of 32-bit words, written at once, whose places depend on the step's shape alone.

use std::rc::Rc;

use kvwarp::sample::MAX_RECENT;

use super::cache::Edit;
use super::metered::Metered;
use super::ops::{Ops, at, params};
use super::platform::{Buffer, Result};
use super::tally::Use;
use crate::config::Config;
use crate::runner::Turn;
use crate::spec::CacheSpec;

/// Rows of a step and tokens that each has: what a recorded step depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grid {
    /// A power of two; rows without a turn hold no tokens.
    pub rows: usize,
    /// 1 to 16.
    pub each: usize,
}

impl Grid {
    /// Rows of activations.
    pub fn tokens(self) -> usize {
        self.rows * self.each
    }
}

/// Layers and heads that are told apart.
#[derive(Debug, Clone, Copy)]
pub struct Apart {
    /// All, or 1 where all hold as many tokens.
    pub layers: usize,
    /// Of each of them all, or 1 where all hold as many.
    pub heads: usize,
}

impl Apart {
    /// Of a cache.
    pub fn of(spec: &CacheSpec, config: &Config) -> Self {
        Self {
            layers: if spec.selects() { config.layers } else { 1 },
            heads: if spec.ragged() { config.kv_heads } else { 1 },
        }
    }

    /// Number of a layer among those told apart.
    pub fn line(self, layer: usize) -> usize {
        layer.min(self.layers - 1)
    }

    /// What is told of `all`, `[layers * kv_heads]`, in order.
    pub fn pick<T>(self, all: &[T], kv_heads: usize) -> impl Iterator<Item = &T> {
        all.chunks_exact(kv_heads).take(self.layers).flat_map(move |heads| &heads[..self.heads])
    }
}

/// Word offsets of the parts, each 16-byte aligned.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// `[tokens]` each, up to `history_lens`
    pub ids: usize,
    pub positions: usize,
    pub draws: usize,
    pub top_k: usize,
    pub temperature: usize,
    pub top_p: usize,
    pub min_p: usize,
    pub penalty: usize,
    pub history_lens: usize,
    /// `[tokens]` u64
    pub seeds: usize,
    /// `[layers, stride]`, of which `[rows, heads]` count: tokens with the new ones
    lens: usize,
    /// `[layers, stride]` each: slabs in the table before and with them
    packed: [usize; 2],
    apart: Apart,
    stride: usize,
    /// `[rows + 1]`
    pub firsts: usize,
    /// `[1]`
    pub count: usize,
    /// `[count, 2]`
    pub edits: usize,
}

impl Places {
    /// For a step of this shape.
    fn of(grid: Grid, apart: Apart) -> Self {
        let (tokens, mut next) = (grid.tokens(), 0usize);
        let stride = (grid.rows * apart.heads).next_multiple_of(4);
        let mut place = |words: usize| {
            let at = next;
            next = (at + words).next_multiple_of(4);
            at
        };
        Self {
            ids: place(tokens),
            positions: place(tokens),
            draws: place(tokens),
            top_k: place(tokens),
            temperature: place(tokens),
            top_p: place(tokens),
            min_p: place(tokens),
            penalty: place(tokens),
            history_lens: place(tokens),
            seeds: place(2 * tokens),
            lens: place(apart.layers * stride),
            packed: [(); 2].map(|()| place(apart.layers * stride)),
            apart,
            stride,
            firsts: place(grid.rows + 1),
            count: place(1),
            edits: place(0),
        }
    }

    /// Lengths in layer `layer`.
    pub fn lens(&self, layer: usize) -> usize {
        self.lens + self.apart.line(layer) * self.stride
    }

    /// Slabs in the table of layer `layer`, before the step and with it.
    pub fn packed(&self, layer: usize) -> [usize; 2] {
        self.packed.map(|place| place + self.apart.line(layer) * self.stride)
    }
}

/// A turn, and what its row holds.
pub struct Placed<'a> {
    pub turn: &'a Turn<'a>,
    /// Tokens given before.
    pub position: usize,
    /// Of heads told apart, `[layers, heads]`: tokens held before; slabs in the table before and with the new tokens.
    pub heads: Vec<(usize, [usize; 2])>,
}

/// The block on the device, the newest tokens that penalties look at, and edits outside of steps.
pub struct Control {
    block: Buffer,
    /// `[tokens, MAX_RECENT]`
    history: Buffer,
    /// A count, then so many edits.
    edits: Buffer,
    words: Vec<u32>,
    apart: Apart,
}

/// Edits that are sent together outside of steps.
pub const EDITS: usize = 1 << 14;
/// Words before the edits of a list of its own.
const COUNT: usize = 4;

impl Control {
    /// For steps of at most `most`, with at most `edits` edits each.
    pub fn new(platform: &Rc<Metered>, most: Grid, edits: usize, apart: Apart) -> Result<Self> {
        let words = Places::of(most, apart).edits + 2 * edits;
        Ok(Self {
            block: Buffer::new(platform, (Use::Scratch, "a step's numbers"), 4 * words)?,
            history: Buffer::new(
                platform,
                (Use::Scratch, "tokens for penalties"),
                most.tokens() * MAX_RECENT * 4,
            )?,
            edits: Buffer::new(
                platform,
                (Use::Scratch, "page table edits"),
                4 * (COUNT + 2 * EDITS),
            )?,
            words: Vec::new(),
            apart,
        })
    }

    /// Where the parts of a step's numbers lie.
    pub fn places(&self, grid: Grid) -> Places {
        Places::of(grid, self.apart)
    }

    /// What is told apart.
    pub fn apart(&self) -> Apart {
        self.apart
    }

    /// Address of a part.
    pub fn at(&self, place: usize) -> u64 {
        self.block.at() + 4 * place as u64
    }

    /// Address of the tokens that penalties look at.
    pub fn history(&self) -> u64 {
        self.history.at()
    }

    /// Tells the device of `turns`.
    pub fn write(
        &mut self,
        platform: &Rc<Metered>,
        grid: Grid,
        turns: &[Placed<'_>],
        edits: &[Edit],
    ) -> Result<()> {
        let places = self.places(grid);
        self.words.clear();
        self.words.resize(places.edits, 0);
        self.words[places.count] = edits.len() as u32;
        self.words.extend(edits.iter().flatten());
        self.words[places.top_p..][..grid.tokens()].fill(1f32.to_bits());
        self.words[places.penalty..][..grid.tokens()].fill(1f32.to_bits());
        for row in 0..=grid.rows {
            self.words[places.firsts + row] = (row * grid.each) as u32;
        }
        let mut history = Vec::new();
        for &Placed { turn, position, ref heads } in turns {
            for (i, &(len, packed)) in heads.iter().enumerate() {
                let (layer, head) = (i / self.apart.heads, i % self.apart.heads);
                let at = turn.row.0 * self.apart.heads + head;
                self.words[places.lens(layer) + at] = (len + grid.each) as u32;
                for (place, packed) in places.packed(layer).into_iter().zip(packed) {
                    self.words[place + at] = packed as u32;
                }
            }
            for i in 0..grid.each {
                let seen = self.place(&places, turn, turn.row.0 * grid.each + i, i, position);
                if let Some(seen) = seen {
                    history.resize(grid.tokens() * MAX_RECENT, 0);
                    let first = (turn.row.0 * grid.each + i) * MAX_RECENT;
                    history[first..first + seen.len()].copy_from_slice(&seen);
                }
            }
        }
        if !history.is_empty() {
            platform.write(self.history.at(), bytemuck::cast_slice(&history))?;
        }
        platform.write(self.block.at(), bytemuck::cast_slice(&self.words))
    }

    /// Fills in token `i` of a turn as number `n` of the step; gives what its penalty looks at, where it has one.
    fn place(
        &mut self,
        places: &Places,
        turn: &Turn<'_>,
        n: usize,
        i: usize,
        len: usize,
    ) -> Option<Vec<u32>> {
        let sampling = &turn.choice.sampling;
        let words = &mut self.words;
        words[places.ids + n] = turn.tokens[i];
        words[places.positions + n] = (len + i) as u32;
        words[places.draws + n] = turn.draw.wrapping_add(i as i32) as u32;
        words[places.top_k + n] = i32::try_from(sampling.top_k).unwrap_or(i32::MAX) as u32;
        words[places.temperature + n] = sampling.temperature.to_bits();
        words[places.top_p + n] = sampling.top_p.to_bits();
        words[places.min_p + n] = sampling.min_p.to_bits();
        words[places.penalty + n] = sampling.repeat_penalty.to_bits();
        words[places.seeds + 2 * n] = turn.choice.seed as u32;
        words[places.seeds + 2 * n + 1] = (turn.choice.seed >> 32) as u32;
        if sampling.repeat_penalty == 1.0 {
            return None;
        }
        let seen = turn.seen(i);
        words[places.history_lens + n] = seen.len() as u32;
        Some(seen)
    }

    /// Edits the device's table, of `entries` entries, outside of a step.
    pub fn edit(&mut self, ops: &Ops, table: (usize, u64), edits: &[Edit]) -> Result<()> {
        for edits in edits.chunks(EDITS) {
            let list = self.list(&ops.platform, edits)?;
            edit(ops, table, (self.edits.at(), list), edits.len())?;
        }
        Ok(())
    }

    /// Writes a list of at most [`EDITS`] where edits outside of a step lie; its address.
    pub fn list(&mut self, platform: &Metered, list: &[[u32; 2]]) -> Result<u64> {
        self.words.clear();
        self.words.resize(COUNT, 0);
        self.words[0] = list.len() as u32;
        self.words.extend(list.iter().flatten());
        platform.write(self.edits.at(), bytemuck::cast_slice(&self.words))?;
        Ok(self.edits.at() + 4 * COUNT as u64)
    }
}

/// Edits a table of `entries` entries; the count lies at `list.0`, the edits at `list.1`.
pub fn edit(ops: &Ops, table: (usize, u64), list: (u64, u64), most: usize) -> Result<()> {
    let params = params!(kvw_page_table_params {
        max_edits: most as i32,
        table: at(table.1),
        edits: at(list.1),
        count: at(list.0),
        entries: table.0 as i32,
    });
    ops.run(|k| &k.page_table, &params)
}
