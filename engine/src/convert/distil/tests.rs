//! Gradients against differences of the error.

use faer::Mat;
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::adam::Adam;
use super::block::{Block, Example, Weights};

/// Two kv heads of three heads each, two of four pairs elite, a latent vector of five, nine tokens.
fn problem() -> (Block, Weights, Example) {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let (heads, kv_heads, d, r, rank, width, t) = (6, 2, 8, 2, 5, 7, 9);
    let mut x =
        |rows: usize, cols: usize| Mat::from_fn(rows, cols, |_, _| random.random::<f32>() - 0.5);
    let weights = [
        x(heads * d, width),
        x(kv_heads * 2 * r, width),
        x(rank, width),
        x(kv_heads * (d - 2 * r), rank),
        x(kv_heads * d, rank),
        x(width, heads * d),
    ];
    let example = Example { g: x(t, width), wanted: x(t, width) };
    let mut bias = |n: usize| (0..n).map(|i| x(1, n)[(0, i)]).collect::<Vec<f32>>();
    let biases =
        [bias(heads * d), bias(kv_heads * 2 * r), bias(kv_heads * (d - 2 * r)), bias(kv_heads * d)];
    let frequencies = vec![1.0, 0.3, 0.7, 0.05];
    (Block { heads, kv_heads, head_dim: d, biases, frequencies }, weights, example)
}

#[test]
fn gradients_are_what_the_error_changes_by() {
    let (block, weights, example) = problem();
    let (error, gradient) = block.gradient(&weights, &example);
    assert_eq!(error, block.error(&weights, &example));
    for m in 0..weights.len() {
        for (i, j) in [(0, 0), (1, 3), (weights[m].nrows() - 1, 1), (weights[m].nrows() / 2, 4)] {
            let moved = |by: f32| {
                let mut weights = weights.clone();
                weights[m][(i, j)] += by;
                block.error(&weights, &example)
            };
            let step = 1e-2;
            let difference = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            let found = f64::from(gradient[m][(i, j)]);
            let off = (found - difference).abs();
            assert!(off < 1e-5 + 2e-2 * difference.abs(), "{m} {i} {j}: {found}, not {difference}");
        }
    }
}

#[test]
fn steps_lead_downwards() {
    let (block, mut weights, example) = problem();
    let (before, mut adam) = (block.error(&weights, &example), Adam::new(&weights));
    for step in 0..200 {
        let gradients = [block.gradient(&weights, &example)];
        adam.step(&mut weights, &gradients, 1.0 - step as f32 / 200.0);
    }
    let after = block.error(&weights, &example);
    assert!(after < 0.3 * before, "{after} after {before}");
}
