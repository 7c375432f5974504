//! rms_norm: hand-worked rows, every path against the oracle.

use crate::cases::{Noise, assert_close, close, somewhere, widen};
use crate::exec::{Run, assert_caught, everyone, op};
use half::f16;
use kvwarp::ffi::{self, kvw_rms_norm_params as Params};
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

#[test]
fn c_checks_need_no_gpu() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        eps: 1e-5,
        x: somewhere(),
        weight: somewhere(),
        out: somewhere(),
        tokens: 2,
        width: 576,
    };
    op!(kvw_rms_norm).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 0, ffi::KVW_ERR_STRUCT),
            ("eps 0", |p| p.eps = 0.0, ffi::KVW_ERR_SHAPE),
            ("eps NaN", |p| p.eps = f32::NAN, ffi::KVW_ERR_SHAPE),
            ("x", |p| p.x = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("weight", |p| p.weight = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("x unaligned", |p| p.x = 8 as _, ffi::KVW_ERR_ALIGN),
            ("tokens", |p| p.tokens = -1, ffi::KVW_ERR_SHAPE),
            ("width", |p| p.width = 100, ffi::KVW_ERR_SHAPE),
            ("width beyond 32768", |p| p.width = 32776, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_rms_norm).bytes(&valid), 576 * (2 * 6 + 4));
    assert_eq!(op!(kvw_rms_norm).workspace(&valid), 0);
}

fn case(run: &Run, tokens: usize, width: usize) -> Result<(), String> {
    let mut noise = Noise(width as u64);
    let (x, weight) = (noise.values(tokens * width), noise.values(width));
    let mut want = vec![0.0; x.len()];
    // As large as x^2, so that leaving it out shows.
    let eps = 0.5;
    oracle(&x, &weight, eps, &mut want).unwrap();
    let (dx, dw) = (run.upload("x", &x), run.upload("weight", &weight));
    let out = run.alloc::<f16>("out", x.len());
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        eps,
        x: dx.ptr(),
        weight: dw.ptr(),
        out: out.ptr().cast(),
        tokens: tokens as i32,
        width: width as i32,
    };
    run.call(&op!(kvw_rms_norm), &params)?;
    // f16 rounds to 2^-11 of the value, to 2^-25 near zero.
    close("rms_norm", &widen(&out.download()), &want, 1e-7, 5e-4)
}

#[test]
fn executors_match_oracle() {
    for exec in everyone(3) {
        let run = exec.start();
        for (tokens, width) in [(1, 8), (3, 576), (2, 2056), (1, 8200), (2, 16392)] {
            case(&run, tokens, width).unwrap();
        }
    }
}

#[test]
fn faults_are_caught() {
    assert_caught(311, "no barrier between the warps' sums and their sum", |run| case(run, 2, 576));
    assert_caught(312, "eps is left out", |run| case(run, 1, 64));
}
