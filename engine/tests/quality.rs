//! What fewer bits cost a real model: distance from the f16 cache on texts, and pass keys that are found again.
//!
//! The recipe of q2 was chosen on other texts; it is calibrated here on this crate's sources and documents.
//! `cargo test --release -p kvwarp-engine --test quality -- --ignored` measures every preset and writes
//! `benches/record/quality.csv`.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use kvwarp::linear::Activations;
use kvwarp_engine::cache::{Shape, full_bytes};
use kvwarp_engine::calibration::{Calibration, read};
use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::perplexity::{Distance, Reading, compare};
use kvwarp_engine::source::Source;
use kvwarp_engine::spec::CacheSpec;
use kvwarp_engine::tokenizer::Tokenizer;
use kvwarp_engine::watch::Watch;
use serde::Deserialize;

/// Tokens read exactly and then quantised, and tokens scored after them.
const PREFIX: usize = 2048;
const SCORED: usize = 512;
/// Tokens that a calibration reads, and reads together.
const CALIBRATION: (usize, usize) = (8192, 2048);

#[derive(Deserialize)]
struct Text {
    tokens: Vec<u32>,
}

fn texts() -> BTreeMap<String, Text> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/texts.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn model(source: &Source) -> Model<'_> {
    Model::new(source, kvwarp::threads::physical_cores(), Activations::Q8).unwrap()
}

fn watched<T>(body: impl FnOnce(&mut Watch<'_>) -> T) -> T {
    body(&mut Watch::new(&AtomicBool::new(false), &mut |_| {}))
}

/// Prose and code that have nothing to do with the texts measured.
fn other_text() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let files =
        ["README.md", "csrc/README.md", "src/slab/mod.rs", "engine/src/model.rs", "src/threads.rs"];
    files.map(|file| std::fs::read_to_string(root.join(file)).unwrap()).concat()
}

fn calibrated(source: &Source) -> Model<'_> {
    let (text, folder) = (other_text(), tempfile::tempdir().unwrap());
    let mut tokens = source.tokenizer().unwrap().encode(&text, false).unwrap();
    tokens.truncate(CALIBRATION.0);
    let (to, empty) = (folder.path().join("kv"), Calibration::new(source, &text));
    watched(|watch| read(&model(source), empty, &tokens, CALIBRATION.1, watch, &to)).unwrap();
    model(source).with_calibration(&Calibration::open(&to, source).unwrap())
}

/// Log-perplexity and distance from f16 of `windows` windows of a text.
fn distance(model: &Model<'_>, spec: &CacheSpec, text: &Text, windows: usize) -> (f64, Distance) {
    let reading = Reading { cache: *spec, prefix: PREFIX, piece: SCORED };
    let mut sums = (0.0, Distance { f16: 0.0, kl: 0.0, agreement: 0.0 });
    for tokens in text.tokens.chunks_exact(PREFIX + SCORED).take(windows) {
        let (scores, far) = watched(|watch| compare(model, tokens, &reading, watch)).unwrap();
        sums.0 += scores.mean() / windows as f64;
        sums.1.f16 += far.f16 / windows as f64;
        sums.1.kl += far.kl / windows as f64;
        sums.1.agreement += far.agreement / windows as f64;
    }
    sums
}

/// Bits an element of a cache that is full with `context` tokens, everything included.
fn bits(source: &Source, spec: &CacheSpec, context: usize) -> f64 {
    let config = &source.config;
    let shape = Shape {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        context,
    };
    let elements = 2 * config.layers * config.kv_heads * config.head_dim * context;
    full_bytes(spec, shape).unwrap() as f64 * 8.0 / elements as f64
}

#[test]
fn two_bits_cost_little() {
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    let model = calibrated(&source);
    // Nats over f16, share of equal top tokens, bits an element at 8,192 tokens.
    for (spec, nats, agreement, most_bits) in [
        ("q2", 0.05, 0.90, 2.6),
        ("q2,group=32,window=128", 0.03, 0.92, 3.2),
        ("q4", 0.005, 0.94, 5.5),
    ] {
        let spec: CacheSpec = spec.parse().unwrap();
        assert!(bits(&source, &spec, 8192) <= most_bits, "{spec}: {}", bits(&source, &spec, 8192));
        for (name, text) in texts() {
            let (mean, far) = distance(&model, &spec, &text, 1);
            let more = mean - far.f16;
            eprintln!("{name} {spec}: {more:+.4} nats, KL {:.4}, {:.3}", far.kl, far.agreement);
            assert!(more <= nats, "{name}, {spec}: {more} nats more than f16");
            assert!(far.agreement >= agreement, "{name}, {spec}: {}", far.agreement);
        }
    }
}

