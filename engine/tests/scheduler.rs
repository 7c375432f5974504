//! Scheduling, on a runner without a model.

mod support;

use std::sync::Arc;

use kvwarp_engine::batch::{Batch, Event, Prefixes, Request};
use kvwarp_engine::generate::End;
use kvwarp_engine::runner::{Choice, Frozen, Runner};
use kvwarp_engine::watch::Watch;
use proptest::prelude::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use support::fake::{EXPLOSIVE, Fake, UNREADABLE};
use support::schedule::{alone, requests, run, watched};

const BLOCK: usize = 64;

fn request(id: u64, prompt: &[u32], max_tokens: usize) -> Request {
    let choice = Choice { seed: id, ..Choice::GREEDY };
    Request { id, prompt: prompt.to_vec(), max_tokens, choice, stop: Arc::from([]), drafts: 0 }
}

/// Slabs for the longest of prompts of 400 tokens and answers of 40, and for a few more.
fn small(rng: &mut ChaCha8Rng) -> Fake {
    let slabs = [rng.random_range(1..12), rng.random_range(5..30)];
    Fake::new(rng.random_range(1..6), slabs)
}

fn by_itself(request: &Request) -> Option<Vec<u32>> {
    alone(&mut Fake::new(1, [1 << 20; 2]), request, BLOCK).ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn everybody_gets_what_they_get_alone_and_nobody_starves(seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let requests = requests(&mut rng, 20, 400, 40);
        let mut fake = small(&mut rng);
        let outcome = run(&mut fake, &requests, BLOCK, 0, &mut rng);
        prop_assert_eq!((outcome.done.len(), outcome.failed.len()), (requests.len(), 0));
        for request in &requests {
            let tokens = outcome.done[&request.id].tokens.clone();
            prop_assert_eq!(Some(tokens), by_itself(request), "{}", request.id);
        }
        prop_assert_eq!(outcome.done[&0].preemptions, 0, "the oldest never gives way");
        // In each round the oldest reads a block or gets a token, whoever else is there.
        let steps = |r: &Request| r.prompt.len().div_ceil(BLOCK) + 1 + r.max_tokens;
        prop_assert!(outcome.rounds <= requests.iter().map(steps).sum::<usize>() + 4 * requests.len());
        prop_assert_eq!(fake.used(), 0);
    }

    #[test]
    fn those_that_fail_or_leave_take_nobody_with_them(seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut requests = requests(&mut rng, 20, 400, 40);
        for request in &mut requests {
            let (at, what) = (rng.random_range(0..request.prompt.len()), rng.random_range(0..8));
            match what {
                0 => request.prompt[at] = UNREADABLE,
                1 => *request.prompt.last_mut().unwrap() = EXPLOSIVE,
                _ => {}
            }
        }
        let mut fake = small(&mut rng);
        let outcome = run(&mut fake, &requests, BLOCK, 10, &mut rng);
        for request in &requests {
            let expected = by_itself(request);
            match outcome.done.get(&request.id) {
                Some(done) => prop_assert_eq!(Some(done.tokens.clone()), expected),
                None => prop_assert!(
                    outcome.cancelled.contains(&request.id)
                        || expected.is_none() && outcome.failed.contains(&request.id)
                ),
            }
        }
        prop_assert_eq!(fake.used(), 0);
    }

    #[test]
    fn the_least_used_prefix_is_forgotten_and_beginnings_outlast_their_ends(
        uses in prop::collection::vec((0..3u32, 1..5usize), 1..60),
    ) {
        let mut prefixes = Prefixes::new([7; 32], BLOCK);
        let text = |which: u32| vec![which; 4 * BLOCK + 5];
        let mut model: Vec<(u32, usize)> = Vec::new();
        for (which, blocks) in uses {
            let keys = prefixes.keys(&text(which)[..blocks * BLOCK]);
            prop_assert_eq!(keys.len(), blocks);
            let known = model.iter().filter(|(w, b)| *w == which && *b <= blocks);
            let reach = known.map(|(_, b)| b * BLOCK).max().unwrap_or(0);
            prop_assert_eq!(prefixes.reach(&keys), reach);
            prop_assert_eq!(prefixes.longest(&keys).map_or(0, |frozen| frozen.len), reach);
            // Used now: the longest first, so that the shortest is the newest.
            let (mut used, rest): (Vec<_>, Vec<_>) =
                model.iter().partition(|(w, b)| *w == which && *b <= blocks);
            used.sort_by_key(|&(_, b)| std::cmp::Reverse(b));
            model = [rest, used].concat();
            let full = keys[blocks - 1];
            if !prefixes.contains(&full) {
                let frozen = Frozen { len: blocks * BLOCK, heads: vec![], entries: vec![] };
                prop_assert!(prefixes.insert(full, frozen).is_none());
                model.push((which, blocks));
            }
            if model.len() > 5 {
                let (_, blocks) = model.remove(0);
                prop_assert_eq!(prefixes.forget().map(|frozen| frozen.len), Some(blocks * BLOCK));
            }
        }
        for (_, blocks) in model {
            prop_assert_eq!(prefixes.forget().map(|frozen| frozen.len), Some(blocks * BLOCK));
        }
        prop_assert!(prefixes.forget().is_none());
    }
}

