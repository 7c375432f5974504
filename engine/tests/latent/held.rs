//! What a cache of latents holds: bytes, slabs that are shared, tokens that are forgotten.

use kvwarp::slab::{Format, TOKENS};
use kvwarp_engine::cache::{Cache, full_bytes};
use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::runner::{Choice, CpuRunner, Row, RunError, Runner, Slabs, Turn};
use kvwarp_engine::store::{Document, Reader, Stored, Writer};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use super::support::models::{model, text};
use super::support::schedule::{alone, fed, requests, run, watched};
use super::{MODELS, spec, staged};

const F16: usize = Format::F16 as usize;
const CHOICE: Choice = Choice::GREEDY;

/// Bytes of a slot of a model's layers: 64 rows of `2 r kv_heads + c` f16.
fn slot(model: &Model<'_>) -> usize {
    let config = model.config();
    let elite = config.elite.as_ref().unwrap();
    let row = |rank: &usize| 2 * elite.pairs * config.kv_heads + rank;
    2 * TOKENS * elite.ranks.iter().map(row).sum::<usize>()
}

fn read(model: &Model<'_>, (cache, row): (&mut Cache, Row), tokens: &[u32]) {
    watched(|watch| model.read(tokens, (cache, row), &mut Work::default(), watch)).unwrap();
}

/// Logits of a step for each of `tokens`.
fn said(model: &Model<'_>, (cache, row): (&mut Cache, Row), tokens: &[u32]) -> Vec<f32> {
    let mut work = Work::default();
    let step = |token: &u32| {
        model.step(&[(row, &[*token])], cache, &mut work).unwrap();
        work.logits().to_vec()
    };
    tokens.iter().flat_map(step).collect()
}

/// From the allocator, in whole slabs of 64 tokens, with 4 bytes of page table a slab and nothing else.
#[test]
fn bytes_are_those_of_the_formula() {
    let (source, _) = staged(MODELS[1]);
    let model = model(&source);
    for tokens in [1, 63, 64, 65, 128, 300] {
        let mut cache = model.cache(&spec("latent"), tokens).unwrap();
        let row = cache.open();
        // Half of them at once, the others one by one.
        read(&model, (&mut cache, row), &text(tokens.div_ceil(2)));
        said(&model, (&mut cache, row), &text(tokens / 2));
        let slabs = tokens.div_ceil(TOKENS);
        let (stats, [pools, rings, staging]) = (cache.stats(row), cache.most_bytes());
        assert_eq!(stats.tokens, tokens);
        assert_eq!(stats.used_bytes, slabs * (slot(&model) + 4));
        assert_eq!(pools, slabs * slot(&model), "{tokens} tokens");
        // Tables, with what a vector has to spare; no ring. A layer of a prompt is exact while it is read.
        assert!(rings <= 4 * (slabs + 4), "{rings}");
        let layer = tokens.div_ceil(2).div_ceil(TOKENS) * 4 * TOKENS * 64 * 2;
        assert!(staging <= layer + stats.used_bytes, "{staging}");
        let shape = model.shape(tokens);
        let full = full_bytes(&spec("latent"), shape, &model.plan(&spec("latent"))).unwrap();
        assert_eq!(full, stats.used_bytes);
        let elements = 2 * tokens * 2 * 2 * 64;
        let bits = 8.0 * stats.used_bytes as f64 / elements as f64;
        assert!((stats.effective_bits - bits).abs() < 1e-9);
        cache.close(row);
        assert_eq!(cache.free()[F16], cache.free().into_iter().max().unwrap());
    }
}

/// A runner with a sequence of `n` tokens.
fn one<'m>(model: &'m Model<'m>, text_of: &str, n: usize) -> (CpuRunner<'m>, Row) {
    let mut runner = CpuRunner::new(model, &spec(text_of), 4, 400).unwrap();
    let row = runner.open().unwrap();
    watched(|watch| runner.read(row, &text(n), watch)).unwrap();
    (runner, row)
}

