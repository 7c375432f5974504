//! What the program says of latents, and what a real model says with them.

use std::path::Path;

use kvwarp::linear::Activations;
use kvwarp_engine::convert::{Budget, Elements, Request, Target, write};
use kvwarp_engine::generate::{Request as Asked, generate};
use kvwarp_engine::model::Model;
use kvwarp_engine::runner::{Choice, CpuRunner};
use kvwarp_engine::source::Source;
use serde_json::Value;

use super::spec;
use super::support::converted::{converted, request};
use super::support::models::{golden, texts};
use super::support::program::{failure, kvwarp, text as said};
use super::support::schedule::watched;
use super::support::{bytes, real_model};

/// A converted model whose vocabulary is the bytes.
fn folder(at: &Path, pairs: usize, rank: usize) -> String {
    let (model, to) = (at.join("source"), at.join(format!("{pairs}-{rank}")));
    if !model.exists() {
        std::fs::create_dir(&model).unwrap();
        bytes::model(&model);
    }
    let (source, tokens) = (Source::open(&model).unwrap(), super::text(160));
    let staged = converted(&source, &request(&tokens, pairs, rank)).staged;
    write(&source, &staged, Elements::F16, &to).unwrap();
    to.display().to_string()
}

fn json(arguments: &[&str]) -> Value {
    let output = kvwarp(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", said(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Two layers of `2 * 8 + 48` f16 elements, in slabs of 64 tokens with 4 bytes of table.
const SLOT: usize = 2 * 64 * 2 * 64;

#[test]
fn commands_take_what_a_converted_model_has() {
    let at = tempfile::tempdir().unwrap();
    let (model, file) = (folder(at.path(), 8, 48), at.path().join("text"));
    std::fs::write(&file, "the quick brown fox jumps over the lazy dog. ".repeat(6)).unwrap();
    let file = file.display().to_string();
    let begin = |command| [command, "-m", &model];
    let with = |command, more: &[&str]| json(&[&begin(command), more].concat());
    let answer = ["-f", &file, "-n", "8", "--temp", "0", "--json"];
    let one = with("generate", &answer);
    assert_eq!((&one["cache"], &one["kv_bytes"]), (&"latent".into(), &(5 * (SLOT + 4)).into()));
    let drafted = with("generate", &[&answer[..], &["--draft", "8"]].concat());
    let expanded = with("generate", &[&answer[..], &["--cache", "f16"]].concat());
    assert_eq!((&one["tokens"], &one["tokens"]), (&drafted["tokens"], &expanded["tokens"]));
    let info = with("info", &["--json"]);
    assert_eq!(info["kv_bytes_at_context"]["latent"], 8 * (SLOT + 4));
    assert_eq!((&info["elite_pairs"], &info["latent_ranks"][1]), (&8.into(), &48.into()));
    let plain = said(&kvwarp(&begin("info")).stdout);
    assert!(plain.contains("8 elite pairs a K head, rank 48: 50.0 % of K and V"), "{plain}");
    let nats = with("perplexity", &["-f", &file, "--kl", "--json"]);
    assert_eq!(nats["cache"], "latent");
    assert!(nats["kl"].as_f64().unwrap() < 1e-4, "{nats}");
    let bench = with("bench", &["-p", "0", "-n", "2", "-d", "128", "-r", "1", "-o", "json"]);
    assert_eq!((&bench[0]["cache"], &bench[0]["n_depth"]), (&"latent".into(), &128.into()));
    assert_eq!(bench[0]["kv_bytes"], 3 * (SLOT + 4));
    let fit = with("bench", &["--memory", "1G", "-d", "256", "-o", "json"]);
    assert_eq!(fit[0]["sequence_bytes"], 5 * (SLOT + 4));
    let cache = at.path().join("cache").display().to_string();
    let made = with("compress", &[&file, "-o", &cache, "--cache", "latent", "--json"]);
    assert_eq!(made["cache"], "latent");
    let asked = with("ask", &[&cache, "what?", "-n", "4", "--temp", "0", "--json"]);
    assert_eq!(asked["answers"][0]["cache"], "latent");
    let sweep = ["agreement", "-m", &model, "-f", &file, "--json"];
    let eval =
        kvwarp(&[&["eval"], &sweep[..], &["-n", "1", "--prefix", "64", "--scored", "32"]].concat());
    assert!(said(&eval.stdout).contains("latent"), "{}", said(&eval.stderr));
}

#[test]
fn the_program_says_what_does_not_go_together() {
    let at = tempfile::tempdir().unwrap();
    let model = folder(at.path(), 6, 48);
    let begin = ["generate", "-m", &model, "-p", "x", "-n", "2", "--temp", "0"];
    let (code, error) = failure(&begin);
    assert!(
        code == 1 && error.contains("`elitekv.pairs` is 6") && error.contains("--cache f16"),
        "{error}"
    );
    assert!(kvwarp(&[&begin[..], &["--cache", "q2"]].concat()).status.success());
    let source = at.path().join("source").display().to_string();
    let (_, error) = failure(&["generate", "-m", &source, "-p", "x", "--cache", "latent"]);
    assert!(error.contains("`kvwarp convert elitekv` makes one"), "{error}");
    let plain = said(&kvwarp(&["info", "-m", &model]).stdout);
    assert!(plain.contains("`elitekv.pairs` is 6"), "{plain}");
}

/// Half the cache of a real model: greedy tokens of the latents are those of keys and values expanded from them.
#[test]
fn a_real_model_says_the_same() {
    let Some(path) = real_model() else { return };
    let source = Source::open(&path).unwrap();
    let tokenizer = source.tokenizer().unwrap();
    let learnt = tokenizer.encode(&golden("eighty_days.txt"), false).unwrap();
    let held = &texts()["persuasion"];
    let asked = Request {
        target: Target::Fixed(Budget { pairs: 12, rank: 112 }),
        by_layer: false,
        whiten: true,
        refit: false,
        distil: 0,
        tokens: &learnt[..512],
        searched: 128,
        window: 512,
        chosen_on: &[],
        held: &held[..64],
    };
    let folder = tempfile::tempdir().unwrap();
    let original = Model::new(&source, kvwarp::threads::physical_cores(), Activations::Q8).unwrap();
    let state = folder.path().join("state");
    let done = watched(|watch| {
        kvwarp_engine::convert::convert((&source, &original), &asked, &state, watch, &mut |_| {})
    });
    let to = folder.path().join("model");
    write(&source, &done.unwrap().staged, Elements::F16, &to).unwrap();
    let read = Source::open(&to).unwrap();
    let model = original_like(&read);
    let answers = ["latent", "f16"].map(|text| {
        let mut runner = CpuRunner::new(&model, &spec(text), 1, 640).unwrap();
        let request = Asked {
            prompt: held[..500].to_vec(),
            row: None,
            max_tokens: 64,
            context: None,
            choice: Choice::GREEDY,
            drafts: 0,
        };
        watched(|watch| generate(&mut runner, &tokenizer, &request, watch, &mut |_| {})).unwrap()
    });
    assert_eq!(answers[0].tokens, answers[1].tokens);
    // 30 layers of 2 * 12 * 3 + 112 f16 elements.
    let slabs = answers[0].cache.tokens.div_ceil(64);
    assert_eq!(answers[0].cache.used_bytes, slabs * (2 * 64 * 30 * 184 + 4));
}

fn original_like(source: &Source) -> Model<'_> {
    Model::new(source, kvwarp::threads::physical_cores(), Activations::Q8).unwrap()
}
