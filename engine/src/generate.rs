//! Text in, text out: the whole engine on one screen.
//!
//! ```text
//! Request -> Tokenizer -> Runner::read -> Runner::step -> token -> Tokenizer -> text
//!                             |            ^  |            |
//!                             | writes     +--|------------+
//!                             v               v reads, appends
//!                             Cache: slabs, slots, positions
//! ```

use std::time::{Duration, Instant};

use crate::cache::{CacheError, CacheStats};
use crate::config::Config;
use crate::lookup::{self, Drafts};
use crate::model::ModelError;
use crate::runner::{Choice, Row, RunError, Runner, Turn};
use crate::tokenizer::Tokenizer;
use crate::watch::Watch;

/// What to generate from, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// Tokens to start from, at least one.
    pub prompt: Vec<u32>,
    /// Sequence that holds the first tokens of the prompt, not all, and is closed at the end; `None` = a new one.
    pub row: Option<Row>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Most tokens that the cache may hold; `None` = the prompt and `max_tokens`, within the model's limit.
    pub context: Option<usize>,
    /// How to choose tokens.
    pub choice: Choice,
    /// Most tokens drafted a step ([`crate::lookup`]); 0 = one token a step.
    pub drafts: usize,
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

impl End {
    /// As JSON has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What a generation did.
#[derive(Debug, Clone)]
pub struct Stats {
    /// Tokens of the prompt that were not held before.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub tokens: Vec<u32>,
    /// Time to read the prompt and to choose the first token.
    pub prefill: Duration,
    /// Time from the first token to the newest: `tokens - 1` decode steps, sampling included.
    pub decode: Duration,
    /// Tokens drafted, and how many of them were taken.
    pub drafts: Drafts,
    /// Why it ended.
    pub end: End,
    /// What the cache held at the end.
    pub cache: CacheStats,
}

impl Stats {
    /// Prompt tokens a second.
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
/// [`RunError`] when the prompt is empty or does not fit, or the runner refuses.
pub fn generate(
    runner: &mut dyn Runner,
    tokenizer: &Tokenizer,
    request: &Request,
    watch: &mut Watch<'_>,
    emit: &mut dyn FnMut(&str),
) -> Result<Stats, RunError> {
    let mut tokens = request.prompt.clone();
    let (prompt, context) = (tokens.len(), runner.context());
    if prompt == 0 {
        return Err(ModelError::Empty.into());
    }
    if prompt > context {
        return Err(CacheError::Full { need: prompt, context }.into());
    }
    let row = request.row.map_or_else(|| runner.open(), Ok)?;
    let held = runner.len(row);
    let (mut text, mut clock, mut chosen) = (tokenizer.stream(false), Clock::start(), Vec::new());
    let mut drafts = Drafts::default();
    // The last token's logits choose the first answer, so it is a step.
    for block in tokens[held..prompt - 1].chunks(runner.spec().block()) {
        match runner.read(row, block, watch) {
            Err(e) if e.is_interrupted() => break,
            read => read?,
        }
    }
    let end = 'text: loop {
        let (made, newest) = (tokens.len() - prompt, tokens.len() - 1);
        if watch.stopped() {
            break End::Interrupted;
        }
        if made == request.max_tokens {
            break End::Length;
        }
        if runner.len(row) == context {
            break End::Context;
        }
        let most = request.drafts.min(runner.drafts(row)).min(request.max_tokens - made - 1);
        let fed = [&tokens[newest..], lookup::draft(&tokens, most)].concat();
        let (choice, draw) = (&request.choice, made as i32);
        let turn = Turn { row, tokens: &fed, choice, draw, recent: &tokens };
        runner.step(&[turn], &mut chosen)?;
        clock.stepped();
        let chosen = drafts.take(&fed[1..], &chosen[0]);
        runner.rollback(row, fed.len() - chosen.len())?;
        for &token in chosen {
            if tokenizer.is_end(token) {
                break 'text End::Stop;
            }
            tokens.push(token);
            text.push(token).iter().for_each(|piece| emit(piece));
        }
    };
    emit(&text.finish());
    let cache = runner.stats(row);
    runner.close(row);
    Ok(clock.stats(prompt - held, tokens.split_off(prompt), drafts, end, cache))
}

impl Request {
    /// Tokens that the cache of a model must be able to hold.
    pub fn context_for(&self, config: &Config) -> usize {
        let prompt = self.prompt.len();
        let needed = (prompt + self.max_tokens).min(config.context);
        self.context.unwrap_or(needed.max(prompt))
    }
}

/// Takes the times of steps.
struct Clock {
    start: Instant,
    /// When the first and the newest step ended.
    first: Option<Duration>,
    newest: Duration,
}

impl Clock {
    fn start() -> Self {
        Self { start: Instant::now(), first: None, newest: Duration::ZERO }
    }

    fn stepped(&mut self) {
        self.newest = self.start.elapsed();
        self.first.get_or_insert(self.newest);
    }

    fn stats(
        self,
        prompt_tokens: usize,
        tokens: Vec<u32>,
        drafts: Drafts,
        end: End,
        cache: CacheStats,
    ) -> Stats {
        let prefill = self.first.unwrap_or_else(|| self.start.elapsed());
        let decode = self.newest.saturating_sub(prefill);
        Stats { prompt_tokens, tokens, prefill, decode, drafts, end, cache }
    }
}
