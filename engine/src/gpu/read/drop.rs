//! Dropping tokens of a layer: scores, the best of each stretch, and what stays written where it belongs.

use kvwarp::ffi::{self, KVW_F16, kvw_cache, kvw_sim_evict_params};
use kvwarp::pages::packed_slabs;
use kvwarp::slab::TOKENS;

use super::Piece;
use super::block::Prompt;
use super::choose::{Choice, Frame, Numbers};
use crate::gpu::Gpu;
use crate::gpu::ops::{at, params};
use crate::gpu::platform::Result;
use crate::policy::{Cut, Evict, Method, best_unseen};
use crate::runner::{Held, Row, RunError};

/// Numbers of LagKV's scores of at most `parts` partitions of `width` tokens; pointers are null.
pub(super) fn lag(width: usize, parts: usize) -> kvw_sim_evict_params {
    params!(kvw_sim_evict_params {
        op: ffi::KVW_EVICT_LAG,
        lag: width as i32,
        partitions: parts as i32,
        v_weight: 1.0,
    })
}

impl Gpu {
    /// What a layer drops of what it holds once `read` tokens have passed through it, among which the policy `chooses` or
    /// not; `None` where all stay.
    pub(super) fn cut(
        &self,
        (chooses, read): (bool, usize),
        layer: usize,
        held: Held,
    ) -> Option<Cut> {
        let spec = self.cache.spec();
        match spec.evict.filter(|_| spec.lag().is_some()) {
            Some(evict) => Cut::lag(&evict, held),
            None if chooses => {
                Cut::first_read(spec, read, (layer, self.net.config.layers), held.len)
            }
            None => None,
        }
    }

    /// Takes the slabs that a read of `n` tokens leaves in the table, where that is known before there are scores.
    pub(super) fn extend(&mut self, row: Row, (chooses, n): (bool, usize)) -> Result<(), RunError> {
        let (mut edits, mut through, each) = (Vec::new(), n, self.cache.heads());
        for (layer, heads) in self.cache.all_held(row).chunks_exact(each).enumerate() {
            for (h, &held) in heads.iter().enumerate() {
                let len = held.len + through;
                let cut = self.cut((chooses, n), layer, Held { len, ..held });
                let stays = cut.map_or(len, |cut| cut.stays());
                let chosen = cut.filter(|_| self.cache.spec().lag().is_some());
                let chosen = chosen.map_or(held.chosen, |cut| cut.chosen());
                self.cache.extend(row, layer * each + h, stays, &mut edits)?;
                self.cache.keep(row, layer * each + h, (stays, chosen));
            }
            through = self.onward((chooses, n), layer, through).map_or(through, |o| o.kept);
        }
        Ok(self.control.edit(&self.net.ops, self.cache.table(), &edits)?)
    }

    /// Adds what a piece of a layer gives to the tokens to what is known of them.
    pub(super) fn observe(&self, piece: &Piece<'_>) -> Result<()> {
        if let Some(said) = &piece.block.said {
            return self.listen(piece, said);
        }
        let Some((choice, evict, cut)) = self.observed(piece) else { return Ok(()) };
        let (watched, rows) = (self.watched(piece), piece.rows());
        let last = piece.number + 1 == piece.block.pieces.len();
        match evict {
            Method::Column => {
                self.attention_to(piece, choice, (watched, rows), (cut.width, piece.number > 0))
            }
            Method::Window if last => {
                let window = cut.len - cut.width;
                self.attention_to(piece, choice, (watched, window.min(rows)), (cut.width, false))
            }
            _ => Ok(()),
        }
    }

