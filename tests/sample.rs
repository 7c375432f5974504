//! sample: hand-worked distributions, draws against the oracle's probabilities, edges.

use crate::cases::Noise;
use kvwarp::sample::{Sampling, cpu, draw, oracle};

fn sampling(temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> Sampling {
    Sampling { temperature, top_k, top_p, min_p }
}

#[test]
fn oracle_hand_worked() {
    // Probabilities 8/15, 4/15, 2/15, 1/15 at ids 2, 0, 3, 1.
    let logits = [4f32, 1.0, 8.0, 2.0].map(f32::ln);
    let p = |s| oracle(&logits, &s).unwrap();
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

#[test]
fn draw_hand_worked() {
    // The first outputs of SplitMix64 started at 0, as published.
    assert_eq!(draw(0, 0), 0xE220_A839_7B1D_CDAF);
    assert_eq!(draw(0, 1), 0x6E78_9E6A_A1B9_65F4);
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let greedy = |logits: &[f32]| cpu(logits, &Sampling::GREEDY, 0).unwrap();
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
        drawn[cpu(&logits, &sampling(1.0, 4, 1.0, 0.0), draw(1, step)).unwrap() as usize] = true;
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
        let want = oracle(&logits, &s).unwrap();
        let (n, mut counts) = (40_000, vec![0u32; logits.len()]);
        for step in 0..n {
            counts[cpu(&logits, &s, draw(7, step)).unwrap() as usize] += 1;
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
        let pick = |logits: &[f32]| cpu(logits, &s, draw(3, step)).unwrap();
        assert_eq!(pick(&[0.0, inf, nan, -inf]), 1);
        assert_eq!(pick(&[-inf, nan, -3.0]), 2);
        assert_eq!(pick(&[nan, nan]), 0);
        assert!(pick(&[nan, -inf, -inf]) != 0);
        let hot = Sampling { temperature: f32::from_bits(1), ..s };
        assert_eq!(cpu(&[1.0, 1.5], &hot, draw(3, step)).unwrap(), 1);
    }
}

#[test]
fn fields_out_of_range_are_named() {
    let refused = |s| cpu(&[0.0], &s, 0).unwrap_err().to_string();
    assert!(refused(sampling(-1.0, 0, 1.0, 0.0)).contains("`temperature` is -1"));
    assert!(refused(sampling(f32::NAN, 0, 1.0, 0.0)).contains("`temperature` is NaN"));
    assert!(refused(sampling(1.0, 0, 0.0, 0.0)).contains("`top_p` is 0"));
    assert!(refused(sampling(1.0, 0, 1.0, 1.0)).contains("`min_p` is 1"));
    assert!(cpu(&[], &Sampling::GREEDY, 0).is_err());
}
