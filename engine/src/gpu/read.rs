//! Reading a block of a prompt, layer by layer: one layer's ring is staged long enough for all of it, filled and attended
//! to piece by piece, and then packed.

use std::rc::Rc;

use kvwarp::device::Pieces;
use kvwarp::ffi::{KVW_F16, KVW_F32, KVW_PACK_FILL, KVW_PACK_FLUSH};
use kvwarp::slab::TOKENS;

use super::Gpu;
use super::metered::Metered;
use super::ops::{at, params};
use super::platform::{Buffer, Result};
use super::tally::Use;
use crate::runner::{Row, RunError};
use crate::watch::Watch;

/// What reading `tokens` tokens takes.
pub struct Prompt {
    /// Residual stream, `[tokens, width]` f32.
    x: Buffer,
    /// `[kv_heads, slabs]` f16 slabs
    ring: Buffer,
    /// [`Words`]
    words: Buffer,
    tokens: usize,
    slabs: usize,
}

/// Word offsets of what a block is told; single numbers 4 words apart, as 16 bytes are what addresses are multiples of.
struct Words {
    packed: usize,
    /// Length after each piece.
    lens: usize,
    /// First row of each sequence, of one sequence: 0 and the rows of a whole piece, then of the last.
    firsts: [usize; 2],
    ids: usize,
    positions: usize,
}

/// Words of a number.
const WORD: usize = 4;

impl Words {
    fn of(tokens: usize, pieces: usize) -> Self {
        let lens = WORD;
        let firsts = lens + WORD * pieces;
        let ids = firsts + 2 * WORD;
        let positions = ids + tokens.next_multiple_of(WORD);
        Self { packed: 0, lens, firsts: [firsts, firsts + WORD], ids, positions }
    }

    fn total(&self, tokens: usize) -> usize {
        self.positions + tokens
    }
}

/// Some rows of a block in a layer.
struct Piece<'a> {
    prompt: &'a Prompt,
    block: &'a Block,
    layer: usize,
    /// First row, of the block's.
    first: usize,
    rows: usize,
}

/// A block on its way through the layers.
struct Block {
    row: Row,
    /// Tokens held before, and new ones.
    len: usize,
    tokens: usize,
    /// Slabs packed before and after.
    packed: [usize; 2],
    /// Slabs of a head's staged ring.
    slabs: usize,
    words: Words,
}

impl Prompt {
    /// Room for `tokens` tokens after whatever a row holds.
    pub fn new(
        gpu: (&Rc<Metered>, usize, usize),
        tokens: usize,
        slab: usize,
        piece: usize,
        ring: usize,
    ) -> Result<Self> {
        let (platform, width, kv_heads) = gpu;
        let slabs = ring + tokens.div_ceil(TOKENS) + 1;
        let words = Words::of(tokens, tokens.div_ceil(piece)).total(tokens);
        Ok(Self {
            x: Buffer::new(
                platform,
                (Use::Activations, "a prompt's residual stream"),
                4 * tokens * width,
            )?,
            ring: Buffer::zeroed(
                platform,
                (Use::Activations, "a layer's keys and values"),
                kv_heads * slabs * slab,
            )?,
            words: Buffer::new(platform, (Use::Activations, "a prompt's tokens"), 4 * words)?,
            tokens,
            slabs,
        })
    }
}

