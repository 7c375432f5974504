//! sim_evict: LagKV worked by hand, scores against the oracle, KVCrush's bits and representatives.

mod cpu;
mod crush;

use half::f16;
use kvwarp::pages::{HeadView, Pools};
use kvwarp::sim_evict::{Lag, Reference, kept, lag, oracle};
use kvwarp::slab::{Format, TOKENS, encode};

/// A head of one f16 slab in a ring, `k` and `v` `[64, 64]`.
fn one_slab(pools: &Pools, k: &[f32], v: &[f32]) -> Vec<u8> {
    let layout = pools.layout(Format::F16);
    let [k, v] = [k, v].map(|x| x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>());
    let mut slab = vec![0; layout.slab_bytes()];
    encode(layout, &k, &v, &mut slab);
    slab
}

#[test]
fn oracle_hand_worked() {
    // Two partitions of 16. In the reference channel 0 of K goes from 1 to 3, channel 1 from -2 to 2, all others are 5.
    let (mut k, mut v) = (vec![5.0; TOKENS * 64], vec![1.0; TOKENS * 64]);
    for t in 16..32 {
        k[t * 64] = if t % 2 == 0 { 1.0 } else { 3.0 };
        k[t * 64 + 1] = if t % 2 == 0 { 2.0 } else { -2.0 };
    }
    // Scaled: (0, 0), but (1, 0.5) for token 3 and (2.5, 1) for token 9. Deviations of two numbers, unbiased: their
    // distance over the root of 2, so 0, 0.5 / 2^0.5 and 1.5 / 2^0.5.
    for t in 0..16 {
        (k[t * 64], k[t * 64 + 1]) =
            [(1.0, -2.0), (3.0, 0.0), (6.0, 2.0)][usize::from(t == 3) + 2 * usize::from(t == 9)];
    }
    // V: one channel that is not constant in the reference, so no deviation at all: 1 / 16 each.
    (v[20 * 64 + 7], v[2 * 64 + 7]) = (0.0, 9.0);
    let (pools, root) = (Pools::new(64, 32).unwrap(), 2f64.sqrt());
    let ring = one_slab(&pools, &k, &v);
    let head = HeadView { pools: &pools, table: &[], ring: &ring, len: 64, packed: 0 };
    let of = |x: f64| (x / root).exp();
    let sum = 14.0 + of(0.5) + of(1.5);
    let half = |x: f64| x / sum + 0.5 / 16.0;
    let mut want = vec![half(1.0); 16];
    (want[3], want[9]) = (half(of(0.5)), half(of(1.5)));
    let spec =
        Lag { first: 0, lag: 16, partitions: 1, v_weight: 0.5, reference: Reference::Elements };
    let got = oracle::lag(&head, &spec);
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-12), "{got:?}");
    let mut out = [0.0; 16];
    lag(&head, 0, 16, 1, 0.5, &mut out).unwrap();
    crate::cases::assert_close("lag", &out, &want, 0.0, 1e-6);
    // Lengths: token 9 of K is (6, 2) and 62 times 5.
    let norm = oracle::key_norms(&head, 9..10)[0];
    assert!((norm - (40.0 + 62.0 * 25.0f64).sqrt()).abs() < 1e-12, "{norm}");
}

#[test]
fn kept_hand_worked() {
    for (tokens, left) in [(500, 308), (1000, 424), (5000, 1448), (32768, 8384)] {
        assert_eq!(kept(tokens, 16, 128, 32), left);
    }
    // No two partitions after the sinks, one token more than none, one partition of two.
    assert_eq!([271, 272, 273].map(|n| kept(n, 16, 128, 32)), [271, 176, 177]);
    assert_eq!([0, 15, 100].map(|n| kept(n, 16, 128, 32)), [0, 15, 100]);
    assert_eq!(kept(32768, 16, 1024, 256), 9728);
    assert_eq!(kept(1000, 16, 128, 0), 16 + 128 + 88);
}
