//! A small team of threads for kernels that run thousands of times a second.
//!
//! Decoding one token of a 30-layer model enters about 150 parallel regions. Members spin for a
//! moment after each and only then park, so an idle process burns no CPU.

use std::any::Any;
use std::cell::UnsafeCell;
use std::collections::BTreeSet;
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a member looks for work before it parks: longer than the serial parts between two
/// regions of one decode step, shorter than anything a person would see as load.
const SPIN: Duration = Duration::from_micros(200);

type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// Keeps counters that different threads write on separate cache lines (in pairs, for the
/// adjacent-line prefetcher).
#[repr(align(128))]
struct Padded<T>(T);

struct Shared {
    /// Moves once a region; members then run the job.
    epoch: Padded<AtomicUsize>,
    /// Members that have not finished the current region.
    pending: Padded<AtomicUsize>,
    /// The current region's body and number of workers.
    job: UnsafeCell<Option<(&'static Body<'static>, usize)>>,
    quit: AtomicBool,
    asleep: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the thread that holds `Team::entry`, while `pending` is 0, and
// read by members only between the epoch that publishes it and their decrement of `pending`.
unsafe impl Sync for Shared {}

/// A fixed set of threads; the calling thread is always worker 0.
pub struct Team {
    shared: Arc<Shared>,
    members: Vec<JoinHandle<()>>,
    entry: Mutex<()>,
}

impl Team {
    /// The caller and `workers - 1` spawned threads, or as many as the system allows.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        let spawned = workers.max(1) - 1;
        let shared = Arc::new(Shared {
            epoch: Padded(AtomicUsize::new(0)),
            pending: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            quit: AtomicBool::new(false),
            asleep: (0..spawned).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
        });
        let spawn = |member| {
            let shared = Arc::clone(&shared);
            let named = thread::Builder::new().name(format!("kvw-{}", member + 1));
            named.spawn(move || shared.serve(member)).ok()
        };
        let members = (0..spawned).map_while(spawn).collect();
        Self { shared, members, entry: Mutex::new(()) }
    }

    /// Threads that take part in a region, the caller included.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.members.len() + 1
    }

    /// Calls `body(worker, workers)` once for every worker index and returns when all are done.
    ///
    /// The calls usually run at the same time but need not: a region entered while the team is busy
    /// (from inside a body, or from another thread) runs every index on its caller. A body must
    /// therefore never wait for another index. A panic in a body is resumed here.
    pub fn run(&self, body: impl Fn(usize, usize) + Sync) {
        let workers = self.workers();
        let Some(entry) = self.entry.try_lock().ok().filter(|_| workers > 1) else {
            return (0..workers).for_each(|worker| body(worker, workers));
        };
        self.publish(&body);
        let mine = catch_unwind(AssertUnwindSafe(|| body(0, workers)));
        for turn in 0.. {
            if self.shared.pending.0.load(Ordering::Acquire) == 0 {
                break;
            }
            pause(turn);
        }
        let theirs = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(entry);
        if let Some(payload) = mine.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// Calls `body(item)` for every item of `0..count`, a worker taking the next item when it is
    /// free: for items of uneven cost and for shared machines. An item should last 2 us or more.
    pub fn each(&self, count: usize, body: impl Fn(usize) + Sync) {
        if count <= 1 || self.members.is_empty() {
            return (0..count).for_each(body);
        }
        let next = Padded(AtomicUsize::new(0));
        self.run(|_, _| {
            let items = std::iter::repeat_with(|| next.0.fetch_add(1, Ordering::Relaxed));
            items.take_while(|&item| item < count).for_each(&body);
        });
    }

    /// Splits `data` into pieces of `len` elements (the last may be shorter) and calls
    /// `body(index, piece)` once for each, handed out as in [`Team::each`].
    pub fn each_chunk<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let pieces = Mutex::new(data.chunks_mut(len.max(1)).enumerate());
        let take = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        self.run(|_, _| std::iter::from_fn(take).for_each(|(index, piece)| body(index, piece)));
    }

    fn publish(&self, body: &Body<'_>) {
        // SAFETY: `run` holds `entry` and leaves only when `pending` is 0 again, after which no
        // member touches the job: the borrow outlives every use of the extended lifetime.
        unsafe {
            let body = std::mem::transmute::<&Body<'_>, &'static Body<'static>>(body);
            *self.shared.job.get() = Some((body, self.workers()));
        }
        self.shared.pending.0.store(self.members.len(), Ordering::Relaxed);
        self.shared.announce(&self.members);
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Relaxed);
        self.shared.announce(&self.members);
        for member in self.members.drain(..) {
            // A member catches the panics of its bodies, so there is nothing to report.
            let _ = member.join();
        }
    }
}

impl Shared {
    /// Moves the epoch and wakes the members that parked. SeqCst on both sides: either the member
    /// sees the epoch move, or this thread sees that it sleeps.
    fn announce(&self, members: &[JoinHandle<()>]) {
        self.epoch.0.fetch_add(1, Ordering::SeqCst);
        for (member, asleep) in members.iter().zip(&self.asleep) {
            if asleep.load(Ordering::SeqCst) {
                member.thread().unpark();
            }
        }
    }

    fn serve(&self, member: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_epoch(seen, member);
            if self.quit.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the epoch moved, so `job` is published and stays until `pending` drops.
            let job = unsafe { *self.job.get() };
            let work = || job.map(|(body, workers)| body(member + 1, workers));
            if let Err(payload) = catch_unwind(AssertUnwindSafe(work)) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
            self.pending.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits until the epoch is no longer `seen`: spins for [`SPIN`], then parks.
    fn next_epoch(&self, seen: usize, member: usize) -> usize {
        let start = Instant::now();
        let mut epoch = self.epoch.0.load(Ordering::Acquire);
        for turn in 0.. {
            if epoch != seen || start.elapsed() > SPIN {
                break;
            }
            pause(turn);
            epoch = self.epoch.0.load(Ordering::Acquire);
        }
        while epoch == seen {
            self.asleep[member].store(true, Ordering::SeqCst);
            if self.epoch.0.load(Ordering::SeqCst) == seen {
                thread::park();
            }
            self.asleep[member].store(false, Ordering::Relaxed);
            epoch = self.epoch.0.load(Ordering::SeqCst);
        }
        epoch
    }
}

/// One turn of a waiting loop: the first turns cost the least time, later ones give the core to any
/// thread that waits for it, which may be the one this loop waits for.
fn pause(turn: u64) {
    if turn < 100 { spin_loop() } else { thread::yield_now() }
}

/// The part of `0..len` that belongs to `worker`: the parts are contiguous, cover everything, start at
/// multiples of `grain` and differ by at most one grain.
#[must_use]
pub fn share(len: usize, grain: usize, worker: usize, workers: usize) -> Range<usize> {
    let grains = len.div_ceil(grain.max(1));
    let edge = |w: usize| (grains * w / workers.max(1) * grain.max(1)).min(len);
    edge(worker)..edge(worker + 1)
}

/// Physical cores this process may use: the default size of a team. Two hyperthreads of one core
/// share its vector units and its memory queue, so they count once.
#[must_use]
pub fn physical_cores() -> usize {
    let logical = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let topology = |cpu| format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    let siblings = |cpu: usize| std::fs::read_to_string(topology(cpu)).ok();
    let cores: BTreeSet<_> = (0..).map_while(siblings).collect();
    if cores.is_empty() { logical } else { logical.min(cores.len()) }
}