impl Gpu {
    /// Makes room for `tokens` tokens.
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        if self.prompt.as_ref().is_none_or(|prompt| prompt.tokens < tokens) {
            self.prompt = None;
            let gpu = (&self.platform, self.net.config.width, self.net.config.kv_heads);
            let (slab, ring) = (self.cache.f16_bytes(), self.cache.ring_slabs());
            self.prompt = Some(Prompt::new(gpu, tokens, slab, self.piece, ring)?);
        }
        Ok(())
    }

    /// Reads tokens that are known to fit.
    pub(super) fn read_block(
        &mut self,
        row: Row,
        tokens: &[u32],
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        self.reserve(tokens.len())?;
        let (len, before) = (self.cache.len(row), self.cache.packed(row));
        let mut edits = Vec::new();
        self.cache.extend(row, len + tokens.len(), &mut edits)?;
        self.control.edit(&self.net.ops, self.cache.table(), &edits)?;
        let Some(prompt) = &self.prompt else { return Ok(()) };
        let block = Block {
            row,
            len,
            tokens: tokens.len(),
            packed: [before, self.cache.packed(row)],
            slabs: prompt.slabs,
            words: Words::of(tokens.len(), tokens.len().div_ceil(self.piece)),
        };
        self.tell(prompt, &block, tokens)?;
        let ids = prompt.at(block.words.ids);
        let net = &self.net;
        net.ops.embed(&net.weights.embedding, ids, (prompt.x.at(), KVW_F32), tokens.len())?;
        for layer in 0..net.config.layers {
            self.read_layer(prompt, &block, layer, watch)?;
        }
        self.cache.set_len(row, len + tokens.len());
        Ok(())
    }

    /// Writes the block's numbers.
    fn tell(&self, prompt: &Prompt, block: &Block, tokens: &[u32]) -> Result<()> {
        let (words, n) = (&block.words, tokens.len());
        let mut out = vec![0u32; words.total(n)];
        out[words.packed] = block.packed[0] as u32;
        let last = (n - 1) % self.piece + 1;
        out[words.firsts[0] + 1] = self.piece as u32;
        out[words.firsts[1] + 1] = last as u32;
        for piece in 0..n.div_ceil(self.piece) {
            let read = ((piece + 1) * self.piece).min(n);
            out[words.lens + WORD * piece] = (block.len + read) as u32;
        }
        out[words.ids..][..n].copy_from_slice(tokens);
        let positions = (block.len..block.len + n).map(|p| p as u32);
        out[words.positions..].iter_mut().zip(positions).for_each(|(to, p)| *to = p);
        self.platform.write(prompt.words.at(), bytemuck::cast_slice(&out))
    }

    /// One layer. The last one's outputs are nobody's: its keys and values are all that stays.
    fn read_layer(
        &self,
        prompt: &Prompt,
        block: &Block,
        index: usize,
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        let net = &self.net;
        let (layer, last) = (&net.weights.layers[index], index + 1 == net.config.layers);
        let held = block.packed[0]..block.len.div_ceil(TOKENS);
        held.into_iter().try_for_each(|slab| self.move_slab(prompt, block, index, slab, true))?;
        for first in (0..block.tokens).step_by(self.piece) {
            let rows = self.piece.min(block.tokens - first);
            let x = prompt.x.at() + (4 * first * net.config.width) as u64;
            net.project(layer, x, rows)?;
            let positions = prompt.at(block.words.positions) + 4 * first as u64;
            net.rotate(layer, positions, rows)?;
            let piece = Piece { prompt, block, layer: index, first, rows };
            self.fill(&piece)?;
            if !last {
                self.attend_piece(&piece)?;
                net.finish(layer, x, rows)?;
            }
            watch.step(rows)?;
        }
        self.flush(prompt, block, index)?;
        let left = block.packed[1]..(block.len + block.tokens).div_ceil(TOKENS);
        Ok(left
            .into_iter()
            .try_for_each(|slab| self.move_slab(prompt, block, index, slab, false))?)
    }

    /// The layer as a kernel sees it once the piece at `first` is written.
    fn staged(
        &self,
        prompt: &Prompt,
        block: &Block,
        layer: usize,
        first: usize,
    ) -> kvwarp::ffi::kvw_cache {
        let lens = prompt.at(block.words.lens + WORD * (first / self.piece));
        let mut cache = self.cache.staged(layer, block.row, lens, (prompt.ring.at(), block.slabs));
        cache.packed = at(prompt.at(block.words.packed));
        cache
    }

    /// Address of a piece's first rows.
    fn firsts(&self, piece: &Piece<'_>) -> u64 {
        let is_last = usize::from(piece.rows < self.piece);
        piece.prompt.at(piece.block.words.firsts[is_last])
    }

    fn fill(&self, piece: &Piece<'_>) -> Result<()> {
        let &Piece { prompt, block, layer, first, rows } = piece;
        let cache = self.staged(prompt, block, layer, first);
        let mut params =
            self.net.packing(&self.net.weights.layers[layer], KVW_PACK_FILL, cache, rows);
        params.cu_tokens = at(self.firsts(piece));
        params.max_tokens = rows as i32;
        self.net.ops.run(|k| &k.kv_pack, &params)
    }

    fn attend_piece(&self, piece: &Piece<'_>) -> Result<()> {
        let &Piece { prompt, block, layer, first, rows } = piece;
        let params = params!(kvw_prefill_attn_params {
            q_heads: self.net.config.heads as i32,
            cache: self.staged(prompt, block, layer, first),
            q: at(self.net.queries()),
            out: at(self.net.work.mix.at()),
            cu_tokens: at(self.firsts(piece)),
            tokens: rows as i32,
            max_tokens: rows as i32,
            sliding_window: self.sliding_window(),
            dtype: KVW_F16,
        });
        self.net.ops.run(|k| &k.prefill_attn, &params)
    }

    /// Packs what has left the window.
    fn flush(&self, prompt: &Prompt, block: &Block, layer: usize) -> Result<()> {
        let [before, after] = block.packed;
        if after == before {
            return Ok(());
        }
        let mut cache = self.staged(prompt, block, layer, block.tokens - 1);
        cache.packed = std::ptr::null();
        let mut params =
            self.net.packing(&self.net.weights.layers[layer], KVW_PACK_FLUSH, cache, 0);
        params.first = at(prompt.at(block.words.packed));
        params.max_tokens = (after - before) as i32;
        params.feedback = at(self.cache.feedback(layer));
        params.range = self.cache.range();
        self.net.ops.run(|k| &k.kv_pack, &params)
    }

    /// Copies a slab of every head from the row's ring to the staged one, or back.
    fn move_slab(
        &self,
        prompt: &Prompt,
        block: &Block,
        layer: usize,
        slab: usize,
        staging: bool,
    ) -> Result<()> {
        let width = self.cache.f16_bytes();
        let kept = self.cache.ring_slabs();
        let ring = (self.cache.ring_at(layer, block.row, slab % kept), kept * width);
        let slot = (slab % block.slabs * width) as u64;
        let staged = (prompt.ring.at() + slot, block.slabs * width);
        let (to, from) = if staging { (staged, ring) } else { (ring, staged) };
        self.platform.copy(&Pieces {
            to: to.0,
            from: from.0,
            to_pitch: to.1,
            from_pitch: from.1,
            width,
            rows: self.net.config.kv_heads,
        })
    }
}

impl Prompt {
    fn at(&self, word: usize) -> u64 {
        self.words.at() + 4 * word as u64
    }
}
