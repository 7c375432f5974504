//! Logits, greedy texts and perplexities against independent implementations.
//!
//! `golden/greedy.json` and `golden/texts.json` hold what transformers computes in float32 from the weights of the same
//! GGUF file, and under `eight_bit` how far llama.cpp, which rounds activations to 8 bits, is from that.
//! `fixtures/` are tiny random models; see its README.

mod support;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvwarp::linear::Activations;
use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::perplexity::{Reading, score};
use kvwarp_engine::runner::{Choice, CpuRunner, Runner, Turn};
use kvwarp_engine::source::Source;
use kvwarp_engine::watch::Watch;
use serde::Deserialize;

#[derive(Deserialize)]
struct Top {
    ids: Vec<usize>,
    logits: Vec<f32>,
}

#[derive(Deserialize)]
struct Prompt {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// Best minus second logit at each step of `greedy`.
    margins: Vec<f32>,
    prompt_top10: Vec<Top>,
    step_top10: Vec<Top>,
    eight_bit: PeerPrompt,
}

#[derive(Deserialize)]
struct PeerPrompt {
    agree: usize,
    max_logit_difference: f32,
}

#[derive(Deserialize)]
struct Text {
    tokens: Vec<u32>,
    nll: Vec<f32>,
    mean: f64,
    eight_bit: PeerText,
    quantised: Quantised,
}

#[derive(Deserialize)]
struct PeerText {
    tokens: usize,
    mean: f64,
    mean_difference: f64,
}

/// Mean `nll` of `tokens` tokens after a prefix that was read exactly and then quantised as KIVI does, groups of 64,
/// residual 128.
#[derive(Deserialize)]
struct Quantised {
    prefix: usize,
    tokens: usize,
    f16: f64,
    q4: f64,
    q2: f64,
}

#[derive(Deserialize)]
struct Fixture {
    tokens: Vec<u32>,
    logits: Vec<Row>,
    nll: Vec<f32>,
    greedy: Greedy,
}

#[derive(Deserialize)]
struct Row {
    position: usize,
    values: Vec<f32>,
}

#[derive(Deserialize)]
struct Greedy {
    tokens: Vec<u32>,
}

fn golden<T: for<'a> Deserialize<'a>>(name: &str) -> Vec<(String, T)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    let map: std::collections::BTreeMap<String, T> = serde_json::from_str(&text).unwrap();
    map.into_iter().collect()
}

