//! rope_select: hand-worked turns, frequencies of stretched models, every path against the oracle.

mod elite;
mod parted;

use crate::cases::{Noise, assert_close, close, f64s, somewhere, widen};
use crate::exec::{Mem, Run, assert_caught, everyone, op};
use half::f16;
use kvwarp::ffi::{self, kvw_rope_select_params as Params};
use kvwarp::hadamard;
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
        ..Default::default()
    };
    let both = Params { rest: somewhere(), rest_stride: 128, rest_heads: 2, ..valid };
    op!(kvw_rope_select).refuses(
        both,
        &[
            ("rest missing", |p| p.rest = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("rest unaligned", |p| p.rest = 8 as _, ffi::KVW_ERR_ALIGN),
            ("rest without heads", |p| p.rest_heads = 0, ffi::KVW_ERR_NULL),
            ("rest_heads", |p| p.rest_heads = 3, ffi::KVW_ERR_SHAPE),
            ("rest_heads, negative", |p| p.rest_heads = -1, ffi::KVW_ERR_SHAPE),
            ("rest_stride", |p| p.rest_stride = 127, ffi::KVW_ERR_SHAPE),
            ("out_stride", |p| p.out_stride = 63, ffi::KVW_ERR_SHAPE),
        ],
    );
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
            ("reserved", |p| p.reserved = 1, ffi::KVW_ERR_SHAPE),
            ("hadamard", |p| p.hadamard = 2, ffi::KVW_ERR_SHAPE),
            ("hadamard of 48", |p| (p.hadamard, p.head_dim) = (1, 48), ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_rope_select).bytes(&valid), 5 * (3 * 64 * 4 + 4) + 128);
    assert_eq!(op!(kvw_rope_select).workspace(&valid), 0);
}

/// Heads of some tokens; turned in place where `gap` is 0.
#[derive(Clone, Copy)]
struct Case {
    pairing: Pairing,
    heads: usize,
    d: usize,
    /// Elements between tokens.
    gap: usize,
    hadamard: bool,
}

impl Case {
    /// What the kernel makes of `x`, whole rows with their gaps, and the rows alone of both.
    fn turned(&self, run: &Run, x: &[f16], positions: &[i32]) -> Result<[Vec<f32>; 2], String> {
        let (row, stride) = (self.heads * self.d, self.heads * self.d + self.gap);
        let rows = |x: &[f16]| -> Vec<f32> {
            x.chunks(stride).flat_map(|row_and_gap| widen(&row_and_gap[..row])).collect()
        };
        let freq = inv_freq(500000.0, self.d, Scaling::None);
        let dx = run.upload("x", x);
        let (dp, df) = (run.upload("positions", positions), run.upload("inv_freq", &freq));
        let out = (self.gap > 0).then(|| run.alloc::<f16>("out", x.len()));
        let to = out.as_ref().unwrap_or(&dx);
        let params = self.params((&dx, to), (&dp, &df), positions.len());
        run.call(&op!(kvw_rope_select), &params)?;
        Ok([rows(x), rows(&to.download())])
    }

    /// Rows of `x` to the same places of `out`, `tokens` of them.
    fn params(
        &self,
        (x, out): (&Mem<f16>, &Mem<f16>),
        (positions, freq): (&Mem<i32>, &Mem<f32>),
        tokens: usize,
    ) -> Params {
        let stride = (self.heads * self.d + self.gap) as i64;
        Params {
            struct_size: size_of::<Params>() as u32,
            pairing: self.pairing as i32,
            x: x.ptr().cast(),
            out: out.ptr().cast(),
            positions: positions.ptr(),
            inv_freq: freq.ptr(),
            x_stride: stride,
            out_stride: stride,
            tokens: tokens as i32,
            heads: self.heads as i32,
            head_dim: self.d as i32,
            hadamard: self.hadamard.into(),
            ..Default::default()
        }
    }

