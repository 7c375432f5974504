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
use kvwarp::pages::{Pools, packed_slabs};
use kvwarp::slab::{Format, TOKENS};
use kvwarp_engine::calibration::{Calibration, measure, read};
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
/// Tokens that a calibration reads, reads together, and measures heads on.
const CALIBRATION: (usize, usize, usize) = (8192, 2048, 1280);

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
    let mut done =
        watched(|watch| read(&model(source), empty, &tokens, CALIBRATION.1, watch, &to)).unwrap();
    let calibrated = model(source).with_calibration(&done);
    let sample = &tokens[..CALIBRATION.2];
    watched(|watch| measure(&calibrated, &mut done, sample, watch, &to)).unwrap();
    let read_back = Calibration::open(&to, source).unwrap();
    assert_eq!(read_back, done);
    model(source).with_calibration(&read_back)
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

/// Bits an element of K and V that a step reads, everything included, on average over 64 lengths from `context` on: the
/// ring holds the window and up to 63 tokens more.
fn bits(source: &Source, spec: &CacheSpec, context: usize) -> f64 {
    let d = source.config.head_dim;
    let pools = Pools::with_meta(d, spec.group, spec.meta).unwrap();
    let slab = |format| pools.layout(format).slab_bytes() as f64;
    let heads = source.config.layers * source.config.kv_heads;
    let kept = spec.kept(heads) as f64 / heads as f64;
    let read = |len: usize| {
        let packed = packed_slabs(len, spec.window);
        let sinks = packed.min(spec.sinks.div_ceil(TOKENS));
        let exact = sinks as f64 + (len - packed * TOKENS) as f64 / TOKENS as f64;
        let store = (1.0 - kept) * slab(spec.store) + kept * slab(Format::Q4);
        let bytes = exact * slab(Format::F16) + (packed - sinks) as f64 * store;
        bytes * 8.0 / (2 * len * d) as f64
    };
    (context..context + TOKENS).map(read).sum::<f64>() / TOKENS as f64
}

#[test]
fn two_bits_cost_little() {
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    let model = calibrated(&source);
    // Nats over f16, share of equal top tokens, bits an element at 8,192 tokens.
    for (spec, nats, agreement, most_bits) in [
        ("q2", 0.05, 0.90, 2.6),
        ("q2,group=32,window=128,keep=5", 0.03, 0.92, 3.2),
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
fn pass_keys_are_found() {
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    let (model, tokenizer) = (calibrated(&source), source.tokenizer().unwrap());
    let of = |spec, digits| found(&model, &tokenizer, spec, (1024, digits), 4);
    for (spec, digits, least) in [("f16", 64, 4), ("q4", 64, 4), ("q2", 64, 3), ("q2", 5, 4)] {
        let found = of(spec, digits);
        eprintln!("{digits} digits in 1,024 tokens, {spec}: {found} of 4");
        assert!(found >= least, "{spec} finds {found} of 4 keys of {digits} digits");
    }
}

/// Presets, what their parts give, and KIVI's groups; whether pass keys are looked for, too.
const TABLE: [(&str, bool); 18] = [
    ("f16", true),
    ("q8", false),
    ("fp8", false),
    ("q4", true),
    ("q4,hadamard=off", false),
    ("q2", true),
    ("q2-small", true),
    ("q2,keep=0", true),
    ("q2,keep=5", true),
    ("q2,window=128", false),
    ("q2,group=32,window=128,keep=5", true),
    ("q2,sinks=0", false),
    ("q2,range=100", false),
    ("q2,hadamard=off", false),
    ("q2-kivi", true),
    ("q2-kivi,sinks=64", false),
    ("q2-kivi,group=64", false),
    ("q2-kivi,meta=u8", false),
];
/// Tokens of a text with a pass key, its digits, and how many are tried.
const KEYS: [(usize, usize, u64); 4] =
    [(1024, 5, 10), (1024, 64, 10), (2048, 64, 10), (4096, 64, 5)];

#[test]
#[ignore = "measures for half an hour; writes a record"]
fn table() {
    let source = Source::open(&support::real_model().expect("the model")).unwrap();
    let (plain, calibrated) = (model(&source), calibrated(&source));
    let tokenizer = source.tokenizer().unwrap();
    let mut csv = String::from(
        "spec,calibrated,bits_2k,bits_8k,bits_32k,text,nats,kl,agreement,keys_5_1k,keys_64_1k,keys_64_2k,keys_64_4k\n",
    );
    for ((spec, keyed), with) in TABLE.into_iter().flat_map(|row| [(row, true), (row, false)]) {
        let parsed: CacheSpec = spec.parse().unwrap();
        if with != parsed.hadamard && (with || !["q2", "q4"].contains(&spec)) {
            continue;
        }
        let model = if with { &calibrated } else { &plain };
        let keys = KEYS.map(|(tokens, digits, seeds)| match keyed {
            true => format!("{}/{seeds}", found(model, &tokenizer, spec, (tokens, digits), seeds)),
            false => String::new(),
        });
        // Without a calibration no head is known to lose more than others.
        let counted = CacheSpec { keep: if with { parsed.keep } else { 0 }, ..parsed };
        let bits = [2048, 8192, 32768].map(|context| bits(&source, &counted, context));
        for (name, text) in texts() {
            let (mean, far) = distance(model, &parsed, &text, 2);
            let [a, b, c] = bits;
            let row = format!(
                "\"{spec}\",{with},{a:.3},{b:.3},{c:.3},{name},{:.4},{:.4},{:.4},{}",
                mean - far.f16,
                far.kl,
                far.agreement,
                keys.join(","),
            );
            eprintln!("{row}");
            writeln!(csv, "{row}").unwrap();
        }
    }
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/record/quality.csv");
    std::fs::write(to, csv).unwrap();
}
