//! Products with weights in GGUF block formats, against f64 over the decoded weights.

mod edges;
pub mod kernel;
mod planes;

use crate::cases::somewhere;
use crate::exec::{assert_caught, executors, op};
use half::f16;
use kernel::{Case, close_to_oracle, params};
use kvwarp::ffi;
use kvwarp::linear::{Activations, Cpu, WeightType, Weights, dequantize_row, matmul, oracle};
use kvwarp::simd::Level;
use kvwarp::threads::Team;
use rand::rngs::ChaCha8Rng;
use rand::{Rng, RngExt, SeedableRng};

/// Random bytes with sane scales: every code, sign and 6-bit scale occurs.
pub fn random_weights(rng: &mut ChaCha8Rng, kind: WeightType, rows: usize, cols: usize) -> Vec<u8> {
    let mut data = vec![0; rows * kind.row_bytes(cols).unwrap()];
    rng.fill_bytes(&mut data);
    let mut half = |at: &mut [u8], top: f32| {
        at.copy_from_slice(&f16::from_f32(rng.random_range(-top..top)).to_le_bytes());
    };
    for block in data.chunks_exact_mut(kind.block_bytes()) {
        match kind {
            WeightType::F32 => {
                let mut high = [0; 2];
                half(&mut high, 1.0);
                block.copy_from_slice(&f16::from_le_bytes(high).to_f32().to_le_bytes());
            }
            WeightType::F16 => half(block, 1.0),
            WeightType::BF16 => {
                let mut high = [0; 2];
                half(&mut high, 1.0);
                let bits = f16::from_le_bytes(high).to_f32().to_bits();
                block.copy_from_slice(&bits.to_le_bytes()[2..]);
            }
            WeightType::Q8_0 | WeightType::Q4_0 => half(&mut block[..2], 0.02),
            WeightType::Q4_1 | WeightType::Q4K => {
                half(&mut block[..2], 0.05);
                half(&mut block[2..4], 0.3);
            }
            WeightType::Q6K => half(&mut block[208..], 0.01),
        }
    }
    data
}

/// Activations with planted outliers, so that blocks differ in scale.
fn random_activations(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    let value = |i| {
        let x: f32 = rng.random_range(-1.0..1.0);
        if i % 97 == 13 { 40.0 * x } else { x }
    };
    (0..len).map(value).collect()
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Largest `|got - want|` as a part of `sum |x| |w|`, the size of what was added up.
fn worst(got: &[f32], want: &[f64], weights: &Weights<'_>, x: &[f64]) -> f64 {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut row = vec![0.0; cols];
    let mut worst = 0f64;
    for r in 0..rows {
        dequantize_row(weights, r, &mut row).unwrap();
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let size: f64 = x.iter().zip(&row).map(|(x, w)| (x * f64::from(*w)).abs()).sum();
            let error = (f64::from(got[t * rows + r]) - want[t * rows + r]).abs();
            assert!(error.is_finite(), "row {r} token {t}: {error}");
            worst = worst.max(error / size.max(1e-30));
        }
    }
    worst
}

fn run(cpu: &Cpu<'_>, weights: &Weights<'_>, x: &[f32], n: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; n * weights.rows()];
    matmul(cpu, weights, x, n, &mut y).unwrap();
    y
}

const TOKENS: [usize; 7] = [1, 2, 3, 5, 8, 17, 64];
const COLS: [usize; 7] = [32, 64, 96, 576, 1536, 256, 512];

