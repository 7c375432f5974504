//! paged_attn: every executor against the f64 oracle over the dequantised cache.

use crate::cache::{Cache, Spec};
use crate::cases::{Noise, close, f64s, relative_l2, somewhere, widen};
use crate::exec::{Run, assert_caught, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_paged_attn_params as Params};
use kvwarp::paged_attn::{Mask, oracle};
use kvwarp::pages::{HeadView, Pools};
use kvwarp::slab::Format::{F16, Q2, Q4, Q8};
use kvwarp::slab::encode;

/// How the op is called on a cache.
#[derive(Clone, Copy)]
pub struct Call {
    pub g: usize,
    pub splits: i32,
    pub sliding_window: usize,
    pub scale: f32,
}

pub const CALL: Call = Call { g: 4, splits: 1, sliding_window: 0, scale: 0.0 };

struct Outcome {
    out: Vec<f32>,
    lse: Vec<f32>,
}

/// Half as large as K; less where K has its outliers, so that scores stay of order one.
fn queries(cache: &Cache, g: usize) -> Vec<f16> {
    let d = cache.spec.head_dim;
    let n = cache.spec.lens.len() * cache.spec.heads * g * d;
    let mut noise = Noise(77);
    let size = |c: usize| if c == 5 || c == d - 3 { 0.5 / cache.spec.outlier } else { 0.5 };
    (0..n).map(|i| f16::from_f32(size(i % d) * noise.unit())).collect()
}

fn run_op(run: &Run, cache: &Cache, call: Call) -> Result<Outcome, String> {
    let (device, q) = (cache.upload(run), queries(cache, call.g));
    let rows = q.len() / cache.spec.head_dim;
    let (q, out) = (run.upload("q", &q), run.alloc::<f16>("out", q.len()));
    let lse = run.alloc::<f32>("lse", rows);
    let mut params = Params {
        struct_size: size_of::<Params>() as u32,
        q_heads: (cache.spec.heads * call.g) as i32,
        cache: device.params(),
        q: q.ptr().cast(),
        out: out.ptr().cast(),
        lse: lse.ptr(),
        workspace: std::ptr::null_mut(),
        workspace_bytes: 0,
        max_slabs: cache.max_slabs() as i32,
        splits: call.splits,
        sliding_window: call.sliding_window as i32,
        scale: call.scale,
    };
    params.workspace_bytes = op!(kvw_paged_attn).workspace(&params);
    let workspace = run.alloc::<u8>("workspace", params.workspace_bytes.max(16));
    params.workspace = workspace.ptr().cast();
    run.call(&op!(kvw_paged_attn), &params)?;
    Ok(Outcome { out: widen(&out.download()), lse: lse.download() })
}

/// Relative L2 of the whole output at most `most`, empty heads exactly zero, lse within twice that.
fn compare(cache: &Cache, call: Call, got: &Outcome, most: f64) -> Result<(), String> {
    let q = widen(&queries(cache, call.g));
    let mask = Mask { sliding_window: (call.sliding_window > 0).then_some(call.sliding_window) };
    let (mut want, mut want_lse) = (Vec::new(), Vec::new());
    for (s, q) in q.chunks(q.len() / cache.spec.lens.len()).enumerate() {
        let (out, lse) = oracle(q, &cache.heads(s), call.scale, mask);
        want.extend(out);
        want_lse.extend(lse);
    }
    close("lse", &got.lse, &want_lse, 2.0 * most, 1e-3)?;
    for (row, lse) in got.out.chunks(cache.spec.head_dim).zip(&want_lse) {
        if *lse == f64::NEG_INFINITY && row.iter().any(|&x| x != 0.0) {
            return Err("a head without tokens is not zero".into());
        }
    }
    let error = relative_l2(&got.out, &want);
    if error <= most { Ok(()) } else { Err(format!("relative L2 {error:.2e}")) }
}

pub fn matches(run: &Run, spec: &Spec, call: Call) -> Result<(), String> {
    let cache = Cache::new(spec, 5);
    compare(&cache, call, &run_op(run, &cache, call)?, 1e-3)
}

/// Every format and a hole in turn; each warp wraps its two buffers; the last slab has a tail.
fn mixed() -> Spec {
    let formats = vec![Some(Q2), Some(F16), None, Some(Q4), Some(Q2), Some(Q8), Some(Q4)];
    Spec { formats, lens: vec![64 * 13 + 21], ..Spec::default() }
}

