//! What each stage of a conversion costs a real model, as a record.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use kvwarp_engine::convert::{Budget, Request, Target, finish};
use kvwarp_engine::source::Source;

use super::recovery::{converted, learnt, nats};
use super::support::models::texts;
use super::support::real_model;

/// Tokens of each text that it is measured on.
const MEASURED: usize = 2048;
const TEXTS: [&str; 2] = ["persuasion", "policy"];
const RATIOS: [f64; 3] = [1.0, 0.5, 0.25];
/// Steps of its distillations.
const STEPS: usize = 40;
const HEADER: &str = "ratio,method,pairs,rank,text,log_perplexity,nats_over_source";

/// What is measured, and the request's `by_layer`, `whiten`, `refit` and `distil`. The first chooses pairs and rank.
const METHODS: [(&str, bool, bool, bool, usize); 7] = [
    ("whitened", false, true, false, 0),
    ("pairs", false, false, false, 0),
    ("plain", false, false, false, 0),
    ("refit", false, true, true, 0),
    ("by layer", true, true, false, 0),
    ("by layer refit", true, true, true, 0),
    ("distil", false, true, true, STEPS),
];

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// Nats over the source by ratio and method, of each text, and pairs and rank.
fn rows(record: &str) -> BTreeMap<(String, String), (Budget, Vec<f64>)> {
    let mut rows = BTreeMap::new();
    for line in record.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let [ratio, method, pairs, rank, _, _, nats] = cells[..] else { panic!("{line}") };
        let budget = Budget { pairs: pairs.parse().unwrap(), rank: rank.parse().unwrap() };
        let key = (ratio.to_owned(), method.to_owned());
        let row = rows.entry(key).or_insert_with(|| (budget, Vec::new()));
        row.1.push(nats.parse().unwrap());
    }
    rows
}

/// The README's table is the record, and refitting takes back most of what plain factors lose at half the cache.
#[test]
fn the_readme_says_what_the_record_has() {
    let read = |name| fs::read_to_string(file(name)).unwrap();
    let (record, readme) = (rows(&read("benches/record/elitekv.csv")), read("README.md"));
    let of = |ratio: &str, method: &str| &record[&(ratio.to_owned(), method.to_owned())];
    let columns = ["pairs", "plain", "whitened", "by layer", "refit", "by layer refit", "distil"];
    for ratio in ["1", "0.5", "0.25"] {
        let Budget { pairs, rank } = of(ratio, METHODS[0].0).0;
        let nats = columns.map(|method| {
            let nats = of(ratio, method).1.iter().map(|nats| format!("{nats:+.2}"));
            nats.collect::<Vec<_>>().join(", ")
        });
        let row = format!("| {ratio} | {pairs}, {rank} | {} |", nats.join(" | "));
        assert!(readme.contains(&row), "the README has no row `{row}`");
    }
    for (plain, refit) in of("0.5", "plain").1.iter().zip(&of("0.5", "refit").1) {
        assert!(2.0 * refit < *plain, "{refit} after {plain}");
    }
}

/// Rows that the record has are not measured again, and a conversion goes on where it was killed; remove the file to measure
/// everything.
#[test]
#[ignore = "an hour: measures conversions of a real model; writes a record"]
fn elitekv_record() {
    let source = Source::open(&real_model().expect("the model")).unwrap();
    let (text, held, to) = (learnt(&source), texts(), file("benches/record/elitekv.csv"));
    let (chosen_on, text) = text.split_at(1024);
    let texts = TEXTS.map(|name| &held[name][..MEASURED]);
    let exact = texts.map(|tokens| nats(&source, tokens));
    let mut record = fs::read_to_string(&to).unwrap_or_else(|_| format!("{HEADER}\n"));
    for (method, by_layer, whiten, refit, distil) in METHODS {
        for ratio in RATIOS {
            let all = rows(&record);
            if all.contains_key(&(ratio.to_string(), method.to_owned())) {
                continue;
            }
            let full = Budget { pairs: 32, rank: 192 };
            let chosen = all.get(&(ratio.to_string(), METHODS[0].0.to_owned())).map(|row| row.0);
            let target = match (method, chosen) {
                _ if ratio == 1.0 => Target::Fixed(full),
                ("pairs", Some(Budget { pairs, .. })) => {
                    Target::Fixed(Budget { pairs, rank: 3 * (128 - 2 * pairs) })
                }
                ("plain", Some(budget)) => Target::Fixed(budget),
                _ => Target::Ratio(ratio),
            };
            let request = Request {
                target,
                by_layer,
                whiten,
                refit,
                distil,
                // Of weights alone a text is only needed for the pairs.
                tokens: if whiten { text } else { &text[..1024] },
                searched: 1024,
                window: 512,
                chosen_on,
                held: &texts[0][..256],
            };
            let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
            let state = folder.join(format!("elitekv-{ratio}-{whiten}"));
            let done = converted(&source, &request, &state);
            let nats = texts.map(|tokens| nats(&done.staged, tokens));
            for i in 0..TEXTS.len() {
                let (Budget { pairs, rank }, more) = (done.budget, nats[i] - exact[i]);
                let figures = format!("{:.4},{more:.4}", nats[i]);
                writeln!(record, "{ratio},{method},{pairs},{rank},{},{figures}", TEXTS[i]).unwrap();
            }
            fs::write(&to, &record).unwrap();
        }
    }
    for (ratio, whiten) in RATIOS.iter().flat_map(|ratio| [(ratio, false), (ratio, true)]) {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        finish(&folder.join(format!("elitekv-{ratio}-{whiten}"))).unwrap();
    }
}
