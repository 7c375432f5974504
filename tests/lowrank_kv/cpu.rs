//! The CPU path: near the oracle at every level, the same for every team.

use super::case::{Cache, Case, SCALE, case};
use crate::cases::relative_l2;
use kvwarp::lowrank_kv::{Scratch, Shape, View, cpu};
use kvwarp::pages::Pool;
use kvwarp::simd::Level;
use kvwarp::threads::Team;

fn check(case: &Case) {
    let cache = Cache::new(case);
    let (want, _) = cache.want();
    for level in Level::available() {
        let (mut scratch, mut first) = (Scratch::at(level), None);
        for workers in 1..=3 {
            let team = Team::new(workers);
            let mut all = Vec::new();
            for (q, q_elite, view) in cache.queries() {
                let mut out = vec![f32::NAN; q.len()];
                cpu(&team, q, q_elite, &view, SCALE, &mut out, &mut scratch).unwrap();
                all.extend(out);
            }
            let error = relative_l2(&all, &want);
            assert!(error <= 2e-5, "{case:?} {level:?}: relative L2 {error:.2e}");
            let bits: Vec<u32> = all.iter().map(|x| x.to_bits()).collect();
            let same = *first.get_or_insert_with(|| bits.clone()) == bits;
            assert!(same, "{case:?} {level:?}: {workers} threads");
        }
    }
}

#[test]
fn cpu_matches_oracle() {
    let lens = vec![0, 1, 15, 16, 17, 63, 64, 65, 127, 255, 256, 257, 600];
    check(&Case { lens, ..case() });
    for (kv_heads, group, pairs, rank) in
        [(1, 1, 4, 128), (32, 1, 4, 256), (8, 4, 8, 448), (4, 5, 64, 512), (20, 1, 3, 1792)]
    {
        check(&Case { kv_heads, group, pairs, rank, lens: vec![300], holes: 0, ..case() });
    }
    // Less than a block of channels a warp.
    for (kv_heads, group, pairs, rank) in [(1, 3, 4, 16), (3, 3, 12, 112), (1, 2, 32, 64)] {
        check(&Case { kv_heads, group, pairs, rank, lens: vec![300, 7], holes: 0, ..case() });
    }
    // All of a sequence's slabs are holes.
    check(&Case { lens: vec![64, 300], holes: 1, ..case() });
}

#[test]
fn what_does_not_fit_is_refused() {
    let told = |result: kvwarp::Result<Shape>| result.unwrap_err().to_string();
    assert!(told(Shape::new(0, 4, 128)).contains("kv_heads"));
    assert!(told(Shape::new(3, 2, 128)).contains("`pairs` is 2"));
    assert!(told(Shape::new(1, 4, 120)).contains("`rank` is 120"));
    let shape = Shape::new(2, 4, 128).unwrap();
    let pool = Pool::of(shape.slab_bytes());
    let run = |q: usize, elite: usize, out: usize, len: usize| {
        let view = View { shape, pool: &pool, packed: None, table: &[], len };
        let (q, elite, mut out) = (vec![0.0; q], vec![0.0; elite], vec![1.0; out]);
        cpu(&Team::new(1), &q, &elite, &view, 1.0, &mut out, &mut Scratch::default())
            .map(|()| assert!(out.iter().all(|&x| x == 0.0)))
            .map_err(|e| e.to_string())
    };
    assert_eq!(run(256, 16, 256, 0), Ok(()));
    for (refused, what) in [
        (run(128, 8, 128, 0), "`q` is 128"),
        (run(256, 8, 256, 0), "`q_elite` holds 8 elements, needs 16"),
        (run(256, 16, 128, 0), "`out` holds 128 elements, needs 256"),
        (run(256, 16, 256, 1), "`table` holds 0 elements, needs 1"),
    ] {
        let text = refused.unwrap_err();
        assert!(text.contains(what), "{text}");
    }
    let mut slab = vec![0; shape.slab_bytes()];
    assert!(shape.write(&mut slab, 0, &[0.0; 128], &[0.0; 15]).is_err());
    assert!(shape.write(&mut slab[1..], 0, &[0.0; 128], &[0.0; 16]).is_err());
}
