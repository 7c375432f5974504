//! The CPU path of token_select against windows in f64 and a sort.

use crate::cases::{Noise, assert_close};
use kvwarp::token_select::{Pool, above, kth, oracle_pool, oracle_top_k, pool, top_k};

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

/// Scores that are hard to rank: of every size, few values, one value, NaN and infinities among them.
pub fn hard(n: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut noise = Noise(seed);
    let spread: Vec<f32> = (0..n).map(|_| (noise.unit() * 20.0).exp() * noise.unit()).collect();
    let few: Vec<f32> = (0..n).map(|_| noise.below(3) as f32 * 0.5 - 0.5).collect();
    let close: Vec<f32> = (0..n).map(|_| 1.0 + noise.below(4) as f32 * f32::EPSILON).collect();
    let special = [NAN, INF, -INF, 0.0, -0.0, -NAN, f32::MIN_POSITIVE / 4.0, -1.0];
    let mixed = (0..n).map(|i| if i % 3 == 0 { special[noise.below(8)] } else { spread[i] });
    let mixed = mixed.collect();
    vec![spread.clone(), few, close, vec![0.25; n], mixed, vec![NAN; n]]
}

#[test]
fn cpu_selects_as_a_sort_does() {
    for n in [1, 2, 63, 64, 65, 1000, 8200] {
        for (which, scores) in hard(n, n as u64).iter().enumerate() {
            for k in [0, 1, 2, n / 10, n / 2, n.saturating_sub(1), n, n + 7] {
                let (got, want) = (top_k(scores, k), oracle_top_k(scores, k));
                assert_eq!(got, want, "{k} of {n}, kind {which}");
                let Some(last) = kth(scores, k) else {
                    assert!(k == 0 || k > n);
                    continue;
                };
                let strict = above(scores, last);
                let in_rank = |x: f32, y: f32| if y.is_nan() { !x.is_nan() } else { x > y };
                let better = (0..n as u32).filter(|&i| in_rank(scores[i as usize], last));
                assert_eq!(strict, better.collect::<Vec<_>>(), "above {last}");
                assert!(strict.len() < k && strict.iter().all(|i| got.contains(i)));
                let ties = |&&i: &&u32| {
                    let x = scores[i as usize];
                    x == last || x.is_nan() && last.is_nan()
                };
                assert_eq!(strict.len() + got.iter().filter(ties).count(), k);
            }
        }
    }
    assert_eq!((top_k(&[], 3), kth(&[], 1), above(&[], 0.0)), (vec![], None, vec![]));
}

#[test]
fn cpu_pools_as_the_oracle_does() {
    let mut noise = Noise(3);
    for n in [1, 2, 5, 64, 70, 200, 1000] {
        for (group, width) in [(1, 1), (3, 7), (4, 5), (2, 63), (8, 3)] {
            let scores: Vec<f32> = (0..group * n).map(|_| noise.unit()).collect();
            for kind in [Pool::Avg, Pool::Max] {
                let mut got = vec![NAN; n];
                pool(&scores, group, kind, width, &mut got);
                let want = oracle_pool(&scores, group, kind, width);
                assert_close(&format!("{kind:?} {width} of {n}"), &got, &want, 1e-5, 0.0);
            }
        }
    }
    let (mut got, gap) = ([7.0; 4], [1.0, NAN, 2.0, 3.0]);
    pool(&gap, 1, Pool::Max, 3, &mut got);
    assert_eq!(got, [1.0, 2.0, 3.0, 3.0], "NaN is no neighbour");
    pool(&gap, 1, Pool::Avg, 3, &mut got);
    assert!(got[..3].iter().all(|x| x.is_nan()) && got[3] == 5.0 / 3.0);
    pool(&[], 0, Pool::Avg, 3, &mut got);
    assert_eq!(got, [0.0; 4], "no rows");
    pool(&gap, 1, Pool::Avg, 3, &mut []);
}
