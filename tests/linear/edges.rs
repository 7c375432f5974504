//! Zero, huge and missing numbers, products together, tokens in company, and sizes that are refused.

use super::{COLS, TOKENS, random_activations, random_weights, run};
use kvwarp::Error;
use kvwarp::linear::{
    Activations, Cpu, WeightType, Weights, dequantize_row, matmul, matmul_many, oracle,
};
use kvwarp::simd::Level;
use kvwarp::threads::Team;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

#[test]
fn zero_activations_give_zero() {
    let team = Team::new(1);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for kind in WeightType::ALL {
        let data = random_weights(&mut rng, kind, 5, 256);
        let weights = Weights::new(kind, 5, 256, &data).unwrap();
        for n in [1, 3, 9] {
            for level in Level::available() {
                let cpu = Cpu { level, ..Cpu::new(&team) };
                let got = run(&cpu, &weights, &vec![0.0; n * 256], n);
                assert!(got.iter().all(|&y| y == 0.0), "{kind:?} {n} {level:?}: {got:?}");
            }
        }
    }
}

/// A NaN or an infinity reaches every row of its own token and no other token.
#[test]
fn not_a_number_stays_in_its_token() {
    let team = Team::new(1);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for kind in WeightType::ALL {
        let data = random_weights(&mut rng, kind, 7, 256);
        let weights = Weights::new(kind, 7, 256, &data).unwrap();
        for (n, poison) in [(1, f32::NAN), (3, f32::INFINITY), (10, f32::NAN), (10, f32::INFINITY)]
        {
            let mut x = random_activations(&mut rng, n * 256);
            let bad = n / 2;
            x[bad * 256 + 77] = poison;
            for level in Level::available() {
                for activations in [Activations::F32, Activations::Q8] {
                    let got = run(&Cpu { level, activations, ..Cpu::new(&team) }, &weights, &x, n);
                    for (token, y) in got.chunks_exact(7).enumerate() {
                        let finite = y.iter().all(|y| y.is_finite());
                        let none = y.iter().all(|y| !y.is_finite());
                        assert!(if token == bad { none } else { finite }, "{kind:?} {n}: {y:?}");
                    }
                }
            }
        }
    }
}

