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
    /// What it held after the prefix, before anything was scored; as [`Scores::cache`] without one.
    pub prefix: CacheStats,
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
    /// After the prefix.
    prefix: Option<CacheStats>,
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
        Ok(Self { model, cache, row, work: Work::default(), prefix: None })
    }

    /// Gives `take` the logits after a prefix, or after each token of a piece.
    fn read(
        &mut self,
        (prefix, part): (bool, &[u32]),
        watch: &mut Watch<'_>,
        take: &mut dyn FnMut(&[f32]),
    ) -> Result<(), ModelError> {
        let Self { model, cache, row, work, .. } = self;
        if !prefix {
            return model.score(part, (cache, *row), work, watch, take);
        }
        model.prefill(part, (cache, *row), work, watch)?;
        take(work.logits());
        self.prefix = Some(self.cache.stats(self.row));
        Ok(())
    }

    fn scores(&self, nll: Vec<f32>) -> Scores {
        let cache = self.cache.stats(self.row);
        Scores { nll, cache, prefix: self.prefix.unwrap_or(cache) }
    }
}

/// The parts that a text is read in: the prefix, where there is one, then pieces; and the tokens to predict.
fn parts(tokens: &[u32], (prefix, piece): (usize, usize)) -> (Vec<(bool, &[u32])>, &[u32]) {
    let (prefix, rest) = tokens.split_at(prefix.min(tokens.len()));
    let pieces = rest.chunks(piece.max(1)).map(|piece| (false, piece));
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
    let (parts, targets) = parts(tokens, (reading.prefix, reading.piece));
    let mut reader = Reader::new(model, (&reading.cache, reading.prefix), tokens.len())?;
    let (mut nll, mut targets) = (Vec::with_capacity(tokens.len()), targets.iter());
    let mut take = |logits: &[f32]| nll.extend(targets.next().map(|&t| surprise(logits, t)));
    for part in parts {
        reader.read(part, watch, &mut take)?;
    }
    Ok(reader.scores(nll))
}

/// What is added up of a cache's predictions and f16's.
#[derive(Default)]
struct Sums {
    nll: Vec<f32>,
    f16: f64,
    kl: f64,
    agree: usize,
}

impl Sums {
    fn add(&mut self, exact: &[f32], logits: &[f32], target: u32) {
        self.nll.push(surprise(logits, target));
        self.f16 += f64::from(surprise(exact, target));
        self.kl += divergence(exact, logits);
        self.agree += usize::from(top(exact) == top(logits));
    }

    fn distance(&self) -> Distance {
        let n = self.nll.len() as f64;
        Distance { f16: self.f16 / n, kl: self.kl / n, agreement: self.agree as f64 / n }
    }
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
    let Reading { cache, prefix, piece } = *reading;
    let mut all = compare_each(model, tokens, &[cache], (prefix, piece), watch)?;
    Ok(all.remove(0))
}

/// [`compare`] with each of `specs`, the f16 cache read once for all: `cut` is the prefix and the tokens of a piece.
///
/// # Errors
/// As [`score`].
pub fn compare_each(
    model: &Model<'_>,
    tokens: &[u32],
    specs: &[CacheSpec],
    cut: (usize, usize),
    watch: &mut Watch<'_>,
) -> Result<Vec<(Scores, Distance)>, ModelError> {
    let (parts, mut targets) = parts(tokens, cut);
    let reader = |spec| Reader::new(model, (spec, cut.0), tokens.len());
    let f16 = CacheSpec::default();
    let mut exact = reader(&f16)?;
    let beside = |spec| Ok((reader(spec)?, Sums::default()));
    let mut readers = specs.iter().map(beside).collect::<Result<Vec<_>, ModelError>>()?;
    for part in parts {
        let mut rows: Vec<f32> = Vec::new();
        exact.read(part, watch, &mut |logits| rows.extend_from_slice(logits))?;
        let rows = rows.chunks_exact(model.config().vocab);
        for (reader, sums) in &mut readers {
            let mut pairs = rows.clone().zip(targets);
            let mut take = |logits: &[f32]| {
                let pair = pairs.next();
                pair.iter().for_each(|(exact, target)| sums.add(exact, logits, **target));
            };
            reader.read(part, watch, &mut take)?;
        }
        targets = &targets[rows.len().min(targets.len())..];
    }
    let measured = |(reader, mut sums): (Reader<'_>, Sums)| {
        let distance = sums.distance();
        (reader.scores(std::mem::take(&mut sums.nll)), distance)
    };
    Ok(readers.into_iter().map(measured).collect())
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
