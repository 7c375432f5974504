//! The CUDA kernel's side: params, operands, and one product on an executor.

use crate::cases::Noise;
use crate::exec::{Run, op};
use half::{bf16, f16};
use kvwarp::ffi::{self, kvw_linear_params as Params};
use kvwarp::linear::{WeightType, Weights, oracle};

/// One product to run: `accumulate` needs an f32 `y`.
#[derive(Clone, Copy)]
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
    let dtype = if case.kind == WeightType::F16 { ffi::KVW_F16 } else { ffi::KVW_BF16 };
    Params {
        struct_size: size_of::<Params>() as u32,
        dtype,
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
    let weight: Vec<u16> = (0..case.rows * case.cols)
        .map(|_| match case.kind {
            WeightType::F16 => f16::from_f32(noise.value()).to_bits(),
            _ => bf16::from_f32(noise.value()).to_bits(),
        })
        .collect();
    let x: Vec<u16> = noise.halves(case.tokens * case.cols).iter().map(|x| x.to_bits()).collect();
    let (bias, before) = (noise.values(case.rows), noise.values(case.tokens * case.rows));

    let weights = Weights::new(case.kind, case.rows, case.cols, bytemuck::cast_slice(&weight));
    let weights = weights.map_err(|e| e.to_string())?;
    let wide: Vec<f64> = x.iter().map(|&x| f16::from_bits(x).to_f64()).collect();
    let want = oracle::matmul(&weights, &wide, case.tokens);

    let (dw, dx) = (run.upload("weight", &weight), run.upload("x", &x));
    let (db, y32) = (run.upload("bias", &bias), run.upload("y", &before));
    let y16 = run.alloc::<f16>("y", want.len());
    let mut p = params(case);
    (p.weight, p.x) = (dw.ptr().cast(), dx.ptr().cast());
    p.bias = if case.bias { db.ptr() } else { std::ptr::null() };
    p.y = if case.y_f32 { y32.ptr().cast() } else { y16.ptr().cast() };
    run.call(&op!(kvw_linear), &p)?;
    let got = if case.y_f32 { y32.download() } else { crate::cases::widen(&y16.download()) };

    // A sum of products of values around 1 with outliers of 20: its size bounds the error of each addition.
    let size = 4.0 * case.cols as f64;
    for (i, &got) in got.iter().enumerate() {
        let bias = if case.bias { f64::from(bias[i % case.rows]) } else { 0.0 };
        let before = if case.accumulate { f64::from(before[i]) } else { 0.0 };
        let want = want[i] + bias + before;
        let rounding = if case.y_f32 { 0.0 } else { 4.9e-4 * want.abs() };
        let off = (f64::from(got) - want).abs();
        if off > 1e-6 * size + rounding || off.is_nan() {
            let (t, r) = (i / case.rows, i % case.rows);
            return Err(format!("token {t} row {r}: {got}, want {want}, off by {off:.2e}"));
        }
    }
    Ok(())
}