/// The real model's source, when there is one on this machine, and the right to use the processor: tests that compute
/// for minutes take turns, as two teams of threads on the same cores would only wait for each other.
fn real() -> Option<(Source, MutexGuard<'static, ()>)> {
    static TURN: Mutex<()> = Mutex::new(());
    let source = support::real_model().map(|path| Source::open(&path).unwrap())?;
    Some((source, TURN.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// Threads of each model: all cores.
fn threads() -> usize {
    kvwarp::threads::physical_cores()
}

/// Logits after each token of `tokens`, read at once.
fn logits(model: &Model<'_>, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut cache = model.cache(&"f16".parse().unwrap(), tokens.len()).unwrap();
    let (stop, mut rows) = (AtomicBool::new(false), Vec::new());
    let mut step = |_| {};
    let mut watch = Watch::new(&stop, &mut step);
    let take = &mut |row: &[f32]| rows.push(row.to_vec());
    let row = cache.open();
    model.score(tokens, (&mut cache, row), &mut Work::default(), &mut watch, take).unwrap();
    rows
}

/// The `n` tokens that follow `prompt`, each the most probable: as [`kvwarp_engine::generate`] gets them.
fn greedy(model: &Model<'_>, spec: &str, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut runner = CpuRunner::new(model, &spec.parse().unwrap(), 1, prompt.len() + n).unwrap();
    let (stop, mut step, row) = (AtomicBool::new(false), |_| {}, runner.open().unwrap());
    let (mut tokens, mut chosen) = (prompt.to_vec(), Vec::new());
    runner.read(row, &prompt[..prompt.len() - 1], &mut Watch::new(&stop, &mut step)).unwrap();
    let choice = Choice::GREEDY;
    for _ in 0..n {
        let newest = &tokens[tokens.len() - 1..];
        let turn = Turn { row, tokens: newest, choice: &choice, draw: 0, recent: &tokens };
        runner.step(&[turn], &mut chosen).unwrap();
        tokens.push(chosen[0][0]);
    }
    tokens.split_off(prompt.len())
}

fn agreeing(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn largest_difference(top: &Top, logits: &[f32]) -> f32 {
    let difference = |(&id, &x): (&usize, &f32)| (logits[id] - x).abs();
    top.ids.iter().zip(&top.logits).map(difference).fold(0.0, f32::max)
}

#[test]
fn float_activations_match_logits_and_greedy_texts() {
    let Some((source, _turn)) = real() else { return };
    let model = Model::new(&source, threads(), Activations::F32).unwrap();
    for (name, case) in golden::<Prompt>("greedy.json") {
        let tokens = [&case.prompt[..], &case.greedy].concat();
        let logits = logits(&model, &tokens);
        let steps = &logits[case.prompt.len() - 1..];
        let rows = case.prompt_top10.iter().zip(&logits).chain(case.step_top10.iter().zip(steps));
        let worst = rows.map(|(top, row)| largest_difference(top, row)).fold(0.0, f32::max);
        let found = greedy(&model, "f16", &case.prompt, case.greedy.len());
        let same = agreeing(&found, &case.greedy);
        eprintln!("{name}: logits within {worst}, {same} of {} tokens", case.greedy.len());
        assert!(worst < 0.05, "{name}: a top-10 logit is off by {worst}");
        let close = case.margins.get(same).is_none_or(|&margin| margin < 0.05);
        assert!(same >= 32 || close, "{name}: differs at token {same}: {found:?}");
    }
}

#[test]
fn eight_bit_activations_are_as_close_as_a_peer() {
    let Some((source, _turn)) = real() else { return };
    let model = Model::new(&source, threads(), Activations::Q8).unwrap();
    let (mut all, mut peers) = (0.0, 0.0);
    for (name, case) in golden::<Prompt>("greedy.json") {
        let row = logits(&model, &case.prompt).pop().unwrap();
        let worst = largest_difference(&case.step_top10[0], &row);
        let found = greedy(&model, "f16", &case.prompt, case.greedy.len());
        let same = agreeing(&found, &case.greedy);
        let PeerPrompt { agree, max_logit_difference } = case.eight_bit;
        eprintln!(
            "{name}: within {worst} (peer {max_logit_difference}), {same} tokens (peer {agree})"
        );
        // Two correct 8-bit engines part where the best two logits are this close.
        let close = case.margins.get(same).is_none_or(|&margin| margin < 0.1);
        assert!(same >= agree || close, "{name}: {same} tokens agree");
        (all, peers) = (all + worst, peers + max_logit_difference);
    }
    // One prompt's largest difference is a matter of luck, their sum less so.
    assert!(all <= peers, "first logits are off by {all} in sum, a peer's by {peers}");
}

/// Negative log-probabilities of the tokens of `text` after the first, or after `prefix`.
fn nll(model: &Model<'_>, spec: &str, text: &[u32], prefix: usize) -> Vec<f32> {
    let (stop, mut step) = (AtomicBool::new(false), |_| {});
    let reading = Reading { cache: spec.parse().unwrap(), prefix, piece: 1024 };
    score(model, text, &reading, &mut Watch::new(&stop, &mut step)).unwrap().nll
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64
}

#[test]
fn perplexity_of_8k_tokens_matches() {
    let Some((source, _turn)) = real() else { return };
    let model = Model::new(&source, threads(), Activations::F32).unwrap();
    for (name, text) in golden::<Text>("texts.json") {
        let found = mean(&nll(&model, "f16", &text.tokens, 0));
        eprintln!("{name}: log-perplexity {found:.6}, reference {:.6}", text.mean);
        assert!(((found - text.mean).exp() - 1.0).abs() < 0.002, "{name}: {found}");
    }
}

#[test]
fn eight_bit_perplexity_is_as_close_as_a_peers() {
    let Some((source, _turn)) = real() else { return };
    let model = Model::new(&source, threads(), Activations::Q8).unwrap();
    for (name, text) in golden::<Text>("texts.json") {
        let PeerText { tokens, mean: peer, mean_difference } = text.eight_bit;
        let (found, expected) =
            (nll(&model, "f16", &text.tokens[..tokens], 0), &text.nll[..tokens - 1]);
        let differences: Vec<_> = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).collect();
        let (off, peer_off) = (mean(&found) - mean(expected), peer - mean(expected));
        let each = mean(&differences);
        // Standard error: a normal deviate is 1.25 of its mean magnitude.
        let error = 1.25 * each / (found.len() as f64).sqrt();
        eprintln!(
            "{name}: mean off by {off:.4} (peer {peer_off:.4}), tokens by {each:.4} (peer {mean_difference:.4})"
        );
        // Both engines round alike but sum in another order, so tokens differ by chance.
        assert!(each <= 1.1 * mean_difference, "{name}: tokens are off by {each}");
        assert!(
            off.abs() <= peer_off.abs() + 2.0 * error,
            "{name}: mean is off by {off} +- {error}"
        );
    }
}

#[test]
fn quantised_prefixes_cost_what_kivi_costs() {
    let Some((source, _turn)) = real() else { return };
    let model = Model::new(&source, threads(), Activations::F32).unwrap();
    for (name, text) in golden::<Text>("texts.json") {
        let Quantised { prefix, tokens, f16, q4, q2 } = text.quantised;
        let (q4_spec, q2_spec) =
            ("q4,hadamard=off,group=64,kivi_exact", "q2-kivi,group=64,kivi_exact");
        // Groups of 32 instead would change q2 by 0.1 and 0.03.
        for (spec, expected, off) in
            [("f16", f16, 0.002), (q4_spec, q4, 0.005), (q2_spec, q2, 0.015)]
        {
            // The reference leaves out the token that the prefix predicts.
            let found = mean(&nll(&model, spec, &text.tokens[..prefix + tokens], prefix)[1..]);
            eprintln!("{name} {spec}: {found:.5}, reference {expected:.5}");
            assert!((found - expected).abs() < off, "{name}, {spec}: {found}");
        }
    }
}

#[test]
fn tiny_models_match_logits_and_greedy_texts() {
    for name in ["llama3", "llama_linear", "mistral", "qwen2"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let text = std::fs::read_to_string(folder.join("expect.json")).unwrap();
        let expected: Fixture = serde_json::from_str(&text).unwrap();
        let source = Source::open(&folder).unwrap();
        let model = Model::new(&source, threads(), Activations::F32).unwrap();
        let found = logits(&model, &expected.tokens);
        let off = |row: &Row| {
            let pairs = row.values.iter().zip(&found[row.position]);
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let worst = expected.logits.iter().map(off).fold(0.0, f32::max);
        eprintln!("{name}: logits within {worst}");
        // K and V are f16, which moves logits by up to 6e-3.
        assert!(worst < 0.01, "{name}: a logit is off by {worst}");
        let tokens = greedy(&model, "f16", &expected.tokens, expected.greedy.tokens.len());
        assert_eq!(tokens, expected.greedy.tokens, "{name}");
        let found = nll(&model, "f16", &expected.tokens, 0);
        assert_eq!(found.len(), expected.nll.len());
        for (i, (a, b)) in found.iter().zip(&expected.nll).enumerate() {
            assert!((a - b).abs() < 0.01, "{name}: nll {i} is {a}, expected {b}");
        }
    }
}
