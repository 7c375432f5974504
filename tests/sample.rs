//! sample: hand-worked distributions, draws against the oracle's probabilities, edges.

mod kernel;

use crate::cases::{Noise, somewhere};
use crate::exec::{Exec, Run, assert_caught, executors, op};
use kernel::same_as_cpu;
use kvwarp::ffi::{self, kvw_sample_params as Params};
use kvwarp::sample::{Sampling, cpu, draw, oracle};
use std::ptr::null;

const fn sampling(temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> Sampling {
    Sampling { temperature, top_k, top_p, min_p, repeat_penalty: 1.0 }
}

const fn penalised(repeat_penalty: f32, sampling: Sampling) -> Sampling {
    Sampling { repeat_penalty, ..sampling }
}

#[test]
fn oracle_hand_worked() {
    // Probabilities 8/15, 4/15, 2/15, 1/15 at ids 2, 0, 3, 1.
    let logits = [4f32, 1.0, 8.0, 2.0].map(f32::ln);
    let p = |s| oracle(&logits, &s, &[]).unwrap();
    let near = |p: Vec<f64>, want: [f64; 4]| {
        assert!(p.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{p:?}, want {want:?}");
    };
    near(p(sampling(1.0, 0, 1.0, 0.0)), [4. / 15., 1. / 15., 8. / 15., 2. / 15.]);
    near(p(sampling(1.0, 2, 1.0, 0.0)), [1. / 3., 0., 2. / 3., 0.]);
    near(p(sampling(1.0, 0, 0.79, 0.0)), [1. / 3., 0., 2. / 3., 0.]);
    near(p(sampling(1.0, 0, 0.81, 0.0)), [4. / 14., 0., 8. / 14., 2. / 14.]);
    near(p(sampling(1.0, 0, 1.0, 0.3)), [1. / 3., 0., 2. / 3., 0.]);
    near(p(sampling(0.5, 2, 1.0, 0.0)), [16. / 80., 0., 64. / 80., 0.]);
}

/// Ids 0 and 1 count once each, id 9 is not in the vocabulary; a NaN stays one.
#[test]
fn penalties_hand_worked() {
    let recent = [0, 1, 0, 9, 3, 0];
    let s = penalised(2.0, sampling(1.0, 0, 1.0, 0.0));
    let p = oracle(&[2.0, -1.0, 1.0, f32::NAN], &s, &recent).unwrap();
    let e = [1f64, -2.0, 1.0].map(f64::exp);
    for (p, e1) in p.iter().zip(e.iter().chain(&[0.0])) {
        assert!((p - e1 / e.iter().sum::<f64>()).abs() < 1e-9, "{p}");
    }
    let greedy = penalised(2.0, Sampling::GREEDY);
    assert_eq!(cpu(&[1.5, 3.0, 1.6], &greedy, &[1], 0).unwrap(), 2);
    assert_eq!(cpu(&[-1.0, -1.5], &greedy, &[0], 0).unwrap(), 1);
    assert_eq!(cpu(&[1.5, 3.0, 1.6], &Sampling::GREEDY, &[1], 0).unwrap(), 1);
}

#[test]
fn draw_hand_worked() {
    // The first outputs of SplitMix64 started at 0, as published.
    assert_eq!(draw(0, 0), 0xE220_A839_7B1D_CDAF);
    assert_eq!(draw(0, 1), 0x6E78_9E6A_A1B9_65F4);
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let greedy = |logits: &[f32]| cpu(logits, &Sampling::GREEDY, &[], 0).unwrap();
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), 1);
    assert_eq!(greedy(&[nan, -1.0, nan, -0.5]), 3);
    assert_eq!(greedy(&[-0.0, 0.0]), 0);
    assert_eq!(greedy(&[nan, -inf]), 1);
    assert_eq!(greedy(&[nan, nan]), 0);
    assert_eq!(greedy(&[1.0, inf, inf]), 1);
    let long: Vec<f32> = (0..1000).map(|i| (i % 611) as f32).collect();
    assert_eq!(greedy(&long), 610);
}

