//! head_linear: every executor and the CPU path against the f64 oracle.

use crate::cases::{Noise, assert_close, close, somewhere, widen};
use crate::exec::{Run, assert_caught, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_head_linear_params as Params};
use kvwarp::head_linear::{Weights, cpu, oracle};
use kvwarp::threads::Team;

#[test]
fn oracle_hand_worked() {
    // Two kv heads of two query heads: W_0 = (1 2), W_1 = (3 4).
    let w = [1.0, 2.0, 3.0, 4.0].map(f16::from_f32);
    let weights = Weights::new(&w, 2, 1, 2).unwrap();
    let mut y = [0.0; 4];
    oracle(&weights, &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, -1.0], &mut y).unwrap();
    assert_eq!(y, [1.0, 2.0, 7.0, 2.0]);
}

#[test]
fn c_checks_need_no_gpu() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        tokens: 3,
        weight: somewhere::<u8>().cast(),
        x: somewhere::<u8>().cast(),
        y: somewhere(),
        bias: somewhere::<f32>(),
        x_stride: 1024,
        x_head_stride: 128,
        kv_heads: 4,
        q_heads: 8,
        rows: 448,
        cols: 120,
        reserved: 0,
    };
    op!(kvw_head_linear).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 1, ffi::KVW_ERR_STRUCT),
            ("weight", |p| p.weight = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("x unaligned", |p| p.x = 8 as _, ffi::KVW_ERR_ALIGN),
            ("y", |p| p.y = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("bias unaligned", |p| p.bias = 8 as _, ffi::KVW_ERR_ALIGN),
            ("kv_heads", |p| p.kv_heads = 0, ffi::KVW_ERR_SHAPE),
            ("q_heads", |p| p.q_heads = 6, ffi::KVW_ERR_SHAPE),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("tokens, too many", |p| p.tokens = 600_000, ffi::KVW_ERR_SHAPE),
            ("rows", |p| p.rows = 0, ffi::KVW_ERR_SHAPE),
            ("cols", |p| p.cols = 116, ffi::KVW_ERR_SHAPE),
            ("x_head_stride", |p| p.x_head_stride = 112, ffi::KVW_ERR_SHAPE),
            ("x_head_stride, odd", |p| p.x_head_stride = 124, ffi::KVW_ERR_SHAPE),
            ("x_stride", |p| p.x_stride = 1008, ffi::KVW_ERR_SHAPE),
            ("reserved", |p| p.reserved = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(
        op!(kvw_head_linear).bytes(&valid),
        2 * (4 * 448 * 120 + 3 * 8 * (448 + 120)) + 4 * 4 * 448
    );
    assert_eq!(op!(kvw_head_linear).workspace(&valid), 0);
}

/// `[kv heads, rows, cols]`, query heads a kv head, tokens; an odd number of which has a bias.
type Case = (usize, usize, usize, usize, usize);

/// x lies in wider rows, NaN between what is read.
fn matches(run: &Run, (kv_heads, rows, cols, group, tokens): Case) -> Result<(), String> {
    let mut noise = Noise((rows + cols) as u64);
    let heads = kv_heads * group;
    let (w, x) = (noise.halves(kv_heads * rows * cols), noise.halves(tokens * heads * cols));
    let (head_stride, stride) = (cols + 8, heads * (cols + 8) + 16);
    let mut spread = vec![f16::NAN; tokens * stride];
    for (i, x) in x.chunks_exact(cols).enumerate() {
        spread[i / heads * stride + i % heads * head_stride..][..cols].copy_from_slice(x);
    }
    let bias = noise.values(kv_heads * rows);
    let (dw, dx) = (run.upload("weight", &w), run.upload("x", &spread));
    let (db, biased) = (run.upload("bias", &bias), tokens % 2 == 1);
    let y = run.alloc::<f16>("y", tokens * heads * rows);
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        tokens: tokens as i32,
        weight: dw.ptr().cast(),
        x: dx.ptr().cast(),
        y: y.ptr().cast(),
        bias: if biased { db.ptr() } else { std::ptr::null() },
        x_stride: stride as i64,
        x_head_stride: head_stride as i32,
        kv_heads: kv_heads as i32,
        q_heads: heads as i32,
        rows: rows as i32,
        cols: cols as i32,
        reserved: 0,
    };
    run.call(&op!(kvw_head_linear), &params)?;
    let weights = Weights::new(&w, kv_heads, rows, cols).unwrap();
    let mut want = vec![0.0; tokens * heads * rows];
    for (x, want) in x.chunks(heads * cols).zip(want.chunks_mut(heads * rows)) {
        oracle(&weights, &widen(x), want).unwrap();
        let bias = |i: usize| bias[i / rows / group * rows + i % rows];
        let biases = (0..want.len()).filter(|_| biased).map(|i| f64::from(bias(i)));
        want.iter_mut().zip(biases).for_each(|(want, bias)| *want += bias);
    }
    // Rounding to f16, and f32 sums of terms that may cancel.
    close("head_linear", &widen(&y.download()), &want, 1e-2, 1e-3)
}

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        let run = exec.start();
        for case in [
            (3, 144, 40, 3, 1),
            (2, 48, 272, 1, 1),
            (2, 31, 264, 4, 3),
            (4, 128, 120, 2, 9),
            (1, 64, 1032, 5, 4),
            (2, 16, 8, 1, 16),
        ] {
            matches(&run, case).unwrap_or_else(|e| panic!("{exec:?} {case:?}: {e}"));
        }
    }
}

#[test]
fn cpu_matches_oracle() {
    let mut noise = Noise(4);
    for (kv_heads, rows, cols, group) in [(3, 144, 40, 3), (1, 5, 7, 1), (2, 33, 300, 4)] {
        let (w, x) = (noise.halves(kv_heads * rows * cols), noise.values(kv_heads * group * cols));
        let weights = Weights::new(&w, kv_heads, rows, cols).unwrap();
        let mut want = vec![0.0; kv_heads * group * rows];
        oracle(&weights, &x, &mut want).unwrap();
        for workers in 1..=3 {
            let mut got = vec![f32::NAN; want.len()];
            cpu(&Team::new(workers), &weights, &x, &mut got).unwrap();
            assert_close("head_linear", &got, &want, 1e-3, 1e-5);
        }
    }
    let w = [f16::ONE; 8];
    let weights = Weights::new(&w, 2, 2, 2).unwrap();
    let team = Team::new(1);
    assert!(Weights::new(&w, 2, 2, 3).is_err());
    assert!(cpu(&team, &weights, &[0.0; 4], &mut [0.0; 3]).is_err());
    assert!(cpu(&team, &weights, &[0.0; 6], &mut [0.0; 6]).is_err());
}

#[test]
fn faults_are_caught() {
    let narrow = |run: &Run| matches(run, (3, 144, 40, 3, 1));
    let wide = |run: &Run| matches(run, (2, 48, 1032, 2, 1));
    assert_caught(441, "query heads of a group go to one place", narrow);
    assert_caught(442, "columns past the last one count", narrow);
    assert_caught(443, "sums are added before all warps have theirs", wide);
    assert_caught(444, "the last warp's columns are lost", wide);
    assert_caught(445, "the bias of the first head is everybody's", narrow);
}
