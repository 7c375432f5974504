//! Choosing tokens: what a cache holds after it, and what a model then says.

mod model;
#[path = "../support/mod.rs"]
mod support;

use half::f16;
use kvwarp::paged_attn::{self, Mask, Scratch};
use kvwarp::sim_evict;
use kvwarp::threads::Team;
use kvwarp_engine::cache::{Cache, Shape};
use kvwarp_engine::runner::Row;
use kvwarp_engine::spec::CacheSpec;
use proptest::prelude::*;

const D: usize = 64;
const SHAPE: Shape = Shape { layers: 1, kv_heads: 2, head_dim: D, context: 6000 };
const WIDTH: usize = SHAPE.kv_heads * D;
const ROW: Row = Row(0);

/// K or V of `n` tokens, `[n, kv_heads, D]`, as f16 has them.
fn rows(n: usize, seed: u64) -> Vec<f32> {
    let value = |i| kvwarp::sample::draw(seed, i as i32) as f32 / u64::MAX as f32 - 0.5;
    (0..n * WIDTH).map(|i| f16::from_f32(value(i)).to_f32()).collect()
}

fn cache(spec: &str) -> Cache {
    let mut cache = Cache::new(&spec.parse().unwrap(), SHAPE).unwrap();
    assert_eq!(cache.open(), ROW);
    cache
}

fn read(cache: &mut Cache, k: &[f32], v: &[f32]) {
    let n = k.len() / WIDTH;
    cache.advance(ROW, n).unwrap();
    cache.stage(ROW, 0, n);
    cache.fill(ROW, 0, k, v, n);
}

fn append(cache: &mut Cache, k: &[f32], v: &[f32]) {
    for (k, v) in k.chunks_exact(WIDTH).zip(v.chunks_exact(WIDTH)) {
        cache.advance(ROW, 1).unwrap();
        cache.append(ROW, 0, k, v).unwrap();
    }
}

/// Attention of one query a head over the tokens `kept` of each, in f64: the same as over all, the others masked.
fn masked(q: &[f32], k: &[f32], v: &[f32], kept: &[Vec<usize>]) -> Vec<f32> {
    let mut out = Vec::new();
    for (h, (q, kept)) in q.chunks_exact(D).zip(kept).enumerate() {
        let at = |data: &[f32], token: usize, c: usize| f64::from(data[token * WIDTH + h * D + c]);
        let score = |&t: &usize| (0..D).map(|c| f64::from(q[c]) * at(k, t, c)).sum::<f64>() / 8.0;
        let weights: Vec<f64> = kept.iter().map(|t| score(t).exp()).collect();
        let sum: f64 = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        out.extend((0..D).map(|c| {
            let mix: f64 = kept.iter().zip(&weights).map(|(&t, w)| w * at(v, t, c)).sum();
            (mix / sum) as f32
        }));
    }
    out
}

/// Reads `n` tokens, keeps some of them, appends `more`, and attends.
fn check_masked(spec: &str, n: usize, more: usize, keeps: &[Vec<usize>]) {
    let (mut cache, team) = (cache(spec), Team::new(2));
    let (k, v) = (rows(n + more, 1), rows(n + more, 2));
    read(&mut cache, &k[..n * WIDTH], &v[..n * WIDTH]);
    for (h, kept) in keeps.iter().enumerate() {
        let slots: Vec<u32> = kept.iter().map(|&t| t as u32).collect();
        cache.keep(ROW, 0, h, 0, &slots).unwrap();
    }
    cache.compress(ROW, 0, &team).unwrap();
    cache.unstage();
    append(&mut cache, &k[n * WIDTH..], &v[n * WIDTH..]);
    assert_eq!(cache.position(ROW), n + more);
    let all: Vec<Vec<usize>> =
        keeps.iter().map(|kept| kept.iter().copied().chain(n..n + more).collect()).collect();
    assert!(cache.lens(ROW, 0).eq(all.iter().map(Vec::len)));
    let (q, mut out) = (rows(1, 3), vec![f32::NAN; WIDTH]);
    let views = cache.views(ROW, 0);
    paged_attn::cpu(&team, &q, &views, 0.0, Mask::default(), &mut out, &mut Scratch::default())
        .unwrap();
    let want = masked(&q, &k, &v, &all);
    let off = out.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 2e-3, "{spec}, {n} + {more}: off by {off}");
}

