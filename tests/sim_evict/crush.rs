//! KVCrush: bits, anchors, representatives.

use crate::cases::Noise;
use kvwarp::sim_evict::{Anchor, bits, oracle, representatives};

const ANCHORS: [Anchor; 6] = [
    Anchor::Mean,
    Anchor::Random(0),
    Anchor::Random(7),
    Anchor::Alternate,
    Anchor::Zeros,
    Anchor::Ones,
];

#[test]
fn bits_hand_worked() {
    let nan = f32::NAN;
    let scores = [
        [1.0, 5.0, 3.0, 5.0, nan],  // 2 best: 1, 3
        [2.0, 2.0, 2.0, 2.0, 2.0],  // ties: 0, 1
        [nan, nan, nan, -1.0, nan], // NaN last, ties: 3, 0
        [-0.0, 0.0, -1.0, -2.0, -3.0],
    ];
    let mut out = [9; 5];
    bits(scores.as_flattened(), 4, 2, &mut out);
    assert_eq!(out, [0b1110, 0b1011, 0b0000, 0b0101, 0b0000]);
    bits(scores.as_flattened(), 4, 0, &mut out);
    assert_eq!(out, [0; 5]);
    bits(scores.as_flattened(), 4, 6, &mut out);
    assert_eq!(out, [15; 5], "all, if there are no more");
}

#[test]
fn representatives_hand_worked() {
    // Distances to zeros: 2, 0, 1, 3, 1, 0, 2. In order: 1, 5, 2, 4, 0, 6, 3.
    let bits = [0b011, 0, 0b100, 0b111, 0b010, 0, 0b110];
    let all = [0, 1, 2, 3, 4, 5, 6];
    let of =
        |candidates: &[u32], count| representatives(&bits, 3, candidates, Anchor::Zeros, count);
    assert_eq!(of(&all, 1), [1]);
    assert_eq!(of(&all, 2), [1, 3], "both ends");
    assert_eq!(of(&all, 3), [1, 3, 4], "places 0, 3, 6");
    assert_eq!(of(&all, 4), [0, 1, 2, 3], "places 0, 2, 4, 6");
    assert_eq!(of(&[0, 2, 3, 6], 2), [2, 3]);
    assert_eq!((of(&all, 0), of(&all, 9), of(&[], 2)), (vec![], all.to_vec(), vec![]));
    // Heads: 0 of 7 tokens has bit 0 in two, 1 in four, 2 in three: the mean is 0b010.
    assert_eq!(representatives(&bits, 3, &all, Anchor::Mean, 1), [4]);
    assert_eq!(representatives(&bits, 3, &all, Anchor::Ones, 1), [3]);
    assert_eq!(representatives(&bits, 2, &all, Anchor::Ones, 1), [0], "two heads have two bits");
    assert_eq!(representatives(&bits, 3, &all, Anchor::Alternate, 1), [4]);
}

/// Against sorts and counting bit by bit: the same tokens, as many as asked for, never twice.
#[test]
fn bits_and_representatives_are_the_oracles() {
    let mut noise = Noise(45);
    for round in 0..300 {
        let (heads, n) = (1 + noise.below(32), 1 + noise.below(400));
        let coarse = 1 << noise.below(6);
        let mut scores = noise.values(heads * n);
        scores.iter_mut().for_each(|x| *x = (*x * coarse as f32).round());
        if round % 3 == 0 {
            scores.iter_mut().step_by(7).for_each(|x| *x = f32::NAN);
        }
        let keep = noise.below(n + 2);
        let mut got = vec![0; n];
        bits(&scores, heads, keep, &mut got);
        assert_eq!(got, oracle::bits(&scores, heads, keep, n), "{keep} of {n}, {heads} heads");
        for h in 0..heads {
            let held = got.iter().filter(|&&b| b >> h & 1 == 1).count();
            assert_eq!(held, keep.min(n), "head {h}");
        }
        let candidates: Vec<u32> = (0..n as u32).filter(|_| noise.below(3) > 0).collect();
        let count = noise.below(candidates.len() + 3);
        for anchor in ANCHORS {
            let chosen = representatives(&got, heads, &candidates, anchor, count);
            assert!(chosen.is_sorted_by(|a, b| a < b), "{anchor:?}: {chosen:?}");
            assert_eq!(chosen.len(), count.min(candidates.len()), "{anchor:?}");
            assert_eq!(chosen, oracle::representatives(&got, heads, &candidates, anchor, count));
            assert_eq!(chosen, representatives(&got, heads, &candidates, anchor, count));
        }
    }
}

#[test]
fn a_random_anchor_is_its_seeds() {
    let mut noise = Noise(46);
    let bits: Vec<u32> = (0..500).map(|_| noise.bits() as u32).collect();
    let all: Vec<u32> = (0..500).collect();
    let of = |seed| representatives(&bits, 32, &all, Anchor::Random(seed), 20);
    let distinct: std::collections::BTreeSet<_> = (0..8).map(of).collect();
    assert_eq!(distinct.len(), 8, "seeds differ");
    assert_eq!(of(3), of(3));
}
