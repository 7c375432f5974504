//! What a model says with a cache that dropped tokens.

use kvwarp::linear::Activations;
use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::source::Source;
use kvwarp_engine::spec::CacheSpec;

use crate::support::models::{fixture, text};
use crate::support::schedule::watched;

/// Logits after a prompt and after each of a few steps, and what the heads of each layer then hold.
fn said(
    model: &Model<'_>,
    spec: &str,
    tokens: &[u32],
    steps: usize,
) -> (Vec<Vec<f32>>, Vec<Vec<usize>>) {
    let mut cache = model.cache(&spec.parse().unwrap(), tokens.len() + steps).unwrap();
    let (row, mut work) = (cache.open(), Work::default());
    watched(|watch| model.prefill(tokens, (&mut cache, row), &mut work, watch)).unwrap();
    let mut logits = vec![work.logits().to_vec()];
    for i in 0..steps {
        let token = tokens[i % tokens.len()];
        model.step(&[(row, &[token])], &mut cache, &mut work).unwrap();
        logits.push(work.logits().to_vec());
    }
    assert_eq!(cache.position(row), tokens.len() + steps);
    let lens = (0..model.config().layers).map(|layer| cache.lens(row, layer).collect()).collect();
    (logits, lens)
}

#[test]
fn everything_kept_is_the_full_cache_bit_for_bit() {
    let source = fixture("qwen2");
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    let tokens = text(150);
    let full = said(&model, "f16", &tokens, 3);
    for spec in [
        "f16,evict=lagkv:1",
        "f16,evict=snapkv:1,budget=global",
        "f16,tsp=0:1",
        // A policy at work that finds nothing to drop.
        "f16,evict=lagkv:0.5",
        "f16,evict=snapkv:0.5:window=512",
        "f16,evict=streaming:0.9999:sink=150",
        "f16,evict=snapkv:0:window=150,budget=dynamickv",
        "f16,evict=h2o:0.9999:sink=150",
    ] {
        let Ok(_) = spec.parse::<CacheSpec>() else { continue };
        assert!(said(&model, spec, &tokens, 3) == full, "{spec}");
    }
}

#[test]
fn budgets_are_kept_in_every_combination() {
    let source = fixture("llama_linear");
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    let (n, heads) = (160, model.config().kv_heads * model.config().layers);
    for store in ["f16", "q8,window=0"] {
        for method in [
            "snapkv:0.25:window=8",
            "fastkv:0.25",
            "h2o:0.25",
            "keynorm:0.25",
            "streaming:0.25",
            "random:0.25",
            "lagkv-kvpress:0.25:lag=16",
        ] {
            for rest in [
                "",
                ",budget=pyramid",
                ",budget=dynamickv",
                ",budget=prefixkv",
                ",budget=global",
                ",refine=kvcrush:0.25",
                ",refine=kvcrush:0.5:random,budget=global",
            ] {
                let spec = format!("{store},evict={method}{rest}");
                let (logits, lens) = said(&model, &spec, &text(n), 2);
                assert!(logits.iter().flatten().all(|x| x.is_finite()), "{spec}");
                let kept = lens.iter().flatten().map(|len| len - 2).sum::<usize>();
                assert!(
                    kept.abs_diff(heads * 40) <= if rest.contains("pyramid") { heads } else { 0 },
                    "{spec}: {kept} of {}",
                    heads * 40
                );
            }
        }
    }
}

#[test]
fn propagation_narrows_later_layers_and_keeps_positions() {
    let source = fixture("qwen2");
    let model = Model::new(&source, 2, Activations::F32).unwrap();
    let (_, lens) = said(&model, "f16,tsp=0:0.25", &text(160), 1);
    assert_eq!(lens, [[161, 161], [41, 41]]);
    // The retention rate is of the whole prompt, and no layer keeps more than it read.
    let (_, lens) = said(&model, "f16,tsp=0:0.25,evict=fastkv:0.1", &text(160), 1);
    assert_eq!(lens, [[17, 17], [17, 17]]);
    let (_, lens) = said(&model, "f16,tsp=0:0.25,evict=fastkv:0.5", &text(160), 1);
    assert_eq!(lens, [[81, 81], [41, 41]]);
    // Nothing is lost where a text is shorter than the window of the scores.
    let (_, lens) = said(&model, "f16,tsp=0:0,evict=fastkv:0", &text(6), 1);
    assert_eq!(lens, [[7, 7], [7, 7]]);
}

#[test]
fn what_does_not_go_together_is_named() {
    let refusals = |model: &Source, spec: &str, context| {
        let model = Model::new(model, 1, Activations::F32).unwrap();
        model.cache(&spec.parse().unwrap(), context).err().unwrap().to_string()
    };
    let error = refusals(&fixture("mistral"), "q2,evict=snapkv:0.5", 80);
    assert!(error.contains("newest 24 tokens") && error.contains("q2,evict=snapkv:0.5"), "{error}");
    let error = refusals(&fixture("qwen2"), "f16,tsp=7:0.5", 80);
    assert!(error.contains("`tsp` is at layer 7") && error.contains("0 to 1"), "{error}");
    let source = fixture("qwen2");
    let model = Model::new(&source, 1, Activations::F32).unwrap();
    let mut cache = model.cache(&"f16,evict=kvzip:0.5".parse().unwrap(), 80).unwrap();
    let row = cache.open();
    let prefill =
        watched(|watch| model.prefill(&text(80), (&mut cache, row), &mut Work::default(), watch));
    let error = prefill.unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

/// A prompt of more rows than pass through a layer together.
#[test]
fn attention_is_summed_over_pieces() {
    let source = Source::synthetic("smollm2-135m").unwrap();
    let model = Model::new(&source, 2, Activations::Q8).unwrap();
    for spec in ["f16,evict=h2o:0.25", "f16,evict=h2o:0.25,tsp=1:0.5"] {
        let (logits, lens) = said(&model, spec, &text(300), 1);
        assert!(logits.iter().flatten().all(|x| x.is_finite()));
        assert!(lens.iter().flatten().all(|&len| len == 76), "{spec}: {lens:?}");
    }
}

/// Most bytes that a sequence took while its prompt was read.
fn peak(model: &Model<'_>, spec: &str, tokens: &[u32]) -> usize {
    let mut cache = model.cache(&spec.parse().unwrap(), tokens.len()).unwrap();
    let (row, mut work) = (cache.open(), Work::default());
    watched(|watch| model.prefill(tokens, (&mut cache, row), &mut work, watch)).unwrap();
    cache.stats(row).peak_bytes
}

#[test]
fn one_layer_is_held_whole_unless_budgets_wait_for_all() {
    let source = Source::synthetic("smollm2-135m").unwrap();
    let model = Model::new(&source, 2, Activations::Q8).unwrap();
    let (tokens, layers) = (text(512), model.config().layers);
    let full = peak(&model, "f16", &tokens);
    let chosen = peak(&model, "f16,evict=keynorm:0.25", &tokens);
    // Two of eight slabs a head beside the ring's one, and one layer whole.
    assert!(chosen < full / 3 + 2 * full / layers, "{chosen} of {full}");
    let waiting = peak(&model, "f16,evict=keynorm:0.25,budget=global", &tokens);
    assert!(waiting > full * 9 / 10, "{waiting} of {full}");
    let settling = peak(&model, "f16,evict=keynorm:0.05,budget=dynamickv", &tokens);
    assert!(settling < full * 3 / 4, "{settling} of {full}");
}
