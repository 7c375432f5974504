//! Policies on the device against those of the CPU path.

use kvwarp_engine::gpu::platform::GpuError;
use kvwarp_engine::gpu::{self, Options};
use kvwarp_engine::runner::Runner;

use crate::machine::Machine;
use crate::pair::{Pair, Seen, fixture, on_device, on_host, text};
use crate::simt::Simt;
use crate::{GIB, machine, options};

/// 300 tokens are read, of which some stay, and `steps` follow; every length, and what the first layer holds.
fn alone(spec: &str, n: usize, steps: usize) -> Seen {
    let (machine, source) = (machine(), fixture("llama3"));
    let host = on_host(&source, None);
    let gpu = on_device(&source, spec, None, &options(1), &machine);
    let mut pair = Pair::new(gpu, &host);
    pair.join(&text(7, n), n);
    pair.compare_slabs(0);
    (0..steps).for_each(|_| pair.step());
    pair.compare_slabs(0);
    assert!(steps == 0 || machine.records() == 1, "the same launches at every length");
    pair.leave(0);
    assert_eq!(pair.gpu.used(), [0; 5]);
    eprintln!("{spec}: {:?}", pair.seen);
    std::mem::take(&mut pair.seen)
}

#[test]
fn methods_keep_what_the_processor_keeps() {
    for spec in [
        "f16,evict=lagkv:0.25:lag=64",
        "f16,evict=snapkv:0.3:window=16",
        "f16,evict=fastkv:0.3",
        "f16,evict=h2o:0.3",
        "f16,evict=streaming:0.3",
        "f16,evict=random:0.3:seed=5",
        "f16,evict=snapkv:0.3:window=16,budget=pyramid",
        "f16,evict=fastkv:0.2,tsp=0.4",
        "f16,tsp=0.3",
    ] {
        let seen = alone(spec, 300, 3);
        assert!(seen.slabs[0] < 3e-3, "{spec}: {seen:?}");
    }
}
