//! Reading a block of a prompt, layer by layer: one layer's ring is staged long enough for all of it, filled and attended
//! to piece by piece, and then packed, or what the policy keeps of it is.

mod again;
mod block;
mod choose;
mod drop;
mod latent;
mod onward;
mod settle;

use std::ops::Range;

use kvwarp::device::Pieces;
use kvwarp::ffi::{KVW_F16, KVW_F32, KVW_PACK_FILL, KVW_PACK_FLUSH, kvw_cache};
use kvwarp::pages::packed_slabs;
use kvwarp::slab::TOKENS;

use super::Gpu;
use super::ops::{at, params};
use super::platform::Result;
use crate::runner::{Held, Row, RunError};
use crate::watch::Watch;
pub use block::Prompt;
use block::{Block, Room, Words, pieces};
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
    /// Room for `tokens` tokens, to be put back.
    fn reserve(&mut self, tokens: usize) -> Result<Prompt> {
        match self.prompt.take() {
            Some(prompt) if prompt.tokens >= tokens => Ok(prompt),
            less => {
                drop(less);
                self.prompt_of(tokens)
            }
        }
    }

    /// Room for a prompt of `tokens` tokens.
    pub(super) fn prompt_of(&self, tokens: usize) -> Result<Prompt> {
        let (config, spec) = (&self.net.config, self.cache.spec());
        let gpu = (&self.platform, config.width, config.kv_heads);
        let said = self.repeat.as_ref().zip(spec.evict);
        let mut prompt = Prompt::new(
            gpu,
            Room {
                tokens,
                said: said.map_or(0, |(repeat, evict)| {
                    repeat.most(tokens.min(evict.options.chunk.into()))
                }),
                piece: self.piece,
                ring: self.cache.staged(),
                held: if self.cache.has_latents() { self.cache.shape().context } else { 0 },
                layers: if settle::waits(spec) { config.layers } else { 1 },
                apart: self.control.apart(),
            },
        )?;
        if spec.selects() {
            prompt.choice = Some(Choice::new(&self.platform, spec, config, (tokens, self.piece))?);
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
        let prompt = self.reserve(tokens.len())?;
        let read = self.read_into(&prompt, row, tokens, watch);
        self.prompt = Some(prompt);
        read
    }

    fn read_into(
        &mut self,
        prompt: &Prompt,
        row: Row,
        tokens: &[u32],
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        let (len, n, layers) = (self.cache.len(row), tokens.len(), self.net.config.layers);
        let before = self.before(row);
        let chooses = len == 0 && self.cache.spec().selects();
        let mut policy = self.policy(n).filter(|_| chooses);
        if policy.is_none() {
            self.extend(row, (chooses, n))?;
        }
        let pieces = pieces(n, self.piece, self.window(chooses));
        let block = Block {
            row,
            read: n,
            before,
            kv_heads: self.net.config.kv_heads,
            words: Words::after(self.unfolded(len).len(), self.control.apart(), pieces.len(), n),
            pieces,
            told: prompt.words.at(),
            x: prompt.x.at(),
            chooses,
            said: None,
        };
        let mut block = self.begin(block, tokens, len)?;
        for layer in 0..layers {
            self.read_layer(prompt, &block, layer, watch)?;
            match &mut policy {
                None => self.settle_layer(prompt, &block, layer)?,
                Some(policy) => self.choose_layer(policy, prompt, &block, layer)?,
            }
            self.pass_on(prompt, &mut block, layer)?;
        }
        if let Some(policy) = &mut policy {
            self.say_again(policy, prompt, (row, tokens), watch)?;
            self.settle_all(policy, prompt, row)?;
        }
        self.cache.set_len(row, len + n);
        self.pack_latents(std::iter::once(row))
    }

    /// Tells the device of a block of `tokens`, the first of them at `position`, and begins its residual stream.
    fn begin(&self, block: Block, tokens: &[u32], position: usize) -> Result<Block> {
        let mut numbers = block.numbers();
        self.tell_unfolded(&block, &mut numbers);
        numbers.extend(tokens);
        numbers.resize(block.words.positions, 0);
        numbers.extend((position..position + tokens.len()).map(|position| position as u32));
        self.platform.write(block.told, bytemuck::cast_slice(&numbers))?;
        let (net, ids) = (&self.net, block.at(block.words.ids));
        net.ops.embed(&net.weights.embedding, ids, (block.x, KVW_F32), tokens.len())?;
        Ok(block)
    }

    /// One layer, into the staged ring. The last one's outputs are nobody's: its keys and values are all that stays.
    fn read_layer(
        &self,
        prompt: &Prompt,
        block: &Block,
        layer: usize,
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        let (net, last) = (&self.net, layer + 1 == self.net.config.layers);
        let weights = &net.weights.layers[layer];
        self.unfold(prompt, block, layer)?;
        if block.said.is_none() && !self.cache.has_latents() {
            let recent = |held: &Held| held.packed..held.len.div_ceil(TOKENS);
            let recent: Vec<_> = block.before(layer).iter().map(recent).collect();
            self.move_slabs((prompt, block.row), layer, &recent, true)?;
        }
        for (number, rows) in block.pieces.iter().enumerate() {
            let x = block.x + (4 * rows.start * net.config.width) as u64;
            net.project(weights, x, rows.len())?;
            let positions = block.at(block.words.positions) + 4 * rows.start as u64;
            net.rotate(weights, positions, rows.len())?;
            let piece = Piece { prompt, block, layer, number };
            self.put(&piece)?;
            if last && self.cache.has_latents() {
                watch.step(rows.len())?;
                continue;
            }
            net.expand(weights, rows.len())?;
            self.fill(layer, self.staged(&piece), (piece.firsts(), rows.len()))?;
            let watched = self.watched(&piece);
            if !last || watched > 0 {
                self.attend_piece(&piece, watched)?;
            }
            self.observe(&piece)?;
            if !last {
                net.finish(weights, x, rows.len())?;
            }
            watch.step(rows.len())?;
        }
        Ok(())
    }

    /// What a staged layer comes to: what has left the window packed, the rest in the row's ring; or what is kept of it.
    fn settle_layer(&self, prompt: &Prompt, block: &Block, layer: usize) -> Result<(), RunError> {
        if self.cache.has_latents() {
            return Ok(());
        }
        let heads = block.held(layer);
        if let Some(cut) = self.cut((block.chooses, block.read), layer, heads[0]) {
            return Ok(self.drop_staged(prompt, block.row, layer, (heads[0], cut))?);
        }
        let window = self.cache.spec().window;
        let packed = |held: &Held| packed_slabs(held.len, window).max(held.packed);
        let new = heads.iter().map(|held| packed(held) - held.packed).max().unwrap_or(0);
        self.flush(prompt, block, layer, new)?;
        let left = |held: &Held| packed(held)..held.len.div_ceil(TOKENS);
        let left: Vec<_> = heads.iter().map(left).collect();
        Ok(self.move_slabs((prompt, block.row), layer, &left, false)?)
    }

    /// The layer as a kernel sees it once a piece is written.
    fn staged(&self, &Piece { prompt, block, layer, number }: &Piece<'_>) -> kvw_cache {
        let told = [block.words.len(layer, number), block.words.packed(layer)];
        let ring = (prompt.ring(layer), prompt.slabs);
        self.cache.staged_view(layer, block.row, told.map(|word| block.at(word)), ring)
    }

    /// Writes keys and values of `rows` rows of a layer, the newest that `cache` holds; `firsts` as the op has it.
    fn fill(&self, layer: usize, cache: kvw_cache, (firsts, rows): (u64, usize)) -> Result<()> {
        let weights = &self.net.weights.layers[layer];
        let mut params = self.net.packing(weights, KVW_PACK_FILL, cache, rows);
        params.cu_tokens = at(firsts);
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

    /// Packs what has left the window, at most `new` slabs of a head.
    fn flush(&self, prompt: &Prompt, block: &Block, layer: usize, new: usize) -> Result<()> {
        if new == 0 {
            return Ok(());
        }
        let number = block.pieces.len() - 1;
        let mut cache = self.staged(&Piece { prompt, block, layer, number });
        cache.packed = std::ptr::null();
        let mut params =
            self.net.packing(&self.net.weights.layers[layer], KVW_PACK_FLUSH, cache, 0);
        params.first = at(block.at(block.words.packed(layer)));
        params.max_tokens = new as i32;
        params.feedback = at(self.cache.feedback(layer));
        params.range = self.cache.range();
        self.net.ops.run(|k| &k.kv_pack, &params)
    }

    /// Copies each head's slabs from the row's ring to the staged one, or back; those of heads in a row that have the same
    /// ones together.
    fn move_slabs(
        &self,
        (prompt, row): (&Prompt, Row),
        layer: usize,
        slabs: &[Range<usize>],
        staging: bool,
    ) -> Result<()> {
        let (width, kept) = (self.cache.f16_bytes(), self.cache.ring_slabs());
        let mut first = 0;
        for heads in slabs.chunk_by(|a, b| a == b) {
            for slab in heads[0].clone() {
                let ring =
                    (self.cache.ring_at(layer, row, first * kept + slab % kept), kept * width);
                let slot = ((first * prompt.slabs + slab % prompt.slabs) * width) as u64;
                let staged = (prompt.ring(layer) + slot, prompt.slabs * width);
                let (to, from) = if staging { (staged, ring) } else { (ring, staged) };
                self.platform.copy(&Pieces {
                    to: to.0,
                    from: from.0,
                    to_pitch: to.1,
                    from_pitch: from.1,
                    width,
                    rows: heads.len(),
                })?;
            }
            first += heads.len();
        }
        Ok(())
    }
}
