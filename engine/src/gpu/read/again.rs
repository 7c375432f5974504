//! Saying a text again, to hear what is asked of it (KVzip, arXiv:2505.23416): a request and the text, a chunk at a time,
//! after all that the staged layers hold, and none of it stays.

use std::ops::Range;

use kvwarp::ffi::{self, KVW_F16};

use super::Piece;
use super::block::{Block, Prompt, Said, WORD, Words, pieces};
use super::choose::Choice;
use crate::gpu::Gpu;
use crate::gpu::ops::{at, params};
use crate::gpu::platform::Result;
use crate::policy::{Policy, Repeat};
use crate::runner::{Held, Row, RunError};
use crate::watch::Watch;

/// Ranges of slots that a chunk's attention is a share of.
const SEEN: usize = 3;

impl Gpu {
    /// Has `tokens`, which all layers have read, said again, and the policy choose by it.
    pub(super) fn say_again(
        &mut self,
        policy: &mut Policy,
        prompt: &Prompt,
        (row, tokens): (Row, &[u32]),
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        let (Some(repeat), Some(evict)) = (&self.repeat, policy.repeats()) else { return Ok(()) };
        let Some(choice) = &prompt.choice else { return Ok(()) };
        let (chunk, sink) = (usize::from(evict.options.chunk), usize::from(evict.options.sink));
        let n = tokens.len();
        let config = &self.net.config;
        let mut heard = vec![vec![0.0; config.kv_heads * n]; config.layers];
        for from in (0..n).step_by(chunk) {
            let part = from..n.min(from + chunk);
            self.say_part(repeat, (prompt, choice), (row, tokens), (&part, sink), watch)?;
            self.hear(choice, n, &part, &mut heard)?;
        }
        for (layer, scores) in heard.into_iter().enumerate() {
            let scored = policy.scored(n, vec![0; self.net.config.kv_heads]);
            self.take(policy, (prompt, row), layer, crate::policy::Scored { scores, ..scored })?;
        }
        Ok(())
    }

    fn say_part(
        &self,
        repeat: &Repeat,
        (prompt, choice): (&Prompt, &Choice),
        (row, tokens): (Row, &[u32]),
        (part, sink): (&Range<usize>, usize),
        watch: &mut Watch<'_>,
    ) -> Result<(), RunError> {
        let (n, layers, kv_heads) =
            (tokens.len(), self.net.config.layers, self.net.config.kv_heads);
        let said = repeat.tokens(tokens, part.clone());
        let firsts = vec![part.start; self.control.apart().heads];
        let seen = [0, sink.min(part.start), part.start, part.end, n, n + said.len()];
        let [first, .., seen] = choice.heads(&self.platform, [&firsts, &[], &[]], &seen)?;
        let pieces = pieces(said.len(), self.piece, 0);
        let block = Block {
            row,
            read: n,
            before: vec![Held { len: n, packed: 0, chosen: 0 }; layers * kv_heads],
            kv_heads,
            words: Words::of(self.control.apart(), pieces.len(), said.len()),
            pieces,
            told: prompt.words.at(),
            x: prompt.x.at(),
            chooses: false,
            said: Some(Said { tokens: part.clone(), first, seen }),
        };
        let block = self.begin(block, &said, n)?;
        (0..layers).try_for_each(|layer| self.read_layer(prompt, &block, layer, watch))
    }

    /// The most that a piece's rows give to each token that is listened for, of what they give to the sinks, to the part of
    /// the text, and to what is said.
    pub(super) fn listen(&self, piece: &Piece<'_>, said: &Said) -> Result<()> {
        let Some(choice) = &piece.prompt.choice else { return Ok(()) };
        let (heads, kv_heads, rows) =
            (self.net.config.heads, self.net.config.kv_heads, piece.rows() as i32);
        let columns = said.tokens.len();
        let all = params!(kvw_token_score_params {
            op: ffi::KVW_SCORE_LSE,
            cache: self.staged(piece),
            q: at(self.net.queries()),
            lse: at(choice.lse.at()),
            cu_tokens: at(piece.firsts()),
            seen: at(said.seen),
            ranges: SEEN as i32,
            q_heads: heads as i32,
            tokens: rows,
            max_tokens: rows,
            lse_rows: rows,
            dtype: KVW_F16,
        });
        self.net.ops.run(|k| &k.token_score, &all)?;
        let most = choice.heard.at() + (4 * piece.layer * heard(kv_heads, columns)) as u64;
        let params = kvwarp::ffi::kvw_token_score_params {
            op: ffi::KVW_SCORE_MAX,
            seen: std::ptr::null(),
            ranges: 0,
            scores: at(most),
            first: at(said.first),
            columns: columns as i32,
            accumulate: i32::from(piece.number > 0),
            ..all
        };
        self.net.ops.run(|k| &k.token_score, &params)
    }

    /// Puts what has been heard of `part` of `n` tokens into each layer's `[kv_heads, n]`.
    fn hear(
        &self,
        choice: &Choice,
        n: usize,
        part: &Range<usize>,
        layers: &mut [Vec<f32>],
    ) -> Result<()> {
        let each = heard(self.net.config.kv_heads, part.len());
        let mut all = vec![0f32; layers.len() * each];
        self.platform.read(choice.heard.at(), bytemuck::cast_slice_mut(&mut all))?;
        for (layer, all) in layers.iter_mut().zip(all.chunks_exact(each)) {
            let heads = layer.chunks_exact_mut(n).zip(all.chunks_exact(part.len()));
            heads.for_each(|(head, heard)| head[part.clone()].copy_from_slice(heard));
        }
        Ok(())
    }
}

/// Words of what is heard of so many tokens in a layer.
pub fn heard(kv_heads: usize, tokens: usize) -> usize {
    (kv_heads * tokens).next_multiple_of(WORD)
}
