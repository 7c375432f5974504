//! Pass keys hidden in a text, and what the model says when it continues.

use kvwarp_engine::model::{Model, Work};
use kvwarp_engine::spec::CacheSpec;
use kvwarp_engine::tokenizer::Tokenizer;

use crate::watched;

/// The `steps` most probable tokens after `prompt`, one after the other.
pub fn greedy(model: &Model<'_>, spec: &CacheSpec, prompt: &[u32], steps: usize) -> Vec<u32> {
    let mut cache = model.cache(spec, prompt.len() + steps).unwrap();
    let mut work = Work::default();
    let row = cache.open();
    watched(|watch| model.prefill(prompt, (&mut cache, row), &mut work, watch)).unwrap();
    let mut said = Vec::new();
    for _ in 0..steps {
        let best = work.logits().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        said.push(best as u32);
        model.step(&[(row, &[best as u32])], &mut cache, &mut work).unwrap();
    }
    said
}

/// A pass key of `digits` digits in a text of about `tokens` tokens, and the question for it.
fn pass_key(tokenizer: &Tokenizer, tokens: usize, digits: usize, seed: u64) -> (Vec<u32>, String) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let key: String = (0..digits).map(|_| char::from(b'0' + next(10) as u8)).collect();
    let filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";
    let each = tokenizer.encode(filler, false).unwrap().len();
    let fillers = tokens.saturating_sub(2 * digits + 60) / each;
    let before = fillers * (1 + next(8) as usize) / 10;
    let text = format!(
        "There is a pass key hidden in this text. Remember it.\n{}The pass key is {key}. Remember it. {key} is the pass key.\n{}What is the pass key? The pass key is ",
        filler.repeat(before),
        filler.repeat(fillers - before),
    );
    (tokenizer.encode(text.trim_end(), false).unwrap(), key)
}

/// Keys of `digits` digits in `tokens` tokens that are said without a slip, of `seeds`.
pub fn found(
    model: &Model<'_>,
    tokenizer: &Tokenizer,
    spec: &CacheSpec,
    (tokens, digits): (usize, usize),
    seeds: u64,
) -> u64 {
    let found = (0..seeds).filter(|&seed| {
        let (prompt, key) = pass_key(tokenizer, tokens, digits, seed + 1);
        let said = greedy(model, spec, &prompt, digits + 2);
        tokenizer.decode(&said, false).trim_start().starts_with(&key)
    });
    found.count() as u64
}
