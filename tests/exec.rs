//! One test body for every executor of the kernels: the CPU executor, plain and checked, and a GPU.

use crate::simt::{Buf, Session, Simt};
use bytemuck::Pod;
use kvwarp::ffi::kvw_stream;

type Function<P> = unsafe extern "C" fn(*const P, kvw_stream) -> i32;
type Query<P, R> = unsafe extern "C" fn(*const P) -> R;
/// A field first of all, a change that makes it unacceptable, and the error it then gives.
type Refusal<'a, P> = (&'a str, fn(&mut P), i32);

/// An op of the C ABI by name, and, where the build holds the kernels, as a function.
pub struct Op<P> {
    pub name: &'static str,
    #[cfg_attr(not(kvw_cuda), expect(dead_code))]
    pub cuda: Option<Function<P>>,
}

/// `op!(kvw_embed)`: the op of that name.
macro_rules! op {
    ($function:ident) => {
        $crate::exec::Op {
            name: stringify!($function),
            #[cfg(kvw_cuda)]
            cuda: Some(kvwarp::ffi::$function),
            #[cfg(not(kvw_cuda))]
            cuda: None,
        }
    };
}
pub(crate) use op;

impl<P> Op<P> {
    /// A function of this family in the CPU executor's library.
    fn simt<F: Copy>(&self, suffix: &str) -> F {
        Simt::plain().get(format!("{}{suffix}", self.name).as_bytes())
    }

    pub fn check(&self, params: *const P) -> i32 {
        // SAFETY: null, or live params; the function reads nothing else.
        unsafe { self.simt::<Query<P, i32>>("_check")(params) }
    }

    pub fn bytes(&self, params: &P) -> usize {
        // SAFETY: as above.
        unsafe { self.simt::<Query<P, usize>>("_bytes")(params) }
    }

    pub fn workspace(&self, params: &P) -> usize {
        // SAFETY: as above.
        unsafe { self.simt::<Query<P, usize>>("_workspace")(params) }
    }

