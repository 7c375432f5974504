//! What memory is taken for, and how much of it there must be.

use kvwarp_engine::batch::{Batch, Event, Refusal, Request};
use kvwarp_engine::gpu::platform::GpuError;
use kvwarp_engine::gpu::tally::Use;
use kvwarp_engine::gpu::{self, Options};
use kvwarp_engine::runner::Runner;
use kvwarp_engine::source::Source;

use crate::latent::staged;
use crate::machine::Machine;
use crate::options;
use crate::pair::{GREEDY, fixture, text, watched};
use crate::simt::Simt;

/// Whether a machine of so much memory holds `rows` whole sequences at once; what it takes by use then, and in all.
fn holds(
    source: &Source,
    spec: &str,
    options: Options,
    memory: usize,
) -> Option<(gpu::tally::Bytes, usize)> {
    let machine = Machine::new(Simt::plain(), memory, true);
    let platform = machine.clone();
    let spec = spec.parse().unwrap();
    let gpu = gpu::open(source, &spec, None, &options, platform, &mut |_, _| {}).ok()?;
    gpu.holds_all().then(|| (gpu.taken(), machine.most()))
}

#[test]
fn as_many_fit_as_on_paper() {
    if !kvwarp::device::HAS_KERNELS {
        return;
    }
    let (plain, halved) = (fixture("qwen2"), staged(("qwen2", 6, 96)));
    let mut found = Vec::new();
    for (source, spec) in [(&plain, "f16"), (&plain, "q2"), (&halved, "latent")] {
        let (memory, options) = (24 << 20, Options { block: 300, ..options(1) });
        let fit = gpu::fit(source, &spec.parse().unwrap(), None, &options, memory).unwrap();
        let rows = fit.sequences;
        let (taken, most) = holds(source, spec, Options { rows, ..options }, memory).unwrap();
        assert_eq!(taken.iter().sum::<usize>(), most, "{spec}: every byte is counted once");
        let own = taken[Use::Pools as usize] + taken[Use::Rings as usize];
        assert_eq!(fit.shared, most - own, "{spec}");
        assert!(
            own >= rows * fit.sequence && own < (rows + 1) * fit.sequence,
            "{spec}: {fit:?} {own}"
        );
        let more = Options { rows: rows + 1, ..options };
        assert!(holds(source, spec, more, memory).is_none(), "{spec}");
        let none = gpu::fit(source, &spec.parse().unwrap(), None, &options, 1 << 20).unwrap();
        assert_eq!((none.sequences, none.sequence), (0, fit.sequence), "{spec}");
        found.push(rows);
    }
    assert!(found[1] > found[0] && found[2] > found[0], "{found:?}");
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

#[test]
fn what_would_fit_is_said() {
    if !kvwarp::device::HAS_KERNELS {
        return;
    }
    let (source, spec) = (Source::outline("llama-3-8b").unwrap(), "f16".parse().unwrap());
    let options = Options::new(16, 32 << 10);
    let say = |memory| gpu::instead(&source, &spec, None, &options, memory).unwrap();
    let fit = |spec: &str| {
        let spec = spec.parse().unwrap();
        gpu::fit(&source, &spec, None, &options, 40_000_000_000).unwrap().sequences
    };
    let (f16, q2) = (fit("f16"), fit("q2"));
    assert!(f16 > 1 && q2 > 4 * f16, "{f16} {q2}");
    assert_eq!(
        say(40_000_000_000),
        format!(
            "{f16} sequences of 32768 tokens would fit, {q2} sequences of 32768 tokens with --cache q2"
        )
    );
    // Less than the weights and a sequence: what is left holds a shorter one, or several in 2 bits.
    let text = say(19_000_000_000);
    assert!(
        text.starts_with("1 sequence of ") && text.ends_with("of 32768 tokens with --cache q2"),
        "{text}"
    );
    let tokens: usize = text.split(' ').nth(3).unwrap().parse().unwrap();
    let shorter = Options { context: tokens, ..Options::new(1, tokens) };
    let fits = |options: &Options| gpu::fit(&source, &spec, None, options, 19_000_000_000).unwrap();
    assert!(fits(&shorter).sequences == 1 && tokens < 32 << 10);
    assert_eq!(say(10_000_000_000), "", "not even the weights");
}

#[test]
fn a_request_longer_than_the_pools_is_refused_alone() {
    let (source, machine) = (fixture("qwen2"), crate::machine());
    let small = Options { budget: Some(300 << 10), ..options(2) };
    let spec = "f16".parse().unwrap();
    let open = |options: &Options| {
        gpu::open(&source, &spec, None, options, machine.clone(), &mut |_, _| {})
    };
    let Err(GpuError::Memory { need, free, .. }) = open(&small) else { panic!("512 tokens") };
    assert!(need > free && free == 300 << 10);
    let mut gpu = open(&Options { least: 1, ..small }).unwrap();
    let mut batch = Batch::new(&mut gpu, 128, [0; 32]);
    let request = |id, tokens| Request {
        id,
        prompt: text(1, tokens),
        max_tokens: 2,
        choice: GREEDY,
        stop: [].into(),
        drafts: 0,
    };
    let refused = batch.submit(request(1, 500)).unwrap_err();
    assert!(matches!(refused, Refusal::Pool { .. }), "{refused}");
    batch.submit(request(2, 100)).unwrap();
    let mut done = Vec::new();
    while !batch.is_idle() {
        watched(|watch| batch.round(watch, &mut |event| done.push(event))).unwrap();
    }
    assert!(matches!(done.last(), Some(Event::Done { id: 2, .. })), "{done:?}");
}
