//! The CPU path of prefill_attn against the f64 oracle.

use crate::cases::Noise;
use crate::cpu_attn::{Cache, D, Data, distance, query};
use kvwarp::pages::HeadView;
use kvwarp::prefill_attn::{LseRows, Mask, Scratch, cpu, oracle};
use kvwarp::simd::Level;
use kvwarp::slab::Format;
use kvwarp::threads::Team;

const LSE_ROWS: usize = 7;

/// Every level and one to three threads: near the oracle in output and log-sum-exp, and the same for every team.
#[track_caller]
fn check(what: &str, cache: &Cache, n: usize, group: usize, mask: Mask, noise: &mut Noise) {
    let heads = cache.views();
    let d = heads[0].head_dim();
    let q_heads = heads.len() * group;
    let q = query(n * q_heads * d, noise);
    let (want, want_lse) = oracle(&q, n, &heads, 0.0, mask);
    for level in Level::available() {
        let mut scratch = Scratch::at(level);
        let mut first = None;
        for workers in 1..=3 {
            let mut out = vec![f32::NAN; q.len()];
            let mut lse = vec![7.0; LSE_ROWS * q_heads];
            let rows = LseRows { out: &mut lse, rows: LSE_ROWS };
            let team = Team::new(workers);
            cpu(&team, &q, n, &heads, 0.0, mask, &mut out, Some(rows), &mut scratch).unwrap();
            let off = distance(&out, &want);
            assert!(off <= 1e-5, "{what} {level:?}: relative L2 {off:.2e}");
            let untouched = LSE_ROWS.saturating_sub(n) * q_heads;
            assert!(lse[..untouched].iter().all(|&x| x == 7.0), "{what}: leading lse rows");
            let newest = &want_lse[n.saturating_sub(LSE_ROWS) * q_heads..];
            for (got, want) in lse[untouched..].iter().zip(newest) {
                let close = (f64::from(*got) - want).abs() <= 1e-4 * want.abs().max(1.0);
                assert!(close || f64::from(*got) == *want, "{what} {level:?}: lse {got} {want}");
            }
            out.extend(lse);
            let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
            assert!(
                *first.get_or_insert_with(|| bits.clone()) == bits,
                "{what}: {workers} threads"
            );
        }
    }
}

#[test]
fn prefill_of_each_shape_and_format() {
    let mut noise = Noise(21);
    for d in D {
        for (format, quant) in Format::ALL.into_iter().zip([32, 64, 64, 32, 32]).chain([
            (Format::Q2, 64),
            (Format::Q8, 32),
            (Format::Q8, 128),
            (Format::Q2, 128),
            (Format::Q4, 32),
            (Format::Q4, 128),
        ]) {
            for group in [1, 3, 4] {
                let mut cache = Cache::new(d, quant);
                cache.push(300, 2, Data::Outlier, &mut noise, |_| Some(format));
                let what = format!("d {d} group {quant} {format:?} G {group}");
                check(&what, &cache, 50, group, Mask::default(), &mut noise);
            }
        }
    }
}

#[test]
fn prefill_of_two_level_metadata() {
    let mut noise = Noise(25);
    let mixed = |i: usize| [Some(Format::Q2), Some(Format::Q4), None, Some(Format::F16)][i % 4];
    for d in D {
        for quant in [32, 64] {
            let mut cache = Cache::two_level(d, quant);
            cache.push(420, 2, Data::Outlier, &mut noise, mixed);
            let what = format!("d {d} group {quant}, two-level");
            check(&what, &cache, 50, 3, Mask::default(), &mut noise);
        }
    }
}

#[test]
fn prefill_of_each_number_of_query_heads_and_length() {
    let mut noise = Noise(22);
    for (len, n) in [(1, 1_usize), (31, 31), (64, 64), (65, 65), (129, 2), (200, 200), (513, 130)] {
        for group in [1, 2, 5, 7, 8, 12, 16] {
            let mut cache = Cache::new(64, 32);
            cache.push(len, n.div_ceil(64) + 1, Data::Outlier, &mut noise, |_| Some(Format::Q4));
            let what = format!("{n} of {len} tokens, G {group}");
            check(&what, &cache, n, group, Mask::default(), &mut noise);
        }
    }
}

#[test]
fn prefill_of_ragged_mixed_heads_with_holes_and_windows() {
    let mut noise = Noise(23);
    let mixed = |i: usize| match i % 5 {
        0 => Some(Format::F16),
        1 => Some(Format::Q8),
        3 => Some(Format::Q2),
        2 => None,
        _ => Some(Format::Q4),
    };
    for d in [64, 96] {
        for data in [Data::Outlier, Data::Extreme] {
            let mut cache = Cache::new(d, 32);
            for len in [700, 90, 256] {
                cache.push(len, 2, data, &mut noise, mixed);
            }
            for window in [None, Some(1), Some(40), Some(64), Some(130), Some(5000)] {
                let mask = Mask { sliding_window: window };
                check(&format!("d {d} window {window:?}"), &cache, 90, 3, mask, &mut noise);
            }
        }
    }
}

#[test]
fn prefill_refuses_what_does_not_fit() {
    let mut noise = Noise(24);
    let mut cache = Cache::new(64, 32);
    cache.push(200, 1, Data::Outlier, &mut noise, |_| Some(Format::Q2));
    let good = cache.views();
    let run = |heads: &[HeadView<'_>], q: usize, n: usize, lse: usize| {
        let (q, mut out, mut lse) = (vec![0.0; q], vec![0.0; q], vec![0.0; lse]);
        let rows = LseRows { out: &mut lse, rows: 2 };
        let (team, mut scratch, mask) = (Team::new(1), Scratch::default(), Mask::default());
        cpu(&team, &q, n, heads, 0.0, mask, &mut out, Some(rows), &mut scratch)
            .map_err(|e| e.to_string())
    };
    assert_eq!(run(&good, 10 * 192, 10, 6), Ok(()));
    assert_eq!(run(&good, 0, 0, 0), Ok(()), "no queries, nothing to do");
    for (result, what) in [
        (run(&[], 10 * 192, 10, 6), "heads"),
        (run(&good, 10 * 192 - 1, 10, 6), "`q`"),
        (run(&good, 201 * 192, 201, 6), "`len` is 200"),
        (run(&good, 10 * 192, 10, 5), "`lse` holds 5 elements, needs 6"),
        (run(&[HeadView { table: &[], ..good[0] }], 10 * 192, 10, 6), "`table` holds 0"),
    ] {
        let text = result.unwrap_err();
        assert!(text.contains(what), "{text}");
    }
}