/// Sequences of every awkward length, heads of different lengths.
fn ragged() -> Spec {
    let lens = vec![0, 1, 31, 33, 63, 64, 65, 127, 129, 400];
    let formats = vec![Some(Q2), Some(Q4), None, Some(F16), Some(Q8)];
    Spec { lens, heads: 3, per_head: true, formats, ..mixed() }
}

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
    let (out, lse) = oracle(&q, &[head], 1.0, Mask::default());
    assert!((out[0] - 2.5).abs() < 1e-6 && out[1] == 0.0, "{out:?}");
    assert!((lse[0] - 4f64.ln()).abs() < 1e-6, "{lse:?}");
    let (out, lse) = oracle(&q, &[head], 1.0, Mask { sliding_window: Some(1) });
    assert_eq!((out[0], lse[0]), (4.0, 0.0));
    let (out, lse) = oracle(&q, &[HeadView { len: 0, ..head }], 1.0, Mask::default());
    assert_eq!((out[0], lse[0]), (0.0, f64::NEG_INFINITY));
}

#[test]
fn c_checks_need_no_gpu() {
    let mut pools = [std::ptr::null_mut(); 4];
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
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        q_heads: 8,
        cache,
        q: somewhere::<u8>().cast(),
        out: somewhere(),
        workspace: somewhere(),
        workspace_bytes: 1 << 30,
        max_slabs: 10,
        ..Default::default()
    };
    let op = op!(kvw_paged_attn);
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
            ("pool unaligned", |p| p.cache.pools[3] = 8 as _, ffi::KVW_ERR_ALIGN),
            ("ring unaligned", |p| p.cache.ring = 8 as _, ffi::KVW_ERR_ALIGN),
            ("group", |p| p.cache.group = 16, ffi::KVW_ERR_FORMAT),
            ("head_dim", |p| p.cache.head_dim = 80, ffi::KVW_ERR_SHAPE),
            ("heads", |p| p.cache.kv_heads = 0, ffi::KVW_ERR_SHAPE),
            ("q_heads", |p| p.q_heads = 7, ffi::KVW_ERR_SHAPE),
            ("17 query heads a kv head", |p| p.q_heads = 34, ffi::KVW_ERR_SHAPE),
            ("window", |p| p.cache.window = -1, ffi::KVW_ERR_SHAPE),
            ("ring_slabs", |p| p.cache.ring_slabs = 1, ffi::KVW_ERR_SHAPE),
            ("table_heads", |p| p.cache.table_heads = 3, ffi::KVW_ERR_SHAPE),
            ("a CSR row a head", |p| p.cache.indptr = 16 as _, ffi::KVW_ERR_SHAPE),
            ("table_stride", |p| p.cache.table_stride = 0, ffi::KVW_ERR_SHAPE),
            ("lens_heads", |p| p.cache.lens_heads = 3, ffi::KVW_ERR_SHAPE),
            ("cache.reserved", |p| p.cache.reserved = 1, ffi::KVW_ERR_SHAPE),
            ("max_slabs", |p| p.max_slabs = 0, ffi::KVW_ERR_SHAPE),
            ("splits", |p| p.splits = -1, ffi::KVW_ERR_SHAPE),
            ("many splits", |p| p.splits = 1025, ffi::KVW_ERR_SHAPE),
            ("sliding_window", |p| p.sliding_window = -1, ffi::KVW_ERR_SHAPE),
            ("scale", |p| p.scale = -1.0, ffi::KVW_ERR_SHAPE),
            ("scale NaN", |p| p.scale = f32::NAN, ffi::KVW_ERR_SHAPE),
        ],
    );
    // Two ring slabs and eight of q2 a head, q and out.
    assert_eq!(op.bytes(&valid), 2 * (2 * 32768 + 8 * 6144) + 2 * 8 * 128 * 2);
    assert_eq!(op.workspace(&Params { splits: 3, ..valid }), 8 * 3 * (128 + 4) * 4);
    assert_eq!(op.workspace(&Params { splits: 1, ..valid }), 0);
    assert_eq!(op.workspace(&valid), op.workspace(&Params { splits: 2, ..valid }));
    // The largest numbers that are accepted; 200 tokens lie in at most five slabs, too few to split.
    assert_eq!(op.bytes(&Params { sliding_window: i32::MAX, ..valid }), op.bytes(&valid));
    let longest = Params { max_slabs: i32::MAX, ..valid };
    assert_eq!(op.workspace(&longest), op.workspace(&Params { splits: 64, ..valid }));
    assert_eq!(op.workspace(&Params { sliding_window: 200, ..longest }), 0);
}

