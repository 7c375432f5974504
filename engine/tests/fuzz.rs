//! A few seconds of mutated files against the bodies of the fuzz targets, with a limit on memory
//! and time.
//!
//! `KVW_FUZZ_SECONDS` (default 2) for each target, `KVW_FUZZ_SEED` (default 1).

mod support;
#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use kvwarp::threads::Team;
use kvwarp_engine::cache::{Cache, Shape};
use kvwarp_engine::spec::CacheSpec;
use kvwarp_engine::store::{Document, Reader, Writer};
use kvwarp_engine::watch::Watch;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use support::Meta;

/// Bytes that reading an input may hold at a time, beside [`FACTOR`] times the input.
const SLACK: usize = 64 << 20;
const FACTOR: usize = 4;
/// Longest time for one input, generous for a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// Counts the bytes in use, and the most since the mark was last set.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(live, Relaxed);
        // SAFETY: the caller's own obligations.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's own obligations.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

type Target = fn(&[u8]);

/// Runs one input; says what broke, if anything did.
fn check(target: Target, input: &[u8]) -> Result<(), String> {
    let (before, started) = (LIVE.load(Relaxed), Instant::now());
    MOST.store(before, Relaxed);
    catch_unwind(AssertUnwindSafe(|| target(input))).map_err(|_| "panicked".to_owned())?;
    let (held, allowed) = (MOST.load(Relaxed).saturating_sub(before), SLACK + FACTOR * input.len());
    if held > allowed {
        return Err(format!(
            "held {held} bytes, allowed {allowed} for an input of {}",
            input.len()
        ));
    }
    let took = started.elapsed();
    if took > LIMIT { Err(format!("took {took:?}")) } else { Ok(()) }
}

/// One change of the kind that breaks parsers: flips, absurd lengths, cuts, copies, splices.
fn mutate(rng: &mut ChaCha8Rng, input: &mut Vec<u8>, other: &[u8]) {
    const LENGTHS: [u64; 10] = [
        0,
        1,
        0xff,
        0xffff,
        0x7fff_ffff,
        0xffff_ffff,
        1 << 32,
        1 << 40,
        i64::MAX as u64,
        u64::MAX - 3,
    ];
    if input.is_empty() {
        input.extend_from_slice(other);
    }
    let at = rng.random_range(0..input.len().max(1));
    match rng.random_range(0..8) {
        0 | 1 => input[at] = rng.random(),
        2 => input[at] ^= 1 << rng.random_range(0..8),
        3 | 4 => {
            let bytes = LENGTHS[rng.random_range(0..LENGTHS.len())].to_le_bytes();
            let width = [1, 4, 8][rng.random_range(0..3)].min(input.len() - at);
            input[at..at + width].copy_from_slice(&bytes[..width]);
        }
        5 => input.truncate(at),
        6 => {
            let end = (at + rng.random_range(1..64)).min(input.len());
            let piece = input[at..end].to_vec();
            input.splice(at..at, piece);
        }
        _ => {
            let from = rng.random_range(0..other.len());
            let end = (from + rng.random_range(1..256)).min(other.len());
            input.splice(at..at, other[from..end].iter().copied());
        }
    }
}

/// Mutates `seeds` until the time is over; inputs run so far.
fn drive(name: &str, target: Target, seeds: &[Vec<u8>]) -> u64 {
    let number = |name: &str, default| std::env::var(name).map_or(default, |n| n.parse().unwrap());
    let (seconds, seed) = (number("KVW_FUZZ_SECONDS", 2), number("KVW_FUZZ_SEED", 1));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut runs = 0;
    while runs < seeds.len() as u64 || Instant::now() < end {
        let mut input = seeds[runs as usize % seeds.len()].clone();
        let changes = if runs < seeds.len() as u64 { 0 } else { rng.random_range(1..6) };
        for _ in 0..changes {
            let other = &seeds[rng.random_range(0..seeds.len())];
            mutate(&mut rng, &mut input, other);
        }
        if let Err(broke) = check(target, &input) {
            let path = std::env::temp_dir().join(format!("kvwarp-fuzz-{name}"));
            std::fs::write(&path, &input).unwrap();
            panic!("{name}: input {runs} of seed {seed} {broke}; kept in {}", path.display());
        }
        runs += 1;
    }
    runs
}

