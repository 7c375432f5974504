//! What a step is made of: the time of every launch of a kernel, or of every call of a kernel family's CPU path, summed
//! by op and shape.

use std::time::{Duration, Instant};

/// One launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Kernel family, or what else was done: `gemm` by cuBLAS, `copy`, `write` from the host, `zero`.
    pub op: &'static str,
    /// Rows and columns of the matrix of a product.
    pub shape: Option<[usize; 2]>,
    /// Bytes that it must move; 0 where they are not counted.
    pub bytes: usize,
}

/// Launches of one op and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// As [`Launch::op`].
    pub op: &'static str,
    /// As [`Launch::shape`].
    pub shape: Option<[usize; 2]>,
    /// How many.
    pub launches: usize,
    /// Of all of them.
    pub time: Duration,
    /// Of all of them.
    pub bytes: usize,
}

/// Launches of some steps, in the order in which their ops came first.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    lines: Vec<Line>,
}

/// Times calls on this thread while it has a profile.
#[derive(Debug, Default)]
pub struct Clock(Option<Profile>);

impl Launch {
    /// Of an op whose bytes are not counted.
    pub const fn of(op: &'static str) -> Self {
        Self { op, shape: None, bytes: 0 }
    }
}

impl Line {
    /// Thousands of millions of bytes a second; `None` where bytes are not counted.
    pub fn gigabytes_a_second(&self) -> Option<f64> {
        let seconds = self.time.as_secs_f64();
        (self.bytes > 0 && seconds > 0.0).then(|| self.bytes as f64 / seconds / 1e9)
    }
}

impl Profile {
    /// Counts a launch.
    pub fn add(&mut self, launch: Launch, time: Duration) {
        let Launch { op, shape, bytes } = launch;
        let line = self.lines.iter_mut().find(|line| (line.op, line.shape) == (op, shape));
        match line {
            Some(line) => {
                line.launches += 1;
                line.time += time;
                line.bytes += bytes;
            }
            None => self.lines.push(Line { op, shape, launches: 1, time, bytes }),
        }
    }

    /// One an op and shape.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// All lines of an op.
    pub fn of<'a>(&'a self, op: &'a str) -> impl Iterator<Item = &'a Line> {
        self.lines.iter().filter(move |line| line.op == op)
    }

    /// Of all launches.
    pub fn time(&self) -> Duration {
        self.lines.iter().map(|line| line.time).sum()
    }
}

impl Clock {
    /// Times what follows.
    pub fn start(&mut self) {
        self.0 = Some(Profile::default());
    }

    /// What was timed; nothing more is.
    pub fn stop(&mut self) -> Profile {
        self.0.take().unwrap_or_default()
    }

    /// Calls `body`; `launch` is asked for only where time is taken.
    pub fn time<R>(&mut self, launch: impl FnOnce() -> Launch, body: impl FnOnce() -> R) -> R {
        let Some(profile) = &mut self.0 else { return body() };
        let start = Instant::now();
        let result = body();
        profile.add(launch(), start.elapsed());
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_are_summed_by_op_and_shape() {
        let mut profile = Profile::default();
        let (matrix, second) = (Some([4, 8]), Duration::from_secs(1));
        for (op, shape, bytes) in [
            ("linear", matrix, 3),
            ("swiglu", None, 0),
            ("linear", matrix, 2_000_000_000),
            ("linear", None, 1),
        ] {
            profile.add(Launch { op, shape, bytes }, second);
        }
        let [first, swiglu, last] = profile.lines() else { panic!("{profile:?}") };
        assert_eq!((first.launches, first.time, first.bytes), (2, 2 * second, 2_000_000_003));
        assert_eq!(first.gigabytes_a_second(), Some(1.000_000_001_5));
        assert_eq!((swiglu.op, swiglu.gigabytes_a_second()), ("swiglu", None));
        assert_eq!((last.shape, last.launches), (None, 1));
        assert_eq!(profile.of("linear").count(), 2);
        assert_eq!(profile.time(), 4 * second);
    }

    #[test]
    fn a_clock_that_is_off_asks_for_nothing() {
        let mut clock = Clock::default();
        assert_eq!(clock.time(|| panic!("asked for"), || 7), 7);
        clock.start();
        clock.time(|| Launch::of("embed"), || std::thread::sleep(Duration::from_millis(2)));
        let profile = clock.stop();
        assert!(profile.of("embed").all(|line| line.time >= Duration::from_millis(2)));
        assert_eq!((profile.lines().len(), clock.stop().lines().len()), (1, 0));
    }
}
