//! Making a calibration.

use std::path::Path;

use kvwarp::slab::Format;

use super::Calibration;
use crate::cache::{Cache, Plan};
use crate::model::{Model, Work};
use crate::perplexity::divergence;
use crate::spec::CacheSpec;
use crate::watch::Watch;

/// Of the tokens that losses are measured on, one of so many is scored; the others come before.
pub const SCORED: usize = 5;

/// Adds `tokens`, read in pieces of `window`, each from its own beginning, writes `to` after every piece and returns what
/// was read.
///
/// # Errors
/// [`crate::model::ModelError`], as when someone asked to stop; [`super::CalibrationError`].
pub fn read(
    model: &Model<'_>,
    calibration: Calibration,
    tokens: &[u32],
    window: usize,
    watch: &mut Watch<'_>,
    to: &Path,
) -> anyhow::Result<Calibration> {
    let mut calibration = calibration;
    for piece in tokens.chunks(window) {
        let mut cache = model.cache(&CacheSpec::default(), piece.len())?;
        let row = cache.open();
        let mut work = Work::collecting(calibration.clone());
        model.prefill(piece, (&mut cache, row), &mut work, watch)?;
        calibration = work.calibration.unwrap_or(calibration);
        calibration.tokens += piece.len();
        calibration.losses.fill(f32::NAN); // those were with other weights
        calibration.save(to)?;
    }
    Ok(calibration)
}

/// Measures what 2 bits of each head cost on `tokens`, where that is not known, and writes `to`. `model` has the
/// calibration's weights already.
///
/// # Errors
/// As [`read`].
pub fn measure(
    model: &Model<'_>,
    calibration: &mut Calibration,
    tokens: &[u32],
    watch: &mut Watch<'_>,
    to: &Path,
) -> anyhow::Result<()> {
    let spec = CacheSpec { keep: 0, ..CacheSpec::preset("q2").unwrap_or_default() };
    let stores = vec![Format::F16; calibration.losses.len()].into();
    let plan = Plan { stores: Some(stores), ..model.plan(&spec) };
    let mut exact = Cache::planned(&spec, model.shape(tokens.len()), plan)?;
    let row = exact.open();
    let (before, scored) = tokens.split_at(tokens.len() - tokens.len() / SCORED);
    let (mut work, mut rows) = (Work::default(), Vec::new());
    model.prefill(before, (&mut exact, row), &mut work, watch)?;
    let mut keep = |logits: &[f32]| rows.extend_from_slice(logits);
    model.score(scored, (&mut exact.clone(), row), &mut work, watch, &mut keep)?;
    for h in 0..calibration.losses.len() {
        if !calibration.losses[h].is_nan() {
            continue;
        }
        let (mut cache, mut sum) = (exact.clone(), 0.0);
        cache.repack(h, Format::Q2)?;
        let mut rows = rows.chunks_exact(model.config().vocab);
        let mut add = |logits: &[f32]| sum += rows.next().map_or(0.0, |p| divergence(p, logits));
        model.score(scored, (&mut cache, row), &mut work, watch, &mut add)?;
        calibration.losses[h] = (sum / scored.len().max(1) as f64) as f32;
        calibration.save(to)?;
    }
    Ok(())
}