#[test]
fn keys_depend_on_every_token_before_and_on_the_root() {
    let text: Vec<u32> = (0..300).collect();
    let keys = |root, text: &[u32]| Prefixes::new([root; 32], BLOCK).keys(text);
    let whole = keys(0, &text);
    assert_eq!(whole.len(), 4);
    assert_eq!(keys(0, &text[..200]), whole[..3]);
    for (at, first) in [(0, 0), (63, 0), (64, 1), (191, 2)] {
        let mut other = text.clone();
        other[at] += 1;
        let same = keys(0, &other).iter().zip(&whole).take_while(|(a, b)| a == b).count();
        assert_eq!(same, first, "token {at}");
    }
    assert!(keys(1, &text).iter().zip(&whole).all(|(a, b)| a != b));
}

#[test]
fn equal_beginnings_are_read_once() {
    let mut fake = Fake::new(4, [100; 2]);
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| [vec![1; 200], vec![i; 20]].concat()).collect();
    let requests: Vec<_> = (0..4).map(|i| request(i, &prompts[i as usize], 3)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let outcome = run(&mut fake, &requests, BLOCK, 0, &mut rng);
    let shared: Vec<_> = (0..4).map(|i| outcome.done[&i].shared_tokens).collect();
    assert_eq!(shared, [0, 192, 192, 192]);
}

#[test]
fn what_can_never_fit_is_refused_with_what_would() {
    let mut fake = Fake::new(2, [4, 2]);
    let mut batch = Batch::new(&mut fake, BLOCK, [0; 32]);
    let mut refuse = |prompt: usize, max_tokens| {
        batch.submit(request(0, &vec![1; prompt], max_tokens)).unwrap_err().to_string()
    };
    assert_eq!(refuse(0, 1), "the prompt is empty");
    let context = refuse(500, 20);
    assert!(
        context.contains("context of 512") && context.contains("max_tokens of 13"),
        "{context}"
    );
    assert!(refuse(600, 20).contains("a prompt of 512 tokens"));
    // Three slabs beside a window of 64: the next would leave at 64 + 4 * 64 tokens.
    let pool = refuse(310, 20);
    assert!(pool.contains("3 Q4 slabs") && pool.contains("has 2"), "{pool}");
    assert!(pool.contains("319 tokens") && pool.contains("max_tokens of 10"), "{pool}");
    batch.submit(request(0, &[1; 310], 10)).unwrap();
    let outside = batch.submit(request(1, &[1, 256], 1)).unwrap_err().to_string();
    assert!(outside.contains("token 256") && outside.contains("256"), "{outside}");
    let mut hot = request(2, &[1], 1);
    hot.choice.sampling.temperature = -1.0;
    assert!(batch.submit(hot).unwrap_err().to_string().contains("temperature"));
}

#[test]
fn nothing_asked_is_nothing_done() {
    let mut fake = Fake::new(1, [4; 2]);
    let mut batch = Batch::new(&mut fake, BLOCK, [0; 32]);
    batch.submit(request(5, &[1, 2], 0)).unwrap();
    let mut events = Vec::new();
    watched(|watch| batch.round(watch, &mut |event| events.push(event))).unwrap();
    let [Event::Done { id: 5, done }] = &events[..] else { panic!("{events:?}") };
    assert_eq!((done.end, done.tokens.len(), batch.is_idle()), (End::Length, 0, true));
}

#[test]
fn an_interruption_loses_nothing() {
    let requests = requests(&mut ChaCha8Rng::seed_from_u64(3), 6, 400, 40);
    let mut fake = Fake::new(3, [100; 2]);
    let mut batch = Batch::new(&mut fake, BLOCK, [0; 32]);
    requests.iter().for_each(|request| batch.submit(request.clone()).unwrap());
    let (mut done, stop, mut step) = (0, true.into(), |_| {});
    while !batch.is_idle() {
        let mut emit = |event| {
            let Event::Done { id, done: it } = event else { return };
            assert_eq!(Some(it.tokens), by_itself(&requests[id as usize]));
            done += 1;
        };
        batch.round(&mut Watch::new(&stop, &mut step), &mut emit).unwrap_err();
    }
    assert_eq!(done, requests.len());
}

#[test]
fn a_batch_that_is_dropped_leaves_nothing_behind() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut fake = Fake::new(3, [100; 2]);
    let mut batch = Batch::new(&mut fake, BLOCK, [0; 32]);
    for request in requests(&mut rng, 10, 400, 40) {
        batch.submit(request).unwrap();
    }
    for _ in 0..12 {
        watched(|watch| batch.round(watch, &mut |_| {})).unwrap();
    }
    assert!(batch.load().0 > 0);
    drop(batch);
    assert_eq!((fake.used(), fake.free()[0]), (0, 100));
}