/// A pass key of `digits` digits in a text of about `tokens` tokens, and the question for it.
fn pass_key(tokenizer: &Tokenizer, tokens: usize, digits: usize, seed: u64) -> (Vec<u32>, String) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let key: String = (0..digits).map(|_| char::from(b'0' + next(10) as u8)).collect();
    let filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";
    let each = tokenizer.encode(filler, false).unwrap().len();
    let fillers = tokens.saturating_sub(2 * digits + 60) / each;
    let before = fillers * (1 + next(8) as usize) / 10;
    let text = format!(
        "There is a pass key hidden in this text. Remember it.\n{}The pass key is {key}. Remember it. {key} is the pass key.\n{}What is the pass key? The pass key is ",
        filler.repeat(before),
        filler.repeat(fillers - before),
    );
    (tokenizer.encode(text.trim_end(), false).unwrap(), key)
}

/// Whether the model says the key.
fn finds(
    model: &Model<'_>,
    tokenizer: &Tokenizer,
    spec: &CacheSpec,
    prompt: &[u32],
    key: &str,
) -> bool {
    let steps = key.len() + 2;
    let mut cache = model.cache(spec, prompt.len() + steps).unwrap();
    let mut work = Work::default();
    watched(|watch| model.prefill(prompt, &mut cache, &mut work, watch)).unwrap();
    let mut said = Vec::new();
    for _ in 0..steps {
        let best = work.logits().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        said.push(best as u32);
        model.decode(best as u32, &mut cache, &mut work).unwrap();
    }
    tokenizer.decode(&said, false).trim_start().starts_with(key)
}

/// Keys found of `seeds`.
fn found(
    model: &Model<'_>,
    tokenizer: &Tokenizer,
    spec: &str,
    (tokens, digits): (usize, usize),
    seeds: u64,
) -> u64 {
    let spec: CacheSpec = spec.parse().unwrap();
    let found = (0..seeds).filter(|&seed| {
        let (prompt, key) = pass_key(tokenizer, tokens, digits, seed + 1);
        finds(model, tokenizer, &spec, &prompt, &key)
    });
    found.count() as u64
}

#[test]
fn pass_keys_are_found_in_two_bits() {
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    let (model, tokenizer) = (calibrated(&source), source.tokenizer().unwrap());
    let of = |spec| found(&model, &tokenizer, spec, (1024, 64), 4);
    let (exact, two_bits) = (of("f16"), of("q2"));
    eprintln!("64 digits in 1,024 tokens: f16 {exact} of 4, q2 {two_bits}");
    assert!(two_bits + 1 >= exact, "f16 finds {exact} of 4, q2 {two_bits}");
}

/// Every preset, what its parts give, and KIVI's groups.
const TABLE: [&str; 18] = [
    "f16",
    "q8",
    "fp8",
    "q4",
    "q4,group=64,meta=u8",
    "q4,hadamard=on",
    "q2",
    "q2-small",
    "q2,window=128",
    "q2,group=32",
    "q2,group=32,window=128",
    "q2,sinks=0",
    "q2,hadamard=off",
    "q2,range=100",
    "q2-kivi,sinks=64",
    "q2-kivi",
    "q2-kivi,group=64",
    "q2-kivi,meta=u8",
];

#[test]
#[ignore = "measures for half an hour; writes a record"]
fn table() {
    let source = Source::open(&support::real_model().expect("the model")).unwrap();
    let (plain, calibrated) = (model(&source), calibrated(&source));
    let tokenizer = source.tokenizer().unwrap();
    let mut csv = String::from(
        "spec,calibrated,bits_2k,bits_8k,bits_32k,text,nats,kl,agreement,keys_5_1k,keys_64_1k,keys_64_2k,keys_64_4k\n",
    );
    for (spec, is_calibrated) in TABLE.iter().flat_map(|spec| [(spec, true), (spec, false)]) {
        let parsed: CacheSpec = spec.parse().unwrap();
        if !is_calibrated && !parsed.hadamard {
            continue;
        }
        let model = if is_calibrated { &calibrated } else { &plain };
        let keys = [(1024, 5), (1024, 64), (2048, 64), (4096, 64)]
            .map(|size| found(model, &tokenizer, spec, size, if size.0 > 2048 { 6 } else { 10 }));
        for (name, text) in texts() {
            let (mean, far) = distance(model, &parsed, &text, 2);
            let [a, b, c] = [2048, 8192, 32768].map(|context| bits(&source, &parsed, context));
            let row = format!(
                "\"{spec}\",{},{a:.3},{b:.3},{c:.3},{name},{:.4},{:.4},{:.4},{}",
                is_calibrated && parsed.hadamard,
                mean - far.f16,
                far.kl,
                far.agreement,
                keys.map(|n| n.to_string()).join(","),
            );
            eprintln!("{row}");
            writeln!(csv, "{row}").unwrap();
        }
    }
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/record/quality.csv");
    std::fs::write(to, csv).unwrap();
}
