//! paged_attn: every executor against the f64 oracle over the dequantised cache.

mod call;
mod cuts;
mod hooks;

use crate::cache::Spec;
use crate::cases::somewhere;
use crate::exec::{Exec, Run, assert_caught, everyone, op};
use call::mixed;
pub use call::{CALL, Call, matches};
use half::f16;
use kvwarp::ffi::{self, kvw_paged_attn_params as Params};
use kvwarp::paged_attn::{Mask, Scores, oracle};
use kvwarp::pages::{HeadView, Pools};
use kvwarp::slab::Format::{F16, Q2, Q4, Q8};
use kvwarp::slab::encode;

#[test]
fn oracle_hand_worked() {
    // Two tokens, K = (1, 0, ..), (0, 1, ..); V = 2 and 4 in channel 0; q = (ln 3, 0, ..): weights 3/4 and 1/4.
    let pools = Pools::new(64, 32).unwrap();
    let (mut k, mut v) = (vec![f16::NAN; 64 * 64], vec![f16::NAN; 64 * 64]);
    k[..128].fill(f16::ZERO);
    v[..128].fill(f16::ZERO);
    (k[0], k[65], v[0], v[64]) = (f16::ONE, f16::ONE, f16::from_f32(2.0), f16::from_f32(4.0));
    let mut ring = vec![0; pools.layout(F16).slab_bytes()];
    encode(pools.layout(F16), &k, &v, &mut ring);
    let head = HeadView { pools: &pools, table: &[], ring: &ring, len: 2, packed: 0 };
    let mut q = vec![0.0; 64];
    q[0] = 3f32.ln();
    let plain = Scores { scale: 1.0, ..Scores::default() };
    // Channel 0 and lse of one row.
    let one = |head: HeadView<'_>, scores: Scores<'_>| {
        let (out, lse) = oracle(&q, 1, &[head], &scores);
        assert!(out[1..].iter().all(|&x| x == 0.0));
        (out[0], lse[0])
    };
    let near = |got: (f64, f64), out: f64, lse: f64| {
        assert!(
            (got.0 - out).abs() < 1e-6 && (got.1 - lse).abs() < 1e-6,
            "{got:?}, want {out} {lse}"
        );
    };
    near(one(head, plain), 2.5, 4f64.ln());
    let mask = Mask { sliding_window: Some(1) };
    near(one(head, Scores { mask, ..plain }), 4.0, 0.0);
    assert_eq!(one(HeadView { len: 0, ..head }, plain), (0.0, f64::NEG_INFINITY));
    // Norms 2 and 5: weights 9 and 1. A cap of c: the score becomes c tanh(ln 3 / c). A sink of ln 4: weights
    // 3, 1 and 4. R exchanges channels 0 and 1: weights 1 and 3.
    near(one(head, Scores { k_norm: Some(&[2.0, 5.0]), ..plain }), 2.2, 10f64.ln());
    let e = (2.0 * (3f64.ln() / 2.0).tanh()).exp(); // tanh(ln(3) / 2) = 1/2: e = exp(1)
    assert!((e - 1f64.exp()).abs() < 1e-9);
    let capped = (2.0 * e + 4.0) / (e + 1.0);
    near(one(head, Scores { softcap: 2.0, ..plain }), capped, (e + 1.0).ln());
    near(one(head, Scores { sinks: Some(&[4f32.ln()]), ..plain }), 1.25, 8f64.ln());
    let alone = one(HeadView { len: 0, ..head }, Scores { sinks: Some(&[0.5]), ..plain });
    assert_eq!(alone, (0.0, 0.5));
    let mut exchange = vec![0.0; 64 * 64];
    (exchange[1], exchange[64]) = (1.0, 1.0);
    near(one(head, Scores { rotation: Some(&exchange), ..plain }), 3.5, 4f64.ln());
    // Three rows of two tokens: the first sees none, the second one, the third both.
    let rows = [&q[..], &q[..], &q[..]].concat();
    let (out, lse) = oracle(&rows, 3, &[head], &plain);
    assert_eq!((out[0], lse[0]), (0.0, f64::NEG_INFINITY));
    near((out[64], lse[1]), 2.0, 3f64.ln());
    near((out[128], lse[2]), 2.5, 4f64.ln());
}

/// Params that pass the check; pointers lead nowhere.
fn valid_params() -> Params {
    let mut pools = ffi::kvw_cache::default().pools;
    pools[Q2 as usize] = somewhere();
    let cache = ffi::kvw_cache {
        pools,
        ring: somewhere(),
        table: somewhere::<u32>(),
        lens: somewhere::<i32>(),
        seqs: 1,
        kv_heads: 2,
        head_dim: 128,
        group: 32,
        window: 64,
        ring_slabs: 2,
        table_stride: 8,
        table_heads: 2,
        lens_heads: 1,
        ..Default::default()
    };
    Params {
        struct_size: size_of::<Params>() as u32,
        q_heads: 8,
        cache,
        q: somewhere::<u8>().cast(),
        out: somewhere(),
        workspace: somewhere(),
        workspace_bytes: 1 << 30,
        q_len: 1,
        max_slabs: 10,
        dtype: ffi::KVW_F16,
        ..Default::default()
    }
}

