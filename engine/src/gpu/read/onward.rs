//! Which tokens go deeper (FastKV, arXiv:2502.01068): those that the newest ones attend to, with their positions.

use kvwarp::device::Pieces;
use kvwarp::ffi;

use super::Piece;
use super::block::{Block, Prompt, Words, pieces};
use super::choose::Choice;
use crate::gpu::Gpu;
use crate::gpu::ops::{at, params};
use crate::gpu::platform::Result;
use crate::policy::{Method, Onward};

impl Gpu {
    /// Which of `n` tokens go deeper than a layer, of `read` that the first was given; `None` where all do.
    pub(super) fn onward(
        &self,
        (chooses, read): (bool, usize),
        layer: usize,
        n: usize,
    ) -> Option<Onward> {
        let spec = self.cache.spec();
        Onward::new(spec, read, (layer, self.net.config.layers), n).filter(|_| chooses)
    }

    /// Newest tokens that have to be in one piece.
    pub(super) fn window(&self, chooses: bool) -> usize {
        let spec = self.cache.spec();
        let asked = spec.evict.filter(|evict| evict.method() == Method::Window);
        let window = asked.map_or(0, |evict| usize::from(evict.options.window));
        let onward = if spec.tsp.is_some() { Onward::WINDOW } else { 0 };
        if chooses { window.max(onward) } else { 0 }
    }

    /// Newest rows of a piece whose log-sum-exps somebody asks for.
    pub(super) fn watched(&self, &Piece { block, layer, number, .. }: &Piece<'_>) -> usize {
        let Some(evict) = self.cache.spec().evict.filter(|_| block.chooses) else {
            return self.watched_onward(block, layer, number);
        };
        let (rows, last) = (block.pieces[number].len(), number + 1 == block.pieces.len());
        match evict.method() {
            Method::Column => rows,
            Method::Window if last => {
                let window = usize::from(evict.options.window);
                window.max(self.watched_onward(block, layer, number)).min(rows)
            }
            _ => self.watched_onward(block, layer, number),
        }
    }

    fn watched_onward(&self, block: &Block, layer: usize, number: usize) -> usize {
        let last = number + 1 == block.pieces.len();
        let onward = self.onward((block.chooses, block.read), layer, block.tokens());
        onward.filter(|_| last).map_or(0, |onward| onward.window)
    }

    /// Makes of a block that has passed layer `layer` what passes the next.
    pub(super) fn pass_on(&self, prompt: &Prompt, block: &mut Block, layer: usize) -> Result<()> {
        let onward = self.onward((block.chooses, block.read), layer, block.tokens());
        let (Some(onward), Some(choice)) = (onward, &prompt.choice) else { return Ok(()) };
        self.pick_onward(prompt, block, (layer, onward), choice)?;
        let pieces = pieces(onward.kept, self.piece, self.window(true));
        let words = Words::of(self.control.apart(), pieces.len(), onward.kept);
        let (from, positions) = (block.x, block.at(block.words.positions));
        (block.pieces, block.words) = (pieces, words);
        (block.told, block.x) = (choice.words.at(), choice.x.at());
        self.platform.write(block.told, bytemuck::cast_slice(&block.numbers()))?;
        let params = params!(kvw_token_select_params {
            op: ffi::KVW_SELECT_GATHER,
            indices: at(choice.picked.at()),
            x: at(from),
            positions: at(positions),
            out: at(block.x),
            out_positions: at(block.at(words.positions)),
            rows: 1,
            n: onward.kept as i32,
            index_stride: onward.kept as i32,
            row_bytes: 4 * self.net.config.width as i32,
        });
        self.net.ops.run(|k| &k.token_select, &params)
    }

    /// Numbers of the tokens that go on, `[kept]`, among those of the block.
    fn pick_onward(
        &self,
        prompt: &Prompt,
        block: &Block,
        (layer, Onward { kept, window, pool }): (usize, Onward),
        choice: &Choice,
    ) -> Result<()> {
        let (n, number) = (block.tokens(), block.pieces.len() - 1);
        let piece = Piece { prompt, block, layer, number };
        let (open, best) = (n - window, kept - window);
        if best > 0 {
            self.attention_to(&piece, choice, (self.watched(&piece), window), (open, false))?;
            self.pool(choice, (1, self.net.config.heads), open, (ffi::KVW_POOL_MAX, pool))?;
            let k = choice.onward_number(&self.platform, best)?;
            self.top_k(choice, k, (1, open), best)?;
        }
        let line = |to: u64, from: u64, n: usize| Pieces {
            to,
            from,
            to_pitch: 4 * n,
            from_pitch: 4 * n,
            width: 4 * n,
            rows: 1,
        };
        let (to, newest) = (choice.picked.at(), choice.order.at() + 4 * open as u64);
        self.platform.copy(&line(to, choice.indices.at(), best))?;
        self.platform.copy(&line(to + 4 * best as u64, newest, window))
    }
}
