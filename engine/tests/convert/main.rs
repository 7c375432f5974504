//! EliteKV: what is converted, what it keeps of the model, and what is refused.

#[path = "../support/mod.rs"]
mod support;

mod folder;
mod record;
mod recovery;
mod refusals;
mod resume;
mod search;

use kvwarp_engine::convert::{Budget, Request, budget::ranks};
use support::converted::{apart, converted, logits, request, stopped};
use support::models::{fixture, text};

const FIXTURES: [&str; 4] = ["llama3", "mistral", "qwen2", "llama_linear"];

/// Every pair and all that the latent vector can hold: the model as it was.
#[test]
fn nothing_is_lost_where_everything_is_kept() {
    for name in FIXTURES {
        let (source, tokens) = (fixture(name), text(160));
        let (kv_heads, width) = (source.config.kv_heads, source.config.width);
        let exact = logits(&source, &tokens, "f16", 160);
        for (whiten, pairs) in [(true, 32), (false, 32)] {
            let full = (kv_heads * (128 - 2 * pairs)).min(width);
            let request = Request { whiten, ..request(&tokens, pairs, full) };
            let done = converted(&source, &request);
            // Keys and values are kept in f16: a rounding that falls on the other side.
            let far = apart(&exact, &logits(&done.staged, &tokens, "f16", 160));
            assert!(far < 0.02, "{name}: {far}");
            let cut = Request { whiten, ..crate::request(&tokens, pairs, full / 2) };
            let far = apart(&exact, &logits(&converted(&source, &cut).staged, &tokens, "f16", 160));
            assert!(far > 0.2, "{name}: half a rank changes nothing: {far}");
        }
    }
}

/// What rotates is a matter of pairs alone: the same channels, the same positions, whatever reads them and how.
#[test]
fn a_converted_model_reads_one_by_one_as_together_and_with_every_cache() {
    for name in FIXTURES {
        let (source, tokens) = (fixture(name), text(160));
        let staged = converted(&source, &request(&tokens, 5, 48)).staged;
        let together = logits(&staged, &tokens, "f16", 160);
        let apart_by = |spec: &str, piece| apart(&together, &logits(&staged, &tokens, spec, piece));
        assert!(apart_by("f16", 1) < 0.02, "{name}");
        assert!(apart_by("f16", 40) < 0.02, "{name}");
        let eight = apart_by("q8", 1);
        assert!((1e-5..0.5).contains(&eight), "{name}: q8 {eight}");
        let two = apart_by("q2,window=64", 1);
        assert!((eight..8.0).contains(&two), "{name}: q2 {two}");
    }
}

/// Half of the pairs, chosen by the search, cost less than the other half.
#[test]
fn elite_pairs_are_the_better_ones() {
    let (source, tokens) = (fixture("llama3"), text(160));
    let exact = logits(&source, &tokens, "f16", 160);
    let mut done = converted(&source, &request(&tokens, 16, 96)).staged;
    let chosen = done.config.elite.clone().unwrap();
    let error =
        |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum() };
    let good = error(&exact, &logits(&done, &tokens, "f16", 160));
    // The tensors are of the chosen pairs: convert with the others instead.
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let wanted = request(&tokens, 16, 96);
    assert!(stopped(&source, &wanted, &state, usize::MAX).is_ok());
    let text = std::fs::read_to_string(&state).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (layer, pairs) in chosen.elite_pairs.iter().enumerate() {
        for (head, pairs) in pairs.iter().enumerate() {
            let others: Vec<u8> = (0..32).filter(|j| !pairs.contains(j)).collect();
            json["orders"][layer][head] = others.into();
        }
    }
    std::fs::write(&state, json.to_string()).unwrap();
    done = stopped(&source, &wanted, &state, usize::MAX).unwrap().staged;
    let bad = error(&exact, &logits(&done, &tokens, "f16", 160));
    assert!(good * 1.5 < bad, "{good} with the chosen pairs, {bad} with the others");
}

/// Each 16 go where they take most of the error, and no layer gets more than it has use for.
#[test]
fn ranks_of_layers_follow_their_errors() {
    let shares = |first: f64, half: usize| -> Vec<f64> {
        (0..96).map(|i| first * 0.5f64.powi((i / half) as i32)).collect()
    };
    // The second layer's halve every 32, the third's begin lower by 8 and stay so.
    let all = [shares(1.0, 16), shares(1.0, 32), shares(0.125, 96)];
    assert_eq!(ranks(&all, 16, 96), [16, 16, 16]);
    assert_eq!(ranks(&all, 32, 96), [32, 48, 16]);
    assert_eq!(ranks(&all, 48, 96), [48, 80, 16]);
    assert_eq!(ranks(&all, 64, 96), [64, 96, 32]);
    assert_eq!(ranks(&all, 80, 80), [80, 80, 80]);
    assert_eq!(ranks(&all, 80, 90), [80, 80, 80]);
}

/// Layers that differ have as much together, and what that costs is said beside what it costs where they are alike.
#[test]
fn layers_share_a_budget() {
    let mut differing = 0;
    for name in FIXTURES {
        let (source, tokens) = (fixture(name), text(160));
        let most = Budget::most(8, &source.config);
        let whole = Request { by_layer: true, ..request(&tokens, 8, most) };
        let whole = converted(&source, &whole).staged.config.elite.unwrap();
        assert!(whole.ranks.iter().all(|&rank| rank == most));
        for whiten in [false, true] {
            let alike = Request { whiten, refit: true, ..request(&tokens, 8, 48) };
            let done = converted(&source, &Request { by_layer: true, ..alike.clone() });
            let stages: Vec<_> = done.stages.iter().map(|stage| stage.name).collect();
            assert_eq!(stages, ["source", "pairs", "factors", "ranks", "refit"]);
            let (elite, alike) =
                (done.staged.config.elite.clone().unwrap(), converted(&source, &alike));
            assert_eq!(elite.ranks.iter().sum::<usize>(), 48 * source.config.layers);
            assert!(elite.ranks.iter().all(|rank| rank.is_multiple_of(16) && *rank > 0));
            assert_eq!(done.ratio, alike.ratio);
            assert_eq!(done.stages[..3], alike.stages[..3]);
            let differ = elite.ranks != alike.staged.config.elite.clone().unwrap().ranks;
            assert_eq!(differ, done.stages[3].nats != done.stages[2].nats, "{name}");
            differing += usize::from(differ);
        }
    }
    assert!(differing > 2, "{differing}");
}
