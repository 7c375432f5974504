//! The CPU executor of the kernels as a platform: it knows every buffer, and its checked build looks at every access.
//!
//! Recordings are real: what is enqueued while one is made is kept with its parameters as they were, and run later.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use half::f16;
use kvwarp::device::{Gemm, Pieces};
use kvwarp::ffi::{self, KVW_F16, kvw_stream};
use kvwarp::kernels::Kernels;
use kvwarp_engine::gpu::platform::{GpuError, Platform, Replay, Result};

use crate::simt::{Buf, Simt};

/// Something enqueued; gives its status.
type Work = Rc<dyn Fn() -> i32>;

thread_local! {
    static SIMT: Cell<Option<&'static Simt>> = const { Cell::new(None) };
    static RECORDING: RefCell<Option<Vec<Work>>> = const { RefCell::new(None) };
}

/// Runs work, or keeps it where a recording is being made.
fn enqueue(work: Work) -> i32 {
    let kept = RECORDING.with_borrow_mut(|list| list.as_mut().map(|list| list.push(work.clone())));
    if kept.is_none() { work() } else { 0 }
}

/// The same of what cannot fail.
fn enqueue_sure(work: impl Fn() + 'static) {
    enqueue(Rc::new(move || {
        work();
        0
    }));
}

fn simt() -> &'static Simt {
    SIMT.get().expect("a machine on this thread")
}

/// Functions of the C ABI that enqueue the executor's.
macro_rules! ops {
    ($($op:ident: $params:ident;)*) => {
        $(
            /// # Safety
            /// As the op's.
            unsafe extern "C" fn $op(params: *const ffi::$params, stream: kvw_stream) -> i32 {
                type Call<T> = unsafe extern "C" fn(*const T, kvw_stream) -> i32;
                let check: unsafe extern "C" fn(*const ffi::$params) -> i32 =
                    simt().get(concat!(stringify!($op), "_check").as_bytes());
                let run: Call<ffi::$params> = simt().get(stringify!($op).as_bytes());
                // SAFETY: live parameters; what they point to is checked by the executor.
                let (params, status) = unsafe { (*params, check(params)) };
                if status != 0 {
                    return status;
                }
                enqueue(Rc::new(move || {
                    // SAFETY: as above.
                    let status = unsafe { run(&params, stream) };
                    if let Err(report) = simt().check(status) {
                        eprintln!("{}: {report}\n{params:?}", stringify!($op));
                    }
                    status
                }))
            }
        )*

        fn symbol(name: &str) -> *const std::ffi::c_void {
            match name {
                $(stringify!($op) => $op as *const std::ffi::c_void,)*
                name => {
                    let other: unsafe extern "C" fn() = simt().get(name.as_bytes());
                    other as *const std::ffi::c_void
                }
            }
        }
    };
}

ops! {
    kvw_embed: kvw_embed_params;
    kvw_head_linear: kvw_head_linear_params;
    kvw_kv_gather: kvw_kv_gather_params;
    kvw_kv_pack: kvw_kv_pack_params;
    kvw_linear: kvw_linear_params;
    kvw_lowrank_kv: kvw_lowrank_kv_params;
    kvw_page_table: kvw_page_table_params;
    kvw_paged_attn: kvw_paged_attn_params;
    kvw_prefill_attn: kvw_prefill_attn_params;
    kvw_rms_norm: kvw_rms_norm_params;
    kvw_rope_select: kvw_rope_select_params;
    kvw_sample: kvw_sample_params;
    kvw_sim_evict: kvw_sim_evict_params;
    kvw_swiglu: kvw_swiglu_params;
    kvw_token_score: kvw_token_score_params;
    kvw_token_select: kvw_token_select_params;
}

/// The executor's memory and kernels.
pub struct Machine {
    kernels: Kernels,
    buffers: RefCell<HashMap<u64, (Buf<u8>, usize)>>,
    /// Bytes that may still be had.
    free: Cell<usize>,
    bytes: usize,
    /// Most bytes that were taken.
    most: Cell<usize>,
    graphs: bool,
    records: Cell<usize>,
    stamps: RefCell<Vec<Instant>>,
}

impl Machine {
    /// Of `bytes` bytes, on this thread.
    pub fn new(simt: &'static Simt, bytes: usize, graphs: bool) -> Rc<Self> {
        SIMT.set(Some(simt));
        // SAFETY: our own functions, or those that the executor exports by these names.
        let kernels = unsafe { Kernels::loaded(symbol) };
        Rc::new(Self {
            kernels,
            buffers: RefCell::default(),
            free: Cell::new(bytes),
            bytes,
            most: Cell::new(0),
            graphs,
            records: Cell::new(0),
            stamps: RefCell::default(),
        })
    }

    /// Recordings made.
    pub fn records(&self) -> usize {
        self.records.get()
    }

    /// Bytes taken.
    pub fn taken(&self) -> usize {
        self.bytes - self.free.get()
    }

