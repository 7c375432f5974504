//! How codes are chosen: a share of the range, and feedback of rounding errors, by hand.

use crate::cases::Noise;
use half::f16;
use kvwarp::slab::{
    Format, Layout, Meta, Rounding, TOKENS, encode_rounded, feedback, k_value, v_value,
};

const D: usize = 64;

/// `[64, 64]` of zeros but for `columns`, the first channels, token by token.
fn tokens(columns: &[[f32; 6]]) -> Vec<f16> {
    let value = |token: usize, channel: usize| {
        let column = columns.get(channel).map_or(&[0.0; 6], |c| c);
        column.get(token).copied().unwrap_or(column[0])
    };
    (0..TOKENS * D).map(|i| f16::from_f32(value(i / D, i % D))).collect()
}

/// Channel `channel` of the first six keys once they are `rounding`'s codes.
fn keys(layout: &Layout, rounding: &Rounding, k: &[f16], channel: usize) -> [f32; 6] {
    let mut slab = vec![0; layout.slab_bytes()];
    encode_rounded(layout, rounding, k, k, &mut slab);
    [0, 1, 2, 3, 4, 5].map(|token| k_value(layout, &slab, token, channel))
}

#[test]
fn a_share_of_the_range_hand_worked() {
    // 0 to 8 about 4: three quarters are 1 to 7, steps of 2; ends are clipped, ties go to even.
    let k = tokens(&[[0.0, 8.0, 2.0, 4.0, 5.5, 1.5], [-100.0; 6]]);
    let rounding = Rounding { range: 0.75, feedback: None };
    let f16 = Layout::new(Format::Q2, D, 32).unwrap();
    assert_eq!(keys(&f16, &rounding, &k, 0), [1.0, 7.0, 1.0, 5.0, 5.0, 1.0]);
    assert_eq!(keys(&f16, &rounding, &k, 1), [-100.0; 6], "a constant is exact");
    // Minima of -100 to 0.2 * 8 are 203 steps of a half, 1 is 202. The span 8 needs steps of 2^-6, of which the scale
    // 2 is 128.
    let bytes = Layout::with_meta(Format::Q2, D, 32, Meta::U8).unwrap();
    assert_eq!(keys(&bytes, &rounding, &k, 0), [1.0, 7.0, 1.0, 5.0, 5.0, 1.0]);
    // Four bits span all of it: 0 is exact.
    let four = Layout::new(Format::Q4, D, 32).unwrap();
    assert_eq!(keys(&four, &rounding, &k, 0)[0], 0.0);
    // V: a token's first 32 channels are one group: 0, -100 and zeros. 3/4 of it are -87.5 to -12.5.
    let mut slab = vec![0; f16.slab_bytes()];
    encode_rounded(&f16, &rounding, &k, &k, &mut slab);
    assert_eq!([0, 1, 2].map(|c| v_value(&f16, &slab, 0, c)), [-12.5, -87.5, -12.5]);
}

#[test]
fn a_minimum_beyond_the_bytes_is_their_last() {
    // Minima of 0 to 0.2 * 8 are 204 steps of 2^-7, but half of the range begins at 2: 255 of them. From there to 6
    // three codes need 85.5 steps of 2^-6.
    let k = tokens(&[[0.0, 8.0, 2.0, 4.0, 5.5, 1.5]]);
    let layout = Layout::with_meta(Format::Q2, D, 32, Meta::U8).unwrap();
    let got = keys(&layout, &Rounding { range: 0.5, feedback: None }, &k, 0);
    let (min, scale) = (255.0 / 128.0, 86.0 / 64.0);
    assert_eq!(got, [0.0, 3.0, 0.0, 1.0, 3.0, 0.0].map(|code: f32| code * scale + min));
}

