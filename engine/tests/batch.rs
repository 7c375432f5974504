//! Many sequences at once on real kernels: each gets, to the bit, what it gets alone.

mod support;

use std::path::Path;

use kvwarp::linear::Activations;
use kvwarp::slab::Format;
use kvwarp_engine::cache::Cache;
use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::runner::{Choice, CpuRunner, Row, RunError, Runner, Slabs, Turn, plus};
use kvwarp_engine::source::Source;
use kvwarp_engine::spec::CacheSpec;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use support::program::fixture;
use support::schedule::{alone, fed, requests, run, watched};

const BLOCK: usize = 64;
const CHOICE: Choice = Choice::GREEDY;

fn tiny(name: &str) -> Source {
    Source::open(Path::new(&fixture(name))).unwrap()
}

fn spec(text: &str) -> CacheSpec {
    text.parse().unwrap()
}

fn tokens(rng: &mut ChaCha8Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(0..250)).collect()
}

/// A cache with `rows` sequences of different lengths.
fn filled(model: &Model<'_>, spec: &CacheSpec, rows: usize) -> Cache {
    let (mut cache, mut work) = (model.cache(spec, 400).unwrap(), Work::default());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..rows {
        let (row, n) = (cache.open(), rng.random_range(1..200));
        let tokens = tokens(&mut rng, n);
        watched(|watch| model.read(&tokens, (&mut cache, row), &mut work, watch)).unwrap();
    }
    cache
}

/// Logits of three steps of the sequences `rows` together, `[step][row][vocab]`.
fn steps(model: &Model<'_>, mut cache: Cache, rows: &[usize]) -> Vec<Vec<Vec<f32>>> {
    let mut work = Work::default();
    let mut step = |step: usize| {
        let tokens: Vec<_> = rows.iter().map(|row| [(step * 64 + row) as u32 % 250]).collect();
        let turns: Vec<_> =
            rows.iter().zip(&tokens).map(|(&row, token)| (Row(row), &token[..])).collect();
        model.step(&turns, &mut cache, &mut work).unwrap();
        work.logits().chunks_exact(model.config().vocab).map(<[f32]>::to_vec).collect()
    };
    (0..3).map(&mut step).collect()
}

