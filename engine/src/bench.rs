//! Speed of prefill and decode at a depth of context, measured as llama-bench does: random tokens, a warm-up, then
//! repetitions on the same filled cache.

use std::time::{Duration, Instant};

use kvwarp::sample::draw;

use crate::cache::CacheStats;
use crate::profile::Profile;
use crate::runner::{Choice, Frozen, Row, RunError, Runner, Turn};
use crate::watch::Watch;

/// Steps of a decode that are profiled: enough to say what one is made of.
const PROFILED: usize = 16;

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
    /// What memory was taken for when it was the most, from the runner's beginning on.
    pub memory: Vec<(&'static str, usize)>,
    /// What it was made of, where that was asked for.
    pub profiled: Option<Profiled>,
}

/// Launches of some steps, each timed.
#[derive(Debug, Clone)]
pub struct Profiled {
    /// Of all steps.
    pub profile: Profile,
    /// Steps; a prefill is one.
    pub steps: usize,
}

/// Sequences filled to some depth, and tests on them.
pub struct Bench<'r> {
    runner: &'r mut dyn Runner,
    depth: usize,
    /// Tokens that each sequence begins with, and its state after them where it can be gone back to.
    filled: Vec<(Vec<u32>, Option<Frozen>)>,
    drawn: i32,
}

impl Samples {
    /// Mean time of a step of `test`; a prefill is one.
    pub fn step_time(&self, test: Test) -> Duration {
        let steps = match test {
            Test::Prefill(_) => 1,
            Test::Decode(n) => n,
        };
        let all: Duration = self.times.iter().sum();
        all.div_f64((steps * self.times.len()).max(1) as f64)
    }

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

impl<'r> Bench<'r> {
    /// Fills as many sequences as the runner has rows by a prefill of `depth` random tokens each, no two alike.
    ///
    /// # Errors
    /// [`RunError`] when that does not fit, or someone asked to stop.
    pub fn new(
        runner: &'r mut dyn Runner,
        depth: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Self, RunError> {
        let rows = runner.rows();
        let mut bench = Self { runner, depth, filled: Vec::new(), drawn: 0 };
        for _ in 0..rows {
            let tokens = bench.random(depth);
            let row = bench.fill(&tokens, watch)?;
            let frozen = match bench.runner.freeze(row) {
                Err(RunError::Shared { .. }) => None,
                frozen => Some(frozen?),
            };
            bench.runner.close(row);
            bench.filled.push((tokens, frozen));
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
    /// [`RunError`] when the tokens do not fit, or someone asked to stop.
    pub fn run(
        &mut self,
        test: Test,
        repetitions: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Samples, RunError> {
        let (warm_up, tokens) = match test {
            Test::Prefill(n) => (Test::Prefill(n), n),
            Test::Decode(n) => (Test::Decode(n.min(1)), n * self.filled.len()),
        };
        let cache = self.once(warm_up, watch)?.1;
        let (times, memory) = (Vec::new(), Vec::new());
        let mut samples = Samples { tokens, times, cache, memory, profiled: None };
        for _ in 0..repetitions {
            let (time, cache) = self.once(test, watch)?;
            samples.times.push(time);
            samples.cache = cache;
        }
        samples.memory = self.runner.memory();
        Ok(samples)
    }

    /// Runs `test` once more, a few steps of a decode, with every launch timed.
    ///
    /// # Errors
    /// As of [`Bench::run`].
    pub fn profile(&mut self, test: Test, watch: &mut Watch<'_>) -> Result<Profiled, RunError> {
        let rows = self.begin(test, watch)?;
        self.runner.start_profile();
        let (steps, done) = match test {
            Test::Prefill(n) => (1, self.prefill(rows[0], n, watch)),
            Test::Decode(n) => (n.min(PROFILED), self.decode(&rows, n.min(PROFILED), watch)),
        };
        let profile = self.runner.end_profile();
        rows.into_iter().for_each(|row| self.runner.close(row));
        done?;
        Ok(Profiled { profile: profile?, steps })
    }

    fn once(
        &mut self,
        test: Test,
        watch: &mut Watch<'_>,
    ) -> Result<(Duration, CacheStats), RunError> {
        let rows = self.begin(test, watch)?;
        let time = match test {
            Test::Prefill(n) => self.prefill(rows[0], n, watch)?,
            Test::Decode(n) => self.decode(&rows, n, watch)?,
        };
        let stats = self.runner.stats(rows[0]);
        rows.into_iter().for_each(|row| self.runner.close(row));
        Ok((time, stats))
    }

    /// Reads `n` tokens; the last goes through a step, as it does for those who want to know what follows.
    fn prefill(&mut self, row: Row, n: usize, watch: &mut Watch<'_>) -> Result<Duration, RunError> {
        let tokens = self.random(n);
        let start = Instant::now();
        if n > 1 {
            self.runner.read(row, &tokens[..n - 1], watch)?;
        }
        self.step(&[row], &tokens[n - 1..])?;
        Ok(start.elapsed())
    }

    fn decode(
        &mut self,
        rows: &[Row],
        n: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Duration, RunError> {
        let tokens = self.random(n * rows.len());
        let start = Instant::now();
        for tokens in tokens.chunks_exact(rows.len()) {
            self.step(rows, tokens)?;
            watch.step(0)?;
        }
        Ok(start.elapsed())
    }

    /// A step with a token for each row.
    fn step(&mut self, rows: &[Row], tokens: &[u32]) -> Result<(), RunError> {
        let turn = |(&row, token)| Turn {
            row,
            tokens: std::slice::from_ref(token),
            choice: &Choice::GREEDY,
            draw: 0,
            recent: &[],
        };
        let turns: Vec<_> = rows.iter().zip(tokens).map(turn).collect();
        self.runner.step(&turns, &mut Vec::new())
    }

    /// The sequences of a test: a prefill is of the first alone, a decode of all together.
    fn begin(&mut self, test: Test, watch: &mut Watch<'_>) -> Result<Vec<Row>, RunError> {
        let sequences = if let Test::Prefill(_) = test { 1 } else { self.filled.len() };
        (0..sequences).map(|i| self.start(i, watch)).collect()
    }

    /// Sequence `i` as it was filled.
    fn start(&mut self, i: usize, watch: &mut Watch<'_>) -> Result<Row, RunError> {
        let (tokens, frozen) = &self.filled[i];
        match frozen {
            Some(frozen) => self.runner.thaw(frozen),
            None => {
                let tokens = tokens.clone();
                self.fill(&tokens, watch)
            }
        }
    }

    fn fill(&mut self, tokens: &[u32], watch: &mut Watch<'_>) -> Result<Row, RunError> {
        let row = self.runner.open()?;
        if !tokens.is_empty() {
            self.runner.read(row, tokens, watch)?;
        }
        Ok(row)
    }

    /// `n` tokens of a fixed random stream.
    fn random(&mut self, n: usize) -> Vec<u32> {
        let vocab = self.runner.config().vocab as u64;
        let first = self.drawn;
        self.drawn = first.wrapping_add(n as i32);
        (0..n as i32).map(|i| (draw(0, first.wrapping_add(i)) % vocab) as u32).collect()
    }
}

impl Drop for Bench<'_> {
    /// Leaves the runner without frozen sequences.
    fn drop(&mut self) {
        let frozen = self.filled.drain(..).filter_map(|(_, frozen)| frozen);
        frozen.for_each(|frozen| self.runner.melt(frozen));
    }
}
