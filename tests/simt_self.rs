//! The executor's own tests, through csrc/simt/selftest.cu.
use crate::simt::{Buf, Simt};

type Io = unsafe extern "C" fn(*const u32, *mut u32) -> i32;

const THREADS: usize = 64;
const WORDS: usize = 64;

/// splitmix64.
fn random_words(seed: u64, n: usize) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) as u32
    };
    (0..n).map(|_| next()).collect()
}

fn run(
    lib: &'static Simt,
    name: &str,
    input: &[u32],
    out_words: usize,
) -> Result<Vec<u32>, String> {
    let x = lib.buf("in", input);
    let y: Buf<u32> = lib.unwritten("out", out_words);
    let op: Io = lib.get(name.as_bytes());
    // SAFETY: the kernel reads `input` and writes `out_words` words; the executor checks that it does.
    lib.check(unsafe { op(x.ptr(), y.ptr()) })?;
    Ok(y.to_vec())
}

#[test]
fn warp_collectives_match_their_definition() {
    for lib in [Simt::plain(), Simt::checked()] {
        for seed in 0..9 {
            let _session = lib.seeded(seed);
            let x = random_words(seed, THREADS * WORDS);
            let y = run(lib, "simt_selftest_warp", &x, THREADS * WORDS).unwrap();
            let x0 = |t: usize| x[t * WORDS];
            for t in 0..THREADS {
                let (base, lane) = (t / 32 * 32, t % 32);
                let warp: Vec<u32> = (base..base + 32).map(x0).collect();
                let out = &y[t * WORDS..];
                assert_eq!(out[0], warp[x[t * WORDS + 1] as usize & 31]);
                assert_eq!(out[1], warp[if lane < 3 { lane } else { lane - 3 }]);
                assert_eq!(out[3], warp[lane ^ 9]);
                assert_eq!(out[8], warp.iter().fold(0u32, |a, b| a.wrapping_add(*b)));
            }
        }
    }
}
