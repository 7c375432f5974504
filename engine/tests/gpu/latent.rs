//! Converted models: latents attended to as they are, and keys and values expanded from them.

use kvwarp_engine::gpu::Options;
use kvwarp_engine::runner::{Runner, Turn};
use kvwarp_engine::source::Source;

use super::pair::{Pair, on_device, on_host, relative, text, watched};
use super::simt::Simt;
use super::support::converted::{converted, request};
use super::{EXACT, GIB, GREEDY, Machine, calibrated, fixture, logits, machine, options};

/// Fixtures, pairs and ranks: one kv head and two, biases, every scaling, fewer channels than a warp has, pairs that are no
/// multiple of 4, every pair elite.
const MODELS: [(&str, usize, usize); 4] =
    [("llama3", 8, 48), ("qwen2", 6, 96), ("llama_linear", 4, 112), ("llama3", 32, 64)];

pub fn staged((name, pairs, rank): (&str, usize, usize)) -> Source {
    let (source, tokens) = (fixture(name), text(5, 160));
    converted(&source, &request(&tokens, pairs, rank)).staged
}

/// Prompts of so many tokens read at once and in blocks that begin within a tile, steps that fill slabs, and more said after
/// them.
fn follow(pair: &mut Pair<'_>, [together, apart]: [usize; 2]) {
    pair.join(&text(7, together), 512);
    pair.join(&text(3, apart), 41);
    (0..5).for_each(|_| pair.step());
    pair.tell(1, &text(8, 77));
    pair.join(&text(4, 2), 64);
    (0..3).for_each(|_| pair.step());
    (0..3).for_each(|i| pair.compare_latents(i));
}

#[test]
fn latents_are_attended_to_as_they_are() {
    for model in MODELS {
        let (machine, source) = (machine(), staged(model));
        let host = on_host(&source, None);
        let small = Options { piece: 48, ..options(3) };
        let mut pair = Pair::new(on_device(&source, "latent", None, &small, &machine), &host);
        follow(&mut pair, [126, 90]);
        eprintln!("{model:?}: {:?}", pair.seen);
        assert!(pair.seen.apart < EXACT && pair.seen.other == 0, "{model:?}: {:?}", pair.seen);
        assert!(pair.seen.slabs[0] < 2e-3 && pair.seen.slabs[1] < EXACT, "{:?}", pair.seen);
        assert_eq!(machine.records(), 2, "of two rows and of four");
        (0..3).for_each(|_| pair.leave(0));
        assert_eq!(pair.gpu.used(), [0; 5]);
        drop(pair);
        assert_eq!(machine.taken(), 0, "all memory is given back");
    }
}

/// The same with slabs of 4 and 2 bits behind windows, in blocks that are shorter and longer than those.
#[test]
fn latents_are_packed_behind_the_window() {
    for (model, spec, share) in [
        (MODELS[0], "latent-q4,window=64", 0.5),
        (MODELS[1], "latent-q2,window=30", 1.0),
        (MODELS[2], "latent-q4,window=0,sinks=70", 0.5),
        (MODELS[3], "latent-q2,window=0,sinks=0,range=100", 1.0),
    ] {
        let (machine, source) = (machine(), staged(model));
        let host = on_host(&source, None);
        let small = Options { piece: 48, ..options(3) };
        let mut pair = Pair::new(on_device(&source, spec, None, &small, &machine), &host);
        let free = pair.gpu.free();
        follow(&mut pair, [190, 150]);
        let seen = &pair.seen;
        eprintln!("{model:?} {spec}: {seen:?}");
        let most = EXACT.max(share * seen.moved);
        assert!(seen.apart < most && seen.other == 0, "{model:?} {spec}: {seen:?}");
        // Later layers see what codes of earlier ones make of it.
        let codes = (2.0 * seen.apart).max(0.05);
        assert!(seen.slabs[0] < 2e-3 && seen.slabs[1] < codes, "{model:?} {spec}: {seen:?}");
        let store = usize::from(pair.gpu.spec().store as u8);
        assert!(pair.gpu.used()[store] >= 2, "{spec}: {:?}", pair.gpu.used());
        (0..3).for_each(|_| pair.leave(0));
        assert_eq!((pair.gpu.used(), pair.gpu.free()), ([0; 5], free));
        drop(pair);
        assert_eq!(machine.taken(), 0, "all memory is given back");
    }
}

/// A context that ends before anything leaves the window.
#[test]
fn short_contexts_pack_nothing() {
    let (machine, source) = (machine(), staged(MODELS[1]));
    let short = Options { context: 100, ..options(1) };
    let exact = on_device(&source, "latent", None, &short, &machine);
    let packing = on_device(&source, "latent-q2", None, &short, &machine);
    let [a, b] = [exact, packing].map(|mut gpu| {
        let row = gpu.open().unwrap();
        watched(|w| gpu.read(row, &text(2, 90), w)).unwrap();
        logits(&mut gpu, row, &text(8, 10))
    });
    assert_eq!(a, b);
}

