//! Random schedules: requests that come, go and share beginnings, on a runner that is too small for all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvwarp::sample::Sampling;
use kvwarp_engine::batch::{Batch, Done, Event, Request};
use kvwarp_engine::generate::End;
use kvwarp_engine::runner::{Choice, Row, RunError, Runner, Turn};
use kvwarp_engine::watch::Watch;
use rand::rngs::ChaCha8Rng;
use rand::{Rng, RngExt};

/// Runs `body` with a watch that never stops.
pub fn watched<T>(body: impl FnOnce(&mut Watch<'_>) -> T) -> T {
    let (stop, mut step) = (AtomicBool::new(false), |_| {});
    body(&mut Watch::new(&stop, &mut step))
}

/// What follows each of `tokens`, given in turns of up to `most` and as the runner allows.
pub fn fed(runner: &mut impl Runner, row: Row, tokens: &[u32], most: usize) -> Vec<u32> {
    let (mut all, mut out, mut at) = (Vec::new(), Vec::new(), 0);
    while at < tokens.len() {
        let n = most.min(1 + runner.drafts(row)).min(tokens.len() - at);
        let (tokens, draw) = (&tokens[at..at + n], at as i32);
        let turn = Turn { row, tokens, choice: &Choice::GREEDY, draw, recent: &tokens[..1] };
        runner.step(&[turn], &mut out).unwrap();
        all.append(&mut out[0]);
        at += n;
    }
    all
}

/// `n` requests of prompts up to `prompt` tokens below 250, most of which begin like others, and short answers.
pub fn requests(rng: &mut ChaCha8Rng, n: u64, prompt: usize, answer: usize) -> Vec<Request> {
    let text = |rng: &mut ChaCha8Rng, n| (0..n).map(|_| rng.random_range(0..250)).collect();
    let beginnings: Vec<Vec<u32>> = (0..3).map(|_| text(rng, prompt)).collect();
    let request = |id| {
        let mut tokens = beginnings[rng.random_range(0..3)].clone();
        tokens.truncate(rng.random_range(1..=prompt));
        if rng.random_range(0..4) > 0 {
            let at = rng.random_range(0..tokens.len());
            let more = rng.random_range(1..=prompt - at);
            tokens.truncate(at);
            tokens.extend(text(rng, more));
        }
        let greedy = rng.random_range(0..2) == 0;
        let some =
            Sampling { temperature: 1.0, top_k: 40, top_p: 0.95, min_p: 0.0, repeat_penalty: 1.1 };
        let sampling = if greedy { Sampling::GREEDY } else { some };
        Request {
            id,
            prompt: tokens,
            max_tokens: rng.random_range(1..=answer),
            choice: Choice { sampling, seed: rng.next_u64(), last: 64 },
            stop: Arc::from([rng.random_range(0..250)]),
            drafts: rng.random_range(0..=15) * rng.random_range(0..=1),
        }
    };
    (0..n).map(request).collect()
}

/// What a request gets by itself: its prompt in blocks, then a token at a time.
pub fn alone(
    runner: &mut dyn Runner,
    request: &Request,
    block: usize,
) -> Result<Vec<u32>, RunError> {
    let row = runner.open()?;
    let (mut tokens, prompt) = (request.prompt.clone(), request.prompt.len());
    let block = if runner.spec().selects() { runner.spec().block() } else { block };
    for block in tokens[..prompt - 1].chunks(block) {
        watched(|watch| runner.read(row, block, watch))?;
    }
    let mut out = Vec::new();
    while tokens.len() - prompt < request.max_tokens {
        let (draw, newest) = ((tokens.len() - prompt) as i32, &tokens[tokens.len() - 1..]);
        let turn = Turn { row, tokens: newest, choice: &request.choice, draw, recent: &tokens };
        runner.step(&[turn], &mut out)?;
        if request.stop.contains(&out[0][0]) {
            break;
        }
        tokens.push(out[0][0]);
    }
    runner.close(row);
    Ok(tokens.split_off(prompt))
}

/// What came of a schedule.
#[derive(Default)]
pub struct Outcome {
    pub done: HashMap<u64, Done>,
    pub failed: Vec<u64>,
    pub rounds: usize,
    pub cancelled: Vec<u64>,
}

/// Submits `requests` a few a round, cancels one of `cancel` where that is not 0, and goes on until nothing is left.
pub fn run(
    runner: &mut dyn Runner,
    requests: &[Request],
    block: usize,
    cancel: u32,
    rng: &mut ChaCha8Rng,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut tokens: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut batch = Batch::new(runner, block, [0; 32]);
    let mut coming = requests.iter();
    while coming.len() > 0 || !batch.is_idle() {
        for request in coming.by_ref().take(rng.random_range(0..3)) {
            batch.submit(request.clone()).unwrap();
            if cancel > 0 && rng.random_range(0..cancel) == 0 {
                let id = rng.random_range(0..=request.id);
                if batch.cancel(id) {
                    outcome.cancelled.push(id);
                }
            }
        }
        let mut emit = |event| match event {
            Event::Token { id, token } => tokens.entry(id).or_default().push(token),
            Event::Done { id, done } => assert!(outcome.done.insert(id, done).is_none()),
            Event::Failed { id, .. } => outcome.failed.push(id),
        };
        watched(|watch| batch.round(watch, &mut emit)).unwrap();
        outcome.rounds += 1;
        assert!(outcome.rounds < 200_000, "it never ends");
    }
    for (id, done) in &outcome.done {
        assert_eq!(tokens.get(id).cloned().unwrap_or_default(), done.tokens, "events of {id}");
        let whole = done.tokens.len() == requests[*id as usize].max_tokens;
        assert_eq!(done.end, if whole { End::Length } else { End::Stop });
    }
    outcome
}
