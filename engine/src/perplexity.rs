//! How well a model predicts a text with a given cache.
//!
//! The text is read in pieces, and each piece attends to the history as the cache stores it, to itself in f16. Two ways
//! to measure a quantised cache follow, and they disagree:
//! - *on write* (`prefix` 0): the history is quantised piece by piece, so what is computed from it is affected too;
//! - *after a prefix*: `prefix` tokens are read exactly, then quantised, and only the tokens after them are scored.

use crate::cache::CacheStats;
use crate::model::{Model, ModelError, Work};
use crate::spec::CacheSpec;
use crate::watch::Watch;

/// How to read the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// How to keep keys and values.
    pub cache: CacheSpec,
    /// Tokens read exactly before the first piece; not scored.
    pub prefix: usize,
    /// Tokens of a piece, at least 1.
    pub piece: usize,
}

/// How well each token was predicted.
#[derive(Debug, Clone)]
pub struct Scores {
    /// Negative log-probability, in nats, of each scored token: all but the first, or all after the prefix.
    pub nll: Vec<f32>,
    /// What the cache held at the end.
    pub cache: CacheStats,
}

impl Scores {
    /// Mean negative log-probability a token, in nats: the log-perplexity. NaN where nothing was scored.
    pub fn mean(&self) -> f64 {
        self.nll.iter().map(|&x| f64::from(x)).sum::<f64>() / self.nll.len() as f64
    }

    /// Standard error of [`Scores::mean`], taking tokens as independent.
    pub fn standard_error(&self) -> f64 {
        let (n, mean) = (self.nll.len() as f64, self.mean());
        let squares: f64 = self.nll.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
        (squares / (n * (n - 1.0).max(1.0))).sqrt()
    }
}

/// Scores `tokens`, which the cache must hold at once.
///
/// # Errors
/// [`ModelError`] when they do not fit the model's context, or someone asked to stop.
pub fn score(
    model: &Model<'_>,
    tokens: &[u32],
    reading: &Reading,
    watch: &mut Watch<'_>,
) -> Result<Scores, ModelError> {
    let mut cache = model.cache(&reading.cache, tokens.len())?;
    let mut work = Work::default();
    let mut nll = Vec::with_capacity(tokens.len());
    let (prefix, rest) = tokens.split_at(reading.prefix.min(tokens.len()));
    if let (false, Some(&target)) = (prefix.is_empty(), rest.first()) {
        model.prefill(prefix, &mut cache, &mut work, watch)?;
        nll.push(surprise(work.logits(), target));
    }
    // The token that each row predicts: the last row of all predicts none.
    let mut targets = rest.iter().skip(1);
    for piece in rest.chunks(reading.piece.max(1)) {
        model.score(piece, &mut cache, &mut work, watch, &mut |logits| {
            nll.extend(targets.next().map(|&target| surprise(logits, target)));
        })?;
    }
    Ok(Scores { nll, cache: cache.stats() })
}

/// `-ln softmax(logits)[target]`.
fn surprise(logits: &[f32], target: u32) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum = |part: &[f32]| f64::from(part.iter().map(|x| (x - max).exp()).sum::<f32>());
    let total: f64 = logits.chunks(256).map(sum).sum();
    (total.ln() - f64::from(logits[target as usize] - max)) as f32
}
