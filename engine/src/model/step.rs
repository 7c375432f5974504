//! One layer of a forward pass.

use kvwarp::linear::matmul;
use kvwarp::pages::HeadView;
use kvwarp::prefill_attn::LseRows;
use kvwarp::rope_select::Angles;
use kvwarp::{hadamard, paged_attn, prefill_attn, rms_norm, swiglu};

use super::layers::Layer;
use super::rows::{each_row, project, residual, row};
use super::work::Work;
use super::{Model, ModelError};
use crate::cache::{Cache, CacheError};
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
        let Piece { x, angles, first, rows, of } = piece;
        let (cpu, eps) = (self.cpu(matches!(of, Of::Turns(_))), self.config.rms_eps);
        work.resize(self.config, rows);
        let Work { h, q, k, v, mix, gate, up, add, calibration, .. } = work;
        let (d, turned) = (self.config.head_dim, cache.spec().hadamard);
        let turn_keys = |_, x: &mut [f32]| {
            hadamard::keys(x, d);
            Ok(())
        };
        let turn_values = |_, x: &mut [f32]| {
            hadamard::values(x);
            Ok(())
        };

        let team = &self.team;
        each_row(team, h, rows, |i, h| rms_norm::cpu(row(x, i, rows), &layer.attn_norm, eps, h))?;
        project(&cpu, [&layer.q, &layer.k, &layer.v], h, rows, [q, k, v])?;
        each_row(team, q, rows, |i, q| angles.rotate(first + i, q, self.pairing))?;
        each_row(team, k, rows, |i, k| angles.rotate(first + i, k, self.pairing))?;
        if let Some(calibration) = calibration {
            calibration.add(index, q, rows, team);
        }
        if turned {
            each_row(team, q, rows, turn_keys)?;
            each_row(team, k, rows, turn_keys)?;
            each_row(team, v, rows, turn_values)?;
        }
        match of {
            Of::Prompt(row) => {
                cache.fill(row, index, k, v, rows);
                let (views, scratch) = (cache.staged_views(row, index), &mut work.prefill);
                let (lse, newest) =
                    (&mut work.lse, work.observer.as_ref().map_or(0, |o| o.rows(rows)));
                lse.resize(newest * self.config.heads, 0.0);
                let wanted = (newest > 0).then_some(LseRows { out: lse, rows: newest });
                prefill_attn::cpu(team, q, rows, &views, 0.0, self.mask, mix, wanted, scratch)?;
                if let Some(observer) = &mut work.observer {
                    observer.see(team, (q, rows), &work.lse, &views)?;
                }
            }
            Of::Turns(turns) => {
                append(cache, index, turns, k, v)?;
                let views = views(cache, index, turns);
                paged_attn::cpu(team, q, &views, 0.0, self.mask, mix, &mut work.decode)?;
                drop(views);
                settle(cache, index, turns)?;
            }
        }
        if turned {
            each_row(team, mix, rows, turn_values)?;
        }
        matmul(&cpu, &layer.o.weights, mix, rows, add)?;
        residual(x, add);

        each_row(team, h, rows, |i, h| rms_norm::cpu(row(x, i, rows), &layer.ffn_norm, eps, h))?;
        project(&cpu, [&layer.gate, &layer.up], h, rows, [gate, up])?;
        each_row(team, gate, rows, |i, gate| swiglu::cpu(gate, row(up, i, rows)))?;
        matmul(&cpu, &layer.down.weights, gate, rows, add)?;
        residual(x, add);
        Ok(())
    }
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
fn settle(cache: &mut Cache, layer: usize, turns: &[(Row, usize)]) -> Result<(), CacheError> {
    let Some(evict) = cache.spec().evict.filter(|_| cache.spec().lag().is_some()) else {
        return Ok(());
    };
    turns.iter().try_for_each(|&(row, _)| cache.lag(row, layer, &evict))
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
