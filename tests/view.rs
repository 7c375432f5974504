//! Memory and streams of cudarc and cust: an op reads and writes them where they lie.
//!
//! The op is the kernel on a GPU. With `KVW_STAND_IN` the driver is `tests/driver.c`, whose memory is the heap's, and the op
//! its CPU path at the same addresses.

use cudarc::driver::{CudaContext, CudaStream};
use cust::CudaFlags;
use cust::context::Context;
use cust::device::Device;
use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use half::f16;
use kvwarp::ffi::kvw_stream;
use kvwarp::view::{self, View, ViewMut};
use kvwarp::{Error, Result, rms_norm};
use std::sync::Arc;

const WIDTH: usize = 64;
const ROWS: usize = 3;

fn stand_in() -> bool {
    std::env::var_os("KVW_STAND_IN").is_some()
}

/// Whether a driver is there; a test says that it is skipped without.
fn driver() -> bool {
    let found = stand_in() || kvwarp::device::device_count().is_ok_and(|n| n > 0);
    if !found {
        assert!(std::env::var_os("KVW_REQUIRE_GPU").is_none(), "no CUDA device");
        eprintln!("skipped: no CUDA device");
    }
    found
}

fn host() -> (Vec<f32>, Vec<f32>) {
    let x = (0..ROWS * WIDTH).map(|i| (i as f32 * 0.37).sin() + i as f32 / 100.0).collect();
    (x, (0..WIDTH).map(|i| 1.0 + i as f32 / 64.0).collect())
}

fn expected() -> Vec<f16> {
    let ((x, weight), mut out) = (host(), [0.0; WIDTH]);
    let row = |x: &[f32]| {
        rms_norm::cpu(x, &weight, 1e-6, &mut out).unwrap();
        out.map(f16::from_f32).to_vec()
    };
    x.chunks(WIDTH).flat_map(row).collect()
}

/// Enqueues the op on what views have.
fn normalise<S, O>(
    x: &View<'_, f32, S>,
    weight: &View<'_, f32, S>,
    out: &ViewMut<'_, u16, O>,
    stream: kvw_stream,
) -> Result<()> {
    let x = x.holding("rms_norm", "x", ROWS * WIDTH)?;
    let weight = weight.holding("rms_norm", "weight", WIDTH)?;
    let out = out.holding("rms_norm", "out", ROWS * WIDTH)?;
    if stand_in() {
        // SAFETY: memory of the stand-in is the host's, and the views say how much there is.
        let (x, weight, out) = unsafe {
            let (x, weight) = (slice(x, ROWS * WIDTH), slice(weight, WIDTH));
            (x, weight, std::slice::from_raw_parts_mut(out.cast::<f16>(), ROWS * WIDTH))
        };
        for (x, out) in x.chunks(WIDTH).zip(out.chunks_mut(WIDTH)) {
            let mut row = [0.0; WIDTH];
            rms_norm::cpu(x, weight, 1e-6, &mut row)?;
            out.copy_from_slice(&row.map(f16::from_f32));
        }
        return Ok(());
    }
    launch(x, weight, out, stream)
}

/// # Safety
/// The elements are in host memory and live long enough.
unsafe fn slice<'a>(at: *const f32, len: usize) -> &'a [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(at, len) }
}

#[cfg(kvw_cuda)]
fn launch(x: *const f32, weight: *const f32, out: *mut u16, stream: kvw_stream) -> Result<()> {
    let (tokens, width, out) = (ROWS as i32, WIDTH as i32, out.cast());
    let args = rms_norm::Args { x, weight, out, tokens, width, eps: 1e-6, ..Default::default() };
    println!("on the GPU: {}", std::thread::current().name().unwrap_or("unnamed"));
    // SAFETY: the views are of this device and outlive the wait of the caller.
    unsafe { rms_norm::run(&args, stream) }
}

#[cfg(not(kvw_cuda))]
fn launch(_: *const f32, _: *const f32, _: *mut u16, _: kvw_stream) -> Result<()> {
    Err(Error::NotBuilt)
}

/// Of the first device.
fn cudarc_stream() -> Arc<CudaStream> {
    CudaContext::new(0).unwrap().new_stream().unwrap()
}

