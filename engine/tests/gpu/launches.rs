//! What a step and a prompt are made of, as `kvwarp bench --profile` tells it.

use kvwarp_engine::gpu::Gpu;
use kvwarp_engine::profile::Profile;
use kvwarp_engine::runner::{Row, Runner, Turn};

use crate::machine::Machine;
use crate::pair::{GREEDY, fixture, on_device, text, watched};
use crate::{machine, options};
use std::rc::Rc;

/// Layers of the model.
const LAYERS: usize = 2;

/// A model with `rows` sequences of some tokens.
fn filled(spec: &str, rows: usize, machine: &Rc<Machine>) -> (Gpu, Vec<Row>) {
    let mut gpu = on_device(&fixture("llama3"), spec, None, &options(rows), machine);
    let rows = (0..rows).map(|_| gpu.open().unwrap()).collect::<Vec<_>>();
    for row in &rows {
        watched(|watch| gpu.read(*row, &text(3, 40), watch)).unwrap();
    }
    (gpu, rows)
}

/// A step of some tokens of each row.
fn step(gpu: &mut Gpu, rows: &[Row], tokens: &[u32]) {
    let turn = |&row| Turn { row, tokens, choice: &GREEDY, draw: 0, recent: &[] };
    gpu.step(&rows.iter().map(turn).collect::<Vec<_>>(), &mut Vec::new()).unwrap();
}

/// Launches of each op.
fn counts<'a>(profile: &'a Profile, ops: &[&'static str]) -> Vec<(&'static str, usize)> {
    let of = |op: &'a str| profile.of(op).map(|line| line.launches).sum();
    let known: usize = ops.iter().map(|&op| of(op)).sum::<usize>();
    let all: usize = profile.lines().iter().map(|line| line.launches).sum();
    assert_eq!(known, all, "{:?}", profile.lines());
    ops.iter().map(|&op| (op, of(op))).collect()
}

#[test]
fn a_step_is_made_of_few_launches() {
    // Values that are turned are f16 beside queries and keys of bf16: a matrix of their own. Drafts are rotated before they
    // are written, single tokens as they are.
    for (spec, rows, tokens, in_a_layer) in [
        ("f16", 1, &[7][..], 9),
        ("q4", 1, &[7], 10),
        ("q4", 3, &[7], 10),
        ("f16", 2, &[7, 8], 10),
        ("q4", 1, &[7, 8, 9], 11),
    ] {
        let machine = machine();
        let (mut gpu, rows) = filled(spec, rows, &machine);
        gpu.start_profile();
        step(&mut gpu, &rows, tokens);
        let profile = gpu.end_profile().unwrap();
        assert_eq!(machine.records(), 0, "a step whose launches are timed is no recording");
        let once = [("write", 1), ("page_table", 1), ("embed", 1), ("sample", 1)];
        let (own, rope) = (usize::from(spec != "f16"), usize::from(tokens.len() > 1));
        // Two norms; products before attention and three after it.
        let layer = [("rms_norm", 2), ("linear", 4 + own), ("rope_select", rope), ("kv_pack", 1)];
        let layer: Vec<_> = layer.into_iter().chain([("paged_attn", 1), ("swiglu", 1)]).collect();
        assert_eq!(layer.iter().map(|(_, n)| n).sum::<usize>(), in_a_layer);
        let head = |op| usize::from(["rms_norm", "linear"].contains(&op));
        let layers = layer.into_iter().map(|(op, n)| (op, LAYERS * n + head(op)));
        let expected: Vec<_> = once.into_iter().chain(layers).collect();
        let ops: Vec<_> = expected.iter().map(|(op, _)| *op).collect();
        assert_eq!(counts(&profile, &ops), expected, "{spec} x{}", rows.len());
    }
}

#[test]
fn launches_have_times_and_bytes() {
    let machine = machine();
    let (mut gpu, rows) = filled("q4", 1, &machine);
    step(&mut gpu, &rows, &[7]);
    let before = gpu.logits(rows[0], 0).unwrap();
    gpu.rollback(rows[0], 1).unwrap();
    gpu.start_profile();
    step(&mut gpu, &rows, &[7]);
    assert_eq!(gpu.logits(rows[0], 0).unwrap(), before, "the same step");
    gpu.rollback(rows[0], 1).unwrap();
    step(&mut gpu, &rows, &[7]);
    let profile = gpu.end_profile().unwrap();
    assert!(profile.lines().iter().all(|line| !line.time.is_zero()), "{:?}", profile.lines());
    // Gate and up, 320 rows of 96, f16: two layers, two steps.
    let gate_up = profile.of("linear").find(|line| line.shape == Some([320, 96])).unwrap();
    assert_eq!((gate_up.launches, gate_up.bytes), (4, 4 * 2 * (320 * 96 + 96 + 320)));
    let sample = profile.of("sample").next().unwrap();
    assert!(sample.bytes > 2 * 4 * gpu.config().vocab && sample.gigabytes_a_second().is_some());
    let records = machine.records();
    step(&mut gpu, &rows, &[7]);
    assert_eq!(machine.records(), records, "the recording of before is launched again");
    assert!(gpu.end_profile().unwrap().lines().is_empty(), "nothing is timed any more");
}

#[test]
fn a_prompt_is_made_of_products_and_attention() {
    let machine = machine();
    let (mut gpu, rows) = filled("q4,window=0", 1, &machine);
    gpu.start_profile();
    watched(|watch| gpu.read(rows[0], &text(5, 200), watch)).unwrap();
    let profile = gpu.end_profile().unwrap();
    // Pieces of 128 and 72 tokens; the last layer's outputs are nobody's. Three slabs leave the ring. Matrices of bf16, all
    // but those that are turned, are unpacked for products of many rows.
    let pieces = 2;
    let expected = [
        ("write", 2),
        ("page_table", 1),
        ("embed", 1 + pieces * (LAYERS + 2 * (LAYERS - 1))),
        ("copy", 2 * LAYERS),
        ("rms_norm", pieces * (LAYERS + LAYERS - 1)),
        ("gemm", pieces * (2 * LAYERS + 3 * (LAYERS - 1))),
        ("rope_select", pieces * LAYERS),
        ("kv_pack", (pieces + 1) * LAYERS),
        ("prefill_attn", pieces * (LAYERS - 1)),
        ("swiglu", pieces * (LAYERS - 1)),
    ];
    assert_eq!(counts(&profile, &expected.map(|(op, _)| op)), expected);
    let copy = profile.of("copy").next().unwrap();
    // An f16 slab of every kv head, read and written.
    let slab = 2 * 2 * 64 * gpu.config().head_dim;
    assert_eq!(copy.bytes, copy.launches * 2 * slab * gpu.config().kv_heads);
}
