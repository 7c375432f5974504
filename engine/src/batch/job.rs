//! A request on its way.

use std::ops::Range;

use super::prefix::Key;
use super::request::{Done, Event, Request};
use crate::generate::End;
use crate::runner::{Row, RunError, Runner, Turn};

/// A request that waits or is being served.
pub(super) struct Job {
    pub request: Request,
    /// The prompt and what was generated.
    pub tokens: Vec<u32>,
    /// Of the whole blocks of the prompt, its last token left out.
    pub keys: Vec<Key>,
    /// Order of arrival.
    pub arrival: u64,
    row: Option<Row>,
    stopped: bool,
    /// Tokens that it had when a step with it failed; its steps have no other members until it has more.
    suspect: Option<usize>,
    pub shared: usize,
    preemptions: usize,
}

impl Job {
    pub fn new(request: Request, keys: Vec<Key>, arrival: u64) -> Self {
        let (tokens, row, stopped, suspect) = (request.prompt.clone(), None, false, None);
        Self { request, tokens, keys, arrival, row, stopped, suspect, shared: 0, preemptions: 0 }
    }

    /// Tokens of the prompt that are read, not stepped over: all but the last.
    fn before(&self) -> usize {
        self.request.prompt.len() - 1
    }

    /// Tokens held.
    pub fn held(&self, runner: &dyn Runner) -> usize {
        self.row.map_or(0, |row| runner.len(row))
    }

    /// Whether some of its prompt is still to be read.
    pub fn is_reading(&self, runner: &dyn Runner) -> bool {
        self.row.is_none() || self.held(runner) < self.before()
    }

    /// Whether all its tokens are held, so that what the step just taken chose last is new.
    pub fn is_current(&self, runner: &dyn Runner) -> bool {
        self.held(runner) == self.tokens.len()
    }

    /// Its sequence, opened when there is none.
    pub fn open(&mut self, runner: &mut dyn Runner) -> Result<Row, RunError> {
        let row = self.row.map_or_else(|| runner.open(), Ok)?;
        self.row = Some(row);
        Ok(row)
    }

    /// Goes on with another sequence of the same tokens.
    pub fn adopt(&mut self, row: Row) {
        self.row = Some(row);
    }

    /// Gives its sequence back, if it has one; whether it had.
    pub fn close(&mut self, runner: &mut dyn Runner) -> bool {
        self.row.take().map(|row| runner.close(row)).is_some()
    }

    /// To be called when it is closed to make room.
    pub fn preempted(&mut self) {
        (self.preemptions, self.shared) = (self.preemptions + 1, 0);
    }

    /// The tokens to read after `held`: up to the next multiple of `block`.
    pub fn next_block(&self, held: usize, block: usize) -> Range<usize> {
        held..(held / block * block + block).min(self.before())
    }

    /// Its part of a step: the newest token, or as many as may go together of those that are not held after it began
    /// again; what followed them is known.
    pub fn turn(&self, runner: &dyn Runner) -> Option<Turn<'_>> {
        let (row, held) = (self.row?, self.held(runner));
        let until = (held + 1 + runner.drafts(row)).min(self.tokens.len());
        let draw = (held - self.before()) as i32;
        let (tokens, recent) = (&self.tokens[held..until], &self.tokens[..=held]);
        Some(Turn { row, tokens, choice: &self.request.choice, draw, recent })
    }

    /// Takes a token; whether it is part of the text.
    pub fn accept(&mut self, token: u32) -> bool {
        self.stopped = self.request.stop.contains(&token);
        if !self.stopped {
            self.tokens.push(token);
        }
        if self.suspect.is_some_and(|tokens| self.tokens.len() > tokens) {
            self.suspect = None;
        }
        !self.stopped
    }

    pub fn suspect(&mut self) {
        self.suspect = Some(self.tokens.len());
    }

    pub fn is_suspect(&self) -> bool {
        self.suspect.is_some()
    }

    /// How it ended, when it has.
    pub fn done(&self, runner: &dyn Runner) -> Option<Event> {
        let generated = &self.tokens[self.request.prompt.len()..];
        let end = match generated.len() < self.request.max_tokens {
            _ if self.stopped => End::Stop,
            false => End::Length,
            true => return None,
        };
        let done = Done {
            end,
            prompt_tokens: self.request.prompt.len(),
            tokens: generated.to_vec(),
            shared_tokens: self.shared,
            preemptions: self.preemptions,
            cache: self.row.map(|row| runner.stats(row)),
        };
        Some(Event::Done { id: self.request.id, done })
    }
}
