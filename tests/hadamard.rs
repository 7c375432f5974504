//! Hadamard rotations: entries by hand, orthonormal, their own inverse.

use crate::cases::Noise;
use kvwarp::hadamard::{BLOCK, keys, values};

/// What `turn` makes of unit vector `j` of `d` channels.
fn column(turn: impl Fn(&mut [f32]), d: usize, j: usize) -> Vec<f32> {
    let mut x = vec![0.0; d];
    x[j] = 1.0;
    turn(&mut x);
    x
}

#[test]
fn entries_hand_worked() {
    // (-1)^(bits that i and j share) / sqrt(64).
    let head = |j| column(|x| keys(x, 64), 64, j);
    assert_eq!(head(0), [0.125; 64]);
    assert_eq!(head(1)[..4], [0.125, -0.125, 0.125, -0.125]);
    assert_eq!(head(3)[..4], [0.125, -0.125, -0.125, 0.125]);
    assert_eq!((head(63)[63], head(63)[62], head(32)[40]), (0.125, -0.125, -0.125));
    // Three of 32, 1 / sqrt(32) = 0.17678: a third of it within a block, less two thirds across.
    let near = |x: f32, want: f32| (x - want).abs() < 1e-6;
    let head = column(|x| keys(x, 96), 96, 33);
    assert!(near(head[32], 0.0589256) && near(head[33], -0.0589256));
    assert!(near(head[0], -0.1178511) && near(head[65], 0.1178511));
    let block = column(values, 64, 34);
    assert!(near(block[32], 0.1767767) && near(block[34], -0.1767767) && block[0] == 0.0);
}

#[test]
fn rotations_are_orthonormal_and_their_own_inverse() {
    let mut noise = Noise(21);
    let check = |turn: &dyn Fn(&mut [f32]), d: usize, noise: &mut Noise| {
        let columns: Vec<_> = (0..d).map(|j| column(turn, d, j)).collect();
        for (i, a) in columns.iter().enumerate() {
            for (j, b) in columns.iter().enumerate() {
                let dot: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-5, "D {d}: {i} {j} {dot}");
            }
        }
        let x = noise.values(3 * d);
        let mut twice = x.clone();
        turn(&mut twice);
        turn(&mut twice);
        assert!(x.iter().zip(&twice).all(|(a, b)| (a - b).abs() < 1e-4), "D {d}");
    };
    for d in [64, 96, 128, 256] {
        check(&|x| keys(x, d), d, &mut noise);
    }
    check(&values, 2 * BLOCK, &mut noise);
}

#[test]
#[should_panic(expected = "heads of 80 channels")]
fn other_heads_are_refused() {
    keys(&mut [0.0; 80], 80);
}