/// The context stays current for as long as it lives.
fn cust_stream() -> (Context, Stream) {
    cust::init(CudaFlags::empty()).unwrap();
    let context = Context::new(Device::get_device(0).unwrap()).unwrap();
    (context, Stream::new(StreamFlags::NON_BLOCKING, None).unwrap())
}

fn bits(x: &[f16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn an_op_runs_on_slices_of_cudarc() {
    if !driver() {
        return;
    }
    let (stream, (x, weight)) = (cudarc_stream(), host());
    let (x, weight) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&weight).unwrap());
    // All but the first row's worth is the op's: a part of a slice is as good.
    let mut out = stream.alloc_zeros::<u16>((1 + ROWS) * WIDTH).unwrap();
    {
        let mut part = out.slice_mut(WIDTH..);
        let (x, weight) = (view::cudarc::read(&x, &stream), view::cudarc::read(&weight, &stream));
        let part = view::cudarc::write(&mut part, &stream);
        assert_eq!((x.len(), weight.len(), part.len()), (ROWS * WIDTH, WIDTH, ROWS * WIDTH));
        let raw = view::cudarc::stream(&stream).unwrap();
        assert_eq!(raw as usize, stream.cu_stream() as usize);
        normalise(&x, &weight, &part, raw).unwrap();
    }
    let got = stream.clone_dtoh(&out).unwrap();
    assert_eq!(got[..WIDTH], [0; WIDTH]);
    assert_eq!(got[WIDTH..], bits(&expected()));
}

#[test]
fn an_op_runs_on_buffers_of_cust() {
    if !driver() {
        return;
    }
    let ((_context, stream), (x, weight)) = (cust_stream(), host());
    let (x, weight) =
        (DeviceBuffer::from_slice(&x).unwrap(), DeviceBuffer::from_slice(&weight).unwrap());
    let mut out = DeviceBuffer::from_slice(&[7u16; ROWS * WIDTH]).unwrap();
    let raw = view::cust::stream(&stream);
    assert_eq!(raw as usize, stream.as_inner() as usize);
    let to = view::cust::write(&mut out);
    normalise(&view::cust::read(&x), &view::cust::read(&weight), &to, raw).unwrap();
    stream.synchronize().unwrap();
    let mut got = [0; ROWS * WIDTH];
    out.copy_to(&mut got).unwrap();
    assert_eq!(got[..], bits(&expected()));
}

#[test]
fn memory_of_one_is_good_on_a_stream_of_the_other() {
    if !driver() {
        return;
    }
    let (stream, (_context, _), (x, weight)) = (cudarc_stream(), cust_stream(), host());
    let (x, weight) =
        (DeviceBuffer::from_slice(&x).unwrap(), DeviceBuffer::from_slice(&weight).unwrap());
    let mut out = stream.alloc_zeros::<u16>(ROWS * WIDTH).unwrap();
    {
        let to = view::cudarc::write(&mut out, &stream);
        let raw = view::cudarc::stream(&stream).unwrap();
        normalise(&view::cust::read(&x), &view::cust::read(&weight), &to, raw).unwrap();
    }
    assert_eq!(stream.clone_dtoh(&out).unwrap(), bits(&expected()));
}

#[test]
fn too_few_elements_are_refused_by_name() {
    if !driver() {
        return;
    }
    let (stream, (x, weight)) = (cudarc_stream(), host());
    let (x, weight) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&weight).unwrap());
    let mut out = stream.alloc_zeros::<u16>(ROWS * WIDTH).unwrap();
    let short = x.slice(1..);
    let x = view::cudarc::read(&short, &stream);
    let weight = view::cudarc::read(&weight, &stream);
    let to = view::cudarc::write(&mut out, &stream);
    let (need, got) = (ROWS * WIDTH, ROWS * WIDTH - 1);
    let refused = normalise(&x, &weight, &to, view::cudarc::stream(&stream).unwrap());
    assert_eq!(refused, Err(Error::Len { op: "rms_norm", buffer: "x", need, got }));
    assert!(!x.is_empty() && !to.is_empty());
    let refused = to.holding("rms_norm", "out", need + 1).unwrap_err();
    assert_eq!(refused, Error::Len { op: "rms_norm", buffer: "out", need: need + 1, got: need });
}
