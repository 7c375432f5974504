//! Choices that the host makes of scores that the device has found: where budgets ask for the scores of several layers, or
//! a token's score for those of its neighbours in rank.

use kvwarp::ffi::{self, kvw_sim_evict_params};
use kvwarp::slab::TOKENS;

use super::Piece;
use super::block::{Block, Prompt};
use super::choose::Choice;
use crate::gpu::Gpu;
use crate::gpu::ops::{at, params};
use crate::gpu::platform::Result;
use crate::policy::{Evict, Keep, Method, Policy, Scored, all_unseen, rank};
use crate::runner::{Row, RunError};
use crate::spec::CacheSpec;

/// Whether all layers are to be read before any of them is packed.
pub fn waits(spec: &CacheSpec) -> bool {
    spec.selects() && (spec.budget().waits() || spec.evict.is_some_and(|evict| evict.says_again()))
}

/// What heads of a layer keep, ascending.
type Kept = (usize, Vec<Vec<u32>>);

impl Gpu {
    /// What chooses among the tokens of a first read of `n`, where the host does.
    pub(super) fn policy(&self, n: usize) -> Option<Policy> {
        let spec = self.cache.spec();
        let ranks = matches!(spec.evict?.method(), Method::LagRanked | Method::KeyNorm);
        let sees = waits(spec) || spec.refine.is_some() || ranks;
        let (layers, q_heads) = (self.net.config.layers, self.net.config.heads);
        Policy::new(spec, layers, q_heads, n).filter(|_| sees)
    }

    /// Chooses among the tokens that have passed layer `layer`, or keeps their scores until the budgets are settled.
    pub(super) fn choose_layer(
        &mut self,
        policy: &mut Policy,
        prompt: &Prompt,
        block: &Block,
        layer: usize,
    ) -> Result<(), RunError> {
        if policy.repeats().is_some() {
            return Ok(());
        }
        let mut scored = policy.scored(block.tokens(), vec![0; block.kv_heads]);
        scored.scores = self.layer_scores(prompt, block, (layer, &scored))?;
        self.take(policy, (prompt, block.row), layer, scored)
    }

    /// Has the policy choose by the scores of layer `layer`.
    pub(super) fn take(
        &mut self,
        policy: &mut Policy,
        held: (&Prompt, Row),
        layer: usize,
        scored: Scored,
    ) -> Result<(), RunError> {
        let mut settled = Vec::new();
        policy.take(scored, layer, &mut note(&mut settled))?;
        self.keep_all(held, settled)
    }

    /// Settles what is not.
    pub(super) fn settle_all(
        &mut self,
        policy: &mut Policy,
        prompt: &Prompt,
        row: Row,
    ) -> Result<(), RunError> {
        let mut settled = Vec::new();
        policy.settle_all(&mut note(&mut settled))?;
        self.keep_all((prompt, row), settled)
    }

    /// Writes what heads of staged layers keep to the table's slabs and the row's ring.
    fn keep_all(&mut self, (prompt, row): (&Prompt, Row), kept: Vec<Kept>) -> Result<(), RunError> {
        let (mut edits, kv_heads) = (Vec::new(), self.net.config.kv_heads);
        for (layer, heads) in &kept {
            for (h, slots) in heads.iter().enumerate() {
                let h = layer * kv_heads + h;
                self.cache.extend(row, h, slots.len(), &mut edits)?;
                self.cache.keep(row, h, (slots.len(), 0));
            }
        }
        self.control.edit(&self.net.ops, self.cache.table(), &edits)?;
        kept.iter().try_for_each(|kept| Ok(self.write_kept(prompt, row, kept)?))
    }

    fn write_kept(&self, prompt: &Prompt, row: Row, (layer, heads): &Kept) -> Result<()> {
        let most = heads.iter().map(Vec::len).max().unwrap_or(0);
        let Some(choice) = prompt.choice.as_ref().filter(|_| most > 0) else { return Ok(()) };
        let apart = self.control.apart().heads;
        let held = |h: usize| self.cache.held(row, layer * heads.len() + h);
        let lens: Vec<_> = (0..apart).map(|h| held(h).len).collect();
        let packed: Vec<_> = (0..apart).map(|h| held(h).packed).collect();
        let told = [&lens[..], &packed[..], &vec![0; apart][..]];
        let [lens, packed, first, _] = choice.heads(&self.platform, told, &[])?;
        let mut slots = vec![0u32; heads.len() * most];
        for (to, from) in slots.chunks_exact_mut(most).zip(heads) {
            to[..from.len()].copy_from_slice(from);
        }
        self.platform.write(choice.slots.at(), bytemuck::cast_slice(&slots))?;
        let params = params!(kvw_kv_gather_params {
            max_slabs: most.div_ceil(TOKENS) as i32,
            cache: self.cache.view_of(*layer, row, [lens, packed]),
            from: at(prompt.ring(*layer)),
            slots: at(choice.slots.at()),
            first: at(first),
            feedback: at(self.cache.feedback(*layer)),
            from_slabs: prompt.slabs as i32,
            slots_stride: most as i32,
            range: self.cache.range(),
        });
        self.net.ops.run(|k| &k.kv_gather, &params)
    }

