//! Continuous batching over a [`Runner`]: requests join and leave between steps.
//!
//! ```text
//! submit -> waiting -> admit -> read a block -> ... -> step -> ... -> done
//!              ^                     |                   |
//!              +---- preempted <-----+-------------------+
//! ```
//!
//! A round admits who fits, in the order of arrival, reads one block of the oldest unread prompt, and takes one step for
//! all whose prompt is read. When slabs run short, prefixes kept for others to share are melted, least recently used
//! first; then the youngest sequence is closed and waits at the front, and later reads its prompt again in the same blocks
//! and is fed the tokens that it had: since a runner's state is a function of those, it goes on as if nothing had happened.
//! The oldest is never preempted, so it ends, and then the next is the oldest: nobody starves.

mod job;
mod prefix;
mod request;
mod room;

use std::collections::VecDeque;

use crate::runner::{RunError, Runner, Slabs, Turn};
use crate::watch::{Interrupted, Watch};
use job::Job;
pub use prefix::{Key, Prefixes};
pub use request::{Done, Event, Refusal, Request};

/// Requests in the care of one runner.
pub struct Batch<'r> {
    runner: &'r mut dyn Runner,
    /// Tokens of a block of a prompt.
    block: usize,
    /// Slabs of the runner when nothing is open.
    capacity: Slabs,
    /// Who has been admitted and who waits, oldest first.
    active: Vec<Job>,
    waiting: VecDeque<Job>,
    prefixes: Prefixes,
    arrivals: u64,
}

impl<'r> Batch<'r> {
    /// Takes charge of a runner without open sequences. Prompts are read in blocks of `block` tokens, rounded up to whole
    /// slabs, or whole where the spec chooses among their tokens; `root` stands for all else that decides what a sequence holds: model, spec, calibration.
    pub fn new(runner: &'r mut dyn Runner, block: usize, root: Key) -> Self {
        let whole = runner.spec().selects().then(|| runner.spec().block());
        let block = whole.unwrap_or_else(|| block.max(1).next_multiple_of(kvwarp::slab::TOKENS));
        let (capacity, prefixes) = (runner.free(), Prefixes::new(root, block));
        let (active, waiting) = (Vec::new(), VecDeque::new());
        Self { runner, block, capacity, active, waiting, prefixes, arrivals: 0 }
    }

    /// Puts a request at the end of the queue.
    ///
    /// # Errors
    /// [`Refusal`] when it could never be served.
    pub fn submit(&mut self, request: Request) -> Result<(), Refusal> {
        request.check(&*self.runner, &self.capacity)?;
        let keys = self.prefixes.keys(&request.prompt[..request.prompt.len() - 1]);
        self.arrivals += 1;
        self.waiting.push_back(Job::new(request, keys, self.arrivals));
        Ok(())
    }

    /// Forgets a request, wherever it is; whether it was there.
    pub fn cancel(&mut self, id: u64) -> bool {
        if let Some(i) = self.waiting.iter().position(|job| job.request.id == id) {
            return self.waiting.remove(i).is_some();
        }
        let found = self.active.iter().position(|job| job.request.id == id);
        found.map(|i| self.leave(i)).is_some()
    }

