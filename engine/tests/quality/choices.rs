//! What choosing tokens costs, beside what kvpress's implementations of the same methods cost on the same windows.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use kvwarp::linear::Activations;
use kvwarp_engine::model::Model;
use kvwarp_engine::perplexity::{Reading, compare};
use kvwarp_engine::source::Source;

use super::{PREFIX, SCORED, WINDOW, golden, support, texts, watched};

/// A row of `kvpress.csv`: nats over the full cache, KL to it and the share of the same top token, after a prefix of 2,048
/// tokens of which a method kept a share; transformers and kvpress in float32.
struct Peer<'a> {
    method: &'a str,
    keep: &'a str,
    text: &'a str,
    window: usize,
    figures: [f64; 3],
}

fn peers(file: &str) -> Vec<Peer<'_>> {
    let row = |line| {
        let cells: Vec<&str> = str::split(line, ',').collect();
        let [method, keep, text, window, nats, kl, top, _] = cells[..] else { panic!("{line}") };
        let figures = [nats, kl, top].map(|x| x.parse().unwrap());
        Peer { method, keep, text, window: window.parse().unwrap(), figures }
    };
    file.lines().skip(1).map(row).collect()
}

/// Nats over f16, KL and share of the same top token.
fn cost(model: &Model<'_>, spec: &str, text: &[u32], window: usize) -> [f64; 3] {
    let reading = Reading { cache: spec.parse().unwrap(), prefix: PREFIX, piece: SCORED };
    let tokens = text.chunks_exact(WINDOW).nth(window).unwrap();
    let (scores, far) = watched(|watch| compare(model, tokens, &reading, watch)).unwrap();
    [scores.mean() - far.f16, far.kl, far.agreement]
}

fn exact(source: &Source) -> Model<'_> {
    Model::new(source, kvwarp::threads::physical_cores(), Activations::F32).unwrap()
}

/// Methods' first windows, kept by half: as near to the full cache as kvpress is.
#[test]
fn methods_cost_what_kvpress_measures() {
    let Some(path) = support::real_model() else { return };
    let (source, file) = (Source::open(&path).unwrap(), golden("kvpress.csv"));
    let (model, texts) = (exact(&source), texts());
    let methods = ["keynorm", "kvzip", "lagkv-kvpress", "snapkv"];
    let wanted = |peer: &&Peer<'_>| {
        let first = (peer.keep, peer.text, peer.window) == ("0.5", "persuasion", 0);
        first && methods.contains(&peer.method)
    };
    let peers = peers(&file);
    let peers: Vec<_> = peers.iter().filter(wanted).collect();
    assert_eq!(peers.len(), methods.len());
    for Peer { method, keep, text, window, figures: theirs } in peers {
        let ours = cost(&model, &format!("f16,evict={method}:{keep}"), &texts[*text], *window);
        println!("{method}: {ours:.4?}, kvpress {theirs:.4?}");
        assert!(ours[0] < theirs[0] + 0.02, "{method}: {} nats, kvpress {}", ours[0], theirs[0]);
        // A random choice is another one.
        let most = if *method == "random" { 1.5 } else { 1.15 };
        assert!(
            ours[1] < theirs[1] * most + 0.002,
            "{method}: KL {}, kvpress {}",
            ours[1],
            theirs[1]
        );
    }
}

const HEADER: &str =
    "method,keep,text,window,nats,kl,agreement,kvpress_nats,kvpress_kl,kvpress_agreement";

/// Rows that the record has are not measured again; remove the file to measure everything.
#[test]
#[ignore = "measures for half an hour; writes a record"]
fn choices() {
    let source = Source::open(&support::real_model().expect("the model")).unwrap();
    let (model, texts, file) = (exact(&source), texts(), golden("kvpress.csv"));
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/record/choices.csv");
    let mut record = std::fs::read_to_string(&to).unwrap_or_else(|_| format!("{HEADER}\n"));
    let mut peers = peers(&file);
    peers.sort_by_key(|peer| peer.keep != "0.5");
    for Peer { method, keep, text, window, figures } in peers {
        let row = format!("{method},{keep},{text},{window},");
        if record.contains(&format!("\n{row}")) {
            continue;
        }
        let ours = cost(&model, &format!("f16,evict={method}:{keep}"), &texts[text], window);
        let [a, b, c] = ours.map(|x| format!("{x:.5}"));
        let [x, y, z] = figures;
        writeln!(record, "{row}{a},{b},{c},{x},{y},{z}").unwrap();
        std::fs::write(&to, &record).unwrap();
    }
}

/// The README's table has the means of the record's rows of which half is kept, method by method.
#[test]
fn the_readme_says_what_the_record_has() {
    let file = |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    let record = std::fs::read_to_string(file("benches/record/choices.csv")).unwrap();
    let readme = std::fs::read_to_string(file("README.md")).unwrap();
    let mut methods: BTreeMap<&str, Vec<[f64; 6]>> = BTreeMap::new();
    for line in record.lines().skip(1) {
        let cells: Vec<&str> = str::split(line, ',').collect();
        if cells[1] == "0.5" {
            let figures = std::array::from_fn(|i| cells[4 + i].parse().unwrap());
            methods.entry(cells[0]).or_default().push(figures);
        }
    }
    assert!(!methods.is_empty());
    for (method, windows) in methods {
        let mean = |i: usize| windows.iter().map(|row| row[i]).sum::<f64>() / windows.len() as f64;
        let side =
            |i| format!("{:+.4} | {:.4} | {:.1} %", mean(i), mean(i + 1), 100.0 * mean(i + 2));
        let row = format!("| `{method}` | {} | {} | {} |", windows.len(), side(0), side(3));
        println!("{row}");
        assert!(readme.contains(&row), "README.md lacks {row}");
    }
}
