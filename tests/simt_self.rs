//! The executor's own tests: primitives against their definition, and bugs that the checker must find.
//! Kernels in csrc/simt/selftest.cu and selftest_bugs.cu, which read words from `in` and write words to `out`.
use crate::simt::{Simt, random_words};
use half::{bf16, f16};

mod async_proxy;
mod bugs;
mod device;
mod halves;
mod warpgroup;

type Op = unsafe extern "C" fn(*const u32, *mut u32) -> i32;
const SEEDS: std::ops::Range<u64> = 0..7;

fn launch(lib: &'static Simt, name: &str, input: &[u32], out: &[u32]) -> Result<Vec<u32>, String> {
    let x = lib.buf("in", input);
    let y = lib.buf("out", out);
    let op: Op = lib.get(format!("simt_selftest_{name}").as_bytes());
    // SAFETY: the kernels stay within both buffers, or the checked build says so before they leave them.
    lib.check(unsafe { op(x.ptr(), y.ptr()) })?;
    Ok(y.to_vec())
}

/// The output in both builds under every seed, which must be one and the same.
fn agreed(name: &str, input: &[u32], out: &[u32]) -> Vec<u32> {
    let runs = [Simt::plain(), Simt::checked()].into_iter().flat_map(|lib| {
        SEEDS.map(move |seed| {
            let _session = lib.seeded(seed);
            launch(lib, name, input, out).unwrap_or_else(|e| panic!("{name}, seed {seed}: {e}"))
        })
    });
    runs.reduce(|a, b| if a == b { a } else { panic!("{name}: schedules disagree") }).unwrap()
}

#[test]
fn warp_operations_match_their_definition() {
    const WORDS: usize = 32;
    let mut x = random_words(1, 64 * WORDS);
    x[5 * WORDS] = 0xffff_ff07; // __any_sync in the first warp
    let y = agreed("warp", &x, &[0; 64 * WORDS]);
    let all: Vec<u32> = (0..64).map(|t| x[t * WORDS]).collect();
    for t in 0..64 {
        let (warp, lane) = (&all[t / 32 * 32..][..32], t % 32);
        let [x0, x1, x2] = [0, 1, 2].map(|i| x[t * WORDS + i]);
        let lanes = |f: &dyn Fn(usize) -> bool| (0..32).fold(0u32, |m, i| m | u32::from(f(i)) << i);
        let down = if lane % 16 + 5 < 16 { lane + 5 } else { lane };
        let masked =
            if lane < 12 { warp[lane ^ 1] } else { lanes(&|i| i >= 12 && warp[i] & 2 != 0) };
        let bytes = (u64::from(x1) << 32 | u64::from(x0)).to_le_bytes();
        let sign = |i: usize| if bytes[i] & 128 == 0 { 0 } else { 255 };
        let dot = x0.to_le_bytes().into_iter().zip(x1.to_le_bytes());
        let expected = [
            warp[x1 as usize % 32],
            warp[if lane < 3 { lane } else { lane - 3 }],
            warp[down],
            warp[lane ^ 9],
            lanes(&|i| warp[i] & 1 != 0),
            u32::from(warp.iter().any(|v| v & 0xff == 7)),
            1,
            lanes(&|i| (warp[i] ^ x0) & 3 == 0),
            warp.iter().copied().fold(0, u32::wrapping_add),
            *warp.iter().max().unwrap(),
            *warp.iter().min().unwrap(),
            warp.iter().fold(0, |a, b| a ^ b),
            warp.iter().map(|&v| v as i32).min().unwrap() as u32,
            masked,
            all.iter().filter(|&&v| v & 1 != 0).count() as u32,
            x0 ^ x1 ^ x2,
            (x0 & x1) | (x0 & x2) | (x1 & x2),
            u32::from_le_bytes([bytes[1], bytes[5], sign(5), sign(1)]),
            ((u64::from(x1) << 32 | u64::from(x0)) >> (x2 % 32)) as u32,
            x0.count_ones()
                .wrapping_add(64 * x1.leading_zeros())
                .wrapping_add(4096 * if x2 == 0 { 0 } else { x2.trailing_zeros() + 1 }),
            x0.reverse_bits(),
            dot.fold(x2, |s, (a, b)| {
                s.wrapping_add((i32::from(a as i8) * i32::from(b as i8)) as u32)
            }),
            ((u64::from(x0) * u64::from(x1)) >> 32) as u32,
        ];
        assert_eq!(y[t * WORDS..][..expected.len()], expected, "thread {t}");
    }
}

#[test]
fn matrix_registers_hold_the_documented_elements() {
    let y = agreed("maps", &[0], &[0; 32 * 9]);
    for lane in 0..32u32 {
        let (g, t) = (lane / 4, lane % 4 * 2);
        let pair = |low: u32, high: u32| low | high << 16;
        let row = |m: u32| m * 64 + g * 8 + t;
        let column = |m: u32| m * 64 + t * 8 + g;
        let plain = [0, 1, 2, 3].map(|m| pair(row(m), row(m) + 1));
        let trans = [0, 1, 2, 3].map(|m| pair(column(m), column(m) + 8));
        let out = &y[lane as usize * 9..][..9];
        assert_eq!(out, [&plain[..], &trans[..], &trans[..1]].concat(), "lane {lane}");
    }
}

