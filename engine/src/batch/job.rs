//! A request on its way.

use std::ops::Range;

use super::prefix::Key;
use super::request::{Done, Event, Request};
use crate::generate::End;
use crate::lookup::{self, Drafts};
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
    /// Tokens of its part of a step.
    fed: Vec<u32>,
    drafts: Drafts,
    stopped: bool,
    /// Tokens that it had when a step with it failed; its steps have no other members until it has more.
    suspect: Option<usize>,
    pub shared: usize,
    preemptions: usize,
}

impl Job {
    pub fn new(request: Request, keys: Vec<Key>, arrival: u64) -> Self {
        let (tokens, fed, drafts) = (request.prompt.clone(), Vec::new(), Drafts::default());
        let (row, stopped, suspect, shared, preemptions) = (None, false, None, 0, 0);
        Self {
            request,
            tokens,
            keys,
            arrival,
            row,
            fed,
            drafts,
            stopped,
            suspect,
            shared,
            preemptions,
        }
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

    /// Lays out its part of the next step: the newest token and drafts of what follows; or, of those that are not held
    /// after it began again, as many as may go together.
    pub fn lay_out(&mut self, runner: &dyn Runner) {
        let Some(row) = self.row else { return };
        let (held, room) = (self.held(runner), runner.drafts(row));
        let known = (held + 1 + room).min(self.tokens.len());
        self.fed.clear();
        self.fed.extend_from_slice(&self.tokens[held..known]);
        if known == self.tokens.len() {
            let left = self.request.max_tokens - (known - self.request.prompt.len());
            let most = self.request.drafts.min(room + 1 - self.fed.len()).min(left - 1);
            self.fed.extend_from_slice(lookup::draft(&self.tokens, most));
        }
    }

    /// What [`Job::lay_out`] laid out.
    pub fn turn(&self, runner: &dyn Runner) -> Option<Turn<'_>> {
        let (row, held) = (self.row?, self.held(runner));
        let draw = (held - self.before()) as i32;
        let recent = &self.tokens[..=held];
        Some(Turn { row, tokens: &self.fed, choice: &self.request.choice, draw, recent })
    }

    /// Of what a step chose after each token fed, those that are new; drafts that were not taken are forgotten.
    pub fn news<'c>(
        &mut self,
        chosen: &'c [u32],
        runner: &mut dyn Runner,
    ) -> Result<&'c [u32], RunError> {
        let (Some(row), held) = (self.row, self.held(runner)) else { return Ok(&[]) };
        let drafted = held.saturating_sub(self.tokens.len());
        if held < self.tokens.len() {
            return Ok(&[]);
        }
        let known = self.fed.len() - drafted;
        let news = self.drafts.take(&self.fed[known..], &chosen[known - 1..]);
        runner.rollback(row, drafted + 1 - news.len())?;
        Ok(news)
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
            drafts: self.drafts,
            cache: self.row.map(|row| runner.stats(row)),
        };
        Some(Event::Done { id: self.request.id, done })
    }
}
