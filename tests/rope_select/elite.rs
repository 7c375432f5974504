//! Heads that turn listed pairs alone.

use super::Params;
use crate::cases::{Noise, close, f64s, somewhere, widen};
use crate::exec::{Run, assert_caught, executors, op};
use half::f16;
use kvwarp::ffi;
use kvwarp::rope_select::{Elite, Scaling, inv_freq};

#[test]
fn elite_hand_worked() {
    // Two lists of one pair for two heads each: the first two turn a quarter, the others half.
    let freq = [std::f32::consts::FRAC_PI_2, std::f32::consts::PI];
    let elite = Elite::new(&[0, 1], 1, 2).unwrap();
    let mut x = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0, 1.0, 2.0, 9.0, 3.0, 4.0, 9.0];
    elite.oracle(&mut x, 3, 1, &freq).unwrap();
    let want = [-2.0, 1.0, 9.0, -4.0, 3.0, 9.0, -1.0, -2.0, 9.0, -3.0, -4.0, 9.0];
    assert!(x.iter().zip(want).all(|(a, b): (&f64, f64)| (a - b).abs() < 1e-6), "{x:?}");
    let refused = Elite::new(&[0, 2], 1, 2).unwrap_err().to_string();
    assert!(refused.contains("`pairs` is 2"), "{refused}");
    assert!(Elite::new(&[0, -1], 1, 2).is_err());
    assert!(Elite::new(&[0, 1, 1], 2, 2).is_err());
    assert!(elite.oracle(&mut x[..11], 3, 1, &freq).is_err());
}

#[test]
fn lists_are_checked() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        pairing: ffi::KVW_ROPE_HALF,
        x: somewhere(),
        out: somewhere(),
        rest: somewhere(),
        pairs: somewhere(),
        positions: somewhere(),
        inv_freq: somewhere(),
        x_stride: 8 * 64 + 4 * 8,
        out_stride: 8 * 64 + 4 * 8,
        rest_stride: 32,
        tokens: 5,
        heads: 12,
        rest_heads: 4,
        head_dim: 64,
        elite: 4,
        lists: 4,
        ..Default::default()
    };
    op!(kvw_rope_select).refuses(
        valid,
        &[
            ("pairs unaligned", |p| p.pairs = 8 as _, ffi::KVW_ERR_ALIGN),
            ("elite without pairs", |p| p.pairs = std::ptr::null(), ffi::KVW_ERR_SHAPE),
            ("elite", |p| p.elite = 0, ffi::KVW_ERR_SHAPE),
            ("elite, too many", |p| p.elite = 33, ffi::KVW_ERR_SHAPE),
            ("lists", |p| p.lists = 0, ffi::KVW_ERR_SHAPE),
            ("lists, not of heads", |p| p.lists = 3, ffi::KVW_ERR_SHAPE),
            ("rest_heads", |p| (p.heads, p.rest_heads) = (11, 3), ffi::KVW_ERR_SHAPE),
            ("pairing", |p| p.pairing = ffi::KVW_ROPE_INTERLEAVED, ffi::KVW_ERR_SHAPE),
            ("hadamard", |p| p.hadamard = 1, ffi::KVW_ERR_SHAPE),
            ("x_stride", |p| p.x_stride -= 1, ffi::KVW_ERR_SHAPE),
            ("rest_stride", |p| p.rest_stride = 31, ffi::KVW_ERR_SHAPE),
        ],
    );
    // In place only what turns is moved, 12 heads of 8 elements; elsewhere whole queries.
    let fixed = 128 + 16;
    assert_eq!(op!(kvw_rope_select).bytes(&valid), 5 * (12 * 8 * 4 + 4) + fixed);
    let apart = Params { out: 8192 as _, out_stride: 512, ..valid };
    assert_eq!(op!(kvw_rope_select).bytes(&apart), 5 * ((8 * 64 + 4 * 8) * 4 + 4) + fixed);
}

/// Query heads a list, lists, D, r; whether queries become dense.
type Case = (usize, usize, usize, usize, bool);

fn matches(run: &Run, (group, lists, d, r, dense): Case) -> Result<(), String> {
    let (heads, own) = (group * lists, group * lists * d);
    let (positions, row) = ([0, 1, 77, 131072], own + lists * 2 * r + 8);
    let (mut noise, freq) = (Noise(d as u64), inv_freq(500000.0, d, Scaling::None));
    let x = noise.halves(positions.len() * row);
    let pairs: Vec<i8> = (0..lists * r).map(|i| ((i * 7 + i / r) % (d / 2)) as i8).collect();
    let (dx, dp) = (run.upload("x", &x), run.upload("positions", &positions));
    let (df, dl) = (run.upload("inv_freq", &freq), run.upload("pairs", &pairs));
    let out = dense.then(|| run.alloc::<f16>("out", positions.len() * own));
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        pairing: ffi::KVW_ROPE_HALF,
        x: dx.ptr().cast(),
        out: out.as_ref().unwrap_or(&dx).ptr().cast(),
        rest: dx.ptr().wrapping_add(own).cast(),
        pairs: dl.ptr(),
        positions: dp.ptr(),
        inv_freq: df.ptr(),
        x_stride: row as i64,
        out_stride: if dense { own } else { row } as i64,
        rest_stride: row as i64,
        tokens: positions.len() as i32,
        heads: (heads + lists) as i32,
        rest_heads: lists as i32,
        head_dim: d as i32,
        elite: r as i32,
        lists: lists as i32,
        ..Default::default()
    };
    run.call(&op!(kvw_rope_select), &params)?;
    let after = dx.download();
    let elite = Elite::new(&pairs, r, freq.len()).unwrap();
    for (t, &position) in positions.iter().enumerate() {
        let before = widen(&x[t * row..][..row]);
        let mut want = f64s(&before);
        elite.oracle(&mut want[..own], d, position, &freq).unwrap();
        elite.oracle(&mut want[own..][..lists * 2 * r], 2 * r, position, &freq).unwrap();
        let mut got = widen(&after[t * row..][..row]);
        if let Some(out) = &out {
            if got[..own] != before[..own] {
                return Err(format!("token {t}: queries were written where they lie"));
            }
            got[..own].copy_from_slice(&widen(&out.download()[t * own..][..own]));
        }
        close("elite", &got, &want, 1e-5, 5e-4)?;
    }
    Ok(())
}

const CASE: Case = (3, 3, 64, 4, true);

#[test]
fn listed_pairs_turn_alone() {
    for exec in executors(2) {
        let run = exec.start();
        for dense in [false, true] {
            for case in [(3, 3, 64, 4, dense), (1, 4, 128, 12, dense), (4, 2, 96, 48, dense)] {
                matches(&run, case).unwrap_or_else(|e| panic!("{exec:?} {case:?}: {e}"));
            }
        }
    }
}

#[test]
fn faults_of_lists_are_caught() {
    assert_caught(305, "no barrier between writing the sines and using them", |run| {
        matches(run, CASE)
    });
    assert_caught(306, "pairs turn in the order of the head", |run| matches(run, CASE));
    assert_caught(307, "what does not turn is not copied", |run| matches(run, CASE));
}