    /// Room, method and cut of a layer whose method asks for attention.
    fn observed<'a>(&self, piece: &Piece<'a>) -> Option<(&'a Choice, Method, Cut)> {
        let method = self.cache.spec().evict?.method();
        let held = piece.block.held(piece.layer);
        let cut = self.cut((piece.block.chooses, piece.block.read), piece.layer, held[0])?;
        Some((piece.prompt.choice.as_ref()?, method, cut))
    }

    /// Attention of a piece's newest `rows` rows to the first `columns` tokens, `more` than there is already or not;
    /// log-sum-exps of the newest `watched` rows are there.
    pub(super) fn attention_to(
        &self,
        piece: &Piece<'_>,
        choice: &Choice,
        (watched, rows): (usize, usize),
        (columns, more): (usize, bool),
    ) -> Result<()> {
        let q_heads = self.net.config.heads;
        let lse = choice.newest(&self.platform, q_heads, (watched, rows))?;
        let all = piece.rows() as i32;
        let params = params!(kvw_token_score_params {
            op: ffi::KVW_SCORE_SUM,
            cache: self.staged(piece),
            q: at(self.net.queries()),
            lse: at(lse),
            scores: at(choice.columns.at()),
            cu_tokens: at(piece.firsts()),
            q_heads: q_heads as i32,
            tokens: all,
            max_tokens: all,
            lse_rows: rows as i32,
            columns: columns as i32,
            accumulate: i32::from(more),
            dtype: KVW_F16,
        });
        self.net.ops.run(|k| &k.token_score, &params)
    }

    /// Drops what `cut` says of a staged layer, and writes what stays to the table's slabs and the row's ring.
    pub(super) fn drop_staged(
        &self,
        prompt: &Prompt,
        row: Row,
        layer: usize,
        (held, cut): (Held, Cut),
    ) -> Result<()> {
        let (Some(choice), Some(evict)) = (&prompt.choice, self.cache.spec().evict) else {
            return Ok(());
        };
        let best = best_unseen(&evict, layer, &cut);
        let on_host = best.is_some();
        let packed = packed_slabs(cut.stays(), self.cache.spec().window).max(held.packed);
        let frame = Frame { cut, held, packed, best };
        let heads = self.net.config.kv_heads;
        choice.write(&self.platform, heads, &frame)?;
        let numbers = Numbers::of(heads * cut.parts);
        let told = |words: [usize; 2]| words.map(|word| choice.number(word));
        if !on_host && cut.k > 0 {
            let ring = (prompt.ring(layer), prompt.slabs);
            let cache = self.cache.staged_view(layer, row, told(numbers.before), ring);
            self.score(choice, (&cut, &numbers), cache)?;
            self.best(choice, (&cut, &numbers))?;
            choice.place(&self.platform, heads, &frame)?;
        }
        if frame.stays() == 0 {
            return Ok(());
        }
        let params = params!(kvw_kv_gather_params {
            max_slabs: frame.stays().div_ceil(TOKENS) as i32,
            cache: self.cache.view_of(layer, row, told(numbers.after)),
            from: at(prompt.ring(layer)),
            slots: at(choice.slots.at()),
            first: at(choice.number(numbers.base)),
            feedback: at(self.cache.feedback(layer)),
            from_slabs: prompt.slabs as i32,
            slots_stride: frame.stays() as i32,
            range: self.cache.range(),
        });
        self.net.ops.run(|k| &k.kv_gather, &params)
    }

    /// Scores of each stretch of each head, `[kv_heads, parts, width]`.
    fn score(
        &self,
        choice: &Choice,
        (cut, numbers): (&Cut, &Numbers),
        cache: kvw_cache,
    ) -> Result<()> {
        let Some(evict) = self.cache.spec().evict else { return Ok(()) };
        if evict.method() == Method::Lag {
            let params = kvw_sim_evict_params {
                cache,
                scores: at(choice.scores.at()),
                first: at(choice.number(numbers.firsts)),
                ..lag(cut.width, cut.parts)
            };
            return self.net.ops.run(|k| &k.sim_evict, &params);
        }
        self.pool_groups(choice, &evict, cut.width)
    }

    /// Attention to `columns` tokens as `evict` scores by it, `[kv_heads, columns]`.
    pub(super) fn pool_groups(&self, choice: &Choice, evict: &Evict, columns: usize) -> Result<()> {
        let heads = self.net.config.kv_heads;
        let pool = if evict.options.max { ffi::KVW_POOL_MAX } else { ffi::KVW_POOL_AVG };
        let pool = (pool, evict.options.pool.into());
        self.pool(choice, (heads, self.net.config.heads / heads), columns, pool)
    }

    /// Attention to `columns` tokens, pooled over neighbours and summed over `group` query heads each.
    pub(super) fn pool(
        &self,
        choice: &Choice,
        (rows, group): (usize, usize),
        columns: usize,
        (pool, width): (i32, usize),
    ) -> Result<()> {
        let params = params!(kvw_token_select_params {
            op: ffi::KVW_SELECT_POOL,
            scores: at(choice.columns.at()),
            out: at(choice.scores.at()),
            rows: rows as i32,
            n: columns as i32,
            group: group as i32,
            width: width as i32,
            pool: pool,
        });
        self.net.ops.run(|k| &k.token_select, &params)
    }

    /// Slots of the best of each stretch, `[kv_heads, parts, k]`.
    fn best(&self, choice: &Choice, (cut, numbers): (&Cut, &Numbers)) -> Result<()> {
        let rows = self.net.config.kv_heads * cut.parts;
        self.top_k(choice, choice.number(numbers.k), (rows, cut.width), cut.k)?;
        let params = params!(kvw_token_select_params {
            op: ffi::KVW_SELECT_GATHER,
            indices: at(choice.indices.at()),
            first: at(choice.number(numbers.firsts)),
            positions: at(choice.order.at()),
            out_positions: at(choice.picked.at()),
            rows: rows as i32,
            n: cut.len as i32,
            index_stride: cut.k as i32,
        });
        self.net.ops.run(|k| &k.token_select, &params)
    }

    /// Ascending indices of the best `k` of each of `rows` rows of `n` scores; `k` also lies at `number` for each row.
    pub(super) fn top_k(
        &self,
        choice: &Choice,
        number: u64,
        (rows, n): (usize, usize),
        k: usize,
    ) -> Result<()> {
        let params = params!(kvw_token_select_params {
            op: ffi::KVW_SELECT_TOP_K,
            scores: at(choice.scores.at()),
            k: at(number),
            indices: at(choice.indices.at()),
            counts: at(choice.counts.at()),
            workspace: at(choice.workspace.at()),
            workspace_bytes: choice.workspace.bytes(),
            rows: rows as i32,
            n: n as i32,
            segment: 1,
            index_stride: k as i32,
        });
        self.net.ops.run(|k| &k.token_select, &params)
    }

    /// What LagKV drops of `row` once a decoded token has completed a partition.
    pub(in crate::gpu) fn drop_by_lag(&mut self, row: Row) -> Result<(), RunError> {
        if self.cache.spec().lag().is_none() {
            return Ok(());
        }
        let due = |held: Held| self.cut((false, 0), 0, held);
        let (layers, kv_heads) = (0..self.net.config.layers, self.net.config.kv_heads);
        let held = layers.map(|layer| self.cache.held(row, layer * kv_heads));
        let cuts: Vec<_> = held.map(|held| (held, due(held))).collect();
        for (layer, (held, cut)) in cuts.into_iter().enumerate() {
            let (Some(cut), Some(prompt)) = (cut, &self.prompt) else { continue };
            let recent = vec![held.packed..held.len.div_ceil(TOKENS); kv_heads];
            self.move_slabs((prompt, row), layer, &recent, true)?;
            self.drop_staged(prompt, row, layer, (held, cut))?;
            for h in layer * kv_heads..(layer + 1) * kv_heads {
                self.cache.keep(row, h, (cut.stays(), cut.chosen()));
            }
        }
        Ok(())
    }
}
