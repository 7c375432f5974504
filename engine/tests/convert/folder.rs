//! A converted model as a folder, and what the program does with it.

use std::fs;
use std::path::Path;

use kvwarp_engine::convert::{Elements, write};
use kvwarp_engine::source::Source;

use super::support::bytes;
use super::support::program::{kvwarp, text as said};
use super::{FIXTURES, apart, converted, fixture, logits, request, text};

/// Written in f32 it is what it was in memory, bit for bit; in 16 bits, nearly.
#[test]
fn a_folder_is_the_model_that_was_written() {
    for name in FIXTURES {
        let (source, tokens) = (fixture(name), text(160));
        let staged = converted(&source, &request(&tokens, 6, 48)).staged;
        let exact = logits(&staged, &tokens, "f16", 160);
        let folder = tempfile::tempdir().unwrap();
        for (i, elements) in [Elements::F32, Elements::F16, Elements::Bf16].into_iter().enumerate()
        {
            let to = folder.path().join(i.to_string());
            write(&source, &staged, elements, &to).unwrap();
            let read = Source::open(&to).unwrap();
            assert_eq!(read.config, staged.config);
            let far = apart(&exact, &logits(&read, &tokens, "f16", 160));
            let most = [0.0, 0.05, 0.5][i];
            assert!(far <= most && (far > 0.0) == (i > 0), "{name} {elements:?}: {far}");
        }
        // Biases that no bias was made of: every row of k and v has one, where the source has.
        let biases = staged.weights.iter().filter(|tensor| tensor.name.ends_with(".bias")).count();
        assert_eq!(biases, if name == "qwen2" { 2 * 4 } else { 0 });
    }
}

fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn the_program_converts_and_reads_what_it_has_converted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (model, calib) = (path("model"), path("calib.txt"));
    fs::create_dir(&model).unwrap();
    bytes::model(&model);
    fs::write(&calib, "the quick brown fox jumps over the lazy dog. ".repeat(12)).unwrap();
    let at = |name: &str| path(name).display().to_string();
    let (model, calib) = (at("model"), at("calib.txt"));
    let convert = |to: &str, more: &[&str]| {
        let begin = ["convert", "elitekv", "-m", &model, "--calib", &calib, "-o", to, "-c", "128"];
        let output = kvwarp(&[&begin[..], &["--held", &calib, "--json"], more].concat());
        assert!(output.status.success(), "{}", said(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let one = convert(&at("one"), &["--ratio", "0.75", "-t", "1"]);
    let two = convert(&at("two"), &["--ratio", "0.75", "-t", "2"]);
    // Of 128 elements 96: ranks that are multiples of 16 with the pairs that fit beside them.
    assert!(one["ratio"].as_f64().unwrap() <= 0.75, "{one}");
    let (pairs, rank) = (one["pairs"].as_u64().unwrap(), one["rank"].as_u64().unwrap());
    assert!(2 * pairs + rank <= 96 && rank.is_multiple_of(16), "{one}");
    let tried = one["tried"].as_array().unwrap();
    assert_eq!(tried.len(), 4, "{one}");
    let nats = |budget: &serde_json::Value| budget["log_perplexity"].as_f64().unwrap();
    let best = tried.iter().map(nats).fold(f64::INFINITY, f64::min);
    let taken = tried.iter().find(|budget| budget["rank"] == rank).unwrap();
    assert_eq!(nats(taken), best);
    let names =
        one["stages"].as_array().unwrap().iter().map(|stage| stage["stage"].as_str().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ["source", "pairs", "factors", "refit"]);
    assert_eq!(one["stages"], two["stages"]);
    assert!(contents(&path("one")) == contents(&path("two")), "two conversions differ");
    let files: Vec<_> = contents(&path("one")).into_iter().map(|(name, _)| name).collect();
    let want = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(files, want);
    let left = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 4, "model, text and two folders; no state, nothing partial");
    for (spec, more) in [("f16", "6"), ("q2", "6"), ("q2,window=64,evict=snapkv:0.5", "6")] {
        let one = at("one");
        let prompt = "the quick brown ".repeat(8);
        let generate =
            ["generate", "-m", &one, "-p", &prompt, "-n", more, "--temp", "0", "--cache", spec];
        let output = kvwarp(&generate);
        assert!(output.status.success() && !output.stdout.is_empty(), "{}", said(&output.stderr));
    }
    // Another conversion has another fingerprint: what was learnt of one is not of the other.
    let fixed = convert(&at("three"), &["--pairs", "8", "--rank", "80", "--plain", "--no-refit"]);
    assert_eq!(fixed["stages"].as_array().unwrap().len(), 3);
    let print =
        |name: &str| kvwarp_engine::calibration::fingerprint(&Source::open(&path(name)).unwrap());
    assert_ne!(print("one"), print("three"));
    assert_eq!(print("one"), print("two"));
}
