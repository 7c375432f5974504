//! swiglu: hand-worked values, every path against the oracle.

use crate::cases::{Noise, assert_close};
use kvwarp::swiglu::{cpu, oracle};

#[test]
fn oracle_hand_worked() {
    assert_eq!(oracle(0.0, 5.0), 0.0);
    let ln3 = 3f64.ln();
    assert!((oracle(ln3, 2.0) - 1.5 * ln3).abs() < 1e-15, "1 / (1 + 1/3) = 3/4");
}

#[test]
fn cpu_matches_oracle() {
    let mut noise = Noise(2);
    let mut gate = noise.values(5000);
    gate.extend([-1e30, -104.0, -88.1, -87.9, 88.0, 1e30, f32::NAN]);
    let up = noise.values(gate.len());
    let want: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| oracle(g.into(), u.into())).collect();
    cpu(&mut gate, &up).unwrap();
    assert_close("swiglu", &gate, &want, 1e-30, 1e-6);
    assert!(cpu(&mut gate, &up[1..]).is_err());
}
