//! A converted model that keeps latents: what it says is what keys and values expanded from them say, in exactly
//! `2 r kv_heads + c` elements a token and layer.

mod held;
mod program;
#[path = "../support/mod.rs"]
mod support;

use kvwarp_engine::config::Config;
use kvwarp_engine::convert::{Budget, Request, budget};
use kvwarp_engine::source::Source;
use kvwarp_engine::spec::CacheSpec;
use support::converted::{apart, converted, logits, request};
use support::models::{fixture, text};

/// Fixtures, pairs and ranks; that of Mistral sees 24 tokens only.
const MODELS: [(&str, usize, usize); 4] =
    [("llama3", 8, 48), ("qwen2", 6, 96), ("llama_linear", 4, 112), ("mistral", 4, 64)];

/// Of one of [`MODELS`], in 16 bits as a folder of it has them.
fn staged((name, pairs, rank): (&str, usize, usize)) -> (Source, usize) {
    let (source, tokens) = (fixture(name), text(160));
    let most = source.config.sliding_window.unwrap_or(tokens.len());
    (converted(&source, &request(&tokens, pairs, rank)).staged, most)
}

fn spec(text: &str) -> CacheSpec {
    text.parse().unwrap()
}

/// Root of the squares of the differences over that of the squares.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let far = squares(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (far / squares(&mut a.iter().copied())).sqrt()
}

/// Read together, keys and values are expanded; one by one, `B_K` and `B_V` are absorbed; piece by piece, what is held is
/// expanded again. Latents and matrices are rounded to f16, keys and values in an f16 cache as well: nothing else sets
/// them apart.
#[test]
fn absorbed_is_expand_then_attend() {
    for model in MODELS {
        let (staged, most) = staged(model);
        let tokens = text(most);
        let expanded = logits(&staged, &tokens, "f16", 160);
        for piece in [160, 40, 1] {
            let latent = logits(&staged, &tokens, "latent", piece);
            let (far, most) = (relative(&expanded, &latent), apart(&expanded, &latent));
            eprintln!("{model:?}, pieces of {piece}: relative L2 {far:.1e}, at most {most:.4}");
            assert!(
                (1e-6..3e-3).contains(&far) && most < 0.05,
                "{model:?}, {piece}: {far}, {most}"
            );
        }
    }
}

/// Every pair and all that the latent vector can hold: the model as it was, read together and one by one.
#[test]
fn nothing_is_lost_where_everything_is_kept() {
    for name in ["llama3", "qwen2", "llama_linear"] {
        let (source, tokens) = (fixture(name), text(160));
        let (kv_heads, width) = (source.config.kv_heads, source.config.width);
        let exact = logits(&source, &tokens, "f16", 160);
        for pairs in [32, 8] {
            let full = (kv_heads * (128 - 2 * pairs)).min(width);
            let request = Request { whiten: false, ..request(&tokens, pairs, full) };
            let done = converted(&source, &request).staged;
            let [together, singly] = [160, 1].map(|piece| logits(&done, &tokens, "latent", piece));
            let far = apart(&exact, &together);
            if pairs == 32 {
                eprintln!("{name}: {far}, {}", apart(&exact, &singly));
                assert!(far.max(apart(&exact, &singly)) < 0.02, "{name}: {far}");
            } else {
                // Most pairs no longer turn.
                assert!(far > 0.05 && relative(&together, &singly) < 3e-3, "{name}: {far}");
            }
        }
    }
}

#[test]
fn a_model_has_latents_of_its_own_and_others_have_none() {
    let (staged, _) = staged(MODELS[0]);
    assert_eq!(CacheSpec::of(&staged.config), spec("latent"));
    assert_eq!(CacheSpec::of(&fixture("llama3").config), spec("f16"));
    let said = |source: &Source, text: &str, context| {
        let model = support::models::model(source);
        model.cache(&spec(text), context).err().map(|error| error.to_string())
    };
    assert_eq!(said(&staged, "latent", 160), None);
    let error = said(&fixture("llama3"), "latent", 160).unwrap();
    assert!(error.contains("no latents") && error.contains("kvwarp convert elitekv"), "{error}");
    let of = |name: &str, pairs, rank| {
        let (source, tokens) = (fixture(name), text(160));
        converted(&source, &request(&tokens, pairs, rank)).staged
    };
    for (source, parts) in [
        (of("llama3", 6, 48), ["`elitekv.pairs` is 6, with 1 kv heads", "multiple of 4"]),
        (of("llama3", 8, 40), ["`elitekv.rank` is 40", "multiples of 16"]),
    ] {
        let error = said(&source, "latent", 160).unwrap();
        let remedies = ["convert again", "--pairs and --rank", "--cache f16"];
        assert!(parts.iter().chain(&remedies).all(|part| error.contains(part)), "{error}");
        assert_eq!(said(&source, "f16", 160), None);
    }
    let (mistral, most) = self::staged(MODELS[3]);
    assert_eq!(said(&mistral, "latent", most), None);
    let error = said(&mistral, "latent", most + 1).unwrap();
    assert!(error.contains("newest 24 tokens only") && error.contains("--cache f16"), "{error}");
    for (text, part) in [
        ("latent,evict=snapkv:0.5", "`evict` does not go with latent"),
        ("latent,evict=lagkv:0.5", "share what latent keeps of a token"),
        ("latent,tsp=0.5", "`tsp` does not go with latent"),
        ("latent,window=64", "`window` has no effect on latent"),
        ("latent,hadamard=on", "`hadamard` has no effect on latent"),
        ("latent-q4,range=90", "`range` has no effect on latent-q4: it is for codes of 2 bits"),
        ("latent-q2,hadamard=on", "`hadamard` has no effect on latent-q2"),
        ("latent-q2,group=32", "an element has an f16 scale of 64 tokens"),
        ("latent-q2,evict=lagkv:0.5", "`evict` does not go with latent"),
    ] {
        let error = text.parse::<CacheSpec>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

/// Of three kv heads pairs are multiples of 4, but for budgets in which there is no room for so many.
#[test]
fn conversions_keep_to_what_latents_take() {
    let config = Config { heads: 9, kv_heads: 3, width: 576, ..fixture("llama3").config };
    for ratio in [0.25, 0.5, 0.75, 1.0] {
        let grid = budget::grid(&config, ratio);
        assert!(grid.iter().any(|budget| budget.pairs >= 4), "{ratio}: {grid:?}");
        for Budget { pairs, rank } in grid {
            let shape = kvwarp::lowrank_kv::Shape::new(3, pairs, rank);
            assert!(shape.is_ok() || pairs < 4, "{ratio}: {pairs} pairs, rank {rank}");
        }
    }
}
