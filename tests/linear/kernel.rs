//! The CUDA kernel's side: params, operands, and one product on an executor.

use super::{CASE, random_weights};
use crate::cases::Noise;
use crate::exec::{Run, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_linear_params as Params};
use kvwarp::linear::{WeightType, Weights, dequantize_row, oracle, planes};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

/// Types of blocks.
pub const BLOCKS: [WeightType; 5] =
    [WeightType::Q8_0, WeightType::Q4_0, WeightType::Q4_1, WeightType::Q4K, WeightType::Q6K];

/// The C ABI's number.
pub fn dtype(kind: WeightType) -> i32 {
    match kind {
        WeightType::F32 => ffi::KVW_F32,
        WeightType::F16 => ffi::KVW_F16,
        WeightType::BF16 => ffi::KVW_BF16,
        WeightType::Q8_0 => ffi::KVW_Q8_0,
        WeightType::Q4_0 => ffi::KVW_Q4_0,
        WeightType::Q4_1 => ffi::KVW_Q4_1,
        WeightType::Q4K => ffi::KVW_Q4_K,
        WeightType::Q6K => ffi::KVW_Q6_K,
    }
}

/// One product to run: `accumulate` needs an f32 `y`.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub kind: WeightType,
    pub tokens: usize,
    pub rows: usize,
    pub cols: usize,
    pub y_f32: bool,
    pub bias: bool,
    pub accumulate: bool,
}

/// Valid params over `y`; the pointers are set by the caller.
pub fn params(case: Case) -> Params {
    let y_dtype = if case.y_f32 { ffi::KVW_F32 } else { ffi::KVW_F16 };
    Params {
        struct_size: size_of::<Params>() as u32,
        dtype: dtype(case.kind),
        y_dtype,
        accumulate: i32::from(case.accumulate),
        tokens: case.tokens as i32,
        rows: case.rows as i32,
        cols: case.cols as i32,
        ..Params::default()
    }
}

/// The product within f32's rounding of its sums (and f16's, of an f16 `y`) of the f64 oracle.
pub fn close_to_oracle(run: &Run, case: Case) -> Result<(), String> {
    let mut noise = Noise((case.rows * 31 + case.cols) as u64);
    let mut rng = ChaCha8Rng::seed_from_u64(noise.bits());
    let data = random_weights(&mut rng, case.kind, case.rows, case.cols);
    let x = noise.halves(case.tokens * case.cols);
    let (bias, before) = (noise.values(case.rows), noise.values(case.tokens * case.rows));

    let weights = Weights::new(case.kind, case.rows, case.cols, &data);
    let weights = weights.map_err(|e| e.to_string())?;
    let wide: Vec<f64> = x.iter().map(|x| x.to_f64()).collect();
    let want = oracle::matmul(&weights, &wide, case.tokens);
    let got = product(run, case, &planes(&weights), &x, &bias, &before)?;

    let largest = largest(&weights);
    for (i, &got) in got.iter().enumerate() {
        let (t, r) = (i / case.rows, i % case.rows);
        let bias = if case.bias { f64::from(bias[r]) } else { 0.0 };
        let before = if case.accumulate { f64::from(before[i]) } else { 0.0 };
        let want = want[i] + bias + before;
        // What is added up, each term as large as the row's largest weight allows: a code times its scale is
        // no larger than the weights of its group are apart.
        let terms: f64 = wide[t * case.cols..][..case.cols].iter().map(|x| x.abs()).sum();
        let rounding = if case.y_f32 { 0.0 } else { 4.9e-4 * want.abs() };
        let off = (f64::from(got) - want).abs();
        if off > 1e-6 * (terms * largest[r] + bias.abs() + before.abs()) + rounding || off.is_nan()
        {
            return Err(format!("{case:?}: token {t} row {r}: {got}, want {want}, off {off:.2e}"));
        }
    }
    Ok(())
}

/// Largest magnitude of each row.
fn largest(weights: &Weights<'_>) -> Vec<f64> {
    let mut row = vec![0.0; weights.cols()];
    let mut of = |r| {
        dequantize_row(weights, r, &mut row).unwrap();
        f64::from(row.iter().fold(0f32, |top, w| top.max(w.abs())))
    };
    (0..weights.rows()).map(&mut of).collect()
}

/// `y` of one product as floats.
fn product(
    run: &Run,
    case: Case,
    planes: &[u8],
    x: &[f16],
    bias: &[f32],
    before: &[f32],
) -> Result<Vec<f32>, String> {
    let (dw, dx) = (run.upload("weight", planes), run.upload("x", x));
    let (db, y32) = (run.upload("bias", bias), run.upload("y", before));
    let y16 = run.alloc::<f16>("y", before.len());
    let mut p = params(case);
    (p.weight, p.x) = (dw.ptr().cast(), dx.ptr().cast());
    p.bias = if case.bias { db.ptr() } else { std::ptr::null() };
    p.y = if case.y_f32 { y32.ptr().cast() } else { y16.ptr().cast() };
    run.call(&op!(kvw_linear), &p)?;
    Ok(if case.y_f32 { y32.download() } else { crate::cases::widen(&y16.download()) })
}

/// Token by token the same bits as among sixteen.
fn same_for_every_batch(run: &Run, case: Case) -> Result<(), String> {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let data = random_weights(&mut rng, case.kind, case.rows, case.cols);
    let weights =
        Weights::new(case.kind, case.rows, case.cols, &data).map_err(|e| e.to_string())?;
    let (planes, x) = (planes(&weights), Noise(9).halves(16 * case.cols));
    let of = |first: usize, tokens: usize| {
        let (x, y) = (&x[first * case.cols..][..tokens * case.cols], vec![0.0; tokens * case.rows]);
        product(run, Case { tokens, ..case }, &planes, x, &vec![0.5; case.rows], &y)
    };
    let all = of(0, 16)?;
    for (first, tokens) in [(0, 1), (3, 2), (7, 5), (15, 1), (2, 8), (1, 9)] {
        let (got, want) = (of(first, tokens)?, &all[first * case.rows..][..tokens * case.rows]);
        if got.iter().zip(want).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return Err(format!("{case:?}: {tokens} tokens from {first} on differ"));
        }
    }
    Ok(())
}

#[test]
fn blocks_match_oracle() {
    for exec in executors(2) {
        let run = exec.start();
        for kind in BLOCKS {
            for tokens in [1, 2, 5, 16] {
                for (rows, cols) in [(33, 288), (1, 32), (20, 576), (17, 256), (18, 2304)] {
                    if cols % kind.block() != 0 {
                        continue;
                    }
                    let y_f32 = cols != 576 && cols != 256;
                    let (bias, accumulate) = (rows > 16, y_f32 && rows % 2 == 0);
                    let case = Case { kind, tokens, rows, cols, y_f32, bias, accumulate };
                    close_to_oracle(&run, case).unwrap();
                }
            }
        }
    }
}

/// With weights in blocks a token's bits do not depend on its batch.
#[test]
fn a_batch_changes_no_bits() {
    for exec in executors(0) {
        for kind in BLOCKS {
            let case = Case { kind, cols: 1536, accumulate: false, ..CASE };
            same_for_every_batch(&exec.start(), case).unwrap();
        }
    }
}
