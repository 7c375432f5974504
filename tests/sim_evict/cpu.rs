//! The CPU paths against the f64 oracle, at every level.

use super::one_slab;
use crate::cases::{Noise, close};
use crate::cpu_attn::{Cache, D, Data};
use kvwarp::pages::{HeadView, Pools};
use kvwarp::sim_evict::{Lag, Reference, key_norms, key_norms_at, lag, lag_at, oracle};
use kvwarp::simd::Level;
use kvwarp::slab::{Format, TOKENS};

/// Every level, and both references: near the oracle.
#[track_caller]
fn check(what: &str, head: &HeadView<'_>, first: usize, length: usize, partitions: usize) {
    for reference in [Reference::Elements, Reference::Metadata] {
        let spec = Lag { first, lag: length, partitions, v_weight: 0.75, reference };
        let want = oracle::lag(head, &spec);
        for level in Level::available() {
            let mut out = vec![7.0; want.len()];
            lag_at(level, head, &spec, &mut out).unwrap();
            let what = format!("{what} {reference:?} {level:?}");
            // The softmax makes an error of a deviation's last bits as much larger as the deviation is.
            close(&what, &out, &want, 0.0, 1e-4).unwrap();
        }
    }
    let slots = first..first + partitions * length + 3;
    let want = oracle::key_norms(head, slots.clone());
    for level in Level::available() {
        let mut out = vec![7.0; want.len()];
        key_norms_at(level, head, slots.clone(), &mut out).unwrap();
        close(&format!("{what} norms {level:?}"), &out, &want, 0.0, 2e-6).unwrap();
    }
}

#[test]
fn scores_of_each_shape_and_format() {
    let mut noise = Noise(41);
    let formats = [None, Some(Format::F16), Some(Format::Q8), Some(Format::Q4), Some(Format::Q2)];
    for d in D {
        for group in [32, 64, 128] {
            let mut cache = Cache::new(d, group);
            cache.push(700, 3, Data::Outlier, &mut noise, |i| formats[(i + 1) % 5]);
            cache
                .push(700, 3, Data::Outlier, &mut noise, |i| Some([Format::Q2, Format::Q4][i % 2]));
            for (h, head) in cache.views().iter().enumerate() {
                for (first, length, partitions) in
                    [(16, 128, 4), (3, 80, 7), (0, 64, 9), (60, 16, 39)]
                {
                    let what = format!("D {d} group {group} head {h}, {partitions} of {length}");
                    check(&what, head, first, length, partitions);
                }
            }
        }
        let mut cache = Cache::two_level(d, 32);
        cache.push(700, 3, Data::Outlier, &mut noise, |i| Some([Format::Q2, Format::Q4][i % 2]));
        check(&format!("D {d}, two-level"), &cache.views()[0], 16, 144, 3);
        let mut cache = Cache::new(d, 32);
        cache.push(700, 3, Data::Outlier, &mut noise, |_| Some(Format::Fp8));
        check(&format!("D {d}, fp8"), &cache.views()[0], 5, 160, 3);
    }
}

#[test]
fn partitions_of_a_thousand_tokens() {
    let mut noise = Noise(42);
    let mut cache = Cache::new(64, 32);
    cache.push(3200, 2, Data::Outlier, &mut noise, |i| (i % 9 != 4).then_some(Format::Q4));
    check("long", &cache.views()[0], 16, 1024, 2);
}

/// Keys and values of a slab with constant channels, NaN, an infinity, the ends of f16.
pub fn hard() -> (Vec<f32>, Vec<f32>) {
    let mut noise = Noise(43);
    let mut k: Vec<f32> = (0..TOKENS * 64).map(|_| noise.value()).collect();
    let mut v: Vec<f32> = (0..TOKENS * 64).map(|_| noise.value()).collect();
    for t in 0..TOKENS {
        (k[t * 64], v[t * 64]) = (1.5, -2.0); // the first channels are constant everywhere
        (k[t * 64 + 9], v[t * 64 + 9]) = (65504.0, -65504.0);
        (k[t * 64 + 12], v[t * 64 + 12]) = (1000.0 + (t / 32) as f32, 1000.0 + (t / 32) as f32);
    }
    k[3 * 64 + 17] = f32::NAN; // scored NaN
    v[5 * 64 + 30] = f32::NAN;
    k[7 * 64] = f32::NAN; // in a channel that takes no part
    k[20 * 64 + 40] = f32::NAN; // in a reference
    k[9 * 64 + 2] = f32::INFINITY;
    (0..16).for_each(|t| v[(32 + t) * 64 + 33] = f32::NAN); // a reference without a number
    (k, v)
}

/// They poison nobody else.
#[test]
fn what_is_constant_or_no_number_takes_no_part() {
    let pools = Pools::new(64, 32).unwrap();
    let (mut k, mut v) = hard();
    let ring = one_slab(&pools, &k, &v);
    let head = HeadView { pools: &pools, table: &[], ring: &ring, len: 64, packed: 0 };
    check("guards", &head, 0, 16, 3);
    let mut out = [0.0; 48];
    lag(&head, 0, 16, 3, 1.0, &mut out).unwrap();
    let nan: Vec<usize> = (0..48).filter(|&i| out[i].is_nan()).collect();
    assert_eq!(nan, [&[3, 5, 9, 20][..], &(32..48).collect::<Vec<_>>()].concat());
    // Nothing to go by: all alike.
    k.fill(3.0);
    v.fill(f32::NAN);
    let ring = one_slab(&pools, &k, &v);
    let head = HeadView { ring: &ring, ..head };
    lag(&head, 0, 32, 1, 1.0, &mut out[..32]).unwrap();
    assert!(out[..32].iter().all(|&x| x == 2.0 / 32.0), "{out:?}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut noise = Noise(44);
    let mut cache = Cache::new(64, 32);
    cache.push(300, 1, Data::Outlier, &mut noise, |_| Some(Format::Q2));
    let head = cache.views()[0];
    let run = |first, length, partitions, out: usize| {
        let done = lag(&head, first, length, partitions, 1.0, &mut vec![0.0; out]);
        done.map_err(|e| e.to_string())
    };
    assert_eq!((run(44, 128, 1, 128), run(9999, 128, 0, 0)), (Ok(()), Ok(())));
    for (result, what) in [
        (run(0, 0, 1, 0), "`lag` is 0"),
        (run(0, 72, 1, 72), "`lag` is 72"),
        (run(0, 1040, 1, 1040), "`lag` is 1040"),
        (run(45, 128, 1, 128), "`partitions` is 1"),
        (run(usize::MAX, 128, 1, 128), "`partitions` is 1"),
        (run(44, 128, 1, 127), "`out` holds 127 elements, needs 128"),
    ] {
        assert!(result.as_ref().unwrap_err().contains(what), "{result:?}");
    }
    let norms = |slots, out: usize| key_norms(&head, slots, &mut vec![0.0; out]).is_ok();
    assert!(norms(0..300, 300) && norms(7..7, 0) && !norms(0..301, 301) && !norms(0..300, 299));
}
