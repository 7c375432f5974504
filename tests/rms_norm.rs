//! rms_norm: hand-worked rows, every path against the oracle.

use crate::cases::{Noise, assert_close};
use kvwarp::rms_norm::{cpu, oracle};

#[test]
fn oracle_hand_worked() {
    let mut out = [0.0; 4];
    oracle(&[3.0, 4.0, 0.0, 2.0], &[1.0, 2.0], 3.5, &mut out).unwrap();
    // (9 + 16) / 2 + 3.5 = 16;  (0 + 4) / 2 + 3.5 = 5.5
    assert_eq!(out, [0.75, 2.0, 0.0, 4.0 / 5.5f64.sqrt()]);
}

#[test]
fn cpu_matches_oracle() {
    let mut noise = Noise(1);
    for (tokens, width) in [(1, 8), (3, 576), (2, 1000), (1, 4096), (0, 8)] {
        let (x, weight) = (noise.values(tokens * width), noise.values(width));
        let mut want = vec![0.0; x.len()];
        oracle(&x, &weight, 1e-5, &mut want).unwrap();
        let mut got = vec![f32::NAN; x.len()];
        cpu(&x, &weight, 1e-5, &mut got).unwrap();
        assert_close("rms_norm", &got, &want, 1e-7, 1e-6);
    }
}

#[test]
fn a_part_of_a_row_is_refused() {
    let refused = cpu(&[1.0; 7], &[1.0; 4], 1e-5, &mut [0.0; 7]).unwrap_err().to_string();
    assert_eq!(refused, "rms_norm: `x` holds 7 elements, needs 8");
    let refused = cpu(&[1.0; 8], &[1.0; 4], 1e-5, &mut [0.0; 7]).unwrap_err().to_string();
    assert_eq!(refused, "rms_norm: `out` holds 7 elements, needs 8");
}