/// C = A B in f64, rounded once; the products and partial sums of these inputs are exact in f64.
fn matmul(a: &[f64], b: &[f64]) -> Vec<f32> {
    let dot =
        |m: usize, n: usize| (0..16).map(|k| a[m * 16 + k] * b[k * 8 + n]).sum::<f64>() as f32;
    (0..128).map(|i| dot(i / 8, i % 8)).collect()
}

fn check_matmul(name: &str, bits: &[u32], value: fn(u16) -> f64) {
    let x: Vec<f64> = bits.iter().map(|&b| value(b as u16)).collect();
    let expected = matmul(&x[..256], &x[256..]);
    let got: Vec<f32> = agreed(name, bits, &[0; 128]).into_iter().map(f32::from_bits).collect();
    assert_eq!(got, expected, "{name}");
    for mode in [1, 2] {
        let session = Simt::plain().seeded(0);
        session.mma(mode);
        let got = launch(Simt::plain(), name, bits, &[0; 128]).unwrap();
        for (i, (g, e)) in got.into_iter().map(f32::from_bits).zip(&expected).enumerate() {
            let scale: f64 =
                (0..16).map(|k| (x[i / 8 * 16 + k] * x[256 + k * 8 + i % 8]).abs()).sum();
            assert!(f64::from((g - e).abs()) <= scale * 2e-6, "{name} mode {mode}: {g} not {e}");
        }
    }
}

/// Random bits with an exponent near 1: `mask` keeps sign and mantissa, `one` is 1.0.
fn near_one(seed: u64, n: usize, mask: u32, one: u32) -> Vec<u32> {
    random_words(seed, n).into_iter().map(|w| w & mask | one).collect()
}

#[test]
fn mma_is_a_matmul_on_every_f16_subnormal() {
    let f16_value = |b: u16| f16::from_bits(b).to_f64();
    for quarter in 0..4u32 {
        let subnormal = (0..256).map(|i| quarter * 256 + i);
        let bits: Vec<u32> = subnormal.chain(near_one(7, 128, 0x83ff, 0x3c00)).collect();
        check_matmul("matmul_f16", &bits, f16_value);
        let bits: Vec<u32> = near_one(8, 256, 0x83ff, 0x3c00)
            .into_iter()
            .chain((0..128).map(|i| quarter * 256 + i * 2 + 1))
            .collect();
        check_matmul("matmul_f16", &bits, f16_value);
    }
    check_matmul("matmul_f16", &near_one(9, 384, 0x8fff, 0x3000), f16_value);
    check_matmul("matmul_bf16", &near_one(10, 384, 0x80ff, 0x3f00), |b| {
        bf16::from_bits(b).to_f64()
    });
}

#[test]
fn async_copies_land_when_waited_for() {
    let x = random_words(2, 256);
    let y = agreed("async", &x, &[0; 256]);
    for t in 0..32 {
        let (first, second) = (&x[t * 8..][..4], &x[t * 8 + 4..][..4]);
        let second = if t % 2 == 0 { second } else { &[0; 4] };
        assert_eq!(y[t * 8..][..8], [first, second].concat(), "thread {t}");
    }
    let session = Simt::plain().seeded(0);
    session.fault(1);
    let y = launch(Simt::plain(), "async", &x, &[0; 256]).unwrap();
    assert!((0..32).all(|t| y[t * 8..][..4] == [u32::MAX; 4]), "bytes in flight must be poison");
}

#[test]
fn atomics_are_indivisible_under_every_schedule() {
    let x: Vec<u32> = random_words(3, 256).into_iter().map(|w| w >> 9).collect();
    let sum = x.iter().copied().fold(0, u32::wrapping_add);
    let y = agreed("atomics", &x, &[0; 5]);
    let bits = x.iter().fold(0, |a, b| a ^ b);
    assert_eq!(y, [sum, *x.iter().max().unwrap(), bits, sum, 128f32.to_bits()]);
}

#[test]
fn barriers_order_those_who_meet() {
    let x = random_words(4, 7 * 32);
    let reversed: Vec<u32> = x[..32].iter().rev().copied().collect();
    assert_eq!(agreed("named_barrier", &x[..32], &[0; 32]), reversed);
    let y = agreed("neighbours", &x, &[0; 14 * 32]);
    assert_eq!(y[..7 * 32], [&x[32..], &x[..32]].concat());
}

#[test]
fn counters_tell_what_a_launch_did() {
    let lib = Simt::checked();
    let _session = lib.seeded(0);
    launch(lib, "matmul_f16", &near_one(5, 384, 0x83ff, 0x3c00), &[0; 128]).unwrap();
    let r = lib.report();
    assert_eq!((r.mma, r.collectives, r.cp_async), (1, 4 * 32, 0));
    assert!(r.accesses > 384 * 2 && r.switches > 0, "{r:?}");
    assert_eq!(r.ldmatrix_conflicts, 0, "{r:?}");
    launch(lib, "async", &[0; 256], &[0; 256]).unwrap();
    assert_eq!(lib.report().cp_async, 64);
}
