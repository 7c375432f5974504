//! token_score: every executor and the CPU path against the f64 oracle over the dequantised cache.

use half::f16;
use kvwarp::pages::{HeadView, Pools};
use kvwarp::slab::{Format::F16, encode};
use kvwarp::token_score::{Reduce, oracle, oracle_lse};
use std::slice::from_ref;

#[test]
fn oracle_hand_worked() {
    // Keys 0, 1, 2 times ones, queries of ones: scores of slot t are 64 t / 64 = t with this scale.
    let pools = Pools::new(64, 32).unwrap();
    let mut k = vec![f16::NAN; 64 * 64];
    (0..3).for_each(|t| k[t * 64..][..64].fill(f16::from_f32(t as f32)));
    let mut ring = vec![0; pools.layout(F16).slab_bytes()];
    encode(pools.layout(F16), &k, &k, &mut ring);
    let heads = [HeadView { pools: &pools, table: &[], ring: &ring, len: 3, packed: 0 }];
    let (q, scale) = ([1.0; 128], 1.0 / 64.0);
    let near = |got: &[f64], want: &[f64]| {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() < 1e-6 || a == b, "{a} {b}"));
    };
    // Row 0 is slot 1 and sees scores 0 and 1, row 1 sees 0, 1 and 2.
    let e = std::f64::consts::E;
    let all = [(1.0 + e).ln(), (1.0 + e + e * e).ln()];
    near(&oracle_lse(&q, 2, &heads, scale, from_ref(&(0..3))), &all);
    near(&oracle_lse(&q, 2, &heads, scale, &[0..1, 2..9]), &[0.0, (1.0 + e * e).ln()]);
    near(&oracle_lse(&q, 2, &heads, scale, from_ref(&(2..3))), &[f64::NEG_INFINITY, 2.0]);
    let lse = all.map(|x| x as f32);
    let p = |s: f64, row: usize| (s - all[row]).exp();
    let sums = [p(0.0, 0) + p(0.0, 1), p(1.0, 0) + p(1.0, 1), p(2.0, 1)];
    near(&oracle(&q, 2, &lse, &heads, scale, &[0], 3, Reduce::Sum), &sums);
    assert!((sums.iter().sum::<f64>() - 2.0).abs() < 1e-12, "two rows of shares that sum to 1");
    near(&oracle(&q, 2, &lse, &heads, scale, &[1], 2, Reduce::Max), &[p(1.0, 0), p(2.0, 1)]);
    // Two query heads: the maximum is over both.
    let (q, lse) = ([[1.0; 64], [2.0; 64]].concat(), [lse[1], 3.0]);
    let max = oracle(&q, 1, &lse, &heads, scale, &[0], 3, Reduce::Max);
    near(&max, &[p(0.0, 1), 1.0 / e, e]);
    let sums = oracle(&q, 1, &[lse[0], f32::NEG_INFINITY], &heads, scale, &[0], 3, Reduce::Sum);
    near(&sums, &[p(0.0, 1), p(1.0, 1), p(2.0, 1), 0.0, 0.0, 0.0]);
}