    /// Whether there is nothing left to do.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty() && self.waiting.is_empty()
    }

    /// Requests admitted, and requests that wait.
    pub fn load(&self) -> (usize, usize) {
        (self.active.len(), self.waiting.len())
    }

    /// One round; what happened goes to `emit`. What goes wrong with a request ends that request alone.
    ///
    /// # Errors
    /// [`Interrupted`]: the batch may go on later.
    pub fn round(
        &mut self,
        watch: &mut Watch<'_>,
        emit: &mut dyn FnMut(Event),
    ) -> Result<(), Interrupted> {
        self.admit(emit);
        self.read(watch, emit)?;
        self.step(emit);
        if watch.stopped() { Err(Interrupted) } else { Ok(()) }
    }

    /// Lets in who fits, in order.
    fn admit(&mut self, emit: &mut dyn FnMut(Event)) {
        while let Some(job) = self.waiting.front() {
            if job.request.max_tokens == 0 {
                let done = self.waiting.pop_front().and_then(|job| job.done(&*self.runner));
                done.into_iter().for_each(&mut *emit);
                continue;
            }
            if self.active.len() == self.runner.rows() || !self.has_room_for_first() {
                return;
            }
            if let Some(job) = self.waiting.pop_front() {
                let place = self.active.partition_point(|other| other.arrival < job.arrival);
                self.active.insert(place, job);
            }
        }
    }

    /// Reads a block of the oldest prompt that is not read, or continues from a prefix that someone has read.
    fn read(
        &mut self,
        watch: &mut Watch<'_>,
        emit: &mut dyn FnMut(Event),
    ) -> Result<(), Interrupted> {
        let Some(i) = self.active.iter().position(|job| job.is_reading(&*self.runner)) else {
            return Ok(());
        };
        match self.read_block(i, watch) {
            Ok(()) => Ok(()),
            Err(error) if error.is_interrupted() => {
                self.preempt(i);
                Err(Interrupted)
            }
            Err(error) => {
                self.fail(i, error, emit);
                Ok(())
            }
        }
    }

    fn read_block(&mut self, i: usize, watch: &mut Watch<'_>) -> Result<(), RunError> {
        self.adopt_prefix(i)?;
        let job = &mut self.active[i];
        let row = job.open(self.runner)?;
        let (arrival, block) = (job.arrival, job.next_block(self.runner.len(row), self.block));
        if block.is_empty() {
            return Ok(());
        }
        if !self.make_room_to_read(arrival, self.runner.need(block.start, block.len()))? {
            return Ok(());
        }
        let job = &self.active[i];
        self.runner.read(row, &job.tokens[block.clone()], watch)?;
        if block.end.is_multiple_of(self.block) {
            self.keep_prefix(i, row, block.end / self.block - 1);
        }
        Ok(())
    }

    /// One step for all whose prompt is read; for one of them alone while it is suspected to have broken a step.
    fn step(&mut self, emit: &mut dyn FnMut(Event)) {
        let members = match self.make_room_to_step() {
            Ok(members) => members,
            Err((i, error)) => return self.fail(i, error, emit),
        };
        if members.is_empty() {
            return;
        }
        let turns: Vec<Turn<'_>> =
            members.iter().filter_map(|&i| self.active[i].turn(&*self.runner)).collect();
        let mut chosen = Vec::new();
        match self.runner.step(&turns, &mut chosen) {
            Ok(()) => self.take(&members, &chosen, emit),
            Err(error) if members.len() == 1 => self.fail(members[0], error, emit),
            Err(_) => self.suspect(&members),
        }
    }

    /// Gives each member the tokens that follow its newest, and lets those go that are done.
    fn take(&mut self, members: &[usize], chosen: &[Vec<u32>], emit: &mut dyn FnMut(Event)) {
        let mut left = Vec::new();
        for (&i, chosen) in members.iter().zip(chosen) {
            let job = &mut self.active[i];
            let id = job.request.id;
            let news = match job.news(chosen, self.runner) {
                Ok(news) => news,
                Err(error) => {
                    emit(Event::Failed { id, error });
                    left.push(i);
                    continue;
                }
            };
            let taken = news.iter().take_while(|&&token| job.accept(token));
            taken.for_each(|&token| emit(Event::Token { id, token }));
            if let Some(done) = job.done(&*self.runner) {
                emit(done);
                left.push(i);
            }
        }
        left.into_iter().rev().for_each(|i| self.leave(i));
    }

    /// Closes the members of a step that failed, as their state is not known, and has each go on by itself until it is
    /// past the token at which it failed.
    fn suspect(&mut self, members: &[usize]) {
        for &i in members.iter().rev() {
            self.active[i].suspect();
            self.preempt(i);
        }
    }

    fn fail(&mut self, i: usize, error: RunError, emit: &mut dyn FnMut(Event)) {
        emit(Event::Failed { id: self.active[i].request.id, error });
        self.leave(i);
    }

    /// Closes an admitted request.
    fn leave(&mut self, i: usize) {
        self.active.remove(i).close(self.runner);
    }
}

impl Drop for Batch<'_> {
    /// Leaves the runner without open or frozen sequences.
    fn drop(&mut self) {
        while !self.active.is_empty() {
            self.leave(0);
        }
        while self.melt_one() {}
    }
}