#[test]
fn keys_and_values_are_expanded() {
    for (model, spec, with, share) in [
        (MODELS[0], "f16", false, 0.0),
        (MODELS[1], "f16", false, 0.0),
        (MODELS[1], "q4,hadamard=off", false, 0.5),
        // Channels lie in another order before they are turned, so codes are others.
        (MODELS[1], "q4", false, 1.5),
        (MODELS[2], "q2,keep=50", true, 1.5),
        (MODELS[0], "q8,evict=lagkv:0.5:lag=16,window=16", false, 0.5),
    ] {
        let (machine, source) = (machine(), staged(model));
        let calibration = with.then(|| calibrated(&source));
        let host = on_host(&source, calibration.as_ref());
        let gpu = on_device(&source, spec, calibration.as_ref(), &options(1), &machine);
        let mut pair = Pair::new(gpu, &host);
        pair.join(&text(7, 200), 512);
        (0..70).for_each(|_| pair.step());
        let seen = &pair.seen;
        eprintln!("{model:?} {spec}: {seen:?}");
        let most = EXACT.max(share * seen.moved);
        assert!(seen.apart < most && seen.other == 0, "{model:?} {spec}: {seen:?}");
    }
}

#[test]
fn drafts_are_as_steps_and_leave_no_trace() {
    // 192 tokens fill a slab, which may be shared or packed.
    let of = MODELS.into_iter().map(|model| (model, "latent", 53));
    for (model, spec, loose) in of.chain([(MODELS[1], "latent-q4,window=64", 117)]) {
        let (machine, source) = (machine(), staged(model));
        let mut gpu = on_device(&source, spec, None, &options(1), &machine);
        let (row, next) = (gpu.open().unwrap(), text(8, 11));
        watched(|w| gpu.read(row, &text(2, 180), w)).unwrap();
        assert_eq!(gpu.drafts(row), 10);
        let turn = Turn { row, tokens: &next, choice: &GREEDY, draw: 0, recent: &[] };
        gpu.step(&[turn], &mut Vec::new()).unwrap();
        let together: Vec<_> = (0..11).map(|i| gpu.logits(row, i).unwrap().unwrap()).collect();
        gpu.rollback(row, 11).unwrap();
        assert!(gpu.rollback(row, loose).is_err());
        for (a, b) in logits(&mut gpu, row, &next).iter().zip(&together) {
            assert!(relative(a, b) < EXACT, "{model:?}: {}", relative(a, b));
        }
    }
}

#[test]
fn frozen_sequences_go_on_the_same() {
    let (machine, source) = (machine(), staged(MODELS[1]));
    for (spec, held, packed) in
        [("latent", 192, 3), ("latent", 250, 3), ("latent-q2,window=64,sinks=0", 250, 2)]
    {
        let mut gpu = on_device(&source, spec, None, &options(3), &machine);
        let (free, row, next) = (gpu.free(), gpu.open().unwrap(), text(8, 12));
        watched(|w| gpu.read(row, &text(2, held), w)).unwrap();
        let taken: usize = free.iter().zip(gpu.free()).map(|(before, now)| before - now).sum();
        assert_eq!(taken, packed, "what is in the window is beside the limit");
        let frozen = gpu.freeze(row).unwrap();
        let expected = logits(&mut gpu, row, &next);
        gpu.close(row);
        for _ in 0..2 {
            let rows = [(); 3].map(|()| gpu.thaw(&frozen).unwrap());
            assert!(gpu.thaw(&frozen).is_err());
            for row in rows {
                assert_eq!(gpu.len(row), held);
                // Products are summed in another order where a step has more rows.
                let again = logits(&mut gpu, row, &next).concat();
                let far = relative(&again, &expected.concat());
                assert!(far < 1e-3 && (row.0 > 0 || far == 0.0), "{row:?}: {far}");
            }
            rows.into_iter().for_each(|row| gpu.close(row));
        }
        gpu.melt(frozen);
        assert_eq!((gpu.used(), gpu.free()), ([0; 5], free));
    }
}

#[test]
#[ignore = "the checked build of the executor takes minutes to compile; run with --ignored"]
fn every_access_to_latents_is_in_bounds_written_and_ordered() {
    let source = staged(MODELS[1]);
    let host = on_host(&source, None);
    for spec in ["latent", "latent-q2,window=0,sinks=0", "q2,window=0"] {
        let machine = Machine::new(Simt::checked(), GIB, true);
        let gpu = on_device(&source, spec, None, &options(2), &machine);
        let mut pair = Pair::new(gpu, &host);
        pair.join(&text(9, 126), 50);
        pair.join(&text(9, 20), 512);
        (0..3).for_each(|_| pair.step());
        eprintln!("checked, {spec}: {:?}", pair.seen);
    }
}
