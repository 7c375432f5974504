//! How a long computation tells how far it is, and learns that it should stop.

use std::sync::atomic::{AtomicBool, Ordering};

/// Someone asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Called after each piece of work.
pub struct Watch<'a> {
    stop: &'a AtomicBool,
    /// Takes the rows that passed through one more layer.
    progress: &'a mut dyn FnMut(usize),
}

impl<'a> Watch<'a> {
    /// Stops when `stop` is set; `progress` is given the rows that have passed through one more layer.
    pub fn new(stop: &'a AtomicBool, progress: &'a mut dyn FnMut(usize)) -> Self {
        Self { stop, progress }
    }

    /// Whether someone asked to stop.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Reports `rows` more and checks for the wish to stop.
    ///
    /// # Errors
    /// [`Interrupted`] when there is one.
    pub fn step(&mut self, rows: usize) -> Result<(), Interrupted> {
        (self.progress)(rows);
        if self.stopped() { Err(Interrupted) } else { Ok(()) }
    }
}