#[test]
fn feedback_of_errors_hand_worked() {
    // Scales are 1, minima 0. Channel 0 is off by 0, 0, 1/4, -1/4, 1/2 and -1/2.
    let k = tokens(&[
        [0.0, 3.0, 1.25, 2.75, 0.5, 1.5],
        [0.0, 3.0, 1.375, 2.625, 1.0, 2.0],
        [0.0, 3.0, 1.0, 2.0, 1.0, 1.0],
    ]);
    let mut weights = vec![f16::ZERO; D * D];
    (weights[D], weights[2 * D], weights[2 * D + 1]) = (f16::from_f32(0.5), f16::ONE, f16::NEG_ONE);
    let layout = Layout::new(Format::Q2, D, 32).unwrap();
    let of =
        |channel| keys(&layout, &Rounding { range: 1.0, feedback: Some(&weights) }, &k, channel);
    assert_eq!(of(0), [0.0, 3.0, 1.0, 3.0, 0.0, 2.0]);
    // Wanted: 1.375 + 1/8, 2.625 - 1/8, 1 + 1/4, 2 - 1/4; off by -5/8, 5/8, 0, 0.
    assert_eq!(of(1), [0.0, 3.0, 2.0, 2.0, 1.0, 2.0]);
    // Wanted: 1 + 1/4 + 5/8, 2 - 1/4 - 5/8, 1 + 1/2, 1 - 1/2.
    assert_eq!(of(2), [0.0, 3.0, 2.0, 1.0, 2.0, 0.0]);
}

fn f32s(x: &[f16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

#[test]
fn weights_hand_worked() {
    // The mean of the diagonals is 1, to which 0.05 is added. 0.45 / (0.85 + 0.05) = 1/2.
    assert_eq!(f32s(&feedback(&[1.15, 0.45, 0.45, 0.85])), [0.0, 0.0, 0.5, 0.0]);
    // Row 2: (0.25, -0.5) / 1. What is left of (1, 1): 1 - 0.25 = 0.75; of (1, 0): 0.25 + 0.125 = 0.375.
    let h = [1.1, 0.25, 0.25, 0.25, 0.95, -0.5, 0.25, -0.5, 0.95];
    assert_eq!(f32s(&feedback(&h)), [0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.25, -0.5, 0.0]);
    for h in [[0.0; 4], [f64::NAN; 4], [1.0, f64::INFINITY, 0.0, 1.0]] {
        assert_eq!(f32s(&feedback(&h)), [0.0; 4], "{h:?}");
    }
}

#[test]
fn weights_leave_each_error_its_own_square() {
    let (d, mut noise) = (24, Noise(17));
    for _ in 0..8 {
        let a: Vec<f64> = (0..d * d).map(|_| f64::from(noise.unit())).collect();
        let entry = |i: usize, j: usize| (0..d).map(|n| a[n * d + i] * a[n * d + j]).sum::<f64>();
        let h: Vec<f64> = (0..d * d).map(|n| entry(n / d, n % d)).collect();
        let mean = (0..d).map(|i| h[i * d + i]).sum::<f64>() / d as f64;
        let m: Vec<f64> = feedback(&h).iter().map(|x| x.to_f64()).collect();
        let damped = |i: usize, j: usize| h[i * d + j] / mean + if i == j { 0.05 } else { 0.0 };
        // w_j: what later channels leave of the diagonal.
        let mut w = vec![0.0; d];
        for j in (0..d).rev() {
            w[j] = damped(j, j) - (j + 1..d).map(|k| w[k] * m[k * d + j].powi(2)).sum::<f64>();
        }
        let e: Vec<f64> = (0..d).map(|_| f64::from(noise.unit())).collect();
        let all = |i: usize| (0..d).map(move |j| (i, j));
        let whole: f64 = (0..d).flat_map(all).map(|(i, j)| e[i] * damped(i, j) * e[j]).sum();
        let y = |j: usize| e[j] + (0..j).map(|i| m[j * d + i] * e[i]).sum::<f64>();
        let squares: f64 = (0..d).map(|j| w[j] * y(j) * y(j)).sum();
        // Weights are f16.
        assert!((whole - squares).abs() < 0.01 * whole, "{whole} {squares}");
    }
}
