//! Policies on the device against those of the CPU path: how many tokens stay in every layer, which ones in the first,
//! whose keys and values depend on tokens alone, and what follows.

use kvwarp_engine::gpu::platform::GpuError;
use kvwarp_engine::gpu::{self, Options};
use kvwarp_engine::runner::{Runner, Turn};
use kvwarp_engine::source::Source;

use crate::pair::{GREEDY, Pair, fixture, on_device, on_host, speaking, text};
use crate::{machine, options};

/// A sequence of 300 tokens, of which some stay, and three more.
fn alone(spec: &str) {
    of(&fixture("llama3"), spec);
}

fn of(source: &Source, spec: &str) {
    let machine = machine();
    let host = on_host(source, None);
    let gpu = on_device(source, spec, None, &options(1), &machine);
    let mut pair = Pair::new(gpu, &host);
    pair.join(&text(7, 300), 300);
    (0..3).for_each(|_| pair.step());
    pair.compare_slabs(0);
    pair.leave(0);
    eprintln!("{spec}: {:?}", pair.seen);
    assert_eq!(pair.gpu.used(), [0; 5], "{spec}");
    assert!(pair.seen.slabs[0] < 3e-3 && pair.seen.other == 0, "{spec}: {:?}", pair.seen);
}

#[test]
fn scores_without_attention() {
    for spec in ["lagkv:0.25:lag=64", "streaming:0.3", "random:0.3:seed=5", "streaming:0"] {
        alone(&format!("f16,evict={spec}"));
    }
}

#[test]
fn scores_by_attention() {
    for spec in ["snapkv:0.3:window=16", "h2o:0.3", "snapkv:0.3:window=16,budget=pyramid"] {
        alone(&format!("f16,evict={spec}"));
    }
}

#[test]
fn fewer_tokens_go_deeper() {
    for spec in ["tsp=0.3", "evict=fastkv:0.2,tsp=0.4", "evict=h2o:0.3,tsp=0:0.5"] {
        alone(&format!("f16,{spec}"));
    }
}

/// Partitions are complete after a prompt, after what is read later, and after steps, of two sequences at different times.
#[test]
fn lagkv_goes_on_while_decoding() {
    let (machine, source) = (machine(), fixture("llama3"));
    let host = on_host(&source, None);
    for spec in ["f16,evict=lagkv:0.5:lag=16:sink=5", "q8,evict=lagkv:0.25:lag=32,window=0"] {
        let gpu = on_device(&source, spec, None, &options(2), &machine);
        let mut pair = Pair::new(gpu, &host);
        pair.join(&text(3, 20), 20);
        pair.join(&text(4, 150), 150);
        (0..40).for_each(|_| pair.step());
        pair.tell(0, &text(5, 170));
        (0..20).for_each(|_| pair.step());
        (0..2).for_each(|i| pair.compare_slabs(i));
        eprintln!("{spec}: {:?}", pair.seen);
        assert!(pair.seen.slabs[0] < 3e-3 && pair.seen.slabs[1] < 0.1, "{spec}: {:?}", pair.seen);
        assert_eq!(pair.seen.other, 0, "{spec}: {:?}", pair.seen);
    }
}

#[test]
fn a_thawed_sequence_has_lost_the_same_tokens() {
    let (machine, source) = (machine(), fixture("llama3"));
    let spec = "q8,evict=lagkv:0.5:lag=16,tsp=0:0.6";
    let mut gpu = on_device(&source, spec, None, &options(2), &machine);
    let row = gpu.open().unwrap();
    let prompt = text(6, 220);
    crate::pair::watched(|watch| gpu.read(row, &prompt, watch)).unwrap();
    let frozen = gpu.freeze(row).unwrap();
    assert!(frozen.heads[0].len > frozen.heads.last().unwrap().len, "{:?}", frozen.heads);
    let twin = gpu.thaw(&frozen).unwrap();
    let mut tokens = [[9], [9]];
    for _ in 0..24 {
        let turn = |row, tokens| Turn { row, tokens, choice: &GREEDY, draw: 0, recent: &[] };
        let turns = [turn(row, &tokens[0][..]), turn(twin, &tokens[1][..])];
        let mut chosen = Vec::new();
        gpu.step(&turns, &mut chosen).unwrap();
        assert_eq!(chosen[0], chosen[1]);
        tokens = [[chosen[0][0]], [chosen[1][0]]];
    }
    gpu.melt(frozen);
    [row, twin].into_iter().for_each(|row| gpu.close(row));
    assert_eq!(gpu.used(), [0; 5]);
}

