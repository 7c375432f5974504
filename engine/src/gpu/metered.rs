//! A platform with meters: memory is counted by what it is for, and what is enqueued is timed while someone wants that.

use std::cell::RefCell;
use std::fmt::Debug;
use std::rc::Rc;

use kvwarp::device::{Gemm, Pieces};
use kvwarp::ffi::KVW_F16;
use kvwarp::kernels::{Kernels, Op};

use super::platform::{Platform, Replay, Result, What};
use super::tally::{Bytes, Tally, Use};
use crate::profile::{Launch, Profile};

/// Launches between two stamps that are kept before their times are read.
const PENDING: usize = 4096;

/// A platform, and what it is doing.
pub struct Metered {
    platform: Rc<dyn Platform>,
    running: RefCell<Option<Running>>,
    tally: RefCell<Tally>,
}

/// What has been launched since times are taken.
#[derive(Default)]
struct Running {
    profile: Profile,
    /// Each between two stamps, the first of which was taken before all of them.
    pending: Vec<Launch>,
}

impl Metered {
    /// Of `platform`.
    pub fn new(platform: Rc<dyn Platform>) -> Rc<Self> {
        Rc::new(Self { platform, running: RefCell::default(), tally: RefCell::default() })
    }

    /// The ops, for what they say of their arguments.
    pub fn kernels(&self) -> &Kernels {
        self.platform.kernels()
    }

    /// Times every launch from here on.
    pub fn start(&self) {
        self.running.replace(Some(Running::default()));
    }

    /// Whether launches are timed.
    pub fn is_timing(&self) -> bool {
        self.running.borrow().is_some()
    }

    /// What was launched; nothing more is timed.
    pub fn stop(&self) -> Result<Profile> {
        let settled = self.settle();
        let running = self.running.take();
        settled.map(|()| running.unwrap_or_default().profile)
    }

    /// Waits for what is pending and counts it.
    fn settle(&self) -> Result<()> {
        let mut running = self.running.borrow_mut();
        let Some(Running { profile, pending }) = &mut *running else { return Ok(()) };
        let times = self.platform.stamps()?;
        pending.drain(..).zip(times).for_each(|(launch, time)| profile.add(launch, time));
        Ok(())
    }

    /// Enqueues what `launch` describes, which is asked for only where time is taken.
    fn timed(
        &self,
        launch: impl FnOnce() -> Launch,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.is_timing() {
            return enqueue();
        }
        if self.running.borrow().as_ref().is_some_and(|running| running.pending.is_empty()) {
            self.platform.stamp()?;
        }
        enqueue()?;
        self.platform.stamp()?;
        let mut pending = 0;
        if let Some(running) = &mut *self.running.borrow_mut() {
            running.pending.push(launch());
            pending = running.pending.len();
        }
        if pending < PENDING { Ok(()) } else { self.settle() }
    }

    /// Enqueues an op; `shape` is that of its matrix, where it multiplies.
    ///
    /// # Safety
    /// As [`Op::run`].
    pub unsafe fn run<P: Debug>(
        &self,
        op: &Op<P>,
        shape: Option<[usize; 2]>,
        params: &P,
    ) -> Result<()> {
        let launch = || Launch { op: op.name(), shape, bytes: op.bytes(params) };
        // SAFETY: the caller's promise.
        self.timed(launch, || Ok(unsafe { op.run(params, self.platform.stream()) }?))
    }

    /// As [`Platform::gemm`].
    pub fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { y_dtype, accumulate, tokens, rows, cols, .. } = *gemm;
        let y = tokens * rows * if y_dtype == KVW_F16 { 2 } else { 4 };
        let bytes = 2 * cols * (tokens + rows) + y * (1 + usize::from(accumulate));
        let launch = Launch { op: "gemm", shape: Some([rows, cols]), bytes };
        self.timed(|| launch, || self.platform.gemm(gemm))
    }

    /// As [`Platform::copy`].
    pub fn copy(&self, pieces: &Pieces) -> Result<()> {
        let launch = Launch { bytes: 2 * pieces.width * pieces.rows, ..Launch::of("copy") };
        self.timed(|| launch, || self.platform.copy(pieces))
    }

    /// As [`Platform::write`].
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let launch = Launch { bytes: bytes.len(), ..Launch::of("write") };
        self.timed(|| launch, || self.platform.write(at, bytes))
    }

    /// As [`Platform::zero`].
    pub fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        let launch = Launch { bytes, ..Launch::of("zero") };
        self.timed(|| launch, || self.platform.zero(at, bytes))
    }

    /// As [`Platform::read`].
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.platform.read(at, bytes)?;
        self.settle()
    }

    /// As [`Platform::record`].
    pub fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Replay>>> {
        self.platform.record(body)
    }

    /// As [`Platform::memory`].
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.platform.memory()
    }

    /// As [`Platform::holds`].
    pub fn holds(&self) -> bool {
        self.platform.holds()
    }

    /// As [`Platform::alloc`].
    pub fn alloc(&self, (of, what): What, bytes: usize) -> Result<u64> {
        let at = self.platform.alloc(what, bytes)?;
        self.tally.borrow_mut().take(of, bytes);
        Ok(at)
    }

    /// Gives back what [`Metered::alloc`] gave for that use.
    pub fn release(&self, at: u64, of: Use, bytes: usize) {
        self.platform.release(at);
        self.tally.borrow_mut().give(of, bytes);
    }

    /// Bytes of the engine's own by use, when all of them were the most.
    pub fn most(&self) -> Bytes {
        self.tally.borrow().most()
    }
}
