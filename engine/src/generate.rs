//! Text in, text out: the whole engine on one screen.
//!
//! ```text
//! Request -> Tokenizer -> prefill -> Sampler -> token -> Tokenizer -> text
//!                            |          ^         |
//!                            | writes   +- decode +
//!                            v             | reads, appends
//!                          Cache: slabs, slots, positions
//! ```

use std::time::{Duration, Instant};

use kvwarp::sample::Sampling;

use crate::cache::{Cache, CacheStats};
use crate::model::{Model, ModelError, Work};
use crate::sampler::Sampler;
use crate::spec::CacheSpec;
use crate::tokenizer::Tokenizer;
use crate::watch::Watch;

/// What to generate from, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// Text to start from, special tokens by their names.
    pub prompt: String,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How to keep keys and values.
    pub cache: CacheSpec,
    /// Most tokens that the cache may hold; `None` = the prompt and `max_tokens`, within the model's limit.
    pub context: Option<usize>,
    /// How to choose a token.
    pub sampling: Sampling,
    /// Fixes every random choice.
    pub seed: u64,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended its text.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// The context is full.
    Context,
    /// Someone asked to stop.
    Interrupted,
}

/// What a generation did.
#[derive(Debug, Clone)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub tokens: Vec<u32>,
    /// Time to read the prompt.
    pub prefill: Duration,
    /// Time from the first token to the newest: `tokens - 1` decode steps, sampling included.
    pub decode: Duration,
    /// Why it ended.
    pub end: End,
    /// What the cache held at the end.
    pub cache: CacheStats,
}

impl Stats {
    /// Prompt tokens a second; 0 when the prompt was not read to its end.
    pub fn prefill_speed(&self) -> f64 {
        speed(self.prompt_tokens, self.prefill)
    }

    /// Decode steps a second; 0 when there was none.
    pub fn decode_speed(&self) -> f64 {
        speed(self.tokens.len().saturating_sub(1), self.decode)
    }
}

fn speed(n: usize, time: Duration) -> f64 {
    if n == 0 { 0.0 } else { n as f64 / time.as_secs_f64().max(1e-9) }
}

/// Generates text, giving each piece to `emit` as soon as its characters are whole. An interruption is no error: it
/// ends the text.
///
/// # Errors
/// [`ModelError`] when the prompt cannot be encoded or does not fit, or a kernel refuses.
pub fn generate(
    model: &Model<'_>,
    tokenizer: &Tokenizer,
    request: &Request,
    watch: &mut Watch<'_>,
    emit: &mut dyn FnMut(&str),
) -> Result<Stats, ModelError> {
    let prompt = tokenizer.prompt(&request.prompt)?;
    let mut cache = model.cache(&request.cache, request.context_for(&prompt, model))?;
    let mut work = Work::default();
    let mut sampler = Sampler::new(request.sampling, request.seed);
    let mut text = tokenizer.stream(false);
    let mut clock = Clock::start();

    match model.prefill(&prompt, &mut cache, &mut work, watch) {
        Err(ModelError::Interrupted(_)) => return Ok(clock.stats(End::Interrupted, &cache)),
        read => read?,
    }
    clock.prefilled(prompt.len());
    let end = loop {
        if clock.tokens.len() == request.max_tokens {
            break End::Length;
        }
        if let Some(&newest) = clock.tokens.last() {
            if watch.stopped() {
                break End::Interrupted;
            }
            if cache.is_full() {
                break End::Context;
            }
            model.decode(newest, &mut cache, &mut work)?;
        }
        let token = sampler.pick(work.logits())?;
        if tokenizer.is_end(token) {
            break End::Stop;
        }
        clock.generated(token);
        text.push(token).iter().for_each(|piece| emit(piece));
    };
    emit(&text.finish());
    Ok(clock.stats(end, &cache))
}

impl Request {
    fn context_for(&self, prompt: &[u32], model: &Model<'_>) -> usize {
        let needed = (prompt.len() + self.max_tokens).min(model.config().context);
        self.context.unwrap_or(needed.max(prompt.len()))
    }
}

/// Takes the times.
struct Clock {
    start: Instant,
    prompt_tokens: usize,
    prefill: Duration,
    tokens: Vec<u32>,
    /// When the first and the newest token were known.
    first: Duration,
    newest: Duration,
}

impl Clock {
    fn start() -> Self {
        let zero = Duration::ZERO;
        let start = Instant::now();
        Self {
            start,
            prompt_tokens: 0,
            prefill: zero,
            tokens: Vec::new(),
            first: zero,
            newest: zero,
        }
    }

    fn prefilled(&mut self, tokens: usize) {
        (self.prompt_tokens, self.prefill) = (tokens, self.start.elapsed());
    }

    fn generated(&mut self, token: u32) {
        self.newest = self.start.elapsed();
        if self.tokens.is_empty() {
            self.first = self.newest;
        }
        self.tokens.push(token);
    }

    fn stats(self, end: End, cache: &Cache) -> Stats {
        let Self { prompt_tokens, prefill, tokens, first, newest, .. } = self;
        Stats { prompt_tokens, tokens, prefill, decode: newest - first, end, cache: cache.stats() }
    }
}
