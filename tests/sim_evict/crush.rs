//! KVCrush: bits, anchors, representatives, on the host and on the executors.

use super::kernel::params;
use crate::cases::Noise;
use crate::exec::{Exec, Run, executors, op};
use kvwarp::ffi;
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

/// Bits of `tokens` tokens from ascending lists, one of which is empty and one full.
pub fn put_bits(run: &Run, heads: usize, tokens: usize) -> Result<(), String> {
    let (mut noise, seqs) = (Noise(61), 2);
    let (mut kept, mut counts) = (Vec::new(), Vec::new());
    let mut want = vec![0u32; seqs * tokens];
    for row in 0..seqs * heads {
        let share = [4, 1, 0, 2][row % 4]; // of 4
        let list: Vec<i32> = (0..tokens as i32).filter(|_| noise.below(4) < share).collect();
        for &i in &list {
            want[row / heads * tokens + i as usize] |= 1 << (row % heads);
        }
        counts.push(list.len() as i32);
        kept.extend(list);
        kept.resize((row + 1) * tokens, i32::MAX);
    }
    let (kept, counts) = (run.upload("kept", &kept), run.upload("kept_counts", &counts));
    let out = run.alloc::<u32>("bits", want.len());
    let mut p = params(ffi::KVW_EVICT_BITS);
    (p.cache.seqs, p.cache.kv_heads) = (seqs as i32, heads as i32);
    (p.kept, p.kept_counts, p.bits) = (kept.ptr(), counts.ptr(), out.ptr());
    (p.kept_stride, p.columns) = (tokens as i32, tokens as i32);
    run.call(&op!(kvw_sim_evict), &p)?;
    let got = out.download();
    match got.iter().zip(&want).position(|(a, b)| a != b) {
        Some(i) => Err(format!("{heads} heads: token {i}: {:b}, want {:b}", got[i], want[i])),
        None => Ok(()),
    }
}

/// What representatives are asked for.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    pub heads: usize,
    pub anchor: Anchor,
    /// Of two thirds of the tokens, not of all.
    pub some: bool,
    /// Of the kernel in CUDA C++, not of that in `ptx/`.
    pub plain: bool,
}

/// Representatives of rows of any tokens.
pub fn represent(run: &Run, tokens: usize, ask: Ask) -> Result<(), String> {
    let mut noise = Noise(64);
    // Some bits most tokens have, some few. Those of heads that there are not mean nothing.
    const OFTEN: u32 = 0xC3A5_0F31;
    let word = |i: usize| {
        let any = noise.bits() as u32;
        [0, u32::MAX, OFTEN, any, any & OFTEN][i % 5]
    };
    let words: Vec<u32> = (0..3 * tokens).map(word).collect();
    chosen(run, &words, ask)
}

/// A bit that exactly half of the tokens have.
pub fn even(run: &Run) -> Result<(), String> {
    let words: Vec<u32> = (0..300).map(|i| i % 2).collect();
    chosen(run, &words, Ask { heads: 1, anchor: Anchor::Mean, some: false, plain: true })
}

/// Three rows of as many columns, which are not all in use.
fn chosen(run: &Run, words: &[u32], ask: Ask) -> Result<(), String> {
    let Ask { heads, anchor, some, plain } = ask;
    let (mut noise, tokens) = (Noise(62), words.len() / 3);
    let counts = [tokens, tokens / 2 + 1, 0];
    let (mut lists, mut list_counts, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (s, &n) in counts.iter().enumerate() {
        let list: Vec<u32> = (0..n as u32).filter(|_| !some || noise.below(3) > 0).collect();
        wanted.push([list.len() / 5, list.len() + 1, 3][s] as i32);
        list_counts.push(list.len() as i32);
        lists.push(list);
    }
    let padded = |list: &Vec<u32>| {
        let mut row: Vec<i32> = list.iter().map(|&i| i as i32).collect();
        row.resize(tokens, -1);
        row
    };
    let rows: Vec<i32> = lists.iter().flat_map(padded).collect();
    let device_counts = run.upload("counts", &counts.map(|n| n as i32));
    let (bits, device_wanted) = (run.upload("bits", words), run.upload("wanted", &wanted));
    let (candidates, of_rows) =
        (run.upload("candidates", &rows), run.upload("candidate_counts", &list_counts));
    let out = run.upload("chosen", &vec![-7; 3 * tokens]);
    let mut p = params(ffi::KVW_EVICT_REPRESENT);
    (p.cache.seqs, p.cache.kv_heads, p.columns) = (3, heads as i32, tokens as i32);
    (p.bits, p.counts, p.wanted) = (bits.ptr(), device_counts.ptr(), device_wanted.ptr());
    if some {
        (p.candidates, p.candidate_counts) = (candidates.ptr(), of_rows.ptr());
    }
    (p.chosen, p.anchor, p.plain) = (out.ptr(), kind(anchor), plain.into());
    if let Anchor::Random(seed) = anchor {
        p.seed = seed;
    }
    run.call(&op!(kvw_sim_evict), &p)?;
    let got = out.download();
    for (s, list) in lists.iter().enumerate() {
        let row = &words[s * tokens..][..counts[s]];
        let want = oracle::representatives(row, heads, list, anchor, wanted[s] as usize);
        let mut want = padded(&want);
        want.iter_mut().filter(|x| **x < 0).for_each(|x| *x = -7);
        if got[s * tokens..][..tokens] != want {
            let at = got[s * tokens..].iter().zip(&want).position(|(a, b)| a != b);
            return Err(format!("{ask:?}, row {s}: place {at:?}"));
        }
    }
    Ok(())
}

fn kind(anchor: Anchor) -> i32 {
    match anchor {
        Anchor::Mean => ffi::KVW_ANCHOR_MEAN,
        Anchor::Random(_) => ffi::KVW_ANCHOR_RANDOM,
        Anchor::Alternate => ffi::KVW_ANCHOR_ALTERNATE,
        Anchor::Zeros => ffi::KVW_ANCHOR_ZEROS,
        Anchor::Ones => ffi::KVW_ANCHOR_ONES,
    }
}

#[test]
fn crush_is_the_oracles() {
    let anchors = [Anchor::Mean, Anchor::Random(7), Anchor::Alternate, Anchor::Zeros, Anchor::Ones];
    for exec in executors(1) {
        let run = exec.start();
        for (heads, tokens) in [(1, 40), (8, 1024), (32, 2500)] {
            put_bits(&run, heads, tokens).unwrap();
        }
        for (n, heads) in [1, 3, 8, 31, 32].into_iter().enumerate() {
            for tokens in [1, 33, 700] {
                let (anchor, some) = (anchors[(n + tokens) % 5], tokens % 2 == 0);
                let ask = Ask { heads, anchor, some, plain: (n + tokens) % 3 == 0 };
                represent(&run, tokens, ask).unwrap();
            }
        }
        for (anchor, plain) in anchors.into_iter().flat_map(|a| [(a, true), (a, false)]) {
            represent(&run, 100, Ask { heads: 32, anchor, some: false, plain }).unwrap();
        }
        for plain in [true, false].into_iter().filter(|_| exec == Exec::SimtPlain) {
            let ask = Ask { heads: 8, anchor: Anchor::Mean, some: true, plain };
            represent(&run, 40_000, ask).unwrap();
        }
    }
}