#[test]
fn a_compacted_cache_attends_as_one_with_the_others_masked() {
    let every = |step: usize, n: usize| (0..n).step_by(step).collect::<Vec<_>>();
    check_masked("f16", 300, 0, &[every(1, 300), every(3, 300)]);
    check_masked("f16", 300, 70, &[every(2, 300), vec![]]);
    check_masked("f16", 300, 0, &[vec![], vec![299]]);
    check_masked("q8,window=64", 500, 130, &[every(2, 500), every(7, 500)]);
    check_masked("q8,window=0,sinks=64", 129, 1, &[every(1, 129), (64..129).collect()]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_choice_attends_as_masked(
        n in 1..400usize,
        more in 0..90usize,
        seed in any::<u64>(),
        shares in prop::array::uniform2(0..=10u64),
        window in 0..200usize,
    ) {
        let draw = |h: usize, t: usize| kvwarp::sample::draw(seed ^ h as u64, t as i32) % 10;
        let keeps = [0, 1].map(|h| (0..n).filter(|&t| draw(h, t) < shares[h]).collect::<Vec<_>>());
        prop_assume!(keeps.iter().all(|kept| !kept.is_empty()) || more > 0);
        check_masked(&format!("q8,window={window}"), n, more, &keeps);
    }
}

/// What attention can see of a head, as f32.
fn seen(cache: &Cache) -> Vec<Vec<f32>> {
    let decoded = |view: kvwarp::pages::HeadView<'_>| {
        let mut all = Vec::new();
        for slab in (0..view.slabs()).map(|i| view.slab(i).unwrap()) {
            let (mut k, mut v) = (vec![0.0; 64 * D], vec![0.0; 64 * D]);
            kvwarp::slab::decode(slab.layout, slab.bytes, &mut k, &mut v);
            all.extend(k.into_iter().zip(v).flat_map(|(k, v)| [k, v]));
        }
        all.truncate(2 * D * view.len);
        all
    };
    cache.views(ROW, 0).into_iter().map(decoded).collect()
}

/// The same keys and values, at once or one by one: LagKV keeps the same tokens, as many as its formula says.
#[test]
fn lagkv_streams() {
    let spec: CacheSpec = "q2-kivi,evict=lagkv:0.25".parse().unwrap();
    assert_eq!((spec.window, spec.lag()), (256, Some(128)));
    let (evict, team) = (spec.evict.unwrap(), Team::new(2));
    for (n, kept) in [(271, 271), (272, 176), (500, 308), (1000, 424), (5000, 1448)] {
        let (k, v) = (rows(n, 5), rows(n, 6));
        let (mut once, mut streamed) = (cache(&spec.to_string()), cache(&spec.to_string()));
        read(&mut once, &k, &v);
        once.lag_staged(ROW, 0, &evict, &team).unwrap();
        once.compress(ROW, 0, &team).unwrap();
        for i in 0..n {
            append(&mut streamed, &k[i * WIDTH..][..WIDTH], &v[i * WIDTH..][..WIDTH]);
            streamed.lag(ROW, 0, &evict, &team).unwrap();
        }
        assert_eq!(sim_evict::kept(n, 16, 128, 32), kept);
        assert!(
            once.lens(ROW, 0).all(|len| len == kept)
                && streamed.lens(ROW, 0).all(|len| len == kept)
        );
        assert!(seen(&once) == seen(&streamed), "{n} tokens");
        assert_eq!(once.position(ROW), n);
    }
}
