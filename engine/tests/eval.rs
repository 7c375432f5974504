//! Evaluation: statistics against numbers done by hand, and every task through the program.

#[path = "support/mod.rs"]
mod support;

use std::path::Path;

use kvwarp_engine::eval::stats::{Mean, Share, median};
use serde_json::Value;
use support::program::{command, failure, kvwarp, text};

fn near(got: f64, want: f64) {
    assert!((got - want).abs() < 1e-4, "{got}, want {want}");
}

/// z = 1.959964: 0 of 10 has z² / (10 + z²) above it; t of two degrees of freedom is 4.302653.
#[test]
fn intervals_are_wilsons_and_students() {
    let none = Share::new(0, 10);
    near(none.low, 0.0);
    near(none.high, 3.841_459 / 13.841_459);
    let half = Share::of([true, false].into_iter().cycle().take(10));
    assert_eq!((half.hits, half.n), (5, 10));
    near(half.low, 0.236_59);
    near(half.high, 0.763_41);
    let empty = Share::new(0, 0);
    assert!(empty.share.is_nan() && (empty.low, empty.high) == (0.0, 1.0));
    let mean = Mean::of(&[1.0, 2.0, 3.0]);
    near(mean.mean, 2.0);
    near(mean.high.unwrap() - 2.0, 4.302_653 / 3f64.sqrt());
    assert_eq!(Mean::of(&[1.0]).low, None);
    assert_eq!(median([3.0, 1.0, 2.0, 4.0]), 2.0);
    assert!(median([]).is_nan());
}

#[test]
fn what_cannot_be_measured_is_refused_before_any_work() {
    let (code, error) = failure(&["eval", "perplexity", "--cache", "q3"]);
    assert_eq!(code, 2);
    assert!(error.contains("unknown preset `q3`"), "{error}");
    let (_, error) = failure(&["eval", "passkey", "-m", "/nonexistent/model.gguf"]);
    assert!(error.contains("/nonexistent/model.gguf"), "{error}");
}

/// The program with the real model, small samples and these arguments.
fn run(model: &Path, arguments: &[&str]) -> String {
    let few = ["-m", model.to_str().unwrap(), "-t", "2", "-n", "1", "--seed", "3"];
    let output = kvwarp(&[&["eval"], arguments, &few].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn every_task_runs_and_a_sweep_goes_on() {
    let Some(model) = support::real_model() else { return };
    let caches = ["--cache", "f16", "--cache", "q8,evict=streaming:0.5"];
    let windows = ["--prefix", "192", "--scored", "32"];
    let lengths = ["--lengths", "384"];
    let json = |task: &str, more: &[&str]| -> Value {
        let printed = run(&model, &[&[task, "--json"], more, &caches].concat());
        serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{task}: {e}: {printed}"))
    };
    for task in ["perplexity", "agreement"] {
        assert!(json(task, &windows).is_object(), "{task}");
    }
    json("passkey", &[&lengths[..], &["--depths", "50", "--digits", "5"]].concat());
    json("needle", &[&lengths[..], &["--depths", "50"]].concat());
    json("multi-query", &[&lengths[..], &["--facts", "2"]].concat());

    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let sweep = [
        &["sweep", "--out", out, "--tasks", "text,passkey", "--depths", "50", "--digits", "5"],
        &windows[..],
        &lengths,
        &caches,
    ];
    run(&model, &sweep.concat());
    let (cells, report) = (folder.path().join("cells.jsonl"), folder.path().join("report.html"));
    let (first, page) = (std::fs::read(&cells).unwrap(), std::fs::read_to_string(&report).unwrap());
    assert!(page.contains("<svg") && page.contains("q8,evict=streaming:0.5"));
    let outside = page.replace("http://www.w3.org/", "");
    assert!(!outside.contains("http") && !outside.contains("src="), "a report needs no network");
    // Killed while it wrote its last line: that cell is measured again, the others are not.
    std::fs::write(&cells, &first[..first.len() - 20]).unwrap();
    run(&model, &sweep.concat());
    assert_eq!(std::fs::read(&cells).unwrap().len(), first.len());
    // Cells of another model are refused by name.
    let foreign = String::from_utf8(first).unwrap().replacen("\"model\":\"", "\"model\":\"x", 1);
    std::fs::write(&cells, foreign).unwrap();
    let few = ["-m", model.to_str().unwrap(), "-t", "2", "-n", "1", "--seed", "3"];
    let refused = command(&[&["eval"], &sweep.concat()[..], &few].concat()).output().unwrap();
    let error = text(&refused.stderr);
    assert!(
        !refused.status.success() && error.contains("`model`") && error.contains("--out"),
        "{error}"
    );
}
