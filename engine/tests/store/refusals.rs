//! Files that are of something else, or of nothing.

use std::path::Path;

use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::store::Stored;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use super::{CONTEXT, N, cache, fixture, model, read, text, write};

/// A file of the fixture.
fn written(model: &Model<'_>, spec: &str, path: &Path) -> Vec<u8> {
    let (mut cache, row) = cache(model, spec);
    read(model, (&mut cache, row), &text(N));
    let frozen = cache.freeze(row).unwrap();
    write(model, &cache, &frozen, path).unwrap();
    std::fs::read(path).unwrap()
}

/// `file` with the first `from` as `to`, of the same length.
fn edited(file: &[u8], from: &str, to: &str) -> Vec<u8> {
    let at = file.windows(from.len()).position(|bytes| bytes == from.as_bytes()).expect(from);
    [&file[..at], to.as_bytes(), &file[at + to.len()..]].concat()
}

#[test]
fn what_a_file_says_wrongly_is_named() {
    let (folder, source) = (tempfile::tempdir().unwrap(), fixture("qwen2"));
    let (model, path) = (model(&source), folder.path().join("cache"));
    let whole = written(&model, "q2,range=90", &path);
    let data = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let numbered = |i: usize, n: u32| {
        let mut file = whole.clone();
        file[data + 4 * i..][..4].copy_from_slice(&n.to_le_bytes());
        file
    };
    let print = model.fingerprint();
    let text = |from, to| edited(&whole, from, to);
    // Heads of 300 tokens have 3 packed slabs, the first a sink, and 2 in the ring: 20 entries in all.
    for (file, part) in [
        (vec![], "cut off"),
        (b"a document".to_vec(), "cut off"),
        (whole[..whole.len() - 1].to_vec(), "cut off, or no cache"),
        (
            std::fs::read(source.path().join("model.safetensors")).unwrap(),
            "`kvwarp.cache` is missing, expected 1",
        ),
        (text(r#"cache":"1""#, r#"cache":"2""#), "`kvwarp.cache` is 2, expected 1"),
        (text(r#""slab":"1""#, r#""slab":"9""#), "`slab` is 9, expected 1"),
        (text(&print, &print.chars().rev().collect::<String>()), &*format!("expected {print}")),
        (
            text(r#""layers":"2""#, r#""layers":"4""#),
            "`heads` is U32 [2, 2, 3], expected U32 [4, 2, 3]",
        ),
        (
            text(r#""head_dim":"64""#, r#""head_dim":"96""#),
            "`slabs.f16` is U8 [12, 16384], expected U8 [slabs, 24576]",
        ),
        (text(r#""head_dim":"64""#, r#""head_dim":"6x""#), "`head_dim` is 6x, expected a number"),
        (
            text("q2,range=90", "q2,range=10"),
            "`spec` is q2,range=10, expected one that this version knows (`range`",
        ),
        (text("q2,range=90", "q2,chance=5"), "unknown part `chance`"),
        (
            text(r#""calibration":"none""#, r#""calibration":"some""#),
            "`calibration` is some, expected a hash",
        ),
        (text(r#""plain""#, r#""plane""#), "`prompt` is plane, expected chat or plain"),
        (
            text(r#""dtype":"U8","shape":[8,"#, r#""dtype":"I8","shape":[8,"#),
            "`slabs.q2` is I8 [8, ",
        ),
        (numbered(0, 7), "`entries[0]` is F16 slab 7, expected F16 slab 0"),
        (numbered(1, u32::MAX), "`entries[1]` is no slab (0xffffffff), expected Q2 slab 0"),
        (numbered(2, 3 << 28), "`entries[2]` is Q2 slab 0, expected Q2 slab 1"),
        (numbered(7, 2 << 28 | 3), "`entries[7]` is Q4 slab 3, expected Q2 slab 3"),
        (numbered(20, 299), "`heads[0][0].len` is 299, expected 300"),
        (numbered(23, 301), "`heads[0][1].len` is 301, expected 300"),
        (numbered(27, 4), "`heads[1][0].packed` is 4, expected 3"),
        (numbered(31, 1), "`heads[1][1].chosen` is 1, expected 0"),
        (numbered(40, 256), "`tokens` is 256, expected tokens below 256"),
    ] {
        std::fs::write(&path, &file).unwrap();
        let error = Stored::open(&path, &model).err().expect(part).to_string();
        assert!(error.contains(part) && error.contains("cache: "), "{part}: {error}");
    }
}

#[test]
fn other_models_and_caches_are_refused() {
    let (folder, source, other) =
        (tempfile::tempdir().unwrap(), fixture("qwen2"), fixture("llama3"));
    let (model, other, path) = (model(&source), model(&other), folder.path().join("cache"));
    written(&model, "q8", &path);
    let error = Stored::open(&path, &other).err().unwrap().to_string();
    let prints = [model.fingerprint(), other.fingerprint()];
    assert!(
        error.contains(&format!("`model` is {}, expected {}", prints[0], prints[1])),
        "{error}"
    );
    let stored = Stored::open(&path, &model).unwrap();
    let load = |spec: &str, context| {
        let mut cache = model.cache(&spec.parse().unwrap(), context).unwrap();
        stored.load(&mut cache).unwrap_err().to_string()
    };
    assert!(load("q8,window=64", N).contains("`spec` is q8, expected q8,window=64"));
    assert!(load("q8", N - 1).contains("300 tokens do not fit in a context of 299"));
    let (mut cache, row) = cache(&model, "q2-kivi,kivi_exact");
    read(&model, (&mut cache, row), &text(N));
    let (frozen, path) = (cache.freeze(row).unwrap(), folder.path().join("exact"));
    let error = write(&model, &cache, &frozen, &path).unwrap_err().to_string();
    assert!(error.contains("`q2-kivi,kivi_exact` cannot be kept"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    // A cache with too few slabs takes none.
    let mut small = model.cache(stored.spec(), N).unwrap();
    small.limit(&[3; 5]);
    assert!(stored.load(&mut small).is_err() && small.free() == [3; 5]);
}

#[test]
fn whatever_loads_can_be_continued() {
    let (folder, source) = (tempfile::tempdir().unwrap(), fixture("llama3"));
    let (model, path) = (model(&source), folder.path().join("cache"));
    let whole = written(&model, "q2,evict=random:0.5", &path);
    let (mut rng, mut loaded) = (ChaCha8Rng::seed_from_u64(1), 0);
    for round in 0..400 {
        let mut file = whole.clone();
        for _ in 0..rng.random_range(1..4) {
            let within = if round % 2 == 0 { file.len() } else { file.len().min(1400) };
            let at = rng.random_range(0..within);
            file[at] = rng.random();
        }
        std::fs::write(&path, &file).unwrap();
        let Ok(stored) = Stored::open(&path, &model) else { continue };
        let mut cache = model.cache(stored.spec(), CONTEXT).unwrap();
        let frozen = stored.load(&mut cache).unwrap();
        let row = cache.thaw(&frozen);
        let mut work = Work::default();
        model.step(&[(row, &[1])], &mut cache, &mut work).unwrap();
        loaded += 1;
    }
    assert!((100..400).contains(&loaded), "{loaded} of 400 load");
}
