//! A block of a prompt, and what a device is told of it.

use std::ops::Range;
use std::rc::Rc;

use kvwarp::slab::TOKENS;

use super::choose::Choice;
use crate::gpu::control::Apart;
use crate::gpu::metered::Metered;
use crate::gpu::platform::{Buffer, Result};
use crate::gpu::tally::Use;
use crate::runner::{Held, Row};

/// What reading `tokens` tokens takes.
pub struct Prompt {
    /// Residual stream, `[tokens, width]` f32.
    pub x: Buffer,
    /// `[layers, kv_heads, slabs]` f16 slabs; of one layer where none waits for another's scores.
    ring: Buffer,
    /// Bytes of a layer there, and layers.
    layer: (usize, usize),
    /// [`Words`]
    pub words: Buffer,
    pub tokens: usize,
    pub slabs: usize,
    /// Where tokens are chosen.
    pub choice: Option<Choice>,
}

/// Words of a number, or of the two that say which rows are a sequence's: 16 bytes are what addresses are multiples of.
pub const WORD: usize = 4;

/// What a prompt's room is made for.
#[derive(Clone, Copy)]
pub struct Room {
    /// Most tokens of a prompt.
    pub tokens: usize,
    /// Most tokens that are said after it, and forgotten.
    pub said: usize,
    /// Rows that pass through a layer together.
    pub piece: usize,
    /// Bytes of an f16 slab, and slabs of tokens before it.
    pub ring: (usize, usize),
    /// Most tokens of latents that are expanded before it.
    pub held: usize,
    /// Layers that are staged at once.
    pub layers: usize,
    pub apart: Apart,
}

/// Word offsets of what a block is told.
#[derive(Clone, Copy)]
pub struct Words {
    pieces: usize,
    held: usize,
    apart: Apart,
    lens: usize,
    packed: usize,
    pub ids: usize,
    pub positions: usize,
}

impl Words {
    /// For `tokens` tokens in so many pieces.
    pub fn of(apart: Apart, pieces: usize, tokens: usize) -> Self {
        Self::after(0, apart, pieces, tokens)
    }

    /// The same after others, latents that are expanded in `held` pieces.
    pub fn after(held: usize, apart: Apart, pieces: usize, tokens: usize) -> Self {
        let (lens, each) = (WORD * pieces, apart.heads.next_multiple_of(WORD));
        let packed = lens + each * apart.layers * pieces;
        let expanded = packed + each * apart.layers;
        let ids = expanded + 2 * WORD * held;
        let positions = ids + tokens.next_multiple_of(WORD);
        Self { pieces, held: expanded, apart, lens, packed, ids, positions }
    }

    pub fn total(&self, tokens: usize) -> usize {
        self.positions + tokens
    }

    /// First row of the only sequence, and of the next, in piece `piece`.
    pub fn firsts(&self, piece: usize) -> usize {
        WORD * piece
    }

    /// Lengths of the heads of layer `layer` after piece `piece`.
    pub fn len(&self, layer: usize, piece: usize) -> usize {
        self.lens + self.each() * (self.apart.line(layer) * self.pieces + piece)
    }

    /// Slabs of the heads of layer `layer` in the table before the block.
    pub fn packed(&self, layer: usize) -> usize {
        self.packed + self.each() * self.apart.line(layer)
    }

    /// First row of the only sequence, and of the next, in piece `piece` of what was held before; and how many tokens that and
    /// the pieces before it are.
    pub fn held(&self, piece: usize) -> [usize; 2] {
        [0, WORD].map(|word| self.held + 2 * WORD * piece + word)
    }

    fn each(&self) -> usize {
        self.apart.heads.next_multiple_of(WORD)
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
    /// What each head held before, `[layers, kv_heads]`.
    pub before: Vec<Held>,
    pub kv_heads: usize,
    /// Rows that pass through the next layer, of [`Block::tokens`].
    pub pieces: Vec<Range<usize>>,
    pub words: Words,
    /// Addresses of what it is told and of its residual stream.
    pub told: u64,
    pub x: u64,
    /// Whether the policy chooses among its tokens.
    pub chooses: bool,
    /// What it gives attention to, where that is all that is asked of it.
    pub said: Option<Said>,
}

/// Of what is said again, as the kernels that listen are told.
pub struct Said {
    /// That are listened for.
    pub tokens: Range<usize>,
    /// Addresses of the first of them, a head, and of the ranges of slots whose attention counts.
    pub first: u64,
    pub seen: u64,
}

impl Block {
    /// Tokens that pass through the next layer.
    pub fn tokens(&self) -> usize {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    /// What the heads of layer `layer` held before.
    pub fn before(&self, layer: usize) -> &[Held] {
        &self.before[layer * self.kv_heads..][..self.kv_heads]
    }

    /// What they hold once its tokens have passed, before any is dropped.
    pub fn held(&self, layer: usize) -> Vec<Held> {
        let after = |before: &Held| Held { len: before.len + self.tokens(), ..*before };
        self.before(layer).iter().map(after).collect()
    }

    /// Address of a word.
    pub fn at(&self, word: usize) -> u64 {
        self.told + 4 * word as u64
    }

    /// What it is told but for tokens and positions.
    pub fn numbers(&self) -> Vec<u32> {
        let (words, mut out) = (&self.words, vec![0; self.words.ids]);
        for (p, piece) in self.pieces.iter().enumerate() {
            out[words.firsts(p) + 1] = piece.len() as u32;
        }
        for layer in 0..words.apart.layers {
            for (h, held) in self.before(layer)[..words.apart.heads].iter().enumerate() {
                out[words.packed(layer) + h] = held.packed as u32;
                for (p, piece) in self.pieces.iter().enumerate() {
                    out[words.len(layer, p) + h] = (held.len + piece.end) as u32;
                }
            }
        }
        out
    }
}

impl Prompt {
    /// Room for a prompt after whatever a row holds.
    pub fn new(
        (platform, width, kv_heads): (&Rc<Metered>, usize, usize),
        Room { tokens, said, piece, ring: (slab, ring), held, layers, apart }: Room,
    ) -> Result<Self> {
        let slabs = ring + (tokens + said).div_ceil(TOKENS) + 1;
        let most = tokens.max(said);
        let words = Words::after(held.div_ceil(piece), apart, most.div_ceil(piece), most);
        let words = words.total(most);
        let buffer = |what, bytes| Buffer::new(platform, (Use::Activations, what), bytes);
        let layer = kv_heads * slabs * slab;
        Ok(Self {
            x: buffer("a prompt's residual stream", 4 * most * width)?,
            ring: Buffer::zeroed(
                platform,
                (Use::Activations, "keys and values of layers that are being read"),
                layers * layer,
            )?,
            layer: (layer, layers),
            words: buffer("a prompt's tokens", 4 * words)?,
            tokens,
            slabs,
            choice: None,
        })
    }

    /// Address of a staged layer.
    pub fn ring(&self, layer: usize) -> u64 {
        let (bytes, layers) = self.layer;
        self.ring.at() + (layer % layers * bytes) as u64
    }
}