#[test]
fn drafts_are_as_tokens_one_by_one_and_leave_no_trace() {
    let (source, _) = staged(MODELS[0]);
    let (model, tokens) = (model(&source), text(150));
    // The window, and tokens of 200 that may be forgotten: what has left it may be shared or is packed.
    for (spec, loose) in [("latent", 8), ("latent-q4,window=40", 72), ("latent-q2,window=0", 8)] {
        let (mut singly, row) = one(&model, spec, 50);
        let expected = fed(&mut singly, row, &tokens, 1);
        for most in [2, 5, 16] {
            let (mut runner, row) = one(&model, spec, 50);
            assert_eq!(fed(&mut runner, row, &tokens, most), expected, "{spec}, {most}");
        }
        let (mut runner, row) = one(&model, spec, 50);
        for (at, &expected) in expected.iter().enumerate() {
            let drafts = runner.drafts(row);
            let turn = [vec![tokens[at]], vec![7; drafts]].concat();
            assert_eq!(fed(&mut runner, row, &turn, 16)[0], expected, "{spec}, token {at}");
            runner.rollback(row, drafts).unwrap();
        }
        assert_eq!(runner.len(row), 200);
        assert!(runner.rollback(row, loose + 1).is_err());
        runner.rollback(row, loose).unwrap();
        assert_eq!(runner.len(row), 200 - loose);
    }
}

#[test]
fn frozen_sequences_go_on_as_often_as_one_likes() {
    let (source, _) = staged(MODELS[1]);
    let (model, tokens) = (model(&source), text(100));
    // Of 192 and of 200 tokens, slabs that are copied.
    for (spec_of, held, copied) in [
        ("latent", 192, 0),
        ("latent", 200, 1),
        ("latent-q4", 192, 1),
        ("latent-q4,window=64,sinks=70", 200, 2),
        ("latent-q2,window=0,sinks=0", 200, 1),
    ] {
        let (mut runner, row) = one(&model, spec_of, held);
        let before = runner.free();
        let frozen = runner.freeze(row).unwrap();
        assert_eq!((frozen.entries.len(), frozen.heads.len()), (held.div_ceil(TOKENS), 1));
        assert_eq!(before[F16] - runner.free()[F16], copied, "{spec_of}: others are shared");
        let expected = fed(&mut runner, row, &tokens, 1);
        runner.close(row);
        for _ in 0..2 {
            let rows: Vec<_> = (0..4).map(|_| runner.thaw(&frozen).unwrap()).collect();
            assert!(matches!(runner.thaw(&frozen), Err(RunError::Rows { rows: 4 })));
            for &row in &rows {
                assert_eq!(runner.len(row), held);
                assert_eq!(fed(&mut runner, row, &tokens, 1), expected);
            }
            rows.into_iter().for_each(|row| runner.close(row));
        }
        let row = runner.thaw(&frozen).unwrap();
        runner.melt(frozen);
        assert_eq!(runner.free(), before, "one sequence is what is left");
        assert_eq!(fed(&mut runner, row, &tokens, 1), expected);
        runner.close(row);
        assert_eq!(runner.free(), CpuRunner::new(&model, &spec(spec_of), 4, 400).unwrap().free());
    }
}

/// A random schedule on pools for two sequences of the longest of them: requests share beginnings, wait, are preempted
/// and begin again, and each gets what it gets alone.
#[test]
fn requests_get_what_they_get_alone() {
    let (source, _) = staged(MODELS[2]);
    let (model, mut rng) = (model(&source), ChaCha8Rng::seed_from_u64(7));
    let requests = requests(&mut rng, 120, 200, 24);
    // Slabs of 224 tokens that have left the window, and what is copied of a sequence that is frozen: of latents the newest,
    // otherwise the window and what a turn adds to it.
    for (text, pools, waiting) in [
        ("latent", Slabs::from([8, 0, 0, 0, 0]), 6),
        ("latent-q2,window=20", Slabs::from([2 * (1 + 2), 0, 0, 4, 0]), 6 * 2 + 32),
    ] {
        let new = |rows| CpuRunner::new(&model, &spec(text), rows, 224).unwrap();
        let (runner, two) = (new(6), new(6).slabs_for(2, 224));
        assert_eq!(two, pools);
        let cache = model.cache(&spec(text), 224).unwrap();
        let bytes = |format: Format| two[format as usize] * cache.slab_stride(format);
        let bytes: usize = Format::ALL.into_iter().map(bytes).sum();
        assert_eq!(runner.slabs_in(bytes + waiting * slot(&model), 224), two);
        let mut runner = runner.with_pools(&two);
        let outcome = run(&mut runner, &requests, 64, 50, &mut rng);
        let (mut preemptions, mut shared) = (0, 0);
        for request in &requests {
            let Some(done) = outcome.done.get(&request.id) else {
                assert!(outcome.cancelled.contains(&request.id), "{}", request.id);
                continue;
            };
            assert_eq!(done.tokens, alone(&mut new(1), request, 64).unwrap(), "{}", request.id);
            (preemptions, shared) = (preemptions + done.preemptions, shared + done.shared_tokens);
        }
        assert!(preemptions > 0 && shared > 0, "{preemptions} preemptions, {shared} shared");
        assert_eq!(runner.free(), two);
    }
}

