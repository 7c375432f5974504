//! What is asked of a batch, and what it answers.

use std::sync::Arc;

use kvwarp::slab::Format;

use crate::cache::CacheStats;
use crate::generate::End;
use crate::lookup::Drafts;
use crate::runner::{Choice, RunError, Runner, Slabs, check, plus};

/// A text to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// Names it in events.
    pub id: u64,
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub choice: Choice,
    /// Tokens that end the text and are not part of it.
    pub stop: Arc<[u32]>,
    /// Most tokens drafted a step ([`crate::lookup`]); 0 = one token a step.
    pub drafts: usize,
}

/// Why a request could never be served.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No tokens.
    #[error("the prompt is empty")]
    Empty,
    /// Not a token of the model.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A field of the sampling is out of range.
    #[error(transparent)]
    Sampling(#[from] kvwarp::Error),
    /// More tokens than a sequence may hold.
    #[error("prompt ({prompt}) and max_tokens ({max_tokens}) do not fit a context of {context} tokens; {}", fits(*.prompt, *.context))]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to generate.
        max_tokens: usize,
        /// Tokens that a sequence may hold.
        context: usize,
    },
    /// More slabs than there are.
    #[error("prompt ({prompt}) and max_tokens ({max_tokens}) need {need} {format:?} slabs and the pool has {have}: it holds {most} tokens of one request; {}", fits(*.prompt, *.most))]
    Pool {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to generate.
        max_tokens: usize,
        /// Of which format there are too few.
        format: Format,
        /// Slabs needed.
        need: usize,
        /// Slabs there are.
        have: usize,
        /// Tokens that the pool could hold.
        most: usize,
    },
}

/// What would fit where `most` tokens do: the last token generated is not held.
fn fits(prompt: usize, most: usize) -> String {
    match most.checked_sub(prompt) {
        Some(more) => format!("a max_tokens of {} would fit", more + 1),
        None => format!("a prompt of {most} tokens would fit"),
    }
}

impl Request {
    /// Tokens held at most: the last one generated is not.
    pub fn held(&self) -> usize {
        self.prompt.len() + self.max_tokens.saturating_sub(1)
    }

    /// Slabs that it takes in all: of its prompt, then of what follows.
    fn need(&self, runner: &dyn Runner) -> Slabs {
        let read = self.prompt.len() - 1;
        plus(runner.need(0, read), runner.need(read, self.held() - read))
    }

    pub(super) fn check(&self, runner: &dyn Runner, capacity: &Slabs) -> Result<(), Refusal> {
        let (vocab, context) = (runner.config().vocab, runner.context());
        let (prompt, max_tokens) = (self.prompt.len(), self.max_tokens);
        if prompt == 0 {
            return Err(Refusal::Empty);
        }
        if let Some(&token) = self.prompt.iter().find(|&&token| token as usize >= vocab) {
            return Err(Refusal::Token { token, vocab });
        }
        self.choice.sampling.check()?;
        if self.held() > context {
            return Err(Refusal::Context { prompt, max_tokens, context });
        }
        match check(&self.need(runner), capacity) {
            Err(RunError::Exhausted { format, need, free: have }) => {
                let most = most(runner, capacity, self.held());
                Err(Refusal::Pool { prompt, max_tokens, format, need, have, most })
            }
            _ => Ok(()),
        }
    }
}

/// Most tokens, fewer than `below`, that a sequence could hold with `capacity`.
fn most(runner: &dyn Runner, capacity: &Slabs, below: usize) -> usize {
    let (mut fits, mut over) = (0, below);
    while over - fits > 1 {
        let middle = fits + (over - fits) / 2;
        match check(&runner.need(0, middle), capacity) {
            Ok(()) => fits = middle,
            Err(_) => over = middle,
        }
    }
    fits
}

/// How a request ended.
#[derive(Debug, Clone)]
pub struct Done {
    /// Why.
    pub end: End,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt that were not read but continued from, as they had been read before.
    pub shared_tokens: usize,
    /// How often it was closed to make room and began again.
    pub preemptions: usize,
    /// Tokens drafted, and how many of them were taken.
    pub drafts: Drafts,
    /// What the cache held at the end; `None` when it never held anything.
    pub cache: Option<CacheStats>,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A request got a token.
    Token {
        /// [`Request::id`].
        id: u64,
        /// The token.
        token: u32,
    },
    /// A request ended.
    Done {
        /// [`Request::id`].
        id: u64,
        /// How.
        done: Done,
    },
    /// The runner refused a request, which is gone.
    Failed {
        /// [`Request::id`].
        id: u64,
        /// Why.
        error: RunError,
    },
}