    fn noise(&self, tokens: usize) -> Vec<f16> {
        Noise(self.d as u64).halves(tokens * (self.heads * self.d + self.gap))
    }
}

/// A head times the orthonormal Hadamard matrix of its size.
pub fn times_hadamard(head: &mut [f64]) {
    let (d, x) = (head.len(), head.to_vec());
    let order = if d == 96 { 32 } else { d };
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let entry = |i: usize, j: usize| {
        let mixed = match (d, i / order == j / order) {
            (96, true) => 1.0 / 3.0,
            (96, false) => -2.0 / 3.0,
            _ => 1.0,
        };
        mixed * sign(i % order, j % order) / (order as f64).sqrt()
    };
    for (i, y) in head.iter_mut().enumerate() {
        *y = (0..d).map(|j| entry(i, j) * x[j]).sum();
    }
}

fn matches(run: &Run, case: Case) -> Result<(), String> {
    let positions = [0, 1, 77, 4095, 131072, i32::MAX];
    let [x, got] = case.turned(run, &case.noise(positions.len()), &positions)?;
    let mut want = f64s(&x);
    let freq = inv_freq(500000.0, case.d, Scaling::None);
    oracle(&mut want, case.heads, case.d, &positions, &freq, case.pairing).unwrap();
    if case.hadamard {
        want.chunks_exact_mut(case.d).for_each(times_hadamard);
    }
    // Rounding to f16: 2^-11 of the value; the products' own rounding where they cancel.
    close("rope_select", &got, &want, 1e-5, 5e-4)
}

/// At position 0 heads do not turn: what is left of the kernel is [`hadamard::keys`], bit for bit.
fn adds_in_order(run: &Run, case: Case) -> Result<(), String> {
    let mut x = case.noise(3);
    x[..case.d].fill(f16::MAX);
    x[case.d] = f16::NAN;
    let [mut want, got] = case.turned(run, &x, &[0; 3])?;
    hadamard::keys(&mut want, case.d);
    let stored = |x: &f32| f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f64();
    close("hadamard", &got, &want.iter().map(stored).collect::<Vec<_>>(), 0.0, 0.0)
}

const CASE: Case = Case { pairing: Pairing::Half, heads: 9, d: 64, gap: 0, hadamard: false };

#[test]
fn executors_match_oracle() {
    for exec in everyone(2) {
        let run = exec.start();
        for pairing in PAIRINGS {
            for (heads, d, gap) in [(9, 64, 0), (2, 128, 8), (1, 256, 16), (3, 80, 1), (2, 6, 3)] {
                matches(&run, Case { pairing, heads, d, gap, ..CASE }).unwrap();
            }
        }
    }
}

#[test]
fn heads_are_turned_and_multiplied() {
    for exec in everyone(2) {
        let run = exec.start();
        for pairing in PAIRINGS {
            for (heads, d, gap) in [(9, 64, 0), (10, 96, 0), (3, 96, 5), (2, 128, 0), (1, 256, 16)]
            {
                let case = Case { pairing, heads, d, gap, hadamard: true };
                matches(&run, case).unwrap_or_else(|e| panic!("{exec:?} {pairing:?} {d}: {e}"));
                adds_in_order(&run, case).unwrap_or_else(|e| panic!("{exec:?} {d}: {e}"));
            }
        }
    }
}

#[test]
fn faults_are_caught() {
    assert_caught(301, "no barrier between writing the sines and using them", |run| {
        matches(run, CASE)
    });
    assert_caught(304, "the rest keeps its places among all heads", |run| {
        CASE.parted(run, &CASE.noise(2), &[5, 6], 3)
    });
    let hadamard = |d| move |run: &Run| matches(run, Case { d, hadamard: true, ..CASE });
    assert_caught(302, "the same, where heads are multiplied", hadamard(96));
    assert_caught(303, "three blocks are mixed by 1 - J", hadamard(96));
}
