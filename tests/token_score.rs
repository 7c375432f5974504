//! token_score: every executor and the CPU path against the f64 oracle over the dequantised cache.

mod kernel;

use crate::cache::Spec;
use crate::cases::somewhere;
use crate::exec::{Run, assert_caught, everyone, op};
use half::f16;
use kernel::{Call, lse_matches, matches};
use kvwarp::ffi::{self, kvw_token_score_params as Params};
use kvwarp::pages::{HeadView, Pools};
use kvwarp::slab::Format::{F16, Fp8, Q2, Q4, Q8};
use kvwarp::slab::{Meta, encode};
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

#[test]
fn c_checks_need_no_gpu() {
    let cache = ffi::kvw_cache {
        ring: somewhere(),
        lens: somewhere::<i32>(),
        packed: somewhere::<i32>(),
        seqs: 2,
        kv_heads: 2,
        head_dim: 64,
        group: 32,
        ring_slabs: 40,
        table_heads: 1,
        lens_heads: 2,
        ..Default::default()
    };
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        op: ffi::KVW_SCORE_SUM,
        cache,
        q: somewhere::<u8>().cast(),
        lse: somewhere(),
        scores: somewhere(),
        cu_tokens: somewhere::<i32>(),
        q_heads: 6,
        tokens: 100,
        max_tokens: 60,
        lse_rows: 8,
        columns: 130,
        dtype: ffi::KVW_F16,
        ..Default::default()
    };
    let op = op!(kvw_token_score);
    op.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 0, ffi::KVW_ERR_STRUCT),
            ("op", |p| p.op = 3, ffi::KVW_ERR_SHAPE),
            ("q", |p| p.q = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("lse", |p| p.lse = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("scores", |p| p.scores = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("cu_tokens", |p| p.cu_tokens = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("q unaligned", |p| p.q = 2 as _, ffi::KVW_ERR_ALIGN),
            ("first unaligned", |p| p.first = 4 as _, ffi::KVW_ERR_ALIGN),
            ("seen unaligned", |p| p.seen = 4 as _, ffi::KVW_ERR_ALIGN),
            ("lens", |p| p.cache.lens = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("group", |p| p.cache.group = 48, ffi::KVW_ERR_FORMAT),
            ("q_heads", |p| p.q_heads = 5, ffi::KVW_ERR_SHAPE),
            ("17 query heads a kv head: q_heads", |p| p.q_heads = 34, ffi::KVW_ERR_SHAPE),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("max_tokens", |p| p.max_tokens = 101, ffi::KVW_ERR_SHAPE),
            ("lse_rows", |p| p.lse_rows = 0, ffi::KVW_ERR_SHAPE),
            ("columns", |p| p.columns = 0, ffi::KVW_ERR_SHAPE),
            ("max_slabs", |p| p.max_slabs = -1, ffi::KVW_ERR_SHAPE),
            ("accumulate", |p| p.accumulate = 2, ffi::KVW_ERR_SHAPE),
            ("ranges without seen", |p| p.ranges = 1, ffi::KVW_ERR_SHAPE),
            ("dtype", |p| p.dtype = ffi::KVW_F32, ffi::KVW_ERR_FORMAT),
            ("scale", |p| p.scale = f32::NAN, ffi::KVW_ERR_SHAPE),
        ],
    );
    let by_row =
        Params { op: ffi::KVW_SCORE_LSE, scores: std::ptr::null_mut(), columns: 0, ..valid };
    op.refuses(
        by_row,
        &[
            ("lse", |p| p.lse = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("ranges with seen", |p| p.seen = somewhere::<i32>(), ffi::KVW_ERR_SHAPE),
            ("accumulate", |p| p.accumulate = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    // 16 rows of queries and their log-sum-exps, K of 3 slabs of f16, scores.
    let rows = 16 * 6 * (64 * 2 + 4);
    assert_eq!(op.bytes(&valid), rows + 4 * 3 * 64 * 64 * 2 + 2 * 6 * 130 * 4);
    let max = Params { op: ffi::KVW_SCORE_MAX, accumulate: 1, ..valid };
    assert_eq!(op.bytes(&max), rows + 4 * 3 * 64 * 64 * 2 + 2 * 2 * 130 * 8);
    assert_eq!(op.bytes(&Params { max_slabs: 5, ..by_row }), rows + 4 * 5 * 64 * 64 * 2);
    assert_eq!(op.workspace(&valid), 0);
}

/// History in every format and a hole, then 150 rows that end in a tail; the last 130 take part.
fn chunk() -> (Spec, Call) {
    let formats = vec![Some(Q2), None, Some(F16), Some(Q4), Some(Q2), Some(Q8)];
    let (lens, outlier) = (vec![64 * 5 + 150], 4.0);
    let spec = Spec { formats, lens, packed: Some(5), heads: 1, outlier, ..Spec::default() };
    let call = Call {
        g: 3,
        rows: vec![150],
        lse_rows: 130,
        bf16: false,
        back: None,
        columns: 480,
        accumulate: false,
        seen: vec![],
        scale: 0.2,
    };
    (spec, call)
}

/// Both reductions, and the log-sum-exps.
fn all(run: &Run, spec: &Spec, call: &Call) -> Result<(), String> {
    matches(run, spec, call, Reduce::Sum)?;
    matches(run, spec, call, Reduce::Max)?;
    lse_matches(run, spec, call)
}

#[test]
fn executors_match_oracle() {
    for exec in everyone(3) {
        let run = exec.start();
        let check = |what: &str, spec: &Spec, call: &Call| {
            all(&run, spec, call).unwrap_or_else(|e| panic!("{exec:?}: {what}: {e}"));
        };
        let (spec, call) = chunk();
        check("a chunk", &spec, &call);
        check("bf16", &spec, &Call { bf16: true, ..call.clone() });
        check("in pieces", &spec, &Call { accumulate: true, ..call.clone() });
        let window = Call { lse_rows: 8, back: Some(470), columns: 400, ..call.clone() };
        check("a window", &spec, &window);
        check("some columns", &spec, &Call { back: Some(333), columns: 70, ..call.clone() });
        check("columns past the end", &spec, &Call { back: Some(30), columns: 90, ..call.clone() });
        let seen = vec![3..4, 63..65, 100..101, 130..330, 400..9999];
        check("ranges", &spec, &Call { seen, lse_rows: 150, ..call.clone() });
        check("a range after all", &spec, &Call { seen: vec![470..499, 499..500], ..call.clone() });
        let loud = Call { scale: 5.0, ..call.clone() };
        lse_matches(&run, &spec, &loud).unwrap_or_else(|e| panic!("{exec:?}: loud: {e}"));
        let ring = Spec { packed: None, lens: vec![400], heads: 2, ..spec.clone() };
        check("a decoder's cache", &ring, &Call { rows: vec![40], ..call.clone() });
        let a_head = Spec { heads: 2, per_head: true, ..spec.clone() };
        check("lengths a head", &a_head, &Call { rows: vec![90], back: Some(200), ..call.clone() });
        let holes = Spec { formats: vec![None], ..spec.clone() };
        check("nothing but holes", &holes, &Call { rows: vec![40], ..call.clone() });
        let lens = vec![1, 65, 90, 200, 130];
        let ragged = Spec { lens, packed: Some(1), shared_rows: true, csr: true, ..spec };
        let rows = vec![1, 3, 0, 100, 66];
        let call = Call { g: 2, rows, lse_rows: 70, columns: 150, ..call };
        check("ragged", &ragged, &call);
        check("ragged pieces", &ragged, &Call { accumulate: true, ..call });
    }
}

#[test]
fn every_shape_matches_oracle() {
    for exec in everyone(0) {
        let run = exec.start();
        let check = |spec: &Spec, call: &Call| {
            let (d, group, meta, g) = (spec.head_dim, spec.group, spec.meta, call.g);
            all(&run, spec, call)
                .unwrap_or_else(|e| panic!("{exec:?}: {d} {group} {meta:?} {g}: {e}"));
        };
        let (spec, call) = chunk();
        for head_dim in [64, 96, 128, 256] {
            for group in [32, 64, 128] {
                check(&Spec { head_dim, group, ..spec.clone() }, &call);
            }
            for group in [32, 64] {
                let formats = vec![Some(Q2), Some(Q4), Some(F16)];
                let meta = Meta::U8;
                check(&Spec { head_dim, group, formats, meta, ..spec.clone() }, &call);
            }
            check(&Spec { head_dim, formats: vec![Some(Fp8), None], ..spec.clone() }, &call);
        }
        for g in [1, 2, 4, 5, 7, 8, 12, 16] {
            check(&spec, &Call { g, rows: vec![70], ..call.clone() });
        }
    }
}

#[test]
fn faults_are_caught() {
    let (spec, call) = chunk();
    let sum = |run: &Run| matches(run, &spec, &call, Reduce::Sum);
    let max = |run: &Run| matches(run, &spec, &call, Reduce::Max);
    let lse = |run: &Run| lse_matches(run, &spec, &call);
    let scores_far_apart = Call { scale: 5.0, ..call.clone() };
    let loud = |run: &Run| lse_matches(run, &spec, &scores_far_apart);
    let back = Call { back: Some(333), columns: 350, accumulate: true, ..call.clone() };
    let pieces = |run: &Run| matches(run, &spec, &back, Reduce::Sum);
    let some = Call { seen: vec![3..4, 100..200], ..call.clone() };
    let ranges = |run: &Run| lse_matches(run, &spec, &some);
    assert_caught(105, "the ring's slabs are taken one slot late", sum);
    assert_caught(123, "log-sum-exps are a row late", max);
    assert_caught(126, "columns run over rows first, then heads", sum);
    assert_caught(371, "registers 1 and 2 of an A fragment are swapped", sum);
    assert_caught(372, "raw queries are read before their copy has landed", sum);
    assert_caught(373, "a row sees the token after it", max);
    assert_caught(374, "a row of minus infinity counts", sum);
    assert_caught(375, "sums are not begun again for the next head", sum);
    assert_caught(376, "columns are counted from the slab's first token", pieces);
    assert_caught(377, "tokens past the length are scored", sum);
    assert_caught(378, "what the scores held is forgotten", pieces);
    assert_caught(379, "fragments are overwritten while warps still read them", sum);
    assert_caught(380, "a slab is overwritten while warps still read it", lse);
    assert_caught(381, "a range begins with its slab", ranges);
    assert_caught(382, "lanes' sums are added whatever they are relative to", lse);
    assert_caught(383, "a sum is not rescaled when its reference moves", loud);
    assert_caught(384, "a slab is read before its copy has landed", lse);
    assert_caught(120, "a row's softmax sees the token after it", lse);
}
