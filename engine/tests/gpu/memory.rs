//! What memory is taken for, and how much of it there must be.

use kvwarp_engine::gpu::tally::Use;
use kvwarp_engine::gpu::{self, Options};
use kvwarp_engine::runner::Runner;

use crate::machine::Machine;
use crate::options;
use crate::pair::{fixture, text, watched};
use crate::simt::Simt;

/// Whether a machine of so much memory holds `rows` whole sequences at once; what it takes by use then, and in all.
fn holds(spec: &str, options: Options, memory: usize) -> Option<(gpu::tally::Bytes, usize)> {
    let (source, machine) = (fixture("qwen2"), Machine::new(Simt::plain(), memory, true));
    let platform = machine.clone();
    let spec = spec.parse().unwrap();
    let gpu = gpu::open(&source, &spec, None, &options, platform, &mut |_, _| {}).ok()?;
    gpu.holds_all().then(|| (gpu.taken(), machine.most()))
}

#[test]
fn as_many_fit_as_on_paper() {
    if !kvwarp::device::HAS_KERNELS {
        return;
    }
    let source = fixture("qwen2");
    let mut found = Vec::new();
    for spec in ["f16", "q2"] {
        let (memory, options) = (24 << 20, Options { block: 300, ..options(1) });
        let fit = gpu::fit(&source, &spec.parse().unwrap(), None, &options, memory).unwrap();
        let rows = fit.sequences;
        let (taken, most) = holds(spec, Options { rows, ..options }, memory).unwrap();
        assert_eq!(taken.iter().sum::<usize>(), most, "{spec}: every byte is counted once");
        let own = taken[Use::Pools as usize] + taken[Use::Rings as usize];
        assert_eq!(fit.shared, most - own, "{spec}");
        assert!(
            own >= rows * fit.sequence && own < (rows + 1) * fit.sequence,
            "{spec}: {fit:?} {own}"
        );
        assert!(holds(spec, Options { rows: rows + 1, ..options }, memory).is_none(), "{spec}");
        let none = gpu::fit(&source, &spec.parse().unwrap(), None, &options, 1 << 20).unwrap();
        assert_eq!((none.sequences, none.sequence), (0, fit.sequence), "{spec}");
        found.push(rows);
    }
    assert!(found[1] > found[0], "{found:?}");
}

#[test]
fn the_most_is_remembered() {
    let (source, machine) = (fixture("qwen2"), crate::machine());
    let mut gpu = crate::on_device(&source, "f16", None, &options(1), &machine);
    let before = gpu.taken();
    let row = gpu.open().unwrap();
    let small = Options { block: 64, ..options(1) };
    watched(|watch| gpu.read(row, &text(1, 400), watch)).unwrap();
    assert_eq!(gpu.taken(), before, "memory for a block of 512 tokens was set aside");
    drop(gpu);
    let mut gpu = crate::on_device(&source, "f16", None, &small, &machine);
    let (before, row) = (gpu.taken(), gpu.open().unwrap());
    watched(|watch| gpu.read(row, &text(1, 400), watch)).unwrap();
    let (after, of) = (gpu.taken(), Use::Activations as usize);
    assert!(after[of] > before[of] && after[..of] == before[..of], "{before:?} {after:?}");
    assert_eq!(gpu.memory()[of], ("activations", after[of]));
}
