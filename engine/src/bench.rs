//! Speed of prefill and decode at a depth of context, measured as llama-bench does: random tokens, a warm-up, then
//! repetitions on the same filled cache.

use std::time::{Duration, Instant};

use kvwarp::sample::draw;

use crate::cache::{Cache, CacheStats};
use crate::model::{Model, ModelError, Work};
use crate::runner::Row;
use crate::spec::CacheSpec;
use crate::watch::Watch;

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// Reading so many tokens at once.
    Prefill(usize),
    /// Generating so many tokens one by one.
    Decode(usize),
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Samples {
    /// Tokens of each repetition.
    pub tokens: usize,
    /// Time of each repetition.
    pub times: Vec<Duration>,
    /// What the cache held after one.
    pub cache: CacheStats,
}

/// A cache filled to some depth, and tests on it.
pub struct Bench<'m> {
    model: &'m Model<'m>,
    depth: usize,
    filled: Cache,
    row: Row,
    work: Work,
    drawn: i32,
}

impl Samples {
    /// Tokens a second of each repetition.
    pub fn speeds(&self) -> Vec<f64> {
        self.times.iter().map(|time| self.tokens as f64 / time.as_secs_f64()).collect()
    }
}

/// Mean and sample standard deviation; the latter is 0 for one value.
pub fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0)).sqrt())
}

impl<'m> Bench<'m> {
    /// Fills a cache of `spec` by a prefill of `depth` random tokens; tests may add `room` tokens.
    ///
    /// # Errors
    /// [`ModelError`] when that does not fit the model's context, or someone asked to stop.
    pub fn new(
        model: &'m Model<'m>,
        spec: &CacheSpec,
        depth: usize,
        room: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Self, ModelError> {
        let mut filled = model.cache(spec, depth + room)?;
        let row = filled.open();
        let mut bench = Self { model, depth, filled, row, work: Work::default(), drawn: 0 };
        if depth > 0 {
            let tokens = bench.random(depth);
            model.prefill(&tokens, (&mut bench.filled, row), &mut bench.work, watch)?;
        }
        Ok(bench)
    }

    /// Tokens in the cache before each repetition.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Runs `test` once to warm up (a decode with one token) and then `repetitions` times.
    ///
    /// # Errors
    /// [`ModelError`] when the tokens do not fit, or someone asked to stop.
    pub fn run(
        &mut self,
        test: Test,
        repetitions: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Samples, ModelError> {
        let (warm_up, tokens) = match test {
            Test::Prefill(n) => (Test::Prefill(n), n),
            Test::Decode(n) => (Test::Decode(n.min(1)), n),
        };
        self.once(warm_up, watch)?;
        let mut samples = Samples { tokens, times: Vec::new(), cache: self.filled.stats(self.row) };
        for _ in 0..repetitions {
            let (time, cache) = self.once(test, watch)?;
            samples.times.push(time);
            samples.cache = cache;
        }
        Ok(samples)
    }

    fn once(
        &mut self,
        test: Test,
        watch: &mut Watch<'_>,
    ) -> Result<(Duration, CacheStats), ModelError> {
        let mut cache = self.filled.clone();
        let tokens = match test {
            Test::Prefill(n) | Test::Decode(n) => self.random(n),
        };
        let start = Instant::now();
        if let Test::Prefill(_) = test {
            self.model.prefill(&tokens, (&mut cache, self.row), &mut self.work, watch)?;
        } else {
            for token in tokens {
                self.model.step(&[(self.row, &[token])], &mut cache, &mut self.work)?;
                watch.step(0)?;
            }
        }
        Ok((start.elapsed(), cache.stats(self.row)))
    }

    /// `n` tokens of a fixed random stream.
    fn random(&mut self, n: usize) -> Vec<u32> {
        let vocab = self.model.config().vocab as u64;
        let first = self.drawn;
        self.drawn = first.wrapping_add(n as i32);
        (0..n as i32).map(|i| (draw(0, first.wrapping_add(i)) % vocab) as u32).collect()
    }
}
