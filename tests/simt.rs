//! The CPU executor of the kernels: builds `csrc/**/*.cu` with the host's C++ compiler on first use and opens
//! the result. `Simt::plain()` is fast; `Simt::checked()` sees every load and store of every CUDA thread.
//!
//! Seeds, faults, errors and counters belong to the calling OS thread, so tests run in parallel.
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

#[path = "simt/build.rs"]
mod build;

/// Counters of the last launch of this OS thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub switches: u64,
    pub collectives: u64,
    pub barriers: u64,
    pub mma: u64,
    pub wgmma: u64,
    pub cp_async: u64,
    pub copy_bulk: u64,
    pub accesses: u64,
    pub ldmatrix_conflicts: u64,
}

pub struct Simt {
    lib: Library,
    path: PathBuf,
}

fn open(kind: &str) -> Simt {
    let path = build::library(kind).unwrap_or_else(|e| panic!("{e}"));
    // SAFETY: our own library; its initialisers only fill in function pointers.
    let lib = unsafe { Library::new(&path) }.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Simt { lib, path }
}

impl Simt {
    pub fn plain() -> &'static Simt {
        static LIB: OnceLock<Simt> = OnceLock::new();
        LIB.get_or_init(|| open("plain"))
    }

    pub fn checked() -> &'static Simt {
        static LIB: OnceLock<Simt> = OnceLock::new();
        LIB.get_or_init(|| open("checked"))
    }

    /// The exported function `name`; `F` must be its `unsafe extern "C" fn` type.
    pub fn get<F: Copy>(&self, name: &[u8]) -> F {
        // SAFETY: the caller names the type that csrc/*.h declares; the library is never closed.
        unsafe { *self.lib.get(name).unwrap_or_else(|e| panic!("{}: {e}", self.path.display())) }
    }

    /// Sets this thread's schedule until the value is dropped. Seed 0 runs in order, others at random.
    pub fn seeded(&self, seed: u64) -> Session<'_> {
        let session = Session { lib: self, seed };
        session.resident(2);
        session
    }

    /// `Ok` for status 0; otherwise the executor's message with source lines, or the status.
    pub fn check(&self, status: i32) -> Result<(), String> {
        match status {
            0 => Ok(()),
            -7 => Err(self.last_error()), // KVW_ERR_EXECUTOR
            status => Err(format!("status {status}")),
        }
    }

    fn last_error(&self) -> String {
        let last: unsafe extern "C" fn() -> *const c_char = self.get(b"simt_last_error");
        // SAFETY: a C string that lives until this thread's next launch.
        let text = unsafe { CStr::from_ptr(last()) }.to_string_lossy().into_owned();
        let mut parts = text.split("pc 0x");
        let head = parts.next().unwrap_or_default().to_owned();
        parts.fold(head, |text, part| {
            let end = part.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(part.len());
            let (pc, rest) = part.split_at(end);
            text + &self.source_lines(pc).unwrap_or(format!("pc 0x{pc}")) + rest
        })
    }

    /// The inlined chain of source lines at a code address, innermost first.
    fn source_lines(&self, pc: &str) -> Option<String> {
        let out = Command::new("addr2line").arg("-ise").arg(&self.path).arg(pc).output().ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        Some(text.lines().filter_map(|l| l.split(' ').next()).collect::<Vec<_>>().join(" < "))
    }

    pub fn report(&self) -> Report {
        let report: unsafe extern "C" fn(*mut Report) = self.get(b"simt_report");
        let mut r = Report::default();
        // SAFETY: `Report` mirrors simt_counters in csrc/simt/control.cpp.
        unsafe { report(&mut r) };
        r
    }

    /// Device memory with these contents.
    pub fn buf<T: Copy>(&'static self, name: &str, values: &[T]) -> Buf<T> {
        let b = self.unwritten(name, values.len());
        let written: unsafe extern "C" fn(*const T, usize) = self.get(b"simt_mark_written");
        // SAFETY: the buffer holds values.len() elements.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), b.ptr, b.len);
            written(b.ptr, size_of_val(values));
        }
        b
    }

    /// Device memory that a kernel must write before it reads; holds 0xff bytes, a NaN in every format.
    pub fn unwritten<T: Copy>(&'static self, name: &str, len: usize) -> Buf<T> {
        let alloc: unsafe extern "C" fn(usize, *const c_char) -> *mut T = self.get(b"simt_alloc");
        let name = CString::new(name).expect("a name without NUL");
        // SAFETY: the name outlives the call.
        let ptr = unsafe { alloc(len * size_of::<T>(), name.as_ptr()) };
        assert!(!ptr.is_null(), "no address space left for {name:?}");
        Buf { lib: self, ptr, len }
    }
}

/// A schedule, fault, mma mode and device of this OS thread, reset when dropped.
pub struct Session<'a> {
    lib: &'a Simt,
    seed: u64,
}

impl Session<'_> {
    /// Runs at most `blocks` blocks at once; 2 unless said.
    pub fn resident(&self, blocks: u32) -> &Self {
        let configure: unsafe extern "C" fn(u64, u32) = self.lib.get(b"simt_configure");
        // SAFETY: plain numbers.
        unsafe { configure(self.seed, blocks) };
        self
    }

    /// Turns on the seeded fault `KVW_FAULT(n)`; 0 is none.
    pub fn fault(&self, n: i32) -> &Self {
        self.set(b"simt_set_fault", n)
    }

    /// How an mma sums: 0 exact, 1 f32 in order, 2 aligned and truncated.
    pub fn mma(&self, mode: i32) -> &Self {
        self.set(b"simt_mma_mode", mode)
    }

    /// Whether the device is of sm_90 (`prim::HOPPER`, its compute capability); no unless said.
    pub fn hopper(&self, on: bool) -> &Self {
        self.set(b"simt_set_hopper", i32::from(on))
    }

    fn set(&self, name: &[u8], n: i32) -> &Self {
        let set: unsafe extern "C" fn(i32) = self.lib.get(name);
        // SAFETY: plain numbers.
        unsafe { set(n) };
        self
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.seed = 0;
        self.resident(2).fault(0).mma(0).hopper(false);
    }
}

/// Emulated device memory: the executor knows its name, its bounds and which bytes were written.
pub struct Buf<T: Copy> {
    lib: &'static Simt,
    ptr: *mut T,
    len: usize,
}

impl<T: Copy> Buf<T> {
    pub fn ptr(&self) -> *mut T {
        self.ptr
    }

    pub fn to_vec(&self) -> Vec<T> {
        // SAFETY: len elements, all bytes set, and no launch is running.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }.to_vec()
    }
}

impl<T: Copy> Drop for Buf<T> {
    fn drop(&mut self) {
        let free: unsafe extern "C" fn(*mut c_void) = self.lib.get(b"simt_free");
        // SAFETY: allocated in `unwritten`, freed once.
        unsafe { free(self.ptr.cast()) };
    }
}

/// splitmix64's high halves: the words that tests feed to kernels.
pub fn random_words(seed: u64, n: usize) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 32) as u32
    };
    (0..n).map(|_| next()).collect()
}