/// Scores that are ranked, refined, or compared with those of other layers: the host chooses.
#[test]
fn scores_that_the_host_sees() {
    for spec in [
        "evict=keynorm:0.3",
        "evict=lagkv-kvpress:0.4:lag=32",
        "evict=snapkv:0.3:window=16,refine=kvcrush:0.25",
        "evict=h2o:0.3,budget=prefixkv",
        "evict=snapkv:0.3:window=16,budget=dynamickv,tsp=0.6",
    ] {
        alone(&format!("f16,{spec}"));
    }
}

/// Heads of a layer keep different numbers of tokens.
#[test]
fn heads_that_hold_what_they_need() {
    let (_folder, source) = speaking("qwen2");
    for spec in [
        "evict=snapkv:0.3:window=16,budget=global",
        "evict=keynorm:0.3,budget=global,refine=kvcrush:0.2",
        "evict=kvzip:0.3:chunk=128",
        "evict=kvzip-head:0.5:chunk=256",
    ] {
        of(&source, &format!("f16,{spec}"));
    }
}

/// After a ragged choice: what is read later, steps, and a copy of the sequence.
#[test]
fn ragged_heads_go_on() {
    let (machine, (_folder, source)) = (machine(), speaking("qwen2"));
    let host = on_host(&source, None);
    for spec in ["q8,evict=kvzip:0.4:chunk=64,window=16", "f16,evict=keynorm:0.2,budget=global"] {
        let gpu = on_device(&source, spec, None, &options(3), &machine);
        let mut pair = Pair::new(gpu, &host);
        pair.join(&text(3, 200), 200);
        pair.join(&text(4, 90), 90);
        (0..5).for_each(|_| pair.step());
        pair.tell(0, &text(5, 150));
        (0..5).for_each(|_| pair.step());
        for i in 0..2 {
            // Of tokens that are worth the same to an f16, one or another head has one more.
            let [device, host] = pair.lens(i);
            eprintln!("{spec}: {device:?} {host:?}");
            assert!(device.iter().any(|len| *len != device[0]), "{spec}: {device:?}");
            assert_eq!(device.iter().sum::<usize>(), host.iter().sum::<usize>(), "{spec}");
            let close = |(a, b): (&usize, &usize)| a.abs_diff(*b) < 4;
            assert!(device.iter().zip(&host).all(close), "{spec}: {device:?}, not {host:?}");
        }
        let frozen = pair.gpu.freeze(pair.rows[0].0).unwrap();
        let twin = pair.gpu.thaw(&frozen).unwrap();
        assert_eq!(pair.gpu.freeze(twin).map(|frozen| frozen.heads).unwrap(), frozen.heads);
        eprintln!("{spec}: {:?}", pair.seen);
        assert_eq!(pair.seen.other, 0, "{spec}: {:?}", pair.seen);
    }
}

#[test]
fn a_window_longer_than_half_a_piece_is_refused_by_name() {
    let source = fixture("llama3");
    let options = Options { piece: 128, ..options(1) };
    let spec = "f16,evict=snapkv:0.3:window=65".parse().unwrap();
    let opened = gpu::open(&source, &spec, None, &options, machine(), &mut |_, _| {});
    match opened.err() {
        Some(GpuError::Unsupported(what)) => assert!(what.contains("at most 64"), "{what}"),
        other => panic!("{other:?}"),
    }
}