/// Largest codes against largest activations of both signs: 16-bit sums of pairs must not saturate.
#[test]
fn extreme_codes_keep_exact_sums() {
    let team = Team::new(1);
    for kind in WeightType::ALL.into_iter().filter(|kind| kind.block() > 1) {
        for fill in [0xff, 0x00, 0x80, 0x7f] {
            let mut data = vec![fill; 3 * kind.row_bytes(256).unwrap()];
            for block in data.chunks_exact_mut(kind.block_bytes()) {
                let one = half::f16::ONE.to_le_bytes();
                match kind {
                    WeightType::Q6K => block[208..].copy_from_slice(&one),
                    WeightType::Q4_1 | WeightType::Q4K => {
                        block[..4].copy_from_slice(&one.repeat(2))
                    }
                    _ => block[..2].copy_from_slice(&one),
                }
            }
            let weights = Weights::new(kind, 3, 256, &data).unwrap();
            for sign in [1.0, -1.0] {
                let x = vec![sign * 127.0; 6 * 256];
                let want = oracle::matmul(&weights, &super::f64s(&x), 6);
                for level in Level::available() {
                    let cpu = Cpu { level, ..Cpu::new(&team) };
                    let one = run(&cpu, &weights, &x[..256], 1);
                    for (got, want) in
                        run(&cpu, &weights, &x, 6).iter().chain(&one).zip(want.iter().chain(&want))
                    {
                        let error = (f64::from(*got) - want).abs();
                        assert!(
                            error <= 1e-6 * want.abs(),
                            "{kind:?} {fill} {level:?} {got} {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn infinite_scales_and_huge_activations_do_not_panic() {
    let team = Team::new(1);
    for kind in WeightType::ALL.into_iter().filter(|kind| kind.block() > 1) {
        let data = vec![0x7c; 3 * kind.row_bytes(256).unwrap()]; // halves 0x7c7c are NaN
        let mut inf = data.clone();
        for block in inf.chunks_exact_mut(kind.block_bytes()) {
            let d = if kind == WeightType::Q6K { 208 } else { 0 };
            block[d] = 0;
        }
        for data in [data, inf] {
            let weights = Weights::new(kind, 3, 256, &data).unwrap();
            for level in Level::available() {
                let cpu = Cpu { level, ..Cpu::new(&team) };
                for n in [1, 6] {
                    let got = run(&cpu, &weights, &vec![3e38; n * 256], n);
                    assert!(got.iter().all(|y| !y.is_finite()), "{kind:?} {level:?} {got:?}");
                }
            }
        }
    }
}

#[test]
fn products_together_equal_products_alone() {
    let team = Team::new(3);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let shapes = [
        (WeightType::Q4_1, 65),
        (WeightType::Q8_0, 33),
        (WeightType::F16, 1),
        (WeightType::Q6K, 200),
    ];
    let data = shapes.map(|(kind, rows)| random_weights(&mut rng, kind, rows, 512));
    let weights: Vec<_> = shapes
        .iter()
        .zip(&data)
        .map(|((kind, rows), data)| Weights::new(*kind, *rows, 512, data).unwrap())
        .collect();
    for n in [1, 4, 5, 30] {
        let x = random_activations(&mut rng, n * 512);
        let cpu = Cpu::new(&team);
        let mut together: Vec<_> = weights.iter().map(|w| vec![f32::NAN; n * w.rows()]).collect();
        let mut products: Vec<_> =
            weights.iter().zip(&mut together).map(|(w, y)| (w, y.as_mut_slice())).collect();
        matmul_many(&cpu, &mut products, &x, n).unwrap();
        for (weights, together) in weights.iter().zip(&together) {
            assert_eq!(&run(&cpu, weights, &x, n), together);
        }
    }
    matmul_many(&Cpu::new(&team), &mut [], &[], 1).unwrap();
    matmul(&Cpu::new(&team), &weights[0], &[], 0, &mut []).unwrap();
}

#[test]
fn wrong_sizes_are_refused() {
    let team = Team::new(1);
    let new = |kind, rows, cols, len| Weights::new(kind, rows, cols, &[0; 4096][..len]).map(|_| ());
    let len = |need, got| Err(Error::Len { op: "linear", buffer: "weights", need, got });
    assert_eq!(new(WeightType::Q4_1, 2, 64, 80), Ok(()));
    assert_eq!(new(WeightType::Q4_1, 2, 64, 79), len(80, 79));
    assert_eq!(new(WeightType::Q8_0, 1, 32, 35), len(34, 35));
    for (kind, cols) in [(WeightType::Q4_0, 33), (WeightType::Q6K, 576), (WeightType::F32, 0)] {
        let refused = new(kind, 1, cols, 0).unwrap_err();
        assert!(refused.to_string().contains("`cols` is"), "{refused}");
    }
    let huge = new(WeightType::F32, usize::MAX / 2, 64, 0);
    assert!(matches!(huge, Err(Error::TooBig { op: "linear", .. })), "{huge:?}");
    let (narrow, wide) = ([0; 68], [0; 136]);
    let narrow = Weights::new(WeightType::Q8_0, 2, 32, &narrow).unwrap();
    let wide = Weights::new(WeightType::Q8_0, 2, 64, &wide).unwrap();
    let cpu = Cpu::new(&team);
    let (mut a, mut b) = ([0.0; 2], [0.0; 2]);
    let name = |result: Result<(), Error>| match result.unwrap_err() {
        Error::Len { buffer, .. } => buffer,
        Error::Unsupported { field, .. } => field,
        other => panic!("{other}"),
    };
    assert_eq!(name(matmul(&cpu, &narrow, &[0.0; 31], 1, &mut a)), "x");
    assert_eq!(name(matmul(&cpu, &narrow, &[0.0; 64], 2, &mut a)), "y");
    let mut mixed = [(&narrow, &mut a[..]), (&wide, &mut b[..])];
    assert_eq!(name(matmul_many(&cpu, &mut mixed, &[0.0; 32], 1)), "cols");
    assert_eq!(name(dequantize_row(&narrow, 2, &mut [0.0; 32])), "row");
    assert_eq!(name(dequantize_row(&narrow, 0, &mut [0.0; 31])), "out");
    assert_eq!(WeightType::from_ggml(3), Some(WeightType::Q4_1));
    assert_eq!(WeightType::from_ggml(15), None);
}

#[test]
fn a_token_alone_has_the_same_bits_in_any_company() {
    let team = Team::new(2);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for kind in WeightType::ALL {
        for cols in COLS.into_iter().filter(|cols| cols % kind.block() == 0) {
            let (rows, most) = (rng.random_range(0..24) * 2 + 1, 64);
            let data = random_weights(&mut rng, kind, rows, cols);
            let weights = Weights::new(kind, rows, cols, &data).unwrap();
            let x = random_activations(&mut rng, most * cols);
            for level in Level::available() {
                for activations in [Activations::F32, Activations::Q8] {
                    let cpu = Cpu { level, activations, alone: true, ..Cpu::new(&team) };
                    let singly: Vec<_> =
                        x.chunks_exact(cols).flat_map(|x| run(&cpu, &weights, x, 1)).collect();
                    for n in TOKENS {
                        let got = run(&cpu, &weights, &x[..n * cols], n);
                        assert!(
                            got == singly[..n * rows],
                            "{kind:?} {rows}x{cols} n {n} {level:?}"
                        );
                    }
                }
            }
        }
    }
}
