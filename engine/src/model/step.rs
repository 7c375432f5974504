//! One layer of a forward pass.

use kvwarp::linear::matmul;
use kvwarp::paged_attn::Mask;
use kvwarp::pages::HeadView;
use kvwarp::prefill_attn::LseRows;
use kvwarp::rope_select::Angles;
use kvwarp::slab::TOKENS;
use kvwarp::threads::Team;
use kvwarp::{hadamard, paged_attn, prefill_attn, rms_norm, swiglu};

use super::keys::product;
use super::layers::Layer;
use super::rows::{each_row, project, residual, row};
use super::work::Work;
use super::{Model, ModelError};
use crate::cache::{Cache, CacheError};
use crate::profile::Launch;
use crate::runner::Row;

/// Whose rows pass through a layer.
#[derive(Clone, Copy)]
pub(super) enum Of<'a> {
    /// Some of a prompt's; the layer is staged.
    Prompt(Row),
    /// So many tokens of each sequence, in order.
    Turns(&'a [(Row, usize)]),
}

/// Some rows on their way through a layer.
pub(super) struct Piece<'a> {
    /// Residual stream, `[rows, width]`.
    pub x: &'a mut [f32],
    pub angles: &'a Angles,
    /// First row in `angles`.
    pub first: usize,
    pub rows: usize,
    pub of: Of<'a>,
}

impl Model<'_> {
    /// One layer, in the order of the math.
    pub(super) fn layer(
        &self,
        index: usize,
        layer: &Layer<'_>,
        piece: Piece<'_>,
        cache: &mut Cache,
        work: &mut Work,
    ) -> Result<(), ModelError> {
        let (rows, eps, team) = (piece.rows, self.config.rms_eps, &self.team);
        work.resize(self.config, rows);
        let norm = |x: &[f32], weight: &[f32], h: &mut [f32]| {
            each_row(team, h, rows, |i, h| rms_norm::cpu(row(x, i, rows), weight, eps, h))
        };
        let Work { h, clock, .. } = &mut *work;
        clock.time(|| Launch::of("rms_norm"), || norm(piece.x, &layer.attn_norm, h))?;
        match layer.kv.latent().filter(|_| cache.spec().latent) {
            Some(latent) => {
                self.attend_to_latents(index, (layer, latent), &piece, cache, work)?;
            }
            None => self.attend(index, layer, &piece, cache, work)?,
        }
        let Work { h, mix, gate, up, add, clock, .. } = work;
        let (Piece { x, of, .. }, o) = (piece, &layer.o);
        let cpu = self.cpu(matches!(of, Of::Turns(_)));
        clock.time(|| product([o], rows), || matmul(&cpu, &o.weights, mix, rows, add))?;
        clock.time(|| Launch::of("residual"), || residual(x, add));

        clock.time(|| Launch::of("rms_norm"), || norm(x, &layer.ffn_norm, h))?;
        let gate_up = [&layer.gate, &layer.up];
        clock.time(|| product(gate_up, rows), || project(&cpu, gate_up, h, rows, [gate, up]))?;
        clock.time(
            || Launch::of("swiglu"),
            || each_row(team, gate, rows, |i, gate| swiglu::cpu(gate, row(up, i, rows))),
        )?;
        let down = &layer.down;
        clock.time(|| product([down], rows), || matmul(&cpu, &down.weights, gate, rows, add))?;
        clock.time(|| Launch::of("residual"), || residual(x, add));
        Ok(())
    }

    /// Queries of a layer's input `work.h`, keys and values beside them, and what attention gives.
    fn attend(
        &self,
        index: usize,
        layer: &Layer<'_>,
        piece: &Piece<'_>,
        cache: &mut Cache,
        work: &mut Work,
    ) -> Result<(), ModelError> {
        let (Piece { angles, first, rows, of, .. }, team) = (piece, &self.team);
        let (rows, cpu) = (*rows, self.cpu(matches!(of, Of::Turns(_))));
        let Work { h, q, k, v, mix, spare, seen, calibration, decode, clock, .. } = &mut *work;
        let (d, turned) = (self.config.head_dim, cache.spec().hadamard);
        let turn_keys = |_, x: &mut [f32]| {
            hadamard::keys(x, d);
            Ok(())
        };
        let turn_values = |_, x: &mut [f32]| {
            hadamard::values(x);
            Ok(())
        };
        layer.kv.project((&cpu, rows), (&layer.q, h), [q, k, v], spare, clock)?;
        if let Some(seen) = seen {
            seen.add([h, q, k, v]);
        }
        let rotate = |x: &mut [f32]| {
            each_row(team, x, rows, |i, x| layer.kv.rotate(angles, first + i, x, self.pairing))
        };
        clock.time(|| Launch::of("rope_select"), || rotate(q).and_then(|()| rotate(k)))?;
        if let Some(calibration) = calibration {
            calibration.add(index, q, rows, team);
        }
        if turned {
            clock.time(
                || Launch::of("hadamard"),
                || {
                    each_row(team, q, rows, turn_keys)?;
                    each_row(team, k, rows, turn_keys)?;
                    each_row(team, v, rows, turn_values)
                },
            )?;
        }
        match *of {
            Of::Prompt(row) => {
                clock.time(|| Launch::of("kv_pack"), || cache.fill(row, index, k, v, rows));
                self.attend_to_staged(index, (cache, row), rows, work)?;
            }
            Of::Turns(turns) => {
                clock.time(|| Launch::of("kv_pack"), || append(cache, index, turns, k, v))?;
                let (views, mask) = (views(cache, index, turns), self.mask);
                clock.time(
                    || attention(&views, mask),
                    || paged_attn::cpu(team, q, &views, 0.0, mask, mix, decode),
                )?;
                drop(views);
                settle(cache, index, turns, &self.team)?;
            }
        }
        let Work { mix, clock, seen, .. } = work;
        if turned {
            clock.time(|| Launch::of("hadamard"), || each_row(team, mix, rows, turn_values))?;
        }
        if let Some(seen) = seen {
            seen.mix.extend_from_slice(mix);
        }
        Ok(())
    }

    /// Attention of the newest `rows` tokens of a prompt, in `work.q`, over the staged layer `index`.
    pub(super) fn attend_to_staged(
        &self,
        index: usize,
        (cache, row): (&Cache, Row),
        rows: usize,
        work: &mut Work,
    ) -> Result<(), ModelError> {
        let (views, team, mask) = (cache.staged_views(row, index), &self.team, self.mask);
        let Work { q, mix, prefill, observer, lse, clock, .. } = work;
        let newest = observer.as_ref().map_or(0, |o| o.rows(rows));
        lse.resize(newest * self.config.heads, 0.0);
        let wanted = (newest > 0).then_some(LseRows { out: lse, rows: newest });
        let attend = || prefill_attn::cpu(team, q, rows, &views, 0.0, mask, mix, wanted, prefill);
        clock.time(|| Launch::of("prefill_attn"), attend)?;
        if let Some(observer) = observer {
            let see = || observer.see(team, (q, rows), lse, &views);
            clock.time(|| Launch::of("token_score"), see)?;
        }
        Ok(())
    }
}

