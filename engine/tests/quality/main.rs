//! What fewer bits cost a real model: distance from the f16 cache on texts, pass keys that are found again, and texts that
//! go on as with f16.
//!
//! The recipe of q2 was chosen on other texts; it is calibrated here on documents and sources of this repository, as they
//! once were: rows of a record are of one calibration.
//! `cargo test --release -p kvwarp-engine --test quality -- --ignored` measures every preset and writes
//! `benches/record/quality.csv`.

mod choices;
mod keys;
mod record;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;

use kvwarp::linear::Activations;
use kvwarp::pages::{Pools, packed_slabs};
use kvwarp::slab::{Format, TOKENS};
use kvwarp_engine::calibration::{Calibration, measure, read};
use kvwarp_engine::model::Model;
use kvwarp_engine::perplexity::{Distance, Reading, compare};
use kvwarp_engine::source::Source;
use kvwarp_engine::spec::CacheSpec;

use keys::{found, greedy};
use record::{Of, Record, row};
use support::models::{golden, texts};
use support::schedule::watched;

/// Tokens read exactly and then quantised, and tokens scored after them.
const PREFIX: usize = 2048;
const SCORED: usize = 512;
const WINDOW: usize = PREFIX + SCORED;
/// Tokens that a calibration reads, reads together, and measures heads on.
const CALIBRATION: (usize, usize, usize) = (8192, 2048, 1280);

/// Two more, of one window each: a novel and a program.
fn more_texts(source: &Source) -> [(String, Vec<u32>); 2] {
    let tokenizer = source.tokenizer().unwrap();
    ["eighty_days.txt", "gun.c"].map(|file| {
        let name = file.split('.').next().unwrap().to_owned();
        (name, tokenizer.encode(&golden(file), false).unwrap())
    })
}

fn model(source: &Source) -> Model<'_> {
    Model::new(source, kvwarp::threads::physical_cores(), Activations::Q8).unwrap()
}

fn calibrated(source: &Source) -> Model<'_> {
    let (text, folder) = (golden("calibration.txt"), tempfile::tempdir().unwrap());
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

/// Nats over f16 and distance from it, the mean of up to `windows` windows of a text, each of `context` tokens.
fn distance(
    model: &Model<'_>,
    spec: &CacheSpec,
    text: &[u32],
    (windows, context): (usize, usize),
) -> (f64, Distance) {
    let reading = Reading { cache: *spec, prefix: context - SCORED, piece: SCORED };
    let windows: Vec<_> = text.chunks_exact(context).take(windows).collect();
    let n = windows.len() as f64;
    let mut sums = (0.0, Distance { f16: 0.0, kl: 0.0, agreement: 0.0 });
    for tokens in windows {
        let (scores, far) = watched(|watch| compare(model, tokens, &reading, watch)).unwrap();
        sums.0 += (scores.mean() - far.f16) / n;
        sums.1.f16 += far.f16 / n;
        sums.1.kl += far.kl / n;
        sums.1.agreement += far.agreement / n;
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
            let (more, far) = distance(&model, &spec, &text, (1, WINDOW));
            eprintln!("{name} {spec}: {more:+.4} nats, KL {:.4}, {:.3}", far.kl, far.agreement);
            assert!(more <= nats, "{name}, {spec}: {more} nats more than f16");
            assert!(far.agreement >= agreement, "{name}, {spec}: {}", far.agreement);
        }
    }
}

#[test]
fn pass_keys_are_found() {
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    let (model, tokenizer) = (calibrated(&source), source.tokenizer().unwrap());
    let of =
        |spec: &str, digits| found(&model, &tokenizer, &spec.parse().unwrap(), (1024, digits), 4);
    for (spec, digits, least) in [("f16", 64, 4), ("q4", 64, 4), ("q2", 64, 3), ("q2", 5, 4)] {
        let found = of(spec, digits);
        eprintln!("{digits} digits in 1,024 tokens, {spec}: {found} of 4");
        assert!(found >= least, "{spec} finds {found} of 4 keys of {digits} digits");
    }
}

/// Caches of the record; with a calibration; and whether pass keys are looked for and texts continued, too.
const TABLE: [(&str, bool, bool); 21] = [
    ("f16", false, true),
    ("q2,group=32,window=128,keep=5", true, true),
    ("q2", true, true),
    ("q2-small", true, true),
    ("q4", true, true),
    ("q2,keep=0", true, true),
    ("q2,keep=5", true, true),
    ("q8", false, true),
    ("fp8", false, true),
    // Without a calibration, and without Hadamard matrices.
    ("q4", false, true),
    ("q2", false, true),
    ("q4,hadamard=off", false, false),
    ("q2,hadamard=off,keep=0", false, false),
    // From KIVI's recipe to q2, one part after the other.
    ("q2-kivi", false, true),
    ("q2-kivi,sinks=64", false, false),
    ("q2-kivi,sinks=64,hadamard=on", false, false),
    ("q2-kivi,sinks=64,hadamard=on,range=88", false, false),
    ("q2,window=128,keep=0", false, false),
    ("q2,window=128,keep=0", true, false),
    ("q2,window=128", true, false),
    ("q2-kivi,group=64", false, false),
];
/// Tokens of a text with a pass key, its digits, and how many are tried.
const KEYS: [(usize, usize, u64); 4] =
    [(1024, 5, 10), (1024, 64, 10), (2048, 64, 10), (4096, 64, 5)];