#[test]
fn ties_at_a_threshold_go_to_the_lowest_ids() {
    let mut logits = vec![0.0; 300];
    logits[299] = 1.0;
    let mut drawn = [false; 300];
    for step in 0..4000 {
        drawn[cpu(&logits, &sampling(1.0, 4, 1.0, 0.0), &[], draw(1, step)).unwrap() as usize] =
            true;
    }
    let ids: Vec<usize> = (0..300).filter(|&i| drawn[i]).collect();
    assert_eq!(ids, [0, 1, 2, 299]);
}

#[test]
fn draws_have_the_oracles_probabilities() {
    let mut noise = Noise(4);
    let logits: Vec<f32> = (0..700).map(|_| noise.value() * 2.0).collect();
    for s in [
        sampling(1.0, 0, 1.0, 0.0),
        sampling(0.7, 40, 0.95, 0.05),
        sampling(3.0, 0, 0.999, 0.0),
        sampling(1e-3, 0, 1.0, 0.0),
        sampling(2.0, 300, 1.0, 1e-4),
    ] {
        let want = oracle(&logits, &s, &[]).unwrap();
        let (n, mut counts) = (40_000, vec![0u32; logits.len()]);
        for step in 0..n {
            counts[cpu(&logits, &s, &[], draw(7, step)).unwrap() as usize] += 1;
        }
        for (i, (&count, &p)) in counts.iter().zip(&want).enumerate() {
            let (mean, deviation) = (f64::from(n) * p, (f64::from(n) * p * (1.0 - p)).sqrt());
            let off = (f64::from(count) - mean).abs();
            assert!(
                off <= 6.0 * deviation + 4.0 * f64::from(p > 0.0),
                "{s:?} id {i}: {count}/{mean}"
            );
        }
    }
}

#[test]
fn infinities_and_nan_draw_something_sensible() {
    let (nan, inf, s) = (f32::NAN, f32::INFINITY, sampling(0.8, 0, 0.9, 0.1));
    for step in 0..200 {
        let pick = |logits: &[f32]| cpu(logits, &s, &[], draw(3, step)).unwrap();
        assert_eq!(pick(&[0.0, inf, nan, -inf]), 1);
        assert_eq!(pick(&[-inf, nan, -3.0]), 2);
        assert_eq!(pick(&[nan, nan]), 0);
        assert!(pick(&[nan, -inf, -inf]) != 0);
        let hot = Sampling { temperature: f32::from_bits(1), ..s };
        assert_eq!(cpu(&[1.0, 1.5], &hot, &[], draw(3, step)).unwrap(), 1);
    }
}

#[test]
fn fields_out_of_range_are_named() {
    let refused = |s| cpu(&[0.0], &s, &[], 0).unwrap_err().to_string();
    assert!(refused(sampling(-1.0, 0, 1.0, 0.0)).contains("`temperature` is -1"));
    assert!(refused(sampling(f32::NAN, 0, 1.0, 0.0)).contains("`temperature` is NaN"));
    assert!(refused(sampling(1.0, 0, 0.0, 0.0)).contains("`top_p` is 0"));
    assert!(refused(sampling(1.0, 0, 1.0, 1.0)).contains("`min_p` is 1"));
    assert!(cpu(&[], &Sampling::GREEDY, &[], 0).is_err());
    for penalty in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let s = Sampling { repeat_penalty: penalty, ..Sampling::GREEDY };
        assert!(refused(s).contains("`repeat_penalty` is"));
    }
    assert!(cpu(&[0.0], &Sampling::GREEDY, &[0; 257], 0).is_err());
}

