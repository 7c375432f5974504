//! The first GPU: one stream, one arena that every case cuts its memory from, clocks and the copy bandwidth.

use anyhow::{Context, Result, ensure};
use cudarc::driver::sys::{
    CUdevice_attribute, CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, result};
use kvwarp::ffi::{self, kvw_stream};
use std::cell::Cell;
use std::sync::Arc;

/// Launches measured one by one between two waits of the host.
const BATCH: usize = 16;
/// Bytes read before them, so that L2 holds something else and the host gets ahead of the card.
const PLUG_BYTES: usize = 512 << 20;
const PLUG_COLS: usize = 4096;

/// Enqueues one launch.
pub type Launch = Box<dyn Fn(kvw_stream) -> kvwarp::Result<()>>;

pub struct Card {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    base: u64,
    size: usize,
    used: Cell<usize>,
    plug: ffi::kvw_linear_params,
    /// Bytes of L2.
    pub l2: usize,
}

impl Drop for Card {
    fn drop(&mut self) {
        // SAFETY: taken in `open`; after an error nothing is left to be done about another.
        let _ = self.stream.synchronize().and_then(|()| unsafe { result::free_sync(self.base) });
    }
}

fn attribute(context: &CudaContext, which: CUdevice_attribute) -> Result<usize> {
    Ok(usize::try_from(context.attribute(which)?)?)
}

impl Card {
    /// The card, with nine tenths of its free memory as the arena.
    pub fn open() -> Result<Card> {
        let context = CudaContext::new(0)?;
        // One stream does everything: no events between uses of a buffer, which a capture would refuse.
        // SAFETY: every buffer is used on this stream only.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let size = context.mem_get_info()?.0 / 10 * 9 / 256 * 256;
        ensure!(size > 2 * PLUG_BYTES, "only {} MB of GPU memory are free", size >> 20);
        // SAFETY: cases write what they read; freed when dropped.
        let base = unsafe { result::malloc_sync(size) }.context("taking the GPU's memory")?;
        let l2 = attribute(&context, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let used = Cell::new(0);
        let plug = ffi::kvw_linear_params::default();
        let mut card = Card { context, stream, base, size, used, plug, l2 };
        card.plug = card.plug()?;
        Ok(card)
    }

    fn plug(&self) -> Result<ffi::kvw_linear_params> {
        let rows = PLUG_BYTES / 2 / PLUG_COLS;
        let weight = self.take(PLUG_BYTES)?;
        self.fill(weight, &[0x11; 4096], PLUG_BYTES)?;
        let plug = ffi::kvw_linear_params {
            dtype: ffi::KVW_F16,
            weight: weight as _,
            x: self.upload(&[0u16; PLUG_COLS])? as _,
            y: self.take(rows * 2)? as _,
            y_dtype: ffi::KVW_F16,
            tokens: 1,
            rows: rows as i32,
            cols: PLUG_COLS as i32,
            ..Default::default()
        };
        Ok(plug)
    }

    /// What the arena holds now; [`Card::release`] goes back to it.
    pub fn mark(&self) -> usize {
        self.used.get()
    }

    pub fn release(&self, mark: usize) {
        self.used.set(mark);
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.size - self.used.get()
    }

    /// `bytes` of device memory, unwritten, 256-byte aligned.
    pub fn take(&self, bytes: usize) -> Result<u64> {
        let at = self.used.get();
        let bytes = bytes.max(1).next_multiple_of(256);
        ensure!(
            bytes <= self.left(),
            "needs {} MB of GPU memory, {} are left",
            bytes >> 20,
            self.left() >> 20
        );
        self.used.set(at + bytes);
        Ok(self.base + at as u64)
    }

    /// `bytes` of zeros.
    pub fn zeros(&self, bytes: usize) -> Result<u64> {
        let at = self.take(bytes)?;
        // SAFETY: the arena holds them.
        unsafe { result::memset_d8_async(at, 0, bytes.max(1), self.stream.cu_stream()) }?;
        Ok(at)
    }

    /// Device memory with these contents.
    pub fn upload<T: bytemuck::Pod>(&self, host: &[T]) -> Result<u64> {
        let at = self.take(size_of_val(host))?;
        // SAFETY: the arena holds them; the copy is over when the call returns.
        unsafe { result::memcpy_htod_sync(at, host) }?;
        Ok(at)
    }

    /// Repeats `pattern` over `bytes` at `to`, the last one perhaps in part.
    pub fn fill(&self, to: u64, pattern: &[u8], bytes: usize) -> Result<()> {
        let mut done = pattern.len().min(bytes);
        // SAFETY: `to` has room for `bytes`; source and target do not overlap.
        unsafe { result::memcpy_htod_sync(to, &pattern[..done]) }?;
        while done < bytes {
            let part = done.min(bytes - done);
            // SAFETY: as above.
            unsafe {
                result::memcpy_dtod_async(to + done as u64, to, part, self.stream.cu_stream())
            }?;
            done += part;
        }
        Ok(())
    }

    pub fn download<T: bytemuck::Pod>(&self, from: u64, n: usize) -> Result<Vec<T>> {
        let mut host = vec![T::zeroed(); n];
        self.synchronize()?;
        // SAFETY: the arena holds n elements there.
        unsafe { result::memcpy_dtoh_sync(&mut host, from) }?;
        Ok(host)
    }

    pub fn synchronize(&self) -> Result<()> {
        Ok(self.stream.synchronize()?)
    }

    pub fn name(&self) -> Result<String> {
        Ok(self.context.name()?)
    }

    pub fn launch(&self, launch: &Launch) -> Result<()> {
        Ok(launch(self.stream.cu_stream().cast())?)
    }

    /// `launches` as a graph.
    pub fn graph<'a>(&self, mut launches: impl Iterator<Item = &'a Launch>) -> Result<CudaGraph> {
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let enqueued = launches.try_for_each(|l| self.launch(l));
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        enqueued?;
        let graph = graph?.context("the capture came back empty")?;
        graph.upload()?;
        Ok(graph)
    }

    fn event(&self) -> Result<CudaEvent> {
        let event = self.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        event.record(&self.stream)?;
        Ok(event)
    }

    /// Microseconds of each piece of work that `enqueue(i)` enqueues, `i` below `n`, on a card that never waits
    /// for the host: a long read comes before each batch, whose first piece is not counted.
    pub fn times(
        &self,
        n: usize,
        mut enqueue: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let mut times = Vec::with_capacity(n);
        let mut next = 0;
        while times.len() < n {
            // SAFETY: the plug's pointers live as long as the arena.
            unsafe { kvwarp::linear::cuda::run(&self.plug, self.stream.cu_stream().cast()) }?;
            enqueue(next)?;
            let mut events = vec![self.event()?];
            for i in 1..=BATCH.min(n - times.len()) {
                enqueue(next + i)?;
                events.push(self.event()?);
            }
            next += events.len();
            self.synchronize()?;
            for pair in events.windows(2) {
                times.push(f64::from(pair[0].elapsed_ms(&pair[1])?) * 1e3);
            }
        }
        Ok(times)
    }

    /// GB/s of a device-to-device copy of a gigabyte, reads plus writes.
    pub fn copy_bandwidth(&self) -> Result<f64> {
        let (mark, bytes) = (self.mark(), 1 << 30);
        let (from, to) = (self.take(bytes)?, self.take(bytes)?);
        let stream = self.stream.cu_stream();
        // SAFETY: both have room.
        let times =
            self.times(16, |_| Ok(unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }?));
        self.release(mark);
        Ok(2.0 * bytes as f64 / crate::record::percentiles(&times?)[0] * 1e-3)
    }
}
