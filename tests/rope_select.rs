//! rope_select: hand-worked turns, frequencies of stretched models, every path against the oracle.

use crate::cases::{Noise, assert_close, close, f64s, somewhere, widen};
use crate::exec::{Run, assert_caught, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_rope_select_params as Params};
use kvwarp::rope_select::{Angles, Pairing, Scaling, cpu, inv_freq, oracle};

const PAIRINGS: [Pairing; 2] = [Pairing::Interleaved, Pairing::Half];

#[test]
fn oracle_hand_worked() {
    let quarter = [std::f32::consts::FRAC_PI_2, 0.0];
    let mut x = [1.0, 2.0, 3.0, 4.0];
    oracle(&mut x, 1, 4, &[1], &quarter, Pairing::Interleaved).unwrap();
    let near = |x: [f64; 4], want: [f64; 4]| x.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(near(x, [-2.0, 1.0, 3.0, 4.0]), "pair (0, 1) a quarter turn: {x:?}");
    let mut x = [1.0, 2.0, 3.0, 4.0];
    oracle(&mut x, 1, 4, &[1], &quarter, Pairing::Half).unwrap();
    assert!(near(x, [-3.0, 2.0, 1.0, 4.0]), "pair (0, 2) a quarter turn: {x:?}");
}

#[test]
fn frequencies_hand_worked() {
    assert_eq!(inv_freq(10000.0, 4, Scaling::None), [1.0, 0.01]);
    assert_eq!(inv_freq(10000.0, 4, Scaling::Linear { factor: 4.0 }), [0.25, 0.0025]);
    // Waves in 8192 positions: 8192 / tau = 1304 (short, kept), 13.04 (kept), 0.1304 (long, divided).
    let llama3 = |theta| {
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        inv_freq(theta, 6, scaling)
    };
    assert_eq!(llama3(1e6), [1.0, 0.01, 1e-4 / 8.0]);
    // tau / 4096 radians a position are 2 waves: a third of the way from low to high.
    let theta = (4096.0 / std::f64::consts::TAU).powi(3);
    let freq = std::f64::consts::TAU / 4096.0;
    let blended = freq / 3.0 + freq / 8.0 * 2.0 / 3.0;
    assert!((f64::from(llama3(theta)[1]) - blended).abs() < 1e-9);
}

#[test]
fn cpu_matches_oracle() {
    let mut noise = Noise(3);
    for d in [64, 80, 96, 128, 256] {
        let freq = inv_freq(500000.0, d, Scaling::None);
        let positions = [0, 1, 63, 4095, 131072];
        let x = noise.values(positions.len() * 3 * d);
        for pairing in PAIRINGS {
            let mut want: Vec<f64> = x.iter().map(|&x| x.into()).collect();
            oracle(&mut want, 3, d, &positions, &freq, pairing).unwrap();
            let mut got = x.clone();
            cpu(&mut got, 3, d, &positions, &freq, pairing).unwrap();
            assert_close("rope_select", &got, &want, 1e-5, 1e-6);
        }
    }
}

#[test]
fn sizes_that_disagree_are_refused() {
    let freq = inv_freq(10000.0, 64, Scaling::None);
    let mut x = vec![0.0; 128];
    assert!(cpu(&mut x, 1, 64, &[0, 1, 2], &freq, Pairing::Half).is_err());
    assert!(cpu(&mut x, 1, 128, &[0], &freq, Pairing::Half).is_err());
    let angles = Angles::new(&[0, 1], &freq);
    assert!(angles.rotate(1, &mut x, Pairing::Half).is_ok());
    let refused = angles.rotate(2, &mut x, Pairing::Half).unwrap_err().to_string();
    assert_eq!(refused, "rope_select: `positions` holds 2 elements, needs 3");
    assert!(angles.rotate(0, &mut x[..65], Pairing::Half).is_err());
}

#[test]
fn c_checks_need_no_gpu() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        pairing: ffi::KVW_ROPE_HALF,
        x: somewhere(),
        out: somewhere(),
        positions: somewhere(),
        inv_freq: somewhere(),
        x_stride: 192,
        out_stride: 192,
        tokens: 5,
        heads: 3,
        head_dim: 64,
        hadamard: 0,
    };
    op!(kvw_rope_select).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 1, ffi::KVW_ERR_STRUCT),
            ("pairing", |p| p.pairing = 2, ffi::KVW_ERR_SHAPE),
            ("x", |p| p.x = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("positions", |p| p.positions = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("inv_freq", |p| p.inv_freq = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("positions unaligned", |p| p.positions = 4 as _, ffi::KVW_ERR_ALIGN),
            ("x_stride", |p| p.x_stride = 191, ffi::KVW_ERR_SHAPE),
            ("out_stride", |p| p.out_stride = 0, ffi::KVW_ERR_SHAPE),
            ("in place, strides differ", |p| p.out_stride = 200, ffi::KVW_ERR_SHAPE),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("heads", |p| p.heads = 0, ffi::KVW_ERR_SHAPE),
            ("head_dim odd", |p| p.head_dim = 63, ffi::KVW_ERR_SHAPE),
            ("head_dim beyond 256", |p| p.head_dim = 258, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_rope_select).bytes(&valid), 5 * (3 * 64 * 4 + 4) + 128);
    assert_eq!(op!(kvw_rope_select).workspace(&valid), 0);
}

/// `gap` elements between tokens; turned in place where it is 0.
fn case(run: &Run, pairing: Pairing, heads: usize, d: usize, gap: usize) -> Result<(), String> {
    let mut noise = Noise(d as u64);
    let positions = [0, 1, 77, 4095, 131072, i32::MAX];
    let (row, stride) = (heads * d, heads * d + gap);
    let x = noise.halves(positions.len() * stride);
    let freq = inv_freq(500000.0, d, Scaling::None);
    let rows =
        |x: Vec<f32>| -> Vec<f32> { x.chunks(stride).flat_map(|r| r[..row].to_vec()).collect() };
    let mut want = f64s(&rows(widen(&x)));
    oracle(&mut want, heads, d, &positions, &freq, pairing).unwrap();
    let dx = run.upload("x", &x);
    let (dp, df) = (run.upload("positions", &positions), run.upload("inv_freq", &freq));
    let out = if gap == 0 { None } else { Some(run.alloc::<f16>("out", x.len())) };
    let to = out.as_ref().unwrap_or(&dx);
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        pairing: pairing as i32,
        x: dx.ptr().cast(),
        out: to.ptr().cast(),
        positions: dp.ptr(),
        inv_freq: df.ptr(),
        x_stride: stride as i64,
        out_stride: stride as i64,
        tokens: positions.len() as i32,
        heads: heads as i32,
        head_dim: d as i32,
        hadamard: 0,
    };
    run.call(&op!(kvw_rope_select), &params)?;
    // Rounding to f16: 2^-11 of the value; the products' own rounding where they cancel.
    close("rope_select", &rows(widen(&to.download())), &want, 1e-5, 5e-4)
}

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        let run = exec.start();
        for pairing in PAIRINGS {
            for (heads, d, gap) in [(9, 64, 0), (2, 128, 8), (1, 256, 16), (3, 80, 1), (2, 6, 3)] {
                case(&run, pairing, heads, d, gap).unwrap();
            }
        }
    }
}

#[test]
fn faults_are_caught() {
    let body = |run: &Run| case(run, Pairing::Half, 9, 64, 0);
    assert_caught(301, "no barrier between writing the sines and using them", body);
}