#[test]
fn c_checks_need_no_gpu() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        seqs: 2,
        logits: somewhere(),
        tokens: somewhere(),
        seeds: somewhere(),
        steps: somewhere(),
        temperature: somewhere(),
        top_p: somewhere(),
        min_p: somewhere(),
        top_k: somewhere(),
        history: somewhere(),
        history_lens: somewhere(),
        penalty: somewhere(),
        vocab: 1000,
        history_stride: 64,
    };
    op!(kvw_sample).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 4, ffi::KVW_ERR_STRUCT),
            ("seqs", |p| p.seqs = 0, ffi::KVW_ERR_SHAPE),
            ("logits", |p| p.logits = null(), ffi::KVW_ERR_NULL),
            ("tokens", |p| p.tokens = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("seeds", |p| p.seeds = null(), ffi::KVW_ERR_NULL),
            ("steps", |p| p.steps = null(), ffi::KVW_ERR_NULL),
            ("temperature", |p| p.temperature = null(), ffi::KVW_ERR_NULL),
            ("top_p", |p| p.top_p = null(), ffi::KVW_ERR_NULL),
            ("min_p", |p| p.min_p = null(), ffi::KVW_ERR_NULL),
            ("top_k", |p| p.top_k = null(), ffi::KVW_ERR_NULL),
            ("logits unaligned", |p| p.logits = 4 as _, ffi::KVW_ERR_ALIGN),
            ("top_k unaligned", |p| p.top_k = 4 as _, ffi::KVW_ERR_ALIGN),
            ("vocab", |p| p.vocab = 0, ffi::KVW_ERR_SHAPE),
            ("vocab beyond 2^22", |p| p.vocab = (1 << 22) + 1, ffi::KVW_ERR_SHAPE),
            ("history unaligned", |p| p.history = 4 as _, ffi::KVW_ERR_ALIGN),
            ("history_lens", |p| p.history_lens = null(), ffi::KVW_ERR_NULL),
            ("penalty", |p| p.penalty = null(), ffi::KVW_ERR_NULL),
            ("history_stride", |p| p.history_stride = 0, ffi::KVW_ERR_SHAPE),
            ("history_stride beyond 256", |p| p.history_stride = 257, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_sample).bytes(&valid), 2 * (4000 + 32 + 8 + 4 * 64));
    let off = Params { history: null(), history_stride: 0, ..valid };
    assert_eq!(op!(kvw_sample).bytes(&off), 2 * (4000 + 32));
    assert_eq!(op!(kvw_sample).workspace(&valid), 0);
}

const SAMPLINGS: [Sampling; 10] = [
    Sampling::GREEDY,
    sampling(1.0, 0, 1.0, 0.0),
    sampling(0.7, 40, 0.95, 0.05),
    sampling(2.5, 0, 0.9, 0.0),
    sampling(4.0, 9, 1.0, 0.0),
    sampling(1.3, 3, 0.5, 0.0),
    sampling(0.9, 0, 1.0, 0.2),
    penalised(1.3, Sampling::GREEDY),
    penalised(1.7, sampling(1.0, 0, 0.97, 0.0)),
    penalised(0.6, sampling(1.5, 20, 1.0, 0.0)),
];

/// Noise, many equal values, and rows of NaN and infinities.
fn rows() -> Vec<Vec<f32>> {
    let mut noise = Noise(16);
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let mut rows = vec![noise.values(1), noise.values(37), noise.values(1100)];
    rows.push((0..700).map(|i| (i % 4) as f32 / 4.0).collect());
    rows.push(vec![0.5; 600]);
    rows.push((0..300).map(|i| if i % 3 == 0 { nan } else { -(i as f32) / 9.0 }).collect());
    rows.push(vec![nan; 40]);
    rows.push(vec![nan, -inf, -inf, nan]);
    rows.push(vec![0.0, inf, 3.0, inf, nan]);
    rows.push((0..200).map(|i| if i % 2 == 0 { 0.0 } else { -0.0 }).collect());
    rows
}

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        let run = exec.start();
        for (step, row) in rows().iter().enumerate() {
            for again in 0..if exec == Exec::SimtPlain { 8 } else { 1 } {
                same_as_cpu(&run, row, &SAMPLINGS, (step * 10 + again) as i32).unwrap();
            }
        }
    }
}

#[test]
fn faults_are_caught() {
    let ties: Vec<f32> = (0..600).map(|i| (i % 3) as f32).collect();
    let all = |run: &Run| (0..4).try_for_each(|step| same_as_cpu(run, &ties, &SAMPLINGS, step));
    assert_caught(321, "no barrier between the histogram and its search", all);
    assert_caught(322, "ties go to the highest id", all);
    assert_caught(324, "top-p counts what top-k has dropped", all);
    assert_caught(325, "negative logits are divided too", |run| {
        let logits: Vec<f32> = (0..300).map(|i| -(i as f32) / 50.0 - 1.0).collect();
        (0..4).try_for_each(|step| same_as_cpu(run, &logits, &SAMPLINGS, step))
    });
    assert_caught(326, "no barrier between the history's slots and their first use", all);
    assert_caught(323, "the walk of a stretch forgets the ids before the current 32", all);
}
