//! The CPU path of token_score against the f64 oracle.

use crate::cases::{Noise, close};
use crate::cpu_attn::{Cache, D, Data, query};
use kvwarp::pages::HeadView;
use kvwarp::prefill_attn::{self, LseRows, Mask};
use kvwarp::simd::Level;
use kvwarp::slab::Format;
use kvwarp::threads::Team;
use kvwarp::token_score::{Reduce, Scratch, cpu, lse, oracle, oracle_lse};
use std::ops::Range;
use std::slice::from_ref;

/// Columns of a head, the newest so many and a few more than whole slabs.
struct Columns {
    /// From the end of each head.
    back: usize,
    count: usize,
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// Every level and one to three threads, both reductions, in one piece of rows and in two: near the oracle, and the
/// same for every team.
#[track_caller]
fn check(what: &str, cache: &Cache, n: usize, group: usize, columns: &Columns, noise: &mut Noise) {
    let heads = cache.views();
    let q_heads = heads.len() * group;
    let q = query(n * q_heads * heads[0].head_dim(), noise);
    let len = heads.iter().map(|head| head.len).max().unwrap_or(0);
    let mut sums = narrow(&oracle_lse(&q, n, &heads, 0.0, from_ref(&(0..len))));
    sums[0] = f32::NEG_INFINITY; // a row that gives nothing
    let first: Vec<usize> = heads.iter().map(|head| head.len - columns.back).collect();
    for reduce in [Reduce::Sum, Reduce::Max] {
        let want = oracle(&q, n, &sums, &heads, 0.0, &first, columns.count, reduce);
        for level in Level::available() {
            let (mut scratch, mut bits) = (Scratch::at(level), None);
            for workers in 1..=3 {
                let (team, mut got) = (Team::new(workers), vec![0.0; want.len()]);
                cpu(
                    &team,
                    &q,
                    n,
                    &sums,
                    &heads,
                    0.0,
                    &first,
                    columns.count,
                    reduce,
                    &mut got,
                    &mut scratch,
                )
                .unwrap();
                close(&format!("{what} {reduce:?} {level:?}"), &got, &want, 1e-6, 2e-4).unwrap();
                let these: Vec<u32> = got.iter().map(|x| x.to_bits()).collect();
                assert_eq!(*bits.get_or_insert_with(|| these.clone()), these, "{what}: {workers}");
            }
        }
    }
}

#[test]
fn scores_of_each_shape_and_format() {
    let mut noise = Noise(31);
    for d in D {
        for (format, quant) in Format::ALL.into_iter().zip([32, 64, 64, 32, 32]) {
            for group in [1, 3, 4] {
                let mut cache = Cache::new(d, quant);
                cache.push(300, 2, Data::Outlier, &mut noise, |_| Some(format));
                let what = format!("d {d} {format:?} G {group}");
                let columns = Columns { back: 300, count: 300 };
                check(&what, &cache, 50, group, &columns, &mut noise);
            }
        }
    }
}

#[test]
fn scores_of_ragged_mixed_heads() {
    let mut noise = Noise(32);
    let mixed = |i: usize| match i % 4 {
        0 => Some(Format::F16),
        1 => Some(Format::Q2),
        2 => None,
        _ => Some(Format::Q4),
    };
    for (d, group) in [(64, 8), (128, 3), (96, 16)] {
        let mut cache = Cache::two_level(d, 32);
        for len in [700, 90, 257] {
            cache.push(len, 2, Data::Outlier, &mut noise, mixed);
        }
        for (back, count) in [(90, 90), (90, 1), (83, 60), (20, 20), (90, 64)] {
            let what = format!("d {d} G {group}: {count} of the last {back}");
            check(&what, &cache, 80, group, &Columns { back, count }, &mut noise);
        }
    }
    let mut cache = Cache::new(64, 32);
    cache.push(1, 1, Data::Outlier, &mut noise, mixed);
    check("one token", &cache, 1, 1, &Columns { back: 1, count: 1 }, &mut noise);
}

#[test]
fn pieces_of_rows_stream_into_the_scores() {
    let (mut noise, team) = (Noise(33), Team::new(2));
    let mut cache = Cache::new(64, 32);
    cache.push(200, 1, Data::Outlier, &mut noise, |_| Some(Format::Q4));
    let (views, mut scratch) = (cache.views(), Scratch::default());
    let (whole, sums) = (query(200 * 192, &mut noise), vec![1.5; 200 * 3]);
    for (reduce, rows) in [(Reduce::Sum, 3), (Reduce::Max, 1)] {
        let want = oracle(&whole, 200, &sums, &views, 0.0, &[0], 200, reduce);
        let mut got = vec![0.0; rows * 200];
        for piece in [0..130, 130..200usize] {
            let q = &whole[piece.start * 192..piece.end * 192];
            // The tokens that the cache held when these rows were the newest.
            let heads = [HeadView { len: piece.end, ..views[0] }];
            let sums = &sums[..piece.len() * 3];
            let count = piece.end;
            let mut part: Vec<f32> =
                got.chunks(200).flat_map(|row| row[..count].to_vec()).collect();
            cpu(
                &team,
                q,
                piece.len(),
                sums,
                &heads,
                0.0,
                &[0],
                count,
                reduce,
                &mut part,
                &mut scratch,
            )
            .unwrap();
            for (row, part) in got.chunks_mut(200).zip(part.chunks(count)) {
                row[..count].copy_from_slice(part);
            }
        }
        close("pieces", &got, &want, 1e-6, 2e-4).unwrap();
    }
}

#[test]
fn lse_over_subsets_of_slots() {
    let (mut noise, group) = (Noise(34), 3);
    let mut cache = Cache::new(64, 32);
    for len in [500, 180] {
        let holes = |i| (i != 1).then_some(Format::Q2);
        cache.push(len, 2, Data::Outlier, &mut noise, holes);
    }
    let (heads, n) = (cache.views(), 70);
    let q = query(n * 2 * group * 64, &mut noise);
    let seen: [&[Range<usize>]; 6] = [
        &[],
        from_ref(&(0..500)),
        &[0..4, 130..135, 140..150, 400..500],
        from_ref(&(64..128)),
        &[63..64, 128..129],
        from_ref(&(499..500)),
    ];
    for seen in seen {
        let want = oracle_lse(&q, n, &heads, 0.0, seen);
        for level in Level::available() {
            let (mut scratch, mut first) = (Scratch::at(level), None);
            for workers in 1..=3 {
                let mut got = vec![f32::NAN; n * 2 * group];
                lse(&Team::new(workers), &q, n, &heads, 0.0, seen, &mut got, &mut scratch).unwrap();
                close(&format!("{level:?} {seen:?}"), &got, &want, 1e-4, 1e-4).unwrap();
                let bits: Vec<u32> = got.iter().map(|x| x.to_bits()).collect();
                assert_eq!(*first.get_or_insert_with(|| bits.clone()), bits);
            }
        }
    }
    // Over everything it is what prefill attention leaves.
    let (mut out, mut all) = (vec![0.0; q.len()], vec![0.0; n * 2 * group]);
    let (team, rows) = (Team::new(2), LseRows { out: &mut all, rows: n });
    let mut scratch = prefill_attn::Scratch::default();
    prefill_attn::cpu(
        &team,
        &q,
        n,
        &heads,
        0.0,
        Mask::default(),
        &mut out,
        Some(rows),
        &mut scratch,
    )
    .unwrap();
    let mut got = vec![0.0; all.len()];
    let everything = from_ref(&(0..500));
    lse(&team, &q, n, &heads, 0.0, everything, &mut got, &mut Scratch::default()).unwrap();
    assert_eq!(got, all);
}

#[test]
fn scores_refuse_what_does_not_fit() {
    let mut noise = Noise(35);
    let mut cache = Cache::new(64, 32);
    cache.push(200, 1, Data::Outlier, &mut noise, |_| Some(Format::Q2));
    let views = cache.views();
    let (team, mut scratch) = (Team::new(1), Scratch::default());
    let mut run = |n: usize, rows: usize, sums: usize, first: &[usize], count, scores: usize| {
        let (q, sums, mut scores) = (vec![0.0; rows * 64], vec![0.0; sums], vec![0.0; scores]);
        let reduce = Reduce::Sum;
        cpu(&team, &q, n, &sums, &views, 0.0, first, count, reduce, &mut scores, &mut scratch)
            .map_err(|e| e.to_string())
    };
    assert_eq!(run(10, 30, 30, &[0], 200, 600), Ok(()));
    assert_eq!(run(0, 0, 0, &[0], 200, 0), Ok(()), "no queries, nothing to do");
    assert_eq!(run(10, 30, 30, &[200], 0, 0), Ok(()), "no columns, nothing to do");
    for (result, what) in [
        (run(10, 29, 30, &[0], 200, 600), "`q`"),
        (run(201, 603, 603, &[0], 200, 600), "`len` is 200"),
        (run(10, 30, 29, &[0], 200, 600), "`lse` holds 29 elements, needs 30"),
        (run(10, 30, 30, &[0], 200, 599), "`scores` holds 599 elements, needs 600"),
        (run(10, 30, 30, &[], 200, 600), "`first` holds 0 elements, needs 1"),
        (run(10, 30, 30, &[1], 200, 600), "`first` is 1"),
        (run(10, 30, 30, &[usize::MAX], 200, 600), "`first`"),
    ] {
        let text = result.unwrap_err();
        assert!(text.contains(what), "{text}");
    }
    let mut out = vec![0.0; 30];
    let error = lse(&team, &[0.0; 1920], 10, &views, 0.0, &[3..9, 8..10], &mut out, &mut scratch);
    assert!(error.unwrap_err().to_string().contains("`seen`"));
}