#[test]
fn c_checks_need_no_gpu() {
    let (op, valid) = (op!(kvw_paged_attn), valid_params());
    op.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size += 8, ffi::KVW_ERR_STRUCT),
            ("q", |p| p.q = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("ring", |p| p.cache.ring = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("lens", |p| p.cache.lens = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("table", |p| p.cache.table = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("workspace", |p| p.workspace = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("workspace_bytes", |p| p.workspace_bytes = 15, ffi::KVW_ERR_WORKSPACE),
            ("lse unaligned", |p| p.lse = 4 as _, ffi::KVW_ERR_ALIGN),
            ("rotation unaligned", |p| p.rotation = 8 as _, ffi::KVW_ERR_ALIGN),
            ("sinks unaligned", |p| p.sinks = 4 as _, ffi::KVW_ERR_ALIGN),
            ("k_norm unaligned", |p| (p.k_norm, p.k_norm_stride) = (4 as _, 9), ffi::KVW_ERR_ALIGN),
            ("pool unaligned", |p| p.cache.pools[3] = 8 as _, ffi::KVW_ERR_ALIGN),
            ("ring unaligned", |p| p.cache.ring = 8 as _, ffi::KVW_ERR_ALIGN),
            ("group", |p| p.cache.group = 16, ffi::KVW_ERR_FORMAT),
            ("dtype", |p| p.dtype = ffi::KVW_F32, ffi::KVW_ERR_FORMAT),
            ("head_dim", |p| p.cache.head_dim = 80, ffi::KVW_ERR_SHAPE),
            ("heads", |p| p.cache.kv_heads = 0, ffi::KVW_ERR_SHAPE),
            ("q_heads", |p| p.q_heads = 7, ffi::KVW_ERR_SHAPE),
            ("17 query heads a kv head", |p| p.q_heads = 34, ffi::KVW_ERR_SHAPE),
            ("q_len", |p| p.q_len = 0, ffi::KVW_ERR_SHAPE),
            ("q_len of 17", |p| p.q_len = 17, ffi::KVW_ERR_SHAPE),
            ("window", |p| p.cache.window = -1, ffi::KVW_ERR_SHAPE),
            ("ring_slabs", |p| p.cache.ring_slabs = 1, ffi::KVW_ERR_SHAPE),
            ("table_heads", |p| p.cache.table_heads = 3, ffi::KVW_ERR_SHAPE),
            ("a CSR row a head", |p| p.cache.indptr = 16 as _, ffi::KVW_ERR_SHAPE),
            ("table_stride", |p| p.cache.table_stride = 0, ffi::KVW_ERR_SHAPE),
            ("lens_heads", |p| p.cache.lens_heads = 3, ffi::KVW_ERR_SHAPE),
            ("meta", |p| p.cache.meta = 2, ffi::KVW_ERR_FORMAT),
            ("max_slabs", |p| p.max_slabs = 0, ffi::KVW_ERR_SHAPE),
            ("max_slabs of 2^31 units", |p| p.max_slabs = 1 << 30, ffi::KVW_ERR_SHAPE),
            ("ctas", |p| p.ctas = -1, ffi::KVW_ERR_SHAPE),
            ("ctas, too many", |p| p.ctas = 4097, ffi::KVW_ERR_SHAPE),
            ("least", |p| p.least = -1, ffi::KVW_ERR_SHAPE),
            ("least, too many", |p| p.least = 65537, ffi::KVW_ERR_SHAPE),
            ("sliding_window", |p| p.sliding_window = -1, ffi::KVW_ERR_SHAPE),
            ("k_norm_stride of 0", |p| p.k_norm = 16 as _, ffi::KVW_ERR_SHAPE),
            ("scale", |p| p.scale = -1.0, ffi::KVW_ERR_SHAPE),
            ("scale NaN", |p| p.scale = f32::NAN, ffi::KVW_ERR_SHAPE),
            ("softcap", |p| p.softcap = -1.0, ffi::KVW_ERR_SHAPE),
            ("softcap infinite", |p| p.softcap = f32::INFINITY, ffi::KVW_ERR_SHAPE),
        ],
    );
    // Two ring slabs and eight of q2 a head, q and out.
    assert_eq!(op.bytes(&valid), 2 * (2 * 32768 + 8 * 6144) + 2 * 8 * 128 * 2);
    assert_eq!(op.bytes(&Params { q_len: 3, ..valid }), op.bytes(&valid) + 2 * 2 * 8 * 128 * 2);
    // The largest numbers that are accepted.
    let largest = Params { sliding_window: i32::MAX, ctas: 4096, least: 65536, ..valid };
    assert_eq!(op.bytes(&largest), op.bytes(&valid));
    assert!(op.bytes(&Params { max_slabs: (1 << 30) - 7, ..valid }) > 0);
}

#[test]
fn executors_match_oracle() {
    for exec in everyone(5) {
        let run = exec.start();
        let hopper = matches!(exec, Exec::SimtChecked(seed) if seed % 2 == 1);
        let check = |what: &str, spec: Spec, call: Call| {
            matches(&run, &spec, Call { hopper, ..call })
                .unwrap_or_else(|e| panic!("{exec:?}: {what}: {e}"));
        };
        check("mixed formats", mixed(), CALL);
        check("cuts", mixed(), Call { ctas: 4, ..CALL });
        check("a ring only", Spec { packed: Some(0), ..mixed() }, Call { ctas: 3, ..CALL });
        check("a table only", Spec { packed: Some(99), ..mixed() }, CALL);
        check("sliding", mixed(), Call { sliding_window: 301, ctas: 2, ..CALL });
    }
}

#[test]
fn every_shape_matches_oracle() {
    for exec in everyone(0) {
        let check = |spec: Spec, call: Call| {
            let what = format!("{exec:?}: D {} group {} G {}", spec.head_dim, spec.group, call.g);
            matches(&exec.start(), &spec, call).unwrap_or_else(|e| panic!("{what}: {e}"));
        };
        for head_dim in [64, 96, 128, 256] {
            for group in [32, 64, 128] {
                let formats = vec![Some(Q2), Some(Q4), Some(F16), Some(Q8)];
                let spec = Spec { head_dim, group, formats, lens: vec![500, 129], ..mixed() };
                check(spec.clone(), CALL);
                check(spec, Call { g: 11, ctas: 5, hopper: true, ..CALL });
            }
        }
        for g in [1, 2, 3, 5, 6, 7, 8, 9, 12, 16] {
            check(mixed(), Call { g, ctas: 3, ..CALL });
        }
    }
}

#[test]
fn faults_are_caught() {
    let small = Spec { lens: vec![64 * 7 + 21], ..mixed() };
    let with = |call: Call| {
        let small = &small;
        move |run: &Run| matches(run, small, call)
    };
    let (plain, cut) = (with(CALL), with(Call { ctas: 3, ..CALL }));
    let sliding = with(Call { sliding_window: 230, ..CALL });
    let rows = with(Call { q_len: 3, ..CALL });
    assert_caught(100, "a step is read before its copy has landed", plain);
    assert_caught(101, "a buffer is filled again while lanes still read it", plain);
    assert_caught(102, "registers 1 and 2 of an A fragment are swapped", plain);
    assert_caught(103, "the tail holds a token too many", plain);
    assert_caught(104, "the second K group is read with the first one's scales", plain);
    assert_caught(105, "the ring's slabs are taken one slot late", plain);
    assert_caught(106, "query heads are interleaved over kv heads", plain);
    assert_caught(107, "outputs are not rescaled when the maximum grows", plain);
    assert_caught(108, "the last part is lost in the merge", cut);
    assert_caught(109, "V past the length is used as it lies there", plain);
    assert_caught(110, "the sliding window is a token short", sliding);
    assert_caught(111, "codes of different formats are added as if they read alike", plain);
    assert_caught(113, "warps merge before all have written", plain);
    assert_caught(114, "V of tokens 8 to 15 is scaled like V of tokens 0 to 7", plain);
    assert_caught(130, "rows and heads change places in the masks", rows);
    assert_caught(131, "the cap is not the one given", with(Call { softcap: 1.5, ..CALL }));
    assert_caught(132, "parts are handed in without a fence", cut);
    assert_caught(133, "a ticket is not taken back", cut);
    assert_caught(134, "both parts of a CTA go to one place", cut);
    assert_caught(135, "a unit at a cut is taken twice", cut);
    let across = |run: &Run| {
        matches(run, &Spec { lens: vec![64 * 3 + 2], ..mixed() }, Call { q_len: 5, ..CALL })
    };
    assert_caught(136, "slabs that the last row sees whole are masked for none", across);
    assert_caught(137, "all heads have the first one's sink", with(Call { sinks: true, ..CALL }));
    assert_caught(138, "norms are taken one token late", with(Call { k_norm: true, ..CALL }));
    assert_caught(139, "rows of the rotation are exchanged", with(Call { rotation: true, ..CALL }));
    let hopper = with(Call { hopper: true, ..CALL });
    assert_caught(100, "a step is read before its bulk copy has landed", hopper);
    assert_caught(101, "a buffer is filled again by a bulk copy while lanes still read it", hopper);
    assert_caught(141, "every round of the ring waits for the first one's phase", hopper);
    assert_caught(142, "a bulk copy follows stores without a fence between the proxies", hopper);
}