    /// `valid` passes the check; each case, a change of one field, is refused with its error by `_check` and
    /// by the op, whose text names a field that the case is about, and moves no bytes. No CUDA call is made.
    #[track_caller]
    pub fn refuses(&self, valid: P, cases: &[Refusal<'_, P>])
    where
        P: Copy + std::fmt::Debug,
    {
        assert_eq!(self.check(&valid), 0, "{}: the valid params", self.name);
        assert!(self.bytes(&valid) > 0, "{}: bytes of the valid params", self.name);
        assert_eq!(named(self.check(std::ptr::null())), (kvwarp::ffi::KVW_ERR_NULL, "params"));
        for (what, change, error) in cases {
            let mut params = valid;
            change(&mut params);
            let status = self.check(&params);
            let (got, field) = named(status);
            assert_eq!(got, *error, "{}: {what}", self.name);
            let about = what.split(' ').next() == Some(field) || changed(&valid, &params, field);
            assert!(about, "{}: {what}: the text names {field}", self.name);
            assert_eq!(self.bytes(&params), 0, "{}: bytes, {what}", self.name);
            // SAFETY: refused params are not followed.
            let got = unsafe { self.simt::<Function<P>>("")(&params, std::ptr::null_mut()) };
            assert_eq!(got, status, "{}: {what}, from the op", self.name);
        }
    }
}

/// The `KVW_ERR_*` of a refusal and the field that its text names.
fn named(status: i32) -> (i32, &'static str) {
    let text: extern "C" fn(i32) -> *const std::ffi::c_char = Simt::plain().get(b"kvw_status_str");
    // SAFETY: a static, NUL-terminated string.
    let text = unsafe { std::ffi::CStr::from_ptr(text(status)) }.to_str().unwrap();
    (-(-status % 16), text.split_once(": ").expect("field: what is wrong").0)
}

/// Whether `field` has another value in `b`, by what `Debug` prints.
fn changed(a: &impl std::fmt::Debug, b: &impl std::fmt::Debug, field: &str) -> bool {
    let value = |x: String| {
        let at = x.find(&format!(" {field}: ")).expect("a field of the params");
        x[at + field.len() + 3..].split_terminator(['}', ']']).next().unwrap().to_owned()
    };
    let first = |x: String| {
        let v = value(x);
        if v.starts_with('[') { v } else { v.split(',').next().unwrap().to_owned() }
    };
    first(format!("{a:?}")) != first(format!("{b:?}"))
}

/// Who runs a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exec {
    /// The CPU executor, threads in order.
    SimtPlain,
    /// The CPU executor, every access checked, under the random schedule of this seed (0: in order).
    SimtChecked(u64),
    /// The op's CPU path behind the C ABI; memory is the executor's.
    #[cfg(kvw_cuda)]
    Cpu,
    /// The first GPU.
    #[cfg(kvw_cuda)]
    Cuda,
}

/// Everyone present: the CPU executor in its two builds, the checked one under `seeds` schedules, and a GPU.
/// From a bundle (`KVW_BUNDLE`) the GPU alone.
pub fn executors(seeds: u64) -> Vec<Exec> {
    #[cfg(kvw_cuda)]
    if std::env::var_os("KVW_BUNDLE").is_some() {
        gpu::expect();
        return vec![Exec::Cuda];
    }
    let mut all = vec![Exec::SimtPlain];
    all.extend((0..seeds).map(Exec::SimtChecked));
    #[cfg(kvw_cuda)]
    all.extend(gpu::device().map(|_| Exec::Cuda));
    all
}

/// [`executors`], and the CPU path behind the C ABI.
pub fn everyone(seeds: u64) -> Vec<Exec> {
    let mut all = executors(seeds);
    #[cfg(kvw_cuda)]
    all.push(Exec::Cpu);
    all
}

/// Memory of an executor.
pub enum Mem<T: Copy> {
    Simt(Buf<T>),
    #[cfg(kvw_cuda)]
    Cuda(kvwarp::device::cuda::Memory, std::marker::PhantomData<T>),
}

impl<T: Pod> Mem<T> {
    pub fn ptr(&self) -> *mut T {
        match self {
            Mem::Simt(buf) => buf.ptr(),
            #[cfg(kvw_cuda)]
            Mem::Cuda(buffer, _) => buffer.at() as *mut T,
        }
    }

    pub fn download(&self) -> Vec<T> {
        match self {
            Mem::Simt(buf) => buf.to_vec(),
            #[cfg(kvw_cuda)]
            Mem::Cuda(buffer, _) => {
                let bytes = gpu::expect().download(buffer).unwrap();
                let whole = bytes.chunks_exact(size_of::<T>());
                whole.map(bytemuck::pod_read_unaligned).collect()
            }
        }
    }
}

/// An executor set up on this thread: schedule and fault last until it is dropped.
pub struct Run {
    exec: Exec,
    session: Option<Session<'static>>,
}

impl Exec {
    pub fn start(self) -> Run {
        let session = match self {
            Exec::SimtPlain => Some(Simt::plain().seeded(0)),
            #[cfg(kvw_cuda)]
            Exec::Cpu => Some(Simt::plain().seeded(0)),
            Exec::SimtChecked(seed) => Some(Simt::checked().seeded(seed)),
            #[cfg(kvw_cuda)]
            Exec::Cuda => None,
        };
        Run { exec: self, session }
    }
}

impl Run {
    fn simt(&self) -> &'static Simt {
        if matches!(self.exec, Exec::SimtChecked(_)) { Simt::checked() } else { Simt::plain() }
    }

    /// Plant fault `n` (0: none).
    pub fn fault(&self, n: i32) {
        self.session.as_ref().expect("faults are the CPU executor's").fault(n);
    }