fn vocab(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/vocab/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// GGUF files with vocabularies of both kinds, and one with little but tensors.
fn gguf_seeds() -> Vec<Vec<u8>> {
    let tensors = [
        support::zeros("token_embd.weight", &[128, 4]),
        support::zeros("rope_freqs.weight", &[32]),
    ];
    let list = |entries: Vec<(&str, Meta)>| {
        let mut all = support::model_metadata("llama");
        all.extend(
            entries.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)),
        );
        support::gguf(&all, &tensors)
    };
    let text = |s: &str| Meta::Text(s.to_owned());
    let letters: Vec<String> = ["a", "b", "ab", "Ġ", "Ġab", "<s>"].map(String::from).to_vec();
    let merges = Meta::Texts(vec!["a b".into(), "Ġ ab".into()]);
    let bytes = vec![
        ("model", text("gpt2")),
        ("pre", text("smollm")),
        ("tokens", Meta::Texts(letters)),
        ("merges", merges),
        ("token_type", Meta::I32s(vec![1, 1, 1, 1, 1, 3])),
        ("bos_token_id", Meta::U32(5)),
    ];
    let spelled = ["<unk>", "<s>", "<0x41>", "▁", "a", "b", "▁a", "ab"].map(String::from).to_vec();
    let pieces = vec![
        ("model", text("llama")),
        ("tokens", Meta::Texts(spelled)),
        ("scores", Meta::F32s((0..8).map(|i| -(i as f32)).collect())),
        ("token_type", Meta::I32s(vec![2, 3, 6, 1, 1, 1, 1, 1])),
    ];
    let nested = vec![("nested".to_owned(), Meta::Nested(vec![vec![1, 2], vec![]]))];
    vec![list(bytes), list(pieces), support::gguf(&nested, &tensors)]
}

fn safetensors_seeds() -> Vec<Vec<u8>> {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "lm_head.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [16, 32]},
    });
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([0; 32]);
    vec![file]
}

fn json_seeds() -> Vec<Vec<u8>> {
    let config = |name: &str| {
        std::fs::read(format!("{}/tests/fixtures/{name}/config.json", env!("CARGO_MANIFEST_DIR")))
            .unwrap()
    };
    let mut small = vocab("qwen2.json")["tokenizer"].take();
    small["model"]["vocab"] = json!({"a": 0, "b": 1, "ab": 2});
    small["model"]["merges"] = json!([["a", "b"]]);
    let whole = vocab("llama3.json")["tokenizer"].to_string();
    vec![config("llama3"), config("qwen2"), small.to_string().into_bytes(), whole.into_bytes()]
}

fn spec_seeds() -> Vec<Vec<u8>> {
    ["f16", "q4,window=64,sinks=4", "q2-kivi,window=128,group=32,kivi_exact"]
        .map(Vec::from)
        .to_vec()
}

/// Cache files, one of whose heads hold different tokens.
fn cache_seeds() -> Vec<Vec<u8>> {
    let shape = Shape { layers: 1, kv_heads: 2, head_dim: 64, context: 200 };
    let (folder, stop) = (tempfile::tempdir().unwrap(), AtomicBool::new(false));
    let seed = |spec: &str| {
        let spec: CacheSpec = spec.parse().unwrap();
        let mut cache = Cache::new(&spec, shape).unwrap();
        let (row, rows) = (cache.open(), vec![0.5; 130 * 128]);
        cache.advance(row, 130).unwrap();
        cache.stage(row, 0, 130);
        cache.fill(row, 0, &rows, &rows, 130);
        if spec.selects() {
            cache.keep(row, 0, 1, 0, &[1, 2, 129]).unwrap();
        }
        cache.compress(row, 0, &Team::new(1)).unwrap();
        let frozen = cache.freeze(row).unwrap();
        let reader = Reader { model: "0".repeat(64), shape: [1, 2, 64], spec, calibration: None };
        let document = Document { tokens: (0..130).collect(), chat: true };
        let (path, mut step) = (folder.path().join("cache"), |_| {});
        let writer = Writer::create(&path, reader).unwrap();
        writer.write(&document, (&cache, &frozen), &mut Watch::new(&stop, &mut step)).unwrap();
        std::fs::read(&path).unwrap()
    };
    ["f16", "q2-small", "q4,window=0,evict=random:0.5", "q8,window=0,sinks=64"].map(seed).to_vec()
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn mutated_files_neither_panic_nor_swell() {
    // The guards themselves: a target that allocates or panics is caught.
    let greedy: Target = |_| drop(vec![1u8; SLACK + (1 << 20)]);
    assert!(check(greedy, &[]).unwrap_err().starts_with("held "));
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let caught = check(|data| assert!(data.is_empty()), &[1]);
    std::panic::set_hook(hook);
    assert_eq!(caught.unwrap_err(), "panicked");

    // A large file of nothing but empty strings costs the most memory a byte.
    let strings =
        vec![("tokenizer.ggml.tokens".to_owned(), Meta::Texts(vec![String::new(); 4 << 20]))];
    check(targets::gguf, &support::gguf(&strings, &[])).unwrap();

    for (name, target, seeds) in [
        ("gguf", targets::gguf as Target, gguf_seeds()),
        ("safetensors", targets::safetensors, safetensors_seeds()),
        ("json", targets::json, json_seeds()),
        ("spec", targets::spec, spec_seeds()),
        ("cache", targets::cache, cache_seeds()),
    ] {
        let runs = drive(name, target, &seeds);
        eprintln!("{name}: {runs} inputs");
        assert!(runs > seeds.len() as u64);
    }
}