    /// Most bytes taken so far.
    pub fn most(&self) -> usize {
        self.most.get()
    }

    fn memory(&self, at: u64, len: usize) -> Memory {
        let buffers = self.buffers.borrow();
        let inside = |(&first, (_, bytes)): (&u64, &(Buf<u8>, usize))| {
            at >= first && at + len as u64 <= first + *bytes as u64
        };
        assert!(buffers.iter().any(inside), "{len} bytes at {at:#x} lie in no buffer");
        Memory { at, len }
    }
}

/// Bytes of the device.
#[derive(Clone, Copy)]
struct Memory {
    at: u64,
    len: usize,
}

impl Memory {
    fn read(self) -> Vec<u8> {
        // SAFETY: it lies in a buffer of the executor, and no kernel is running.
        unsafe { std::slice::from_raw_parts(self.at as *const u8, self.len) }.to_vec()
    }

    fn write(self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        let written: unsafe extern "C" fn(*const u8, usize) = simt().get(b"simt_mark_written");
        // SAFETY: as above.
        unsafe {
            std::ptr::copy(bytes.as_ptr(), self.at as *mut u8, self.len);
            written(self.at as *const u8, self.len);
        }
    }

    fn floats(self, dtype: i32) -> Vec<f32> {
        let bytes = self.read();
        match dtype {
            KVW_F16 => {
                bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
            }
            _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        }
    }
}

impl Platform for Machine {
    fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    fn stream(&self) -> kvw_stream {
        std::ptr::null_mut()
    }

    fn alloc(&self, what: &'static str, bytes: usize) -> Result<u64> {
        let Some(free) = self.free.get().checked_sub(bytes) else {
            return Err(GpuError::Memory { what, need: bytes, free: self.free.get() });
        };
        self.free.set(free);
        self.most.set(self.most.get().max(self.taken()));
        let buffer = simt().unwritten::<u8>(what, bytes);
        let at = buffer.ptr() as u64;
        self.buffers.borrow_mut().insert(at, (buffer, bytes));
        Ok(at)
    }

    fn release(&self, at: u64) {
        let (_, bytes) = self.buffers.borrow_mut().remove(&at).expect("what was given");
        self.free.set(self.free.get() + bytes);
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.memory(at, bytes.len()).write(bytes);
        Ok(())
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(&self.memory(at, bytes.len()).read());
        Ok(())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        let memory = self.memory(at, bytes);
        enqueue_sure(move || memory.write(&vec![0; bytes]));
        Ok(())
    }

    fn copy(&self, pieces: &Pieces) -> Result<()> {
        let Pieces { to, from, to_pitch, from_pitch, width, rows } = *pieces;
        assert!(rows == 0 || (to_pitch >= width && from_pitch >= width), "{pieces:?}");
        for row in 0..rows {
            let from = self.memory(from + (row * from_pitch) as u64, width);
            let to = self.memory(to + (row * to_pitch) as u64, width);
            enqueue_sure(move || to.write(&from.read()));
        }
        Ok(())
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { x, weight, y, y_dtype, accumulate, tokens, rows, cols } = *gemm;
        let y_bytes = if y_dtype == KVW_F16 { 2 } else { 4 };
        let x = self.memory(x, 2 * tokens * cols);
        let weight = self.memory(weight, 2 * rows * cols);
        let y = self.memory(y, y_bytes * tokens * rows);
        enqueue_sure(move || {
            let (x, weight) = (x.floats(KVW_F16), weight.floats(KVW_F16));
            let old = if accumulate { y.floats(y_dtype) } else { vec![0.0; tokens * rows] };
            let dot = |i: usize| {
                let (x, w) = (&x[i / rows * cols..][..cols], &weight[i % rows * cols..][..cols]);
                old[i] + x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>()
            };
            let sums = (0..tokens * rows).map(dot);
            let bytes: Vec<u8> = match y_dtype {
                KVW_F16 => sums.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
                _ => sums.flat_map(f32::to_le_bytes).collect(),
            };
            y.write(&bytes);
        });
        Ok(())
    }

    fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Replay>>> {
        if !self.graphs {
            return Ok(None);
        }
        self.records.set(self.records.get() + 1);
        RECORDING.set(Some(Vec::new()));
        let (done, list) = (body(), RECORDING.take().unwrap_or_default());
        done.map(|()| Some(Box::new(Recording(list)) as Box<dyn Replay>))
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok((self.free.get(), self.bytes))
    }

    fn stamp(&self) -> Result<()> {
        self.stamps.borrow_mut().push(Instant::now());
        Ok(())
    }

    fn stamps(&self) -> Result<Vec<Duration>> {
        Ok(self.stamps.take().windows(2).map(|pair| pair[1] - pair[0]).collect())
    }
}

struct Recording(Vec<Work>);

impl Replay for Recording {
    fn launch(&self) -> Result<()> {
        self.0.iter().for_each(|work| assert_eq!(work(), 0));
        Ok(())
    }
}
