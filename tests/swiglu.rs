//! swiglu: hand-worked values, every path against the oracle.

use crate::cases::{Noise, assert_close, close, somewhere, widen};
use crate::exec::{Run, assert_caught, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_swiglu_params as Params};
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

#[test]
fn c_checks_need_no_gpu() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        tokens: 2,
        gate: somewhere(),
        up: 65536 as _,
        out: somewhere::<u8>().wrapping_add(32768).cast(),
        in_stride: 32,
        width: 16,
        reserved: 0,
    };
    op!(kvw_swiglu).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size += 8, ffi::KVW_ERR_STRUCT),
            ("gate", |p| p.gate = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("up", |p| p.up = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("up unaligned", |p| p.up = 2 as _, ffi::KVW_ERR_ALIGN),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("width", |p| p.width = 20, ffi::KVW_ERR_SHAPE),
            ("in_stride below width", |p| p.in_stride = 8, ffi::KVW_ERR_SHAPE),
            ("in_stride odd", |p| p.in_stride = 33, ffi::KVW_ERR_SHAPE),
            ("in_stride in place", |p| p.out = p.gate.cast_mut(), ffi::KVW_ERR_SHAPE),
            ("reserved", |p| p.reserved = -1, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_swiglu).bytes(&valid), 2 * 16 * 6);
    assert_eq!(op!(kvw_swiglu).workspace(&valid), 0);
}

fn case(
    run: &Run,
    tokens: usize,
    width: usize,
    stride: usize,
    in_place: bool,
) -> Result<(), String> {
    let mut noise = Noise(width as u64);
    let (mut gate, up) = (noise.halves(tokens * stride), noise.halves(tokens * stride));
    for (g, x) in gate.iter_mut().zip([-65504., -200., -88., -81., -79., 200., 65504., f32::NAN]) {
        *g = f16::from_f32(x);
    }
    let at = |i: usize| i / width * stride + i % width;
    let want: Vec<f64> = (0..tokens * width)
        .map(|i| oracle(gate[at(i)].to_f64(), up[at(i)].to_f64()).clamp(-65504.0, 65504.0))
        .collect();
    let (dg, du) = (run.upload("gate", &gate), run.upload("up", &up));
    let out = run.alloc::<f16>("out", tokens * width);
    let to = if in_place { &dg } else { &out };
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        tokens: tokens as i32,
        gate: dg.ptr().cast(),
        up: du.ptr().cast(),
        out: to.ptr().cast(),
        in_stride: stride as i64,
        width: width as i32,
        reserved: 0,
    };
    run.call(&op!(kvw_swiglu), &params)?;
    close("swiglu", &widen(&to.download()), &want, 1e-7, 5.2e-4)
}

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        let run = exec.start();
        case(&run, 1, 8, 8, false).unwrap();
        case(&run, 3, 1536, 3072, false).unwrap();
        case(&run, 5, 1000, 1000, true).unwrap();
    }
}

#[test]
fn faults_are_caught() {
    let body = |run: &Run| case(run, 2, 64, 64, false);
    assert_caught(341, "the last two of eight channels are multiplied by the gate again", body);
}