    /// `[kv_heads, n]` of what a staged layer has read.
    fn layer_scores(
        &self,
        prompt: &Prompt,
        block: &Block,
        (layer, scored): (usize, &Scored),
    ) -> Result<Vec<f32>> {
        let (n, (sink, newest), open) = (scored.n, scored.protects, scored.open());
        let (Some(choice), Some(evict)) = (&prompt.choice, self.cache.spec().evict) else {
            return Ok(vec![0.0; scored.heads() * n]);
        };
        let piece = Piece { prompt, block, layer, number: block.pieces.len() - 1 };
        let (mut all, method) = (vec![0.0; scored.heads() * n], evict.method());
        match method {
            _ if open == 0 => {}
            // Where all stay, nobody has asked what attention gives.
            Method::Window | Method::Column => {
                if self.cut((block.chooses, block.read), layer, block.held(layer)[0]).is_some() {
                    self.pool_groups(choice, &evict, open)?;
                    self.read_scores(choice, (&mut all, n), sink..sink + open)?;
                }
            }
            Method::LagRanked if newest > 0 => {
                self.lag_scores(choice, &piece, &evict, open)?;
                self.read_scores(choice, (&mut all, n), sink..sink + open)?;
                let heads = all.chunks_exact_mut(n);
                heads.for_each(|head| rank(&mut head[sink..sink + open], evict.options.lag.into()));
            }
            Method::KeyNorm => {
                let norms = params!(kvw_sim_evict_params {
                    op: ffi::KVW_EVICT_NORM,
                    cache: self.staged(&piece),
                    scores: at(choice.scores.at()),
                    columns: n as i32,
                });
                self.net.ops.run(|k| &k.sim_evict, &norms)?;
                self.read_scores(choice, (&mut all, n), 0..n)?;
                all.iter_mut().for_each(|norm| *norm = -*norm);
            }
            _ => return Ok(all_unseen(&evict, layer, scored.heads(), n)),
        }
        Ok(all)
    }

    /// Scores of whole partitions from the sinks on, but for the newest.
    fn lag_scores(
        &self,
        choice: &Choice,
        piece: &Piece<'_>,
        evict: &Evict,
        open: usize,
    ) -> Result<()> {
        let sinks = vec![usize::from(evict.options.sink); self.control.apart().heads];
        let [first, ..] = choice.heads(&self.platform, [&sinks, &[], &[]], &[])?;
        let params = kvw_sim_evict_params {
            cache: self.staged(piece),
            scores: at(choice.scores.at()),
            first: at(first),
            ..super::drop::lag(evict.options.lag.into(), open / usize::from(evict.options.lag))
        };
        self.net.ops.run(|k| &k.sim_evict, &params)
    }

    /// Puts the device's scores `[kv_heads, columns]` where they belong in those of `n` tokens.
    fn read_scores(
        &self,
        choice: &Choice,
        (all, n): (&mut [f32], usize),
        columns: std::ops::Range<usize>,
    ) -> Result<()> {
        let mut scores = vec![0f32; all.len() / n * columns.len()];
        self.platform.read(choice.scores.at(), bytemuck::cast_slice_mut(&mut scores))?;
        for (head, scores) in all.chunks_exact_mut(n).zip(scores.chunks_exact(columns.len())) {
            head[columns.clone()].copy_from_slice(scores);
        }
        Ok(())
    }
}

/// Notes what heads of settled layers keep: staged layers keep all until then.
fn note(settled: &mut Vec<Kept>) -> impl Keep<RunError> {
    |layer, scored, kept, for_good| {
        match for_good {
            true => settled.push((layer, kept)),
            false => scored.held = kept,
        }
        Ok(())
    }
}