fn check_company(model: &Model<'_>, spec: &CacheSpec, companies: &[usize]) {
    let rows = companies.iter().copied().max().unwrap();
    let cache = filled(model, spec, rows);
    let singly: Vec<_> = (0..rows).map(|row| steps(model, cache.clone(), &[row])).collect();
    for &n in companies {
        let together = steps(model, cache.clone(), &(0..n).collect::<Vec<_>>());
        for (step, logits) in together.iter().enumerate() {
            for (row, logits) in logits.iter().enumerate() {
                assert!(
                    *logits == singly[row][step][0],
                    "{spec}: {n} rows, row {row}, step {step}"
                );
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    for (name, text) in
        [("llama3", "f16"), ("mistral", "q4,window=0"), ("qwen2", "q2"), ("llama_linear", "fp8")]
    {
        let source = tiny(name);
        let model = Model::new(&source, 2, Activations::Q8).unwrap();
        check_company(&model, &spec(text), &[2, 5, 16, 64]);
    }
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    for activations in [Activations::Q8, Activations::F32] {
        check_company(&Model::new(&source, 2, activations).unwrap(), &spec("q2"), &[2, 5, 9]);
    }
}

/// A runner with one sequence of `n` tokens.
fn one<'m>(model: &'m Model<'m>, spec: &CacheSpec, n: usize) -> (CpuRunner<'m>, Row) {
    let mut runner = CpuRunner::new(model, spec, 4, 400).unwrap();
    let row = runner.open().unwrap();
    let text = tokens(&mut ChaCha8Rng::seed_from_u64(2), n);
    watched(|watch| runner.read(row, &text, watch)).unwrap();
    (runner, row)
}

#[test]
fn tokens_of_one_turn_are_as_tokens_one_by_one() {
    let source = tiny("qwen2");
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    for text in [
        "f16",
        "q4,window=0",
        "q2",
        "q8,window=70",
        "q2-kivi,window=64,kivi_exact",
        "q8,window=0,evict=lagkv:0.5:lag=16",
        "f16,evict=streaming:0.5",
    ] {
        let (spec, text) = (spec(text), tokens(&mut ChaCha8Rng::seed_from_u64(3), 150));
        let (mut singly, row) = one(&model, &spec, 50);
        let expected = fed(&mut singly, row, &text, 1);
        for most in [2, 5, 16] {
            let (mut runner, row) = one(&model, &spec, 50);
            assert_eq!(fed(&mut runner, row, &text, most), expected, "{spec}, {most}");
            assert_eq!(runner.len(row), 200);
        }
    }
}

#[test]
fn drafts_that_are_not_taken_leave_no_trace() {
    let source = tiny("llama3");
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    for spec in ["f16", "q4,window=0", "q2", "q8,evict=lagkv:0.25:lag=16"].map(spec) {
        let text = tokens(&mut ChaCha8Rng::seed_from_u64(4), 100);
        let (mut singly, row) = one(&model, &spec, 90);
        let expected = fed(&mut singly, row, &text, 1);
        let (mut runner, row) = one(&model, &spec, 90);
        for (at, &expected) in expected.iter().enumerate() {
            let drafts = runner.drafts(row);
            let turn = [vec![text[at]], vec![7; drafts]].concat();
            assert_eq!(fed(&mut runner, row, &turn, 16)[0], expected, "{spec}, token {at}");
            runner.rollback(row, drafts).unwrap();
        }
        let too_many = vec![7; 2 + runner.drafts(row)];
        let turn = Turn { row, tokens: &too_many, choice: &CHOICE, draw: 0, recent: &[] };
        let error = runner.step(&[turn], &mut Vec::new()).unwrap_err();
        assert!(matches!(error, RunError::Turn { .. }), "{error}");
    }
}

#[test]
fn frozen_sequences_go_on_as_often_as_one_likes() {
    let source = tiny("qwen2");
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    let chosen = ["q4,window=0,evict=h2o:0.5,budget=global", "q8,window=0,evict=lagkv:0.5:lag=16"];
    for spec in
        [&["f16", "q4,window=0", "q2", "q2-small"][..], &chosen].concat().into_iter().map(spec)
    {
        let text = tokens(&mut ChaCha8Rng::seed_from_u64(5), 100);
        let (mut runner, row) = one(&model, &spec, 192);
        let before = runner.free();
        let frozen = runner.freeze(row).unwrap();
        let expected = fed(&mut runner, row, &text, 1);
        runner.close(row);
        for _ in 0..2 {
            let rows: Vec<_> = (0..4).map(|_| runner.thaw(&frozen).unwrap()).collect();
            assert!(matches!(runner.thaw(&frozen), Err(RunError::Rows { rows: 4 })));
            for &row in &rows {
                assert_eq!(runner.len(row), 192);
                assert_eq!(fed(&mut runner, row, &text, 1), expected, "{spec}");
            }
            rows.into_iter().for_each(|row| runner.close(row));
        }
        let row = runner.thaw(&frozen).unwrap();
        runner.melt(frozen);
        assert_eq!(runner.free(), before, "one sequence of 192 tokens is what is left");
        assert_eq!(fed(&mut runner, row, &text, 1), expected);
        runner.close(row);
        let all = CpuRunner::new(&model, &spec, 4, 400).unwrap().free();
        assert_eq!(runner.free(), all);
    }
    let (mut runner, row) = one(&model, &spec("q2-kivi,window=64,kivi_exact"), 64);
    assert!(matches!(runner.freeze(row), Err(RunError::Shared { .. })));
}

#[test]
fn a_pool_that_is_too_small_refuses_and_changes_nothing() {
    let source = tiny("llama3");
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    let spec = spec("q4,window=0");
    let mut slabs = Slabs::default();
    slabs[Format::Q4 as usize] = 2;
    let runner = CpuRunner::new(&model, &spec, 2, 400).unwrap();
    // Two slabs for each of two layers' one head.
    assert_eq!(runner.need(0, 128), slabs.map(|n| 2 * n));
    let mut runner = runner.with_pools(&slabs);
    let row = runner.open().unwrap();
    let text = tokens(&mut ChaCha8Rng::seed_from_u64(6), 128);
    let error = watched(|watch| runner.read(row, &text, watch)).unwrap_err();
    assert!(matches!(error, RunError::Exhausted { format: Format::Q4, need: 4, free: 2 }));
    watched(|watch| runner.read(row, &text[..127], watch)).unwrap();
    let turn = Turn { row, tokens: &text[127..], choice: &CHOICE, draw: 0, recent: &[] };
    assert!(matches!(runner.step(&[turn], &mut Vec::new()), Err(RunError::Exhausted { .. })));
    assert_eq!((runner.len(row), runner.free()[Format::Q4 as usize]), (127, 0));
}

/// A random schedule of `n` requests on pools for `sequences` of the longest of them.
fn schedule(name: &str, text: &str, n: u64, sequences: usize) {
    let (source, spec) = (tiny(name), spec(text));
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(n);
    let requests = requests(&mut rng, n, 200, 24);
    let runner = CpuRunner::new(&model, &spec, 6, 224).unwrap();
    // Where tokens are dropped, what the longest request is promised: its prompt's, then each step's.
    let slabs = match spec.selects() {
        true => plus(runner.need(0, 200), runner.need(200, 24)).map(|n| n * sequences),
        false => runner.slabs_for(sequences, 224),
    };
    let mut runner = runner.with_pools(&slabs);
    let outcome = run(&mut runner, &requests, BLOCK, 50, &mut rng);
    let (mut preemptions, mut shared) = (0, 0);
    for request in &requests {
        let Some(done) = outcome.done.get(&request.id) else {
            assert!(outcome.cancelled.contains(&request.id), "{text}: {}", request.id);
            continue;
        };
        let mut single = CpuRunner::new(&model, &spec, 1, 224).unwrap();
        let expected = alone(&mut single, request, BLOCK).unwrap();
        assert_eq!(done.tokens, expected, "{text}: {}", request.id);
        (preemptions, shared) = (preemptions + done.preemptions, shared + done.shared_tokens);
    }
    eprintln!("{text}: {} rounds, {preemptions} preemptions, {shared} shared", outcome.rounds);
    assert!(spec.selects() || preemptions > 0 && !outcome.cancelled.is_empty());
    assert_eq!(shared > 0, !spec.selects());
    assert_eq!(runner.free(), slabs, "{text}");
}

#[test]
fn a_thousand_requests_get_what_they_get_alone() {
    schedule("llama3", "f16", 260, 2);
    schedule("mistral", "q4,window=0", 240, 1);
    schedule("qwen2", "q2", 250, 1);
    schedule("llama_linear", "q2-small", 250, 2);
    schedule("qwen2", "q8,window=0,evict=snapkv:0.5:window=8,budget=global", 60, 1);
    schedule("llama_linear", "q8,window=0,evict=lagkv:0.5:lag=16", 60, 1);
}
