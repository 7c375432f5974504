//! sim_evict: LagKV worked by hand, scores against the oracle, KVCrush's bits and representatives.

mod cpu;
mod crush;
mod kernel;

use crate::cache::Spec;
use crate::cases::somewhere;
use crate::exec::{Run, assert_caught, everyone, executors, op};
use crush::{Ask, even, put_bits, represent};
use half::f16;
use kernel::{mixed, norms, params, scores, two_level};
use kvwarp::ffi::{self, kvw_sim_evict_params as Params};
use kvwarp::pages::{HeadView, Pools};
use kvwarp::sim_evict::{Anchor, Lag, Reference, kept, lag, oracle};
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

#[test]
fn c_checks_need_no_gpu() {
    let sim_evict = op!(kvw_sim_evict);
    let cache = ffi::kvw_cache {
        ring: somewhere(),
        lens: somewhere::<i32>(),
        packed: somewhere::<i32>(),
        seqs: 3,
        kv_heads: 2,
        head_dim: 64,
        group: 32,
        ring_slabs: 40,
        table_heads: 1,
        lens_heads: 2,
        ..Default::default()
    };
    let valid = Params {
        cache,
        scores: somewhere(),
        lag: 128,
        partitions: 3,
        v_weight: 1.0,
        ..params(ffi::KVW_EVICT_LAG)
    };
    sim_evict.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 0, ffi::KVW_ERR_STRUCT),
            ("op", |p| p.op = 4, ffi::KVW_ERR_SHAPE),
            ("head_dim", |p| p.cache.head_dim = 80, ffi::KVW_ERR_SHAPE),
            ("ring", |p| p.cache.ring = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("scores", |p| p.scores = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("first unaligned", |p| p.first = 4 as _, ffi::KVW_ERR_ALIGN),
            ("lag 0", |p| p.lag = 0, ffi::KVW_ERR_SHAPE),
            ("lag 72", |p| p.lag = 72, ffi::KVW_ERR_SHAPE),
            ("lag 1040", |p| p.lag = 1040, ffi::KVW_ERR_SHAPE),
            ("partitions", |p| p.partitions = 0, ffi::KVW_ERR_SHAPE),
            ("partitions past int32", |p| p.partitions = 1 << 24, ffi::KVW_ERR_SHAPE),
            ("reference", |p| p.reference = 2, ffi::KVW_ERR_SHAPE),
        ],
    );
    // Four lags of 512 bytes a token, all of the window or f16; scores.
    assert_eq!(sim_evict.bytes(&valid), 6 * (4 * 128 * 256 + 3 * 128 * 4));
    let norm = Params { columns: 64, ..Params { op: ffi::KVW_EVICT_NORM, ..valid } };
    assert_eq!(sim_evict.bytes(&norm), 6 * (64 * 128 + 64 * 4));
    sim_evict.refuses(norm, &[("columns", |p| p.columns = 0, ffi::KVW_ERR_SHAPE)]);
    let of_bits = Params {
        kept: somewhere::<i32>(),
        kept_counts: somewhere::<i32>(),
        bits: somewhere(),
        columns: 1000,
        kept_stride: 100,
        ..params(ffi::KVW_EVICT_BITS)
    };
    let shape = ffi::kvw_cache { seqs: 3, kv_heads: 32, ..Default::default() };
    let of_bits = Params { cache: shape, ..of_bits };
    sim_evict.refuses(
        of_bits,
        &[
            ("seqs", |p| p.cache.seqs = 0, ffi::KVW_ERR_SHAPE),
            ("kv_heads", |p| p.cache.kv_heads = 33, ffi::KVW_ERR_SHAPE),
            ("columns", |p| p.columns = (1 << 17) + 1, ffi::KVW_ERR_SHAPE),
            ("bits", |p| p.bits = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("kept", |p| p.kept = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("kept_counts", |p| p.kept_counts = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("kept_stride", |p| p.kept_stride = 0, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(sim_evict.bytes(&of_bits), 96 * 400 + 3 * 4000);
    let chosen = Params {
        op: ffi::KVW_EVICT_REPRESENT,
        counts: somewhere::<i32>(),
        wanted: somewhere::<i32>(),
        chosen: somewhere(),
        ..of_bits
    };
    sim_evict.refuses(
        chosen,
        &[
            ("counts", |p| p.counts = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("wanted", |p| p.wanted = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("chosen", |p| p.chosen = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("candidates unaligned", |p| p.candidates = 4 as _, ffi::KVW_ERR_ALIGN),
            ("candidate_counts", |p| p.candidates = somewhere::<i32>(), ffi::KVW_ERR_NULL),
            ("anchor", |p| p.anchor = 5, ffi::KVW_ERR_SHAPE),
            ("plain", |p| p.plain = 2, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(sim_evict.bytes(&chosen), 3 * 8000);
    assert_eq!(sim_evict.workspace(&chosen), 0);
}

#[test]
fn executors_match_oracle() {
    for exec in everyone(3) {
        let run = exec.start();
        scores(&run, &mixed(64, 32), 16, 128, Reference::Elements).unwrap();
        scores(&run, &mixed(64, 64), 16, 112, Reference::Metadata).unwrap();
        norms(&run, &mixed(128, 32), 30).unwrap();
    }
    for exec in executors(3) {
        let run = exec.start();
        put_bits(&run, 5, 1100).unwrap();
        for plain in [true, false] {
            represent(&run, 300, Ask { heads: 8, anchor: Anchor::Mean, some: true, plain })
                .unwrap();
        }
    }
}

#[test]
fn faults_are_caught() {
    let one = |spec: Spec| Spec { lens: vec![330], heads: 1, ..spec };
    let elements = |run: &Run| scores(run, &one(mixed(64, 32)), 19, 80, Reference::Elements);
    let metadata = |run: &Run| scores(run, &one(two_level(64)), 0, 64, Reference::Metadata);
    let chosen = |heads, anchor, plain| {
        move |run: &Run| {
            represent(run, 300, Ask { heads, anchor, some: anchor == Anchor::Mean, plain })
        }
    };
    let cpp = chosen(5, Anchor::Mean, true);
    assert_caught(701, "a constant channel takes part", kernel::hard);
    assert_caught(702, "the largest of a group is taken for its range", metadata);
    assert_caught(703, "tokens next to the reference count as part of it", elements);
    assert_caught(704, "sums are taken from 0, however far away", kernel::far);
    assert_caught(705, "the deviation is biased", elements);
    assert_caught(706, "the reference is a token short", elements);
    assert_caught(707, "channels are used before they are there", elements);
    assert_caught(708, "deviations are used before they are there", elements);
    assert_caught(709, "half of a key's channels are left out", |run| {
        norms(run, &one(mixed(64, 32)), 3)
    });
    assert_caught(711, "words are cleared after bits came", |run| put_bits(run, 9, 100));
    assert_caught(712, "a stretch begins with its second token", |run| put_bits(run, 2, 1500));
    assert_caught(713, "the largest distance is forgotten", chosen(32, Anchor::Ones, true));
    assert_caught(714, "bits of no head count", chosen(5, Anchor::Ones, true));
    assert_caught(715, "votes are counted before all are there", cpp);
    assert_caught(716, "half of the tokens are a majority", even);
    assert_caught(717, "places are given before all are counted", cpp);
    assert_caught(718, "all of a warp at one distance share a place", cpp);
    let ptx = |heads, anchor| chosen(heads, anchor, false);
    assert_caught(731, "ptx: places are given before all are counted", ptx(5, Anchor::Mean));
    assert_caught(732, "ptx: all of a warp at one distance share a place", ptx(5, Anchor::Mean));
    assert_caught(733, "ptx: a candidate after the last is counted", ptx(5, Anchor::Zeros));
    assert_caught(734, "ptx: a table of three bits is the wrong one", ptx(32, Anchor::Zeros));
    assert_caught(735, "ptx: bits are turned half as far", ptx(32, Anchor::Mean));
    assert_caught(736, "ptx: votes are counted before all are there", ptx(5, Anchor::Mean));
    assert_caught(737, "ptx: the largest distance has no places", ptx(32, Anchor::Ones));
    assert_caught(738, "ptx: tokens are written before all are counted", ptx(5, Anchor::Mean));
}