    /// Run the way of sm_90, where the executor can choose: a GPU runs its own.
    pub fn hopper(&self, on: bool) {
        if let Some(session) = &self.session {
            session.hopper(on);
        }
    }

    /// Warpgroup products of the last call; the executor's own count.
    pub fn wgmma(&self) -> Option<u64> {
        #[cfg(kvw_cuda)]
        if self.exec == Exec::Cpu {
            return None;
        }
        self.session.as_ref().map(|_| self.simt().report().wgmma)
    }

    /// Memory holding `values`.
    pub fn upload<T: Pod>(&self, name: &str, values: &[T]) -> Mem<T> {
        #[cfg(kvw_cuda)]
        if self.exec == Exec::Cuda {
            let buffer = gpu::expect().upload(bytemuck::cast_slice(values)).unwrap();
            return Mem::Cuda(buffer, std::marker::PhantomData);
        }
        Mem::Simt(self.simt().buf(name, values))
    }

    /// Memory for `len` elements that nobody has written: all bits set, a NaN in every float format.
    pub fn alloc<T: Pod>(&self, name: &str, len: usize) -> Mem<T> {
        #[cfg(kvw_cuda)]
        if self.exec == Exec::Cuda {
            let poison = vec![0xFFu8; len * size_of::<T>()];
            let buffer = gpu::expect().upload(&poison).unwrap();
            return Mem::Cuda(buffer, std::marker::PhantomData);
        }
        Mem::Simt(self.simt().unwritten(name, len))
    }

    /// Run the op to its end; the executor's report or CUDA's error otherwise.
    pub fn call<P>(&self, op: &Op<P>, params: &P) -> Result<(), String> {
        #[cfg(kvw_cuda)]
        if self.exec == Exec::Cuda {
            return gpu::call(op.cuda.expect("a build with kernels"), params);
        }
        #[cfg(kvw_cuda)]
        if self.exec == Exec::Cpu {
            return crate::cabi::call(op.name, params);
        }
        let function: Function<P> = self.simt().get(op.name.as_bytes());
        // SAFETY: params point into memory of this executor, which checks every access.
        self.simt().check(unsafe { function(params, std::ptr::null_mut()) })
    }
}

/// Fault `n` must be seen: by a report of the checked executor, or by `body` finding wrong results.
#[track_caller]
pub fn assert_caught(n: i32, what: &str, body: impl Fn(&Run) -> Result<(), String>) {
    let seen = (0..4).any(|seed| {
        let run = Exec::SimtChecked(seed).start();
        body(&run).unwrap_or_else(|e| panic!("without fault {n}: {e}"));
        run.fault(n);
        body(&run).is_err()
    });
    assert!(seen, "fault {n} went unseen: {what}");
}

#[cfg(kvw_cuda)]
mod gpu {
    use super::Function;
    use kvwarp::device::{Device, cuda::Cuda};
    use std::sync::OnceLock;

    pub fn device() -> Option<&'static Cuda> {
        static DEVICE: OnceLock<Option<Cuda>> = OnceLock::new();
        let open = || match Device::cuda(0) {
            Ok(Device::Cuda(cuda)) => Some(cuda),
            Err(e) if std::env::var_os("KVW_REQUIRE_GPU").is_some() => panic!("{e}"),
            _ => None,
        };
        DEVICE.get_or_init(open).as_ref()
    }

    pub fn expect() -> &'static Cuda {
        device().expect("a GPU")
    }

    pub fn call<P>(function: Function<P>, params: &P) -> Result<(), String> {
        let stream = expect().stream().map_err(|e| e.to_string())?;
        // SAFETY: params point into live buffers of this device.
        match unsafe { function(params, stream) } {
            0 => {
                // A bundle counts the tests that say so.
                println!("on the GPU: {}", std::thread::current().name().unwrap_or("unnamed"));
                expect().synchronize().map_err(|e| e.to_string())
            }
            status => Err(format!("status {status}")),
        }
    }
}
