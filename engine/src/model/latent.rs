//! A layer whose cache holds latents: a prompt has its keys and values expanded a layer at a time and keeps none of them,
//! what is decoded attends to the latents as they are.

use kvwarp::lowrank_kv::View;

use super::keys::Latent;
use super::layers::Layer;
use super::read::ROWS;
use super::rows::each_row;
use super::step::{Of, Piece};
use super::{Model, ModelError, Work};
use crate::cache::{Cache, CacheError};
use crate::profile::Launch;
use crate::runner::Row;

impl Model<'_> {
    /// Queries of a layer's input `work.h`, rotated, and what attention gives them.
    pub(super) fn attend_to_latents(
        &self,
        index: usize,
        (layer, latent): (&Layer<'_>, &Latent<'_>),
        piece: &Piece<'_>,
        cache: &mut Cache,
        work: &mut Work,
    ) -> Result<(), ModelError> {
        let (Piece { angles, first, rows, of, .. }, team) = (piece, &self.team);
        let (rows, cpu) = (*rows, self.cpu(matches!(of, Of::Turns(_))));
        let Work { h, q, k, v, mix, spare, clock, absorbed, .. } = work;
        latent.down((&cpu, rows), (&layer.q, h), q, spare, clock)?;
        let rotate = || {
            latent.rotate(team, (angles, *first), &mut spare.elite, rows)?;
            each_row(team, q, rows, |i, q| layer.kv.rotate(angles, first + i, q, self.pairing))
        };
        clock.time(|| Launch::of("rope_select"), rotate)?;
        match *of {
            Of::Prompt(row) => {
                // What follows sees them as they are kept.
                spare.round();
                let held = cache.lens(row, index).next().unwrap_or(0);
                let put = || put(cache, index, &[(row, rows)], [&spare.z, &spare.elite]);
                clock.time(|| Launch::of("kv_pack"), put)?;
                latent.up((&cpu, rows), [k, v], spare, clock)?;
                clock.time(|| Launch::of("kv_pack"), || lay(cache, index, held, [k, v], rows));
                self.attend_to_staged(index, (cache, row), rows, work)
            }
            Of::Turns(turns) => {
                let put = || put(cache, index, turns, [&spare.z, &spare.elite]);
                clock.time(|| Launch::of("kv_pack"), put)?;
                let views = views(cache, index, turns);
                Ok(latent.attend(team, (q, mix), &views, absorbed, clock)?)
            }
        }
    }

    /// Packs what has left the windows of `rows`, where latents are kept: between steps.
    pub(super) fn pack_latents(
        &self,
        mut rows: impl Iterator<Item = Row>,
        cache: &mut Cache,
        work: &mut Work,
    ) -> Result<(), ModelError> {
        if !cache.spec().latent {
            return Ok(());
        }
        let pack = || rows.try_for_each(|row| cache.pack_latents(row, &self.team));
        Ok(work.clock.time(|| Launch::of("kv_pack"), pack)?)
    }

    /// Expands what `row` holds of the staged layer `index`, for a prompt that goes on there.
    pub(super) fn unfold(
        &self,
        (index, layer): (usize, &Layer<'_>),
        (cache, row): (&mut Cache, Row),
        work: &mut Work,
    ) -> Result<(), ModelError> {
        let Some(latent) = layer.kv.latent().filter(|_| cache.spec().latent) else { return Ok(()) };
        let held = cache.lens(row, index).next().unwrap_or(0);
        for first in (0..held).step_by(ROWS) {
            let rows = ROWS.min(held - first);
            work.resize(self.config, rows);
            let Work { k, v, spare, clock, .. } = &mut *work;
            [spare.z, spare.elite] = cache.rows(row, index, first..first + rows)?;
            latent.up((&self.cpu(false), rows), [k, v], spare, clock)?;
            lay(cache, index, first, [k, v], rows);
        }
        Ok(())
    }
}

/// Appends the rows of `z` and of elite keys to their sequences.
fn put(
    cache: &mut Cache,
    layer: usize,
    turns: &[(Row, usize)],
    [mut z, mut k]: [&[f32]; 2],
) -> Result<(), CacheError> {
    let mut left: usize = turns.iter().map(|turn| turn.1).sum();
    for &(row, n) in turns {
        let (of_z, of_k) = (z.len() / left * n, k.len() / left * n);
        cache.put(row, layer, (&z[..of_z], &k[..of_k]), n)?;
        (z, k, left) = (&z[of_z..], &k[of_k..], left - n);
    }
    Ok(())
}

/// Writes expanded keys and values of tokens from `first` on to every head of a staged layer.
fn lay(cache: &mut Cache, layer: usize, first: usize, kv: [&mut Vec<f32>; 2], rows: usize) {
    let kv = kv.map(|x| &x[..]);
    (0..cache.shape().kv_heads).for_each(|h| cache.lay(layer, (h, first), kv, rows));
}

/// What each row sees: the tokens of its sequence up to its own.
fn views<'a>(cache: &'a Cache, layer: usize, turns: &[(Row, usize)]) -> Vec<View<'a>> {
    let of = |&(row, n): &(Row, usize)| {
        (0..n).rev().filter_map(move |later| cache.latent(row, layer, later))
    };
    turns.iter().flat_map(of).collect()
}