#[test]
fn executors_match_oracle() {
    for exec in executors(7) {
        let run = exec.start();
        let check = |what: &str, spec: Spec, call: Call| {
            matches(&run, &spec, call).unwrap_or_else(|e| panic!("{exec:?}: {what}: {e}"));
        };
        check("mixed formats", mixed(), CALL);
        check("splits", mixed(), Call { splits: 3, ..CALL });
        check("a ring only", Spec { packed: Some(0), ..mixed() }, CALL);
        check("a table only", Spec { packed: Some(99), ..mixed() }, CALL);
        check("sliding", mixed(), Call { sliding_window: 301, splits: 2, ..CALL });
    }
}

#[test]
fn ragged_batches_match_oracle() {
    for exec in executors(1) {
        for (shared_rows, csr) in [(false, false), (true, false), (true, true)] {
            let spec = Spec { shared_rows, csr, ..ragged() };
            for splits in [0, 1, 4] {
                let call = Call { splits, g: 2, scale: 0.3, ..CALL };
                matches(&exec.start(), &spec, call).unwrap_or_else(|e| panic!("{exec:?}: {e}"));
            }
        }
    }
}

#[test]
fn every_shape_matches_oracle() {
    for exec in executors(0) {
        let check = |spec: Spec, call: Call| {
            let what = format!("{exec:?}: D {} group {} G {}", spec.head_dim, spec.group, call.g);
            matches(&exec.start(), &spec, call).unwrap_or_else(|e| panic!("{what}: {e}"));
        };
        for head_dim in [64, 96, 128, 256] {
            for group in [32, 64, 128] {
                let formats = vec![Some(Q2), Some(Q4), Some(F16), Some(Q8)];
                let spec = Spec { head_dim, group, formats, lens: vec![700, 129], ..mixed() };
                check(spec.clone(), CALL);
                check(spec, Call { g: 11, ..CALL });
            }
        }
        for g in [1, 2, 3, 5, 6, 7, 8, 12, 16] {
            check(mixed(), Call { g, splits: 2, ..CALL });
        }
    }
}

#[test]
fn splits_agree_and_repeat_bit_for_bit() {
    for exec in executors(0) {
        let cache = Cache::new(&mixed(), 5);
        let run = |splits| run_op(&exec.start(), &cache, Call { splits, ..CALL }).unwrap();
        let one = run(1);
        for splits in 1..=9 {
            let (a, b) = (run(splits), run(splits));
            assert!(a.out == b.out && a.lse == b.lse, "{exec:?}: {splits} splits do not repeat");
            close("lse", &a.lse, &f64s(&one.lse), 1e-5, 1e-6).unwrap();
            let apart = relative_l2(&a.out, &f64s(&one.out));
            assert!(apart <= 1e-5, "{exec:?}: {splits} splits differ by {apart:.2e}");
        }
    }
}

#[test]
fn the_largest_keys_neither_overflow_nor_drown_the_others() {
    for exec in executors(1) {
        // Queries that are tiny there: normalised to 1/16 of their largest they are subnormal, hence the error.
        let cache = Cache::new(&Spec { outlier: 30000.0, ..mixed() }, 5);
        let got = run_op(&exec.start(), &cache, CALL).unwrap();
        compare(&cache, CALL, &got, 5e-3).unwrap_or_else(|e| panic!("{exec:?}: {e}"));
        // Scores of 10^4 and more: one token takes all.
        let got = run_op(&exec.start(), &cache, Call { scale: 1e4, ..CALL }).unwrap();
        assert!(got.out.iter().chain(&got.lse).all(|x| x.is_finite()), "{exec:?}: {:?}", got.lse);
    }
}

#[test]
fn faults_are_caught() {
    let plain = |run: &Run| matches(run, &mixed(), CALL);
    let split = |run: &Run| matches(run, &mixed(), Call { splits: 3, ..CALL });
    let sliding = |run: &Run| matches(run, &mixed(), Call { sliding_window: 301, ..CALL });
    assert_caught(100, "a step is read before its copy has landed", plain);
    assert_caught(101, "a buffer is filled again while lanes still read it", plain);
    assert_caught(102, "registers 1 and 2 of an A fragment are swapped", plain);
    assert_caught(103, "the tail holds a token too many", plain);
    assert_caught(104, "the second K group is read with the first one's scales", plain);
    assert_caught(105, "the ring's slabs are taken one slot late", plain);
    assert_caught(106, "query heads are interleaved over kv heads", plain);
    assert_caught(107, "outputs are not rescaled when the maximum grows", plain);
    assert_caught(108, "the last split is lost in the merge", split);
    assert_caught(109, "V past the length is used as it lies there", plain);
    assert_caught(110, "the sliding window is a token short", sliding);
    assert_caught(111, "codes of different formats are added as if they read alike", plain);
    assert_caught(113, "warps merge before all have written", plain);
    assert_caught(114, "V of tokens 8 to 15 is scaled like V of tokens 0 to 7", plain);
}