/// Tokens by which texts are continued.
const GREEDY: usize = 64;
/// Caches and tokens of the longest windows, the model's context.
const LONG: ([(&str, bool); 2], usize) = ([("q2", true), ("q2-kivi", false)], 8192);

/// Tokens before the first that f16 does not say, and share of equal ones, on average over `starts` and what f16 says.
fn agreement(model: &Model<'_>, spec: &CacheSpec, starts: &[(&[u32], Vec<u32>)]) -> (f64, f64) {
    let mut sums = (0, 0);
    for (start, exact) in starts {
        let said = greedy(model, spec, start, GREEDY);
        let equal = || said.iter().zip(exact).map(|(a, b)| a == b);
        sums.0 += equal().take_while(|equal| *equal).count();
        sums.1 += equal().filter(|equal| *equal).count();
    }
    let n = starts.len() as f64;
    (sums.0 as f64 / n, sums.1 as f64 / n / GREEDY as f64)
}

type Texts = [(String, Vec<u32>)];

/// Every text of the caches that are measured in every way.
fn whole(texts: &Texts) -> impl Iterator<Item = (&'static str, bool, &str)> {
    let rows = TABLE.into_iter().filter(|(_, _, whole)| *whole);
    rows.flat_map(|(spec, with, _)| texts.iter().map(move |(name, _)| (spec, with, &name[..])))
}

/// `models` are one without and one with a calibration.
fn distances(models: &[Model<'_>; 2], source: &Source, texts: &Texts, record: &mut Record) {
    let of = |spec: &CacheSpec, with, text: &[u32], windows| {
        let (more, far) = distance(&models[usize::from(with)], spec, text, windows);
        [more, far.kl, far.agreement].map(|x| format!("{x:.4}"))
    };
    for (spec, with, _) in TABLE {
        let parsed: CacheSpec = spec.parse().unwrap();
        // Without a calibration no head is known to lose more than others.
        let counted = CacheSpec { keep: if with { parsed.keep } else { 0 }, ..parsed };
        for (name, text) in texts {
            let row = row(spec, with, WINDOW, name);
            record.fill((&row, "bits_2k", Of::Cache), || {
                [2048, 8192, 32768].map(|at| format!("{:.3}", bits(source, &counted, at)))
            });
            record.fill((&row, "nats", Of::Text), || of(&parsed, with, text, (2, WINDOW)));
        }
    }
    for (spec, with) in LONG.0 {
        let (name, text) = &texts[0];
        let row = row(spec, with, LONG.1, name);
        record
            .fill((&row, "nats", Of::Text), || of(&spec.parse().unwrap(), with, text, (1, LONG.1)));
    }
}

fn continuations(models: &[Model<'_>; 2], texts: &Texts, record: &mut Record) {
    // Short prompts never leave the window.
    let starts: Vec<_> = texts
        .iter()
        .flat_map(|(_, text)| text.chunks_exact(WINDOW).take(2))
        .map(|text| &text[..PREFIX])
        .map(|start| (start, greedy(&models[0], &CacheSpec::default(), start, GREEDY)))
        .collect();
    for (spec, with, name) in whole(texts) {
        record.fill((&row(spec, with, WINDOW, name), "greedy_tokens", Of::Cache), || {
            let model = &models[usize::from(with)];
            let (tokens, share) = agreement(model, &spec.parse().unwrap(), &starts);
            [format!("{tokens:.1}"), format!("{share:.4}")]
        });
    }
}

#[test]
#[ignore = "measures for half an hour; writes a record"]
fn table() {
    let source = Source::open(&support::real_model().expect("the model")).unwrap();
    let (models, tokenizer) = ([model(&source), calibrated(&source)], source.tokenizer().unwrap());
    let texts: Vec<_> = texts().into_iter().chain(more_texts(&source)).collect();
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/record/quality.csv");
    let mut record = Record::open(to);
    distances(&models, &source, &texts, &mut record);
    continuations(&models, &texts, &mut record);
    for (spec, with, name) in whole(&texts) {
        record.fill((&row(spec, with, WINDOW, name), "keys_5_1k", Of::Cache), || {
            KEYS.map(|(tokens, digits, n)| {
                let (model, spec) = (&models[usize::from(with)], spec.parse().unwrap());
                format!("{}/{n}", found(model, &tokenizer, &spec, (tokens, digits), n))
            })
        });
    }
}
