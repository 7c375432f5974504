//! Which pairs keep their rotation.

use std::f32::consts::PI;
use std::sync::atomic::AtomicBool;

use kvwarp::rope_select::{Pairing, inv_freq};
use kvwarp::threads::Team;
use kvwarp_engine::convert::search::{Heads, Losses, Text, oracle, search};
use kvwarp_engine::watch::Watch;
use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

fn found(heads: Heads<'_>, texts: &[Text<'_>], rounds: usize, threads: usize) -> Vec<Vec<u8>> {
    let (stop, mut step) = (AtomicBool::new(false), |_| {});
    let watch = &mut Watch::new(&stop, &mut step);
    search(heads, texts, rounds, &Team::new(threads), watch).unwrap()
}

/// Two tokens, one head of two pairs, `D = 4`, so scores are halved. Pair 0 turns by half a circle a position, pair 1 by
/// a quarter.
#[test]
fn oracle_hand_worked() {
    let heads = Heads {
        kv_heads: 1,
        group: 1,
        head_dim: 4,
        inv_freq: &[PI, PI / 2.0],
        pairing: Pairing::Interleaved,
    };
    // q1 = (1, 0 | 3, 0), k0 = (2, 0 | 4, 0); what stands at equal positions does not change.
    let q = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 3.0, 0.0];
    let k = [2.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let text = Text { q: &q, k: &k };
    // Turned, pair 0 gives -2 and pair 1 gives 0: S = (-2 + 0) / 2 = -1. Pair 0 alone turned: (-2 + 12) / 2 = 5, 6 away;
    // pair 1 alone: (2 + 0) / 2 = 1, 2 away. Of four scores one is not 0.
    let first = oracle::distances(heads, text, 0, &[]);
    assert!(
        (first[0] - 6.0 / 4.0).abs() < 1e-6 && (first[1] - 2.0 / 4.0).abs() < 1e-6,
        "{first:?}"
    );
    let then = oracle::distances(heads, text, 0, &[1]);
    assert!(then[0].abs() < 1e-6 && then[1].is_infinite(), "{then:?}");
    assert_eq!(oracle::search(heads, &[text], 0, 2), [1, 0]);
    assert_eq!(found(heads, &[text], 2, 1), [[1, 0]]);
    // The half pairing: the same vectors with channels (0, 2) and (1, 3) as pairs.
    let halves = |x: [f32; 8]| [0, 2, 1, 3, 4, 6, 5, 7].map(|i| x[i]);
    let (q, k) = (halves(q), halves(k));
    let heads = Heads { pairing: Pairing::Half, ..heads };
    assert_eq!(found(heads, &[Text { q: &q, k: &k }], 2, 1), [[1, 0]]);
}

struct Case {
    inv_freq: Vec<f32>,
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
}

const KV_HEADS: usize = 2;
const GROUP: usize = 3;
const D: usize = 16;

impl Case {
    fn new(seed: u64, lengths: &[usize]) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = |n: usize| -> Vec<f32> {
            (0..n).map(|_| f32::from(rng.next_u32() as i16) / 16_384.0).collect()
        };
        let q = lengths.iter().map(|n| random(n * KV_HEADS * GROUP * D)).collect();
        // Channels of a kv head differ in size, and not as those of the other.
        let sized = |(i, x): (usize, f32)| x * ((i % D * 7 + i / D % KV_HEADS * 5) % 11) as f32;
        let mut keys = |n: &usize| random(n * KV_HEADS * D).into_iter().enumerate().map(sized);
        let k = lengths.iter().map(|n| keys(n).collect()).collect();
        Self { inv_freq: inv_freq(100.0, D, Default::default()), q, k }
    }

    fn heads(&self, pairing: Pairing) -> Heads<'_> {
        let inv_freq = &self.inv_freq;
        Heads { kv_heads: KV_HEADS, group: GROUP, head_dim: D, inv_freq, pairing }
    }

    fn texts(&self) -> Vec<Text<'_>> {
        self.q.iter().zip(&self.k).map(|(q, k)| Text { q, k }).collect()
    }
}

/// Tiles, tails, several texts, both pairings, heads that share keys: the pairs that the paper's loop chooses.
#[test]
fn search_matches_oracle() {
    for (seed, lengths) in [&[1][..], &[2], &[63], &[64], &[65], &[130], &[30, 70], &[64, 1, 17]]
        .into_iter()
        .enumerate()
    {
        let case = Case::new(seed as u64, lengths);
        for pairing in [Pairing::Half, Pairing::Interleaved] {
            let (heads, texts) = (case.heads(pairing), case.texts());
            let orders = found(heads, &texts, D / 2, 2);
            for (head, order) in orders.iter().enumerate() {
                let want = oracle::search(heads, &texts, head, D / 2);
                // One token: no pair turns, so the first is as good as any.
                assert_eq!(*order, want, "{lengths:?} {pairing:?} head {head}");
            }
        }
    }
}

/// `S - S_E` is the sum of what the pairs outside `E` add, so a candidate's part can be taken from it: the losses are those
/// of all scores computed again, whatever is chosen already.
#[test]
fn losses_are_those_of_whole_scores() {
    for (seed, lengths) in [&[1][..], &[64], &[65], &[130, 30]].into_iter().enumerate() {
        let case = Case::new(seed as u64 + 50, lengths);
        for pairing in [Pairing::Half, Pairing::Interleaved] {
            let (heads, texts, team) = (case.heads(pairing), case.texts(), Team::new(2));
            for chosen in [&[][..], &[3], &[7, 0, 4], &[0, 1, 2, 3, 4, 5, 6]] {
                let got = Losses::new(heads, &texts, &team)
                    .after(&vec![chosen.to_vec(); KV_HEADS], &team);
                for (i, got) in got.into_iter().enumerate() {
                    let (head, j) = (i / (D / 2), i % (D / 2));
                    let want = texts.iter().zip(lengths).map(|(text, n)| {
                        let mean = oracle::distances(heads, *text, head, chosen)[j];
                        mean * (GROUP * n * n) as f64
                    });
                    let want: f64 = want.sum();
                    let close = got == want || (got - want).abs() < 1e-5 * (1.0 + want);
                    assert!(close, "{lengths:?} {chosen:?} head {head} pair {j}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn sets_are_nested_and_do_not_depend_on_threads() {
    let case = Case::new(3, &[100, 50]);
    let (heads, texts) = (case.heads(Pairing::Half), case.texts());
    let whole = found(heads, &texts, D / 2, 1);
    assert_ne!(whole[0], whole[1], "heads choose for themselves");
    for rounds in 0..=D / 2 {
        for (part, whole) in found(heads, &texts, rounds, 3).iter().zip(&whole) {
            assert_eq!(part, &whole[..rounds]);
        }
    }
    for order in whole {
        let mut once = order.clone();
        once.sort_unstable();
        assert_eq!(once, (0..D as u8 / 2).collect::<Vec<_>>(), "{order:?}");
    }
}
