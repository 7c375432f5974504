//! A block of a prompt, and what a device is told of it.

use std::ops::Range;
use std::rc::Rc;

use kvwarp::slab::TOKENS;

use super::choose::Choice;
use crate::gpu::metered::Metered;
use crate::gpu::platform::{Buffer, Result};
use crate::gpu::tally::Use;
use crate::runner::{Held, Row};

/// What reading `tokens` tokens takes.
pub struct Prompt {
    /// Residual stream, `[tokens, width]` f32.
    pub x: Buffer,
    /// `[kv_heads, slabs]` f16 slabs
    pub ring: Buffer,
    /// [`Words`]
    pub words: Buffer,
    pub tokens: usize,
    pub slabs: usize,
    /// Where tokens are chosen.
    pub choice: Option<Choice>,
}

/// Words of a number, or of the two that say which rows are a sequence's: 16 bytes are what addresses are multiples of.
pub const WORD: usize = 4;

/// Word offsets of what a block is told.
#[derive(Clone, Copy)]
pub struct Words {
    pieces: usize,
    lines: usize,
    lens: usize,
    packed: usize,
    pub ids: usize,
    pub positions: usize,
}

impl Words {
    /// For `tokens` tokens in so many pieces, and layers that may hold different numbers of tokens.
    pub fn of(lines: usize, pieces: usize, tokens: usize) -> Self {
        let lens = WORD * pieces;
        let packed = lens + WORD * lines * pieces;
        let ids = packed + WORD * lines;
        let positions = ids + tokens.next_multiple_of(WORD);
        Self { pieces, lines, lens, packed, ids, positions }
    }

    pub fn total(&self, tokens: usize) -> usize {
        self.positions + tokens
    }

    /// First row of the only sequence, and of the next, in piece `piece`.
    pub fn firsts(&self, piece: usize) -> usize {
        WORD * piece
    }

    /// Length of layer `layer` after piece `piece`.
    pub fn len(&self, layer: usize, piece: usize) -> usize {
        self.lens + WORD * (self.line(layer) * self.pieces + piece)
    }

    /// Slabs of layer `layer` in the table before the block.
    pub fn packed(&self, layer: usize) -> usize {
        self.packed + WORD * self.line(layer)
    }

    fn line(&self, layer: usize) -> usize {
        layer.min(self.lines - 1)
    }
}

/// Rows that pass through a layer together: `most`, but the newest `window` rows are in one of them.
pub fn pieces(tokens: usize, most: usize, window: usize) -> Vec<Range<usize>> {
    let mut pieces: Vec<_> =
        (0..tokens).step_by(most).map(|first| first..tokens.min(first + most)).collect();
    if let [.., before, last] = &mut pieces[..]
        && last.len() < window
    {
        let middle = before.start + (tokens - before.start) / 2 / WORD * WORD;
        (before.end, last.start) = (middle, middle);
    }
    pieces
}

/// A block on its way through the layers.
pub struct Block {
    pub row: Row,
    /// Tokens that were given to the first layer.
    pub read: usize,
    /// What each layer held before.
    pub before: Vec<Held>,
    /// Rows that pass through the next layer, of [`Block::tokens`].
    pub pieces: Vec<Range<usize>>,
    pub words: Words,
    /// Addresses of what it is told and of its residual stream.
    pub told: u64,
    pub x: u64,
    /// Whether the policy chooses among its tokens.
    pub chooses: bool,
}

impl Block {
    /// Tokens that pass through the next layer.
    pub fn tokens(&self) -> usize {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    /// What layer `layer` holds once they have, before any is dropped.
    pub fn held(&self, layer: usize) -> Held {
        let before = self.before[layer];
        Held { len: before.len + self.tokens(), ..before }
    }

    /// Address of a word.
    pub fn at(&self, word: usize) -> u64 {
        self.told + 4 * word as u64
    }

    /// What it is told but for tokens and positions; for `lines` layers that are told apart.
    pub fn numbers(&self, lines: usize) -> Vec<u32> {
        let mut out = vec![0; self.words.ids];
        for (p, piece) in self.pieces.iter().enumerate() {
            out[self.words.firsts(p) + 1] = piece.len() as u32;
            for line in 0..lines {
                out[self.words.len(line, p)] = (self.before[line].len + piece.end) as u32;
            }
        }
        (0..lines).for_each(|line| out[self.words.packed(line)] = self.before[line].packed as u32);
        out
    }
}

impl Prompt {
    /// Room for `tokens` tokens after whatever a row holds, for so many layers that are told apart.
    pub fn new(
        (platform, width, kv_heads): (&Rc<Metered>, usize, usize),
        tokens: usize,
        slab: usize,
        (piece, lines): (usize, usize),
        ring: usize,
    ) -> Result<Self> {
        let slabs = ring + tokens.div_ceil(TOKENS) + 1;
        let words = Words::of(lines, tokens.div_ceil(piece), tokens).total(tokens);
        let buffer = |what, bytes| Buffer::new(platform, (Use::Activations, what), bytes);
        Ok(Self {
            x: buffer("a prompt's residual stream", 4 * tokens * width)?,
            ring: Buffer::zeroed(
                platform,
                (Use::Activations, "a layer's keys and values"),
                kv_heads * slabs * slab,
            )?,
            words: buffer("a prompt's tokens", 4 * words)?,
            tokens,
            slabs,
            choice: None,
        })
    }
}