/// Pools for fewer slabs than a prompt has refuse it and change nothing.
#[test]
fn a_pool_that_is_too_small_refuses() {
    let (source, _) = staged(MODELS[0]);
    let model = model(&source);
    let runner = CpuRunner::new(&model, &spec("latent"), 2, 400).unwrap();
    let mut runner = runner.with_pools(&Slabs::from([1, 0, 0, 0, 0]));
    let row = runner.open().unwrap();
    let read = |runner: &mut CpuRunner<'_>, n| watched(|watch| runner.read(row, &text(n), watch));
    let error = read(&mut runner, 128).unwrap_err();
    assert!(matches!(error, RunError::Exhausted { format: Format::F16, need: 2, free: 1 }));
    read(&mut runner, 127).unwrap();
    let turn = Turn { row, tokens: &[1], choice: &CHOICE, draw: 0, recent: &[] };
    assert!(matches!(runner.step(&[turn], &mut Vec::new()), Err(RunError::Exhausted { .. })));
    assert_eq!((runner.len(row), runner.free()[F16]), (127, 0));
}

/// A document in a file goes on as it went on, to the last bit, and is the same bytes when it is written again.
#[test]
fn a_file_continues_as_if_it_had_never_left() {
    let (folder, (source, _)) = (tempfile::tempdir().unwrap(), staged(MODELS[1]));
    let (model, path) = (model(&source), folder.path().join("cache"));
    for (held, text_of, bytes_of) in [
        (256, "latent", 4 * slot(&model)),
        (300, "latent", 5 * slot(&model)),
        // Sinks, two slabs of 36 bytes an element instead of 128, the window.
        (300, "latent-q4,sinks=64,window=100", (128 + 2 * 36 + 2 * 128) * slot(&model) / 128),
    ] {
        let document = Document { tokens: text(held), chat: false };
        let write = |cache: &Cache, frozen, path| {
            let writer = Writer::create(path, Reader::new(&model, cache.spec())).unwrap();
            watched(|watch| writer.write(&document, (cache, frozen), watch)).unwrap()
        };
        let mut cache = model.cache(&spec(text_of), 400).unwrap();
        let row = cache.open();
        read(&model, (&mut cache, row), &document.tokens);
        // What was held and forgotten is in no file.
        said(&model, (&mut cache, row), &text(5));
        cache.rollback(row, 5).unwrap();
        let frozen = cache.freeze(row).unwrap();
        let bytes = write(&cache, &frozen, &path) as usize;
        assert!((bytes_of..bytes_of + 8 * held + 2048).contains(&bytes), "{bytes} for {bytes_of}");
        let stored = Stored::open(&path, &model).unwrap();
        let mut other = model.cache(&spec(text_of), 400).unwrap();
        let free = other.free();
        let loaded = stored.load(&mut other).unwrap();
        let again = folder.path().join("again");
        write(&other, &loaded, &again);
        assert!(std::fs::read(&again).unwrap() == std::fs::read(&path).unwrap());
        let want = said(&model, (&mut cache, row), &text(80));
        for _ in 0..2 {
            let row = other.thaw(&loaded);
            assert!(said(&model, (&mut other, row), &text(80)) == want);
            other.close(row);
        }
        other.melt(loaded);
        assert_eq!(other.free(), free);
    }
    let (other, _) = staged((MODELS[1].0, 8, 80));
    let error = Stored::open(&path, &super::support::models::model(&other)).err().unwrap();
    assert!(error.to_string().contains("`model` is"), "{error}");
}
