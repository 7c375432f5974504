//! Caches in files: what is loaded continues as what was saved, to the last bit, and nothing else is loaded.

mod refusals;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};

use kvwarp::linear::Activations;
use kvwarp_engine::cache::Cache;
use kvwarp_engine::calibration::{self, Calibration};
use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::runner::{Frozen, Row};
use kvwarp_engine::source::Source;
use kvwarp_engine::store::{Document, Reader, StoreError, Stored, Writer};
use support::models::{fixture, model, text};
use support::schedule::watched;

/// Tokens of a document, and tokens that a cache holds in all.
const N: usize = 300;
const CONTEXT: usize = 400;

fn cache(model: &Model<'_>, spec: &str) -> (Cache, Row) {
    let mut cache = model.cache(&spec.parse().unwrap(), CONTEXT).unwrap();
    let row = cache.open();
    (cache, row)
}

fn read(model: &Model<'_>, (cache, row): (&mut Cache, Row), tokens: &[u32]) {
    watched(|watch| model.read(tokens, (cache, row), &mut Work::default(), watch)).unwrap();
}

/// Any keys and values, of which each head keeps its own choice.
fn ragged(model: &Model<'_>, (cache, row): (&mut Cache, Row), keeps: &[Vec<u32>]) {
    let (config, random) = (model.config(), |seed, i| kvwarp::sample::draw(seed, i as i32));
    let values = |seed| {
        let value = |i| random(seed, i) as f32 / u64::MAX as f32 - 0.5;
        (0..N * config.kv_heads * config.head_dim).map(value).collect::<Vec<f32>>()
    };
    cache.advance(row, N).unwrap();
    for layer in 0..config.layers {
        cache.stage(row, layer, N);
        cache.fill(row, layer, &values(1), &values(2), N);
        for h in 0..config.kv_heads {
            cache.keep(row, layer, h, 0, &keeps[layer * config.kv_heads + h]).unwrap();
        }
        cache.compress(row, layer, model.team()).unwrap();
    }
    cache.unstage();
}

/// Logits of 80 steps.
fn said(model: &Model<'_>, (cache, row): (&mut Cache, Row)) -> Vec<f32> {
    let mut work = Work::default();
    let step = |token: u32| {
        model.step(&[(row, &[token])], cache, &mut work).unwrap();
        work.logits().to_vec()
    };
    text(80).into_iter().flat_map(step).collect()
}

fn write(
    model: &Model<'_>,
    cache: &Cache,
    frozen: &Frozen,
    path: &Path,
) -> Result<u64, StoreError> {
    let document = Document { tokens: text(N), chat: false };
    let writer = Writer::create(path, Reader::new(model, cache.spec()))?;
    watched(|watch| writer.write(&document, (cache, frozen), watch))
}

/// Writes what `row` holds, loads it, and continues both.
fn check_detour(model: &Model<'_>, (mut cache, row): (Cache, Row), path: &Path) {
    let spec = *cache.spec();
    let frozen = cache.freeze(row).unwrap();
    let bytes = write(model, &cache, &frozen, path).unwrap();
    let stored = Stored::open(path, model).unwrap();
    assert_eq!((stored.bytes() as u64, stored.spec()), (bytes, &spec));
    assert_eq!((&stored.document().tokens, stored.document().chat), (&text(N), false));
    let mut other = model.cache(&spec, CONTEXT).unwrap();
    let free = other.free();
    let loaded = stored.load(&mut other).unwrap();
    assert_eq!((loaded.len, &loaded.heads), (N, &frozen.heads));
    // What was loaded is saved as the same bytes.
    let again = path.with_extension("again");
    write(model, &other, &loaded, &again).unwrap();
    assert!(std::fs::read(&again).unwrap() == std::fs::read(path).unwrap(), "{spec}");
    let want = said(model, (&mut cache, row));
    assert!(want.iter().all(|x| x.is_finite()));
    let rows = [other.thaw(&loaded), other.thaw(&loaded)];
    for row in rows {
        assert!(said(model, (&mut other, row)) == want, "{spec}");
    }
    let next = other.thaw(&loaded);
    assert!(said(model, (&mut other, next)) == want, "{spec}, after others");
    rows.into_iter().chain([next]).for_each(|row| other.close(row));
    other.melt(loaded);
    assert_eq!(other.free(), free, "{spec}");
}

#[test]
fn a_loaded_cache_continues_as_if_it_had_never_left() {
    let folder = tempfile::tempdir().unwrap();
    for (name, spec) in [
        ("qwen2", "f16"),
        ("qwen2", "q2"),
        ("llama3", "q2,window=0"),
        ("mistral", "q2-small"),
        ("llama_linear", "q4,sinks=64"),
        ("qwen2", "q8"),
        ("llama3", "fp8,window=0"),
    ] {
        let source = fixture(name);
        let model = model(&source);
        let (mut cache, row) = cache(&model, spec);
        read(&model, (&mut cache, row), &text(N));
        check_detour(&model, (cache, row), &folder.path().join("cache"));
    }
}

