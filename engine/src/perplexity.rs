//! How well a model predicts a text with a given cache.
//!
//! The text is read in pieces, and each piece attends to the history as the cache stores it, to itself in f16. Two ways
//! to measure a quantised cache follow, and they disagree:
//! - *on write* (`prefix` 0): the history is quantised piece by piece, so what is computed from it is affected too;
//! - *after a prefix*: `prefix` tokens are read exactly, then quantised, and only the tokens after them are scored.

use crate::cache::{Cache, CacheStats};
use crate::model::{Model, ModelError, Work};
use crate::runner::Row;
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

/// How far a cache's predictions are from those with an f16 cache, of the tokens scored.
#[derive(Debug, Clone)]
pub struct Distance {
    /// Log-perplexity with f16.
    pub f16: f64,
    /// Mean Kullback-Leibler divergence from f16's prediction, in nats.
    pub kl: f64,
    /// Share of tokens of which both find the same one most probable.
    pub agreement: f64,
}

/// A text being read with one cache.
struct Reader<'a> {
    model: &'a Model<'a>,
    cache: Cache,
    row: Row,
    work: Work,
}

impl<'a> Reader<'a> {
    fn new(
        model: &'a Model<'a>,
        (spec, prefix): (&CacheSpec, usize),
        context: usize,
    ) -> Result<Self, ModelError> {
        if spec.selects() && spec.lag().is_none() && prefix == 0 {
            let problem =
                "tokens are chosen among those of a prefix; give one with --prefix".into();
            return Err(ModelError::Policy { spec: Box::new(*spec), problem });
        }
        let mut cache = model.cache(spec, context)?;
        let row = cache.open();
        Ok(Self { model, cache, row, work: Work::default() })
    }

    /// Gives `take` the logits after a prefix, or after each token of a piece.
    fn read(
        &mut self,
        (prefix, part): (bool, &[u32]),
        watch: &mut Watch<'_>,
        take: &mut dyn FnMut(&[f32]),
    ) -> Result<(), ModelError> {
        let Self { model, cache, row, work } = self;
        if !prefix {
            return model.score(part, (cache, *row), work, watch, take);
        }
        model.prefill(part, (cache, *row), work, watch)?;
        take(work.logits());
        Ok(())
    }

    fn stats(&self) -> CacheStats {
        self.cache.stats(self.row)
    }
}

/// The parts that a text is read in: the prefix, where there is one, then pieces; and the tokens to predict.
fn parts<'a>(tokens: &'a [u32], reading: &Reading) -> (Vec<(bool, &'a [u32])>, &'a [u32]) {
    let (prefix, rest) = tokens.split_at(reading.prefix.min(tokens.len()));
    let pieces = rest.chunks(reading.piece.max(1)).map(|piece| (false, piece));
    match prefix {
        [] => (pieces.collect(), tokens.get(1..).unwrap_or_default()),
        _ => (std::iter::once((true, prefix)).chain(pieces).collect(), rest),
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
    let (parts, targets) = parts(tokens, reading);
    let mut reader = Reader::new(model, (&reading.cache, reading.prefix), tokens.len())?;
    let (mut nll, mut targets) = (Vec::with_capacity(tokens.len()), targets.iter());
    let mut take = |logits: &[f32]| nll.extend(targets.next().map(|&t| surprise(logits, t)));
    for part in parts {
        reader.read(part, watch, &mut take)?;
    }
    Ok(Scores { nll, cache: reader.stats() })
}

/// [`score`], and the same text with an f16 cache beside it, piece by piece.
///
/// # Errors
/// As [`score`].
pub fn compare(
    model: &Model<'_>,
    tokens: &[u32],
    reading: &Reading,
    watch: &mut Watch<'_>,
) -> Result<(Scores, Distance), ModelError> {
    let (parts, targets) = parts(tokens, reading);
    let reader = |spec| Reader::new(model, (spec, reading.prefix), tokens.len());
    let (mut exact, mut reader) = (reader(&CacheSpec::default())?, reader(&reading.cache)?);
    let (mut nll, mut targets) = (Vec::with_capacity(tokens.len()), targets.iter());
    let (mut f16, mut kl, mut agree) = (0.0, 0.0, 0);
    for part in parts {
        let mut rows: Vec<f32> = Vec::new();
        let mut keep = |logits: &[f32]| rows.extend_from_slice(logits);
        exact.read(part, watch, &mut keep)?;
        let mut rows = rows.chunks_exact(model.config().vocab);
        let mut take = |logits: &[f32]| {
            let (Some(exact), Some(&target)) = (rows.next(), targets.next()) else { return };
            nll.push(surprise(logits, target));
            f16 += f64::from(surprise(exact, target));
            kl += divergence(exact, logits);
            agree += usize::from(top(exact) == top(logits));
        };
        reader.read(part, watch, &mut take)?;
    }
    let n = nll.len() as f64;
    let distance = Distance { f16: f16 / n, kl: kl / n, agreement: agree as f64 / n };
    Ok((Scores { nll, cache: reader.stats() }, distance))
}

/// `ln sum exp`.
fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum = |part: &[f32]| f64::from(part.iter().map(|x| (x - max).exp()).sum::<f32>());
    logits.chunks(256).map(sum).sum::<f64>().ln() + f64::from(max)
}

/// `-ln softmax(logits)[target]`.
fn surprise(logits: &[f32], target: u32) -> f32 {
    (log_sum(logits) - f64::from(logits[target as usize])) as f32
}

/// Kullback-Leibler divergence of `softmax(q)` from `softmax(p)`.
pub(crate) fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (f64::from(p) - of_p, f64::from(q) - of_q);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum()
}

fn top(logits: &[f32]) -> Option<usize> {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i)
}
