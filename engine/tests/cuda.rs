//! Models on a GPU, where there is one: against the CPU path, against themselves without recordings, and a schedule of
//! requests against each of them alone. `benches/bundle engine` takes this test to a machine that has one.
#![allow(dead_code)]

#[path = "gpu/pair.rs"]
mod pair;
mod support;

use std::rc::Rc;
use std::time::Duration;

use kvwarp::device::{Device, Gemm, Pieces};
use kvwarp::ffi::kvw_stream;
use kvwarp::kernels::Kernels;
use kvwarp_engine::gpu::Options;
use kvwarp_engine::gpu::cuda::CudaPlatform;
use kvwarp_engine::gpu::platform::{Platform, Replay, Result};
use kvwarp_engine::runner::{Runner, Turn};
use pair::{GREEDY, Pair, Seen, fixture, on_device, on_host, text, watched};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use support::converted::{converted, request};
use support::schedule::{alone, requests, run};

/// Most tokens of a sequence.
const CONTEXT: usize = 512;
/// Tokens of a prompt that are read together.
const BLOCK: usize = 128;

/// The first GPU; `None` where there is none, unless `KVW_REQUIRE_GPU` says that there is.
fn platform() -> Option<Rc<CudaPlatform>> {
    match Device::cuda(0) {
        Ok(Device::Cuda(cuda)) => {
            // A bundle counts the tests that say so.
            println!("on the GPU: {}", std::thread::current().name().unwrap_or("unnamed"));
            Some(Rc::new(CudaPlatform::new(cuda).unwrap()))
        }
        Ok(Device::Cpu) => None,
        Err(error) if std::env::var_os("KVW_REQUIRE_GPU").is_some() => panic!("{error}"),
        Err(_) => None,
    }
}

/// The same GPU, but everything is enqueued each time.
struct Eager(Rc<CudaPlatform>);

impl Platform for Eager {
    fn kernels(&self) -> &Kernels {
        self.0.kernels()
    }

    fn stream(&self) -> kvw_stream {
        self.0.stream()
    }

    fn alloc(&self, what: &'static str, bytes: usize) -> Result<u64> {
        self.0.alloc(what, bytes)
    }

    fn release(&self, at: u64) {
        self.0.release(at);
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.0.write(at, bytes)
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.0.read(at, bytes)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        self.0.zero(at, bytes)
    }

    fn copy(&self, pieces: &Pieces) -> Result<()> {
        self.0.copy(pieces)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.0.gemm(gemm)
    }

    fn record(&self, _: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Replay>>> {
        Ok(None)
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.0.memory()
    }

    fn stamp(&self) -> Result<()> {
        self.0.stamp()
    }

    fn stamps(&self) -> Result<Vec<Duration>> {
        self.0.stamps()
    }
}

fn options(rows: usize) -> Options {
    Options { budget: Some(64 << 20), piece: BLOCK, ..Options::new(rows, CONTEXT) }
}

#[test]
fn models_agree_with_the_cpu_path() {
    let Some(platform) = platform() else { return };
    for name in ["llama3", "mistral", "qwen2", "llama_linear"] {
        let source = fixture(name);
        let host = on_host(&source, None);
        let gpu = on_device(&source, "f16", None, &options(2), &platform);
        let mut pair = Pair::new(gpu, &host);
        pair.join(&text(7, 200), CONTEXT);
        pair.join(&text(8, 90), CONTEXT);
        (0..70).for_each(|_| pair.step());
        (0..2).for_each(|i| pair.compare_slabs(i));
        println!("{name}: {:?}", pair.seen);
        assert!(pair.seen.apart < 0.01 && pair.seen.other == 0, "{name}: {:?}", pair.seen);
        (0..2).for_each(|_| pair.leave(0));
        assert_eq!(pair.gpu.used(), [0; 5]);
    }
}

/// Latents attended to as they are, and keys and values expanded from them.
#[test]
fn converted_models_agree_with_the_cpu_path() {
    let Some(platform) = platform() else { return };
    for (name, pairs, rank) in [("llama3", 8, 48), ("qwen2", 6, 96)] {
        let (source, tokens) = (fixture(name), text(5, 160));
        let source = converted(&source, &request(&tokens, pairs, rank)).staged;
        let host = on_host(&source, None);
        for spec in ["latent", "f16"] {
            let gpu = on_device(&source, spec, None, &options(2), &platform);
            let mut pair = Pair::new(gpu, &host);
            pair.join(&text(7, 200), CONTEXT);
            pair.join(&text(8, 90), 64);
            (0..70).for_each(|_| pair.step());
            println!("{name} {spec}: {:?}", pair.seen);
            let Seen { apart, other, .. } = pair.seen;
            assert!(apart < 0.01 && other == 0, "{name} {spec}: {:?}", pair.seen);
            (0..2).for_each(|_| pair.leave(0));
            assert_eq!(pair.gpu.used(), [0; 5]);
        }
    }
}

/// Logits of 70 steps of two sequences.
fn steps(spec: &str, platform: &Rc<impl Platform + 'static>) -> Vec<Vec<f32>> {
    let source = fixture("llama3");
    let mut gpu = on_device(&source, spec, None, &options(2), platform);
    let rows = [gpu.open().unwrap(), gpu.open().unwrap()];
    for (row, n) in rows.into_iter().zip([150, 37]) {
        watched(|watch| gpu.read(row, &text(n, n as usize), watch)).unwrap();
    }
    let mut logits = Vec::new();
    for token in text(1, 70) {
        let tokens = &[token][..];
        let turn = |row| Turn { row, tokens, choice: &GREEDY, draw: 0, recent: &[] };
        gpu.step(&rows.map(turn), &mut Vec::new()).unwrap();
        logits.extend(rows.map(|row| gpu.logits(row, 0).unwrap().unwrap()));
    }
    logits
}

#[test]
fn recordings_give_the_same_bits() {
    let Some(platform) = platform() else { return };
    for spec in ["f16", "q4", "q2"] {
        let eager = Rc::new(Eager(platform.clone()));
        assert!(steps(spec, &platform) == steps(spec, &eager), "{spec}");
    }
}

/// Prompts stop short of a sequence's end by what is generated.
#[test]
fn a_thousand_requests_get_what_they_get_alone() {
    let Some(platform) = platform() else { return };
    let (source, mut rng) = (fixture("llama3"), ChaCha8Rng::seed_from_u64(1));
    let requests = requests(&mut rng, 1000, 200, 24);
    let few = Options { budget: Some(3 << 20), ..options(8) };
    let mut gpu = on_device(&source, "q4,window=0", None, &few, &platform);
    let free = gpu.free();
    let outcome = run(&mut gpu, &requests, BLOCK, 50, &mut rng);
    assert_eq!(gpu.free(), free);
    let mut single = on_device(&source, "q4,window=0", None, &options(1), &platform);
    let (mut other, mut preemptions) = (0, 0);
    for request in &requests {
        let Some(done) = outcome.done.get(&request.id) else { continue };
        preemptions += done.preemptions;
        other += usize::from(done.tokens != alone(&mut single, request, BLOCK).unwrap());
    }
    println!("{} rounds, {preemptions} preemptions, {other} others", outcome.rounds);
    assert!(outcome.failed.is_empty() && preemptions > 0);
    assert_eq!(other, 0, "requests that got other tokens than alone");
}