/// Attention over the slabs of `views` that `mask` lets a token see.
fn attention(views: &[HeadView<'_>], mask: Mask) -> Launch {
    let bytes = |view: &HeadView<'_>| -> usize {
        let unseen = mask.sliding_window.map_or(0, |window| view.len.saturating_sub(window));
        let slabs = (unseen / TOKENS..view.slabs()).filter_map(|i| view.slab(i));
        slabs.map(|slab| slab.bytes.len()).sum()
    };
    Launch { bytes: views.iter().map(bytes).sum(), ..Launch::of("paged_attn") }
}

/// Writes the rows of `k` and `v`, each `[kv_heads, head_dim]`, to their sequences.
fn append(
    cache: &mut Cache,
    layer: usize,
    turns: &[(Row, usize)],
    k: &[f32],
    v: &[f32],
) -> Result<(), CacheError> {
    let rows = turns.iter().map(|turn| turn.1).sum();
    let owners = turns.iter().flat_map(|&(row, n)| std::iter::repeat_n(row, n));
    for (i, owner) in owners.enumerate() {
        cache.append(owner, layer, row(k, i, rows), row(v, i, rows))?;
    }
    Ok(())
}

/// Drops what a policy drops while decoding, now that `layer` has attended to it.
fn settle(
    cache: &mut Cache,
    layer: usize,
    turns: &[(Row, usize)],
    team: &Team,
) -> Result<(), CacheError> {
    let Some(evict) = cache.spec().evict.filter(|_| cache.spec().lag().is_some()) else {
        return Ok(());
    };
    turns.iter().try_for_each(|&(row, _)| cache.lag(row, layer, &evict, team))
}

/// What each row sees, a view a kv head: the tokens of its sequence up to its own.
fn views<'a>(cache: &'a Cache, layer: usize, turns: &[(Row, usize)]) -> Vec<HeadView<'a>> {
    let mut all = Vec::new();
    for &(row, n) in turns {
        let views = cache.views(row, layer);
        for later in (0..n).rev() {
            all.extend(views.iter().map(|view| HeadView { len: view.len - later, ..*view }));
        }
    }
    all
}
