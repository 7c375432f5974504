//! rope_select: hand-worked turns, frequencies of stretched models, every path against the oracle.

use crate::cases::{Noise, assert_close};
use kvwarp::rope_select::{Angles, Pairing, Scaling, cpu, inv_freq, oracle};

const PAIRINGS: [Pairing; 2] = [Pairing::Interleaved, Pairing::Half];

#[test]
fn oracle_hand_worked() {
    let quarter = [std::f32::consts::FRAC_PI_2, 0.0];
    let mut x = [1.0, 2.0, 3.0, 4.0];
    oracle(&mut x, 1, 4, &[1], &quarter, Pairing::Interleaved).unwrap();
    let near = |x: [f64; 4], want: [f64; 4]| x.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(near(x, [-2.0, 1.0, 3.0, 4.0]), "pair (0, 1) a quarter turn: {x:?}");
    let mut x = [1.0, 2.0, 3.0, 4.0];
    oracle(&mut x, 1, 4, &[1], &quarter, Pairing::Half).unwrap();
    assert!(near(x, [-3.0, 2.0, 1.0, 4.0]), "pair (0, 2) a quarter turn: {x:?}");
}

#[test]
fn frequencies_hand_worked() {
    assert_eq!(inv_freq(10000.0, 4, Scaling::None), [1.0, 0.01]);
    assert_eq!(inv_freq(10000.0, 4, Scaling::Linear { factor: 4.0 }), [0.25, 0.0025]);
    // Waves in 8192 positions: 8192 / tau = 1304 (short, kept), 13.04 (kept), 0.1304 (long, divided).
    let llama3 = |theta| {
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        inv_freq(theta, 6, scaling)
    };
    assert_eq!(llama3(1e6), [1.0, 0.01, 1e-4 / 8.0]);
    // tau / 4096 radians a position are 2 waves: a third of the way from low to high.
    let theta = (4096.0 / std::f64::consts::TAU).powi(3);
    let freq = std::f64::consts::TAU / 4096.0;
    let blended = freq / 3.0 + freq / 8.0 * 2.0 / 3.0;
    assert!((f64::from(llama3(theta)[1]) - blended).abs() < 1e-9);
}

#[test]
fn cpu_matches_oracle() {
    let mut noise = Noise(3);
    for d in [64, 80, 96, 128, 256] {
        let freq = inv_freq(500000.0, d, Scaling::None);
        let positions = [0, 1, 63, 4095, 131072];
        let x = noise.values(positions.len() * 3 * d);
        for pairing in PAIRINGS {
            let mut want: Vec<f64> = x.iter().map(|&x| x.into()).collect();
            oracle(&mut want, 3, d, &positions, &freq, pairing).unwrap();
            let mut got = x.clone();
            cpu(&mut got, 3, d, &positions, &freq, pairing).unwrap();
            assert_close("rope_select", &got, &want, 1e-5, 1e-6);
        }
    }
}

#[test]
fn sizes_that_disagree_are_refused() {
    let freq = inv_freq(10000.0, 64, Scaling::None);
    let mut x = vec![0.0; 128];
    assert!(cpu(&mut x, 1, 64, &[0, 1, 2], &freq, Pairing::Half).is_err());
    assert!(cpu(&mut x, 1, 128, &[0], &freq, Pairing::Half).is_err());
    let angles = Angles::new(&[0, 1], &freq);
    assert!(angles.rotate(1, &mut x, Pairing::Half).is_ok());
    let refused = angles.rotate(2, &mut x, Pairing::Half).unwrap_err().to_string();
    assert_eq!(refused, "rope_select: `positions` holds 2 elements, needs 3");
    assert!(angles.rotate(0, &mut x[..65], Pairing::Half).is_err());
}