/// Every format, level, number of tokens and width; odd numbers of rows around a panel of 16.
fn all_shapes(activations: Activations) {
    let team = Team::new(2);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for kind in WeightType::ALL {
        for cols in COLS.into_iter().filter(|cols| cols % kind.block() == 0) {
            let rows = rng.random_range(0..24) * 2 + 1;
            let data = random_weights(&mut rng, kind, rows, cols);
            let weights = Weights::new(kind, rows, cols, &data).unwrap();
            for n in TOKENS {
                let x = random_activations(&mut rng, n * cols);
                let float = activations == Activations::F32 || kind.block() == 1;
                let meant = if float { f64s(&x) } else { oracle::quantized_activations(&x, cols) };
                let want = oracle::matmul(&weights, &meant, n);
                for level in Level::available() {
                    let got = run(&Cpu { level, activations, ..Cpu::new(&team) }, &weights, &x, n);
                    let error = worst(&got, &want, &weights, &meant);
                    assert!(error < 1e-6, "{kind:?} {rows}x{cols} n {n} {level:?}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn float_activations_match_oracle() {
    all_shapes(Activations::F32);
}

#[test]
fn eight_bit_activations_match_exact_integers() {
    all_shapes(Activations::Q8);
}

/// 8 bits cost what 8 bits cost: about 0.5 % of the norm, not more.
#[test]
fn eight_bit_activations_stay_near_float_ones() {
    let team = Team::new(1);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let data = random_weights(&mut rng, WeightType::Q4_0, 64, 576);
    let weights = Weights::new(WeightType::Q4_0, 64, 576, &data).unwrap();
    let x: Vec<f32> = (0..576).map(|_| rng.random_range(-1.0..1.0)).collect();
    let want = oracle::matmul(&weights, &f64s(&x), 1);
    let got = run(&Cpu::new(&team), &weights, &x, 1);
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let error = square(&mut got.iter().zip(&want).map(|(g, w)| f64::from(*g) - w));
    let ratio = error / square(&mut want.iter().copied());
    assert!((1e-5..8e-3).contains(&ratio), "{ratio:e}");
}

#[test]
fn golden_blocks_decode_exactly() {
    let mut lines = include_str!("data/linear_blocks.txt").lines();
    let mut seen = 0;
    while let (Some(name), Some(hex), Some(values)) = (lines.next(), lines.next(), lines.next()) {
        let kind = match name {
            "f16" => WeightType::F16,
            "bf16" => WeightType::BF16,
            "q8_0" => WeightType::Q8_0,
            "q4_0" => WeightType::Q4_0,
            "q4_1" => WeightType::Q4_1,
            "q4_k" => WeightType::Q4K,
            "q6_k" => WeightType::Q6K,
            other => panic!("unknown format {other}"),
        };
        let byte = |i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
        let data: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        let want: Vec<f32> = values.split(' ').map(|v| v.parse().unwrap()).collect();
        let weights = Weights::new(kind, 1, want.len(), &data).unwrap();
        let mut got = vec![f32::NAN; want.len()];
        dequantize_row(&weights, 0, &mut got).unwrap();
        assert_eq!(got, want, "{name}");
        seen += 1;
    }
    assert_eq!(seen, 7);
}

/// One block of each 32-element format, worked out by hand: d = 0.5, m = -1.
#[test]
fn oracle_hand_worked() {
    let team = Team::new(1);
    let d = f16::from_f32(0.5).to_le_bytes();
    let m = f16::from_f32(-1.0).to_le_bytes();
    let mut nibbles = [0x88u8; 16];
    nibbles[0] = 0xf1; // element 0 has code 1, element 16 code 15
    let mut codes = [0u8; 32];
    (codes[0], codes[16]) = (0x80, 127); // -128 and 127
    let cases = [
        (WeightType::Q4_0, [&d[..], &nibbles].concat(), -3.5, 3.5, 0.0),
        (WeightType::Q4_1, [&d[..], &m, &nibbles].concat(), -0.5, 6.5, 3.0),
        (WeightType::Q8_0, [&d[..], &codes].concat(), -64.0, 63.5, 0.0),
    ];
    // 127 in every block makes the activation scale exactly 1.
    let mut x = [0f32; 32];
    (x[0], x[16], x[31]) = (127.0, -2.0, 5.0);
    for (kind, data, first, middle, last) in cases {
        let weights = Weights::new(kind, 1, 32, &data).unwrap();
        let want = 127.0 * first - 2.0 * middle + 5.0 * last;
        for activations in [Activations::F32, Activations::Q8] {
            for level in Level::available() {
                let cpu = Cpu { level, activations, ..Cpu::new(&team) };
                assert_eq!(
                    run(&cpu, &weights, &x, 1),
                    [want],
                    "{kind:?} {activations:?} {level:?}"
                );
                let six = run(&cpu, &weights, &x.repeat(6), 6);
                assert_eq!(six, [want; 6], "{kind:?} {activations:?} {level:?}");
            }
        }
    }
}

const CASE: Case = Case {
    kind: WeightType::F16,
    tokens: 3,
    rows: 33,
    cols: 72,
    y_f32: true,
    bias: true,
    accumulate: true,
};

#[test]
fn c_checks_need_no_gpu() {
    let mut valid = params(CASE);
    (valid.weight, valid.x, valid.y) = (somewhere(), somewhere(), somewhere());
    op!(kvw_linear).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 0, ffi::KVW_ERR_STRUCT),
            ("dtype", |p| p.dtype = ffi::KVW_F32, ffi::KVW_ERR_FORMAT),
            ("y_dtype", |p| p.y_dtype = ffi::KVW_BF16, ffi::KVW_ERR_FORMAT),
            ("accumulate in f16", |p| p.y_dtype = ffi::KVW_F16, ffi::KVW_ERR_FORMAT),
            ("accumulate", |p| p.accumulate = 2, ffi::KVW_ERR_SHAPE),
            ("weight", |p| p.weight = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("x", |p| p.x = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("y", |p| p.y = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("weight unaligned", |p| p.weight = 8 as _, ffi::KVW_ERR_ALIGN),
            ("bias unaligned", |p| p.bias = 4 as _, ffi::KVW_ERR_ALIGN),
            ("tokens", |p| p.tokens = 17, ffi::KVW_ERR_SHAPE),
            ("rows", |p| p.rows = 0, ffi::KVW_ERR_SHAPE),
            ("cols", |p| p.cols = 68, ffi::KVW_ERR_SHAPE),
            ("reserved", |p| p.reserved = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_linear).bytes(&valid), 33 * 72 * 2 + 3 * 72 * 2 + 2 * 3 * 33 * 4);
    assert_eq!(op!(kvw_linear).workspace(&valid), 0);
    let blocks = params(Case { kind: WeightType::Q6K, cols: 512, accumulate: false, ..CASE });
    let blocks =
        ffi::kvw_linear_params { weight: somewhere(), x: somewhere(), y: somewhere(), ..blocks };
    let splits = ("cols splits a block", |p: &mut ffi::kvw_linear_params| p.cols = 384);
    op!(kvw_linear).refuses(blocks, &[(splits.0, splits.1, ffi::KVW_ERR_SHAPE)]);
    assert_eq!(op!(kvw_linear).bytes(&blocks), 33 * 420 + 3 * 512 * 2 + 3 * 33 * 4);
}

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        let run = exec.start();
        for kind in [WeightType::F16, WeightType::BF16] {
            for tokens in [1, 2, 8, 9, 16] {
                for (rows, cols) in [(33, 72), (1, 8), (16, 2056), (20, 1024)] {
                    let y_f32 = cols % 9 != 0;
                    let (bias, accumulate) = (rows > 16, y_f32 && rows % 2 == 0);
                    let case = Case { kind, tokens, rows, cols, y_f32, bias, accumulate };
                    close_to_oracle(&run, case).unwrap();
                }
            }
        }
    }
}

#[test]
fn faults_are_caught() {
    let body = |run: &crate::exec::Run| close_to_oracle(run, CASE);
    assert_caught(331, "no barrier between the warps' sums and their sum", body);
    assert_caught(332, "columns past the end of a row are read", body);
    assert_caught(333, "rows g and g + 8 of a tile change places", body);
    assert_caught(334, "y is overwritten where it should be added to", body);
    let of = |kind, cols| {
        move |run: &crate::exec::Run| close_to_oracle(run, Case { kind, cols, ..CASE })
    };
    assert_caught(335, "rows g + 8 have the scales of rows g", of(WeightType::Q8_0, 96));
    assert_caught(336, "a run that is not whole is read as one", of(WeightType::Q4_0, 192));
    assert_caught(337, "minima are left out", of(WeightType::Q4_1, 64));
}
