//! Reading a block of a prompt, layer by layer: one layer's ring is staged long enough for all of it, filled and attended
//! to piece by piece, and then packed, or what the policy keeps of it is.

mod block;
mod choose;
mod drop;
mod onward;

use kvwarp::device::Pieces;
use kvwarp::ffi::{KVW_F16, KVW_F32, KVW_PACK_FILL, KVW_PACK_FLUSH};
use kvwarp::pages::packed_slabs;
use kvwarp::slab::TOKENS;

use super::Gpu;
use super::ops::{at, params};
use super::platform::Result;
use crate::runner::{Held, Row, RunError};
use crate::watch::Watch;
pub use block::Prompt;
use block::{Block, Words, pieces};
pub use choose::{Choice, refused};

/// Some rows of a block in a layer.
struct Piece<'a> {
    prompt: &'a Prompt,
    block: &'a Block,
    layer: usize,
    /// Number of the piece.
    number: usize,
}

impl Piece<'_> {
    fn rows(&self) -> usize {
        self.block.pieces[self.number].len()
    }

    /// Address of its first rows.
    fn firsts(&self) -> u64 {
        self.block.at(self.block.words.firsts(self.number))
    }
}

impl Gpu {
    /// Makes room for `tokens` tokens.
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        if self.prompt.as_ref().is_none_or(|prompt| prompt.tokens < tokens) {
            self.prompt = None;
            self.prompt = Some(self.prompt_of(tokens)?);
        }
        Ok(())
    }

    /// Room for a prompt of `tokens` tokens.
    pub(super) fn prompt_of(&self, tokens: usize) -> Result<Prompt> {
        let config = &self.net.config;
        let gpu = (&self.platform, config.width, config.kv_heads);
        let (slab, ring) = (self.cache.f16_bytes(), self.cache.ring_slabs());
        let told = (self.piece, self.control.lines());
        let mut prompt = Prompt::new(gpu, tokens, slab, told, ring)?;
        if self.cache.spec().selects() {
            prompt.choice =
                Some(Choice::new(&self.platform, self.cache.spec(), config, (tokens, self.piece))?);
        }
        Ok(prompt)
    }

    /// Reads tokens that are known to fit.
    pub(super) fn read_block(
        &mut self,
        row: Row,
        tokens: &[u32],
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        self.reserve(tokens.len())?;
        let (len, n, layers) = (self.cache.len(row), tokens.len(), self.net.config.layers);
        let before: Vec<_> = (0..layers).map(|layer| self.cache.held(row, layer)).collect();
        let chooses = len == 0 && self.cache.spec().selects();
        let mut edits = Vec::new();
        let mut through = n;
        for (layer, &held) in before.iter().enumerate() {
            let len = held.len + through;
            let cut = self.cut((chooses, n), layer, Held { len, ..held });
            let stays = cut.map_or(len, |cut| cut.stays());
            let chosen = cut.filter(|_| self.cache.spec().lag().is_some());
            self.cache.extend(row, layer, stays, &mut edits)?;
            self.cache.keep(row, layer, (stays, chosen.map_or(held.chosen, |cut| cut.chosen())));
            through = self.onward((chooses, n), layer, through).map_or(through, |o| o.kept);
        }
        self.control.edit(&self.net.ops, self.cache.table(), &edits)?;
        let Some(prompt) = &self.prompt else { return Ok(()) };
        let pieces = pieces(n, self.piece, self.window(chooses));
        let words = Words::of(self.control.lines(), pieces.len(), n);
        let (told, x) = (prompt.words.at(), prompt.x.at());
        let mut block = Block { row, read: n, before, pieces, words, told, x, chooses };
        let mut numbers = block.numbers(self.control.lines());
        numbers.extend(tokens);
        numbers.resize(words.positions, 0);
        numbers.extend((len..len + n).map(|position| position as u32));
        self.platform.write(told, bytemuck::cast_slice(&numbers))?;
        let net = &self.net;
        net.ops.embed(&net.weights.embedding, block.at(words.ids), (x, KVW_F32), n)?;
        for layer in 0..layers {
            self.read_layer(prompt, &block, layer, watch)?;
            self.pass_on(prompt, &mut block, layer)?;
        }
        self.cache.set_len(row, len + n);
        Ok(())
    }

    /// One layer. The last one's outputs are nobody's: its keys and values are all that stays.
    fn read_layer(
        &self,
        prompt: &Prompt,
        block: &Block,
        layer: usize,
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        let (net, last) = (&self.net, layer + 1 == self.net.config.layers);
        let (weights, before) = (&net.weights.layers[layer], block.before[layer]);
        let recent = before.packed..before.len.div_ceil(TOKENS);
        self.move_slabs((prompt, block.row), layer, recent, true)?;
        for (number, rows) in block.pieces.iter().enumerate() {
            let x = block.x + (4 * rows.start * net.config.width) as u64;
            net.project(weights, x, rows.len())?;
            let positions = block.at(block.words.positions) + 4 * rows.start as u64;
            net.rotate(weights, positions, rows.len())?;
            let piece = Piece { prompt, block, layer, number };
            self.fill(&piece)?;
            let watched = self.watched(&piece);
            if !last || watched > 0 {
                self.attend_piece(&piece, watched)?;
                self.observe(&piece)?;
            }
            if !last {
                net.finish(weights, x, rows.len())?;
            }
            watch.step(rows.len())?;
        }
        let held = block.held(layer);
        match self.cut((block.chooses, block.read), layer, held) {
            Some(cut) => Ok(self.drop_staged(prompt, block.row, layer, (held, cut))?),
            None => {
                let packed = packed_slabs(held.len, self.cache.spec().window).max(held.packed);
                self.flush(prompt, block, layer, packed)?;
                let left = packed..held.len.div_ceil(TOKENS);
                Ok(self.move_slabs((prompt, block.row), layer, left, false)?)
            }
        }
    }

    /// The layer as a kernel sees it once a piece is written.
    fn staged(
        &self,
        &Piece { prompt, block, layer, number }: &Piece<'_>,
    ) -> kvwarp::ffi::kvw_cache {
        let told = [block.words.len(layer, number), block.words.packed(layer)];
        let ring = (prompt.ring.at(), prompt.slabs);
        self.cache.staged(layer, block.row, told.map(|word| block.at(word)), ring)
    }

    fn fill(&self, piece: &Piece<'_>) -> Result<()> {
        let weights = &self.net.weights.layers[piece.layer];
        let rows = piece.rows();
        let mut params = self.net.packing(weights, KVW_PACK_FILL, self.staged(piece), rows);
        params.cu_tokens = at(piece.firsts());
        params.max_tokens = rows as i32;
        self.net.ops.run(|k| &k.kv_pack, &params)
    }

    /// Attention of a piece; of its newest `watched` rows also how the weights were normalised.
    fn attend_piece(&self, piece: &Piece<'_>, watched: usize) -> Result<()> {
        let rows = piece.rows() as i32;
        let choice = piece.prompt.choice.as_ref().filter(|_| watched > 0);
        let params = params!(kvw_prefill_attn_params {
            q_heads: self.net.config.heads as i32,
            cache: self.staged(piece),
            q: at(self.net.queries()),
            out: at(self.net.work.mix.at()),
            lse: at(choice.map_or(0, |choice| choice.lse.at())),
            lse_rows: watched as i32,
            cu_tokens: at(piece.firsts()),
            tokens: rows,
            max_tokens: rows,
            sliding_window: self.sliding_window(),
            dtype: KVW_F16,
        });
        self.net.ops.run(|k| &k.prefill_attn, &params)
    }

    /// Packs what has left the window: slabs up to `packed`.
    fn flush(&self, prompt: &Prompt, block: &Block, layer: usize, packed: usize) -> Result<()> {
        let before = block.before[layer].packed;
        if packed == before {
            return Ok(());
        }
        let number = block.pieces.len() - 1;
        let mut cache = self.staged(&Piece { prompt, block, layer, number });
        cache.packed = std::ptr::null();
        let mut params =
            self.net.packing(&self.net.weights.layers[layer], KVW_PACK_FLUSH, cache, 0);
        params.first = at(block.at(block.words.packed(layer)));
        params.max_tokens = (packed - before) as i32;
        params.feedback = at(self.cache.feedback(layer));
        params.range = self.cache.range();
        self.net.ops.run(|k| &k.kv_pack, &params)
    }

    /// Copies slabs of every head from the row's ring to the staged one, or back.
    fn move_slabs(
        &self,
        (prompt, row): (&Prompt, Row),
        layer: usize,
        slabs: std::ops::Range<usize>,
        staging: bool,
    ) -> Result<()> {
        let (width, kept) = (self.cache.f16_bytes(), self.cache.ring_slabs());
        for slab in slabs {
            let ring = (self.cache.ring_at(layer, row, slab % kept), kept * width);
            let slot = (slab % prompt.slabs * width) as u64;
            let staged = (prompt.ring.at() + slot, prompt.slabs * width);
            let (to, from) = if staging { (staged, ring) } else { (ring, staged) };
            self.platform.copy(&Pieces {
                to: to.0,
                from: from.0,
                to_pitch: to.1,
                from_pitch: from.1,
                width,
                rows: self.net.config.kv_heads,
            })?;
        }
        Ok(())
    }
}