#[test]
fn heads_that_hold_different_tokens_come_back_so() {
    let (folder, source) = (tempfile::tempdir().unwrap(), fixture("qwen2"));
    let model = model(&source);
    let every = |step: usize| (0..N as u32).step_by(step).collect::<Vec<_>>();
    for spec in ["f16,evict=random:0.5", "q2,evict=random:0.5", "q2-small,evict=streaming:0.3"] {
        let (mut cache, row) = cache(&model, spec);
        ragged(&model, (&mut cache, row), &[every(1), every(3), vec![], vec![299]]);
        assert!(cache.lens(row, 1).eq([0, 1]));
        check_detour(&model, (cache, row), &folder.path().join("cache"));
    }
    // LagKV chooses among what follows, so it has to know what it has chosen among.
    let (mut cache, row) = cache(&model, "q2,evict=lagkv:0.5:lag=16");
    read(&model, (&mut cache, row), &text(N));
    assert!(cache.lens(row, 0).all(|len| len < 200));
    check_detour(&model, (cache, row), &folder.path().join("cache"));
}

/// A policy chooses among a document; a question that follows it stays, but for what LagKV drops of any text.
#[test]
fn what_is_read_later_stays() {
    let source = fixture("qwen2");
    let model = model(&source);
    for (spec, lens) in [
        ("f16,evict=snapkv:0.25:window=8", [70, 70]),
        ("q2,tsp=0:0.25", [190, 70]),
        // 16 at the start, 8 of each 16 after them, and the newest 16 + 14, which are not settled.
        ("q2,evict=lagkv:0.5:lag=16", [118, 118]),
    ] {
        let (mut cache, row) = cache(&model, spec);
        read(&model, (&mut cache, row), &text(160));
        read(&model, (&mut cache, row), &text(30));
        let held = [0, 1].map(|layer| cache.lens(row, layer).collect::<Vec<_>>());
        assert_eq!(held, lens.map(|len| vec![len; 2]), "{spec}");
    }
}

/// A calibration of the fixture by a text of its own.
fn calibrated(source: &Source, text: &[u32], to: PathBuf) -> Calibration {
    let model = Model::new(source, 2, Activations::F32).unwrap();
    watched(|watch| {
        let empty = Calibration::new(source, "");
        let mut read = calibration::read(&model, empty, text, 64, watch, &to).unwrap();
        let model = model.with_calibration(&read);
        calibration::measure(&model, &mut read, text, watch, &to).unwrap();
        read
    })
}

#[test]
fn a_calibration_goes_with_what_it_has_rounded() {
    let (folder, source) = (tempfile::tempdir().unwrap(), fixture("qwen2"));
    let path = folder.path().join("cache");
    let [one, other] = [&text(160)[..], &text(240)[80..]]
        .map(|text| calibrated(&source, text, folder.path().join("kv")));
    let of = |calibration| model(&source).with_calibration(calibration);
    for spec in ["q2,keep=25", "q2-kivi,keep=25", "f16"] {
        let model = of(&one);
        let (mut cache, row) = cache(&model, spec);
        read(&model, (&mut cache, row), &text(N));
        check_detour(&model, (cache, row), &path);
        let others = [Stored::open(&path, &of(&other)), Stored::open(&path, &self::model(&source))];
        for (opened, print) in others.into_iter().zip([&*other.fingerprint(), "none"]) {
            if spec == "f16" {
                assert!(opened.is_ok());
                continue;
            }
            let error = opened.err().unwrap().to_string();
            let part = format!("`calibration` is {}, expected {print}", one.fingerprint());
            assert!(error.contains(&part), "{error}");
        }
    }
}

#[test]
fn the_same_document_gives_the_same_bytes() {
    let (folder, source) = (tempfile::tempdir().unwrap(), fixture("llama3"));
    let path = folder.path().join("cache");
    let file = |threads, more: usize| {
        let model = Model::new(&source, threads, Activations::F32).unwrap();
        let (mut cache, row) = cache(&model, "q2");
        read(&model, (&mut cache, row), &text(N));
        // What was held and forgotten is in no file.
        let mut work = Work::default();
        for token in text(more) {
            model.step(&[(row, &[token])], &mut cache, &mut work).unwrap();
        }
        cache.rollback(row, more).unwrap();
        let frozen = cache.freeze(row).unwrap();
        write(&model, &cache, &frozen, &path).unwrap();
        std::fs::read(&path).unwrap()
    };
    let whole = file(1, 0);
    assert!(file(2, 0) == whole && file(2, 5) == whole);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
