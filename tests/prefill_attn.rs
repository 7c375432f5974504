//! prefill_attn: every executor against the f64 oracle over the dequantised cache.

use crate::cache::{Cache, Spec};
use crate::cases::{Noise, close, relative_l2, somewhere};
use crate::exec::{Run, assert_caught, everyone, op};
use half::{bf16, f16};
use kvwarp::ffi::{self, kvw_prefill_attn_params as Params};
use kvwarp::pages::{HeadView, Pools};
use kvwarp::prefill_attn::{Mask, oracle};
use kvwarp::slab::Format::{F16, Q2, Q4, Q8};
use kvwarp::slab::encode;

/// How the op is called on a cache; `rows[s]` query rows, `lse_rows` of them with a log-sum-exp.
#[derive(Clone)]
pub struct Call {
    pub g: usize,
    pub rows: Vec<usize>,
    pub lse_rows: usize,
    pub sliding_window: usize,
    pub bf16: bool,
}

impl Call {
    /// Elements of the dtype of the call, and numbers from them.
    fn narrow(&self, x: f32) -> u16 {
        if self.bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() }
    }

    fn widen(&self, x: &[u16]) -> Vec<f32> {
        let one =
            |&x| if self.bf16 { bf16::from_bits(x).to_f32() } else { f16::from_bits(x).to_f32() };
        x.iter().map(one).collect()
    }
}

fn queries(cache: &Cache, call: &Call) -> Vec<u16> {
    let n = call.rows.iter().sum::<usize>() * cache.spec.heads * call.g * cache.spec.head_dim;
    let mut noise = Noise(78);
    (0..n).map(|_| call.narrow(0.5 * noise.unit())).collect()
}

pub fn matches(run: &Run, spec: &Spec, call: &Call) -> Result<(), String> {
    let cache = Cache::new(spec, 6);
    let (device, q) = (cache.upload(run), queries(&cache, call));
    let q_heads = spec.heads * call.g;
    let (q_mem, out) = (run.upload("q", &q), run.alloc::<u16>("out", q.len()));
    let lse = run.upload("lse", &vec![7.0f32; spec.lens.len() * call.lse_rows * q_heads]);
    let mut starts = vec![0];
    call.rows.iter().for_each(|n| starts.push(starts.last().unwrap() + *n as i32));
    let cu_tokens = run.upload("cu_tokens", &starts);
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        q_heads: q_heads as i32,
        cache: device.params(),
        q: q_mem.ptr().cast(),
        out: out.ptr().cast(),
        lse: lse.ptr(),
        cu_tokens: cu_tokens.ptr(),
        tokens: *starts.last().unwrap(),
        max_tokens: *call.rows.iter().max().unwrap() as i32,
        lse_rows: call.lse_rows as i32,
        sliding_window: call.sliding_window as i32,
        dtype: if call.bf16 { ffi::KVW_BF16 } else { ffi::KVW_F16 },
        scale: 0.2,
        ..Default::default()
    };
    run.call(&op!(kvw_prefill_attn), &params)?;

    let mask = Mask { sliding_window: (call.sliding_window > 0).then_some(call.sliding_window) };
    let (mut want, mut want_lse) = (Vec::new(), Vec::new());
    let (mut rest, q) = (0, call.widen(&q));
    for (s, &n) in call.rows.iter().enumerate() {
        if n == 0 {
            want_lse.extend(vec![7.0; call.lse_rows * q_heads]);
            continue;
        }
        let size = n * q_heads * spec.head_dim;
        let (o, l) = oracle(&q[rest..rest + size], n, &cache.heads(s), 0.2, mask);
        rest += size;
        want.extend(o);
        let kept = n.min(call.lse_rows);
        want_lse.extend(vec![7.0; (call.lse_rows - kept) * q_heads]);
        want_lse.extend(&l[(n - kept) * q_heads..]);
    }
    close("lse", &lse.download(), &want_lse, 2e-3, 1e-3)?;
    let error = relative_l2(&call.widen(&out.download()), &want);
    if error <= if call.bf16 { 4e-3 } else { 1e-3 } {
        Ok(())
    } else {
        Err(format!("relative L2 {error:.2e}"))
    }
}

/// History in every format and a hole, then a chunk of 150 rows that ends in a tail.
fn chunk() -> (Spec, Call) {
    let formats = vec![Some(Q2), None, Some(F16), Some(Q4), Some(Q2), Some(Q8)];
    let (lens, outlier) = (vec![64 * 5 + 150], 4.0);
    let spec = Spec { formats, lens, packed: Some(5), heads: 1, outlier, ..Spec::default() };
    (spec, Call { g: 3, rows: vec![150], lse_rows: 8, sliding_window: 0, bf16: false })
}

#[test]
fn oracle_hand_worked() {
    // Keys alike: row i averages V over the tokens up to its own, or over the newest two.
    let pools = Pools::new(64, 32).unwrap();
    let (k, mut v) = (vec![f16::ZERO; 64 * 64], vec![f16::NAN; 64 * 64]);
    (0..3).for_each(|t| v[t * 64..][..64].fill(f16::from_f32((t * t) as f32)));
    let mut ring = vec![0; pools.layout(F16).slab_bytes()];
    encode(pools.layout(F16), &k, &v, &mut ring);
    let head = HeadView { pools: &pools, table: &[], ring: &ring, len: 3, packed: 0 };
    let (out, lse) = oracle(&[1.0; 128], 2, &[head], 0.0, Mask::default());
    assert!((out[0] - 0.5).abs() < 1e-12 && (out[64] - 5.0 / 3.0).abs() < 1e-12);
    assert!((lse[0] - 2f64.ln()).abs() < 1e-12 && (lse[1] - 3f64.ln()).abs() < 1e-12);
    let (out, _) = oracle(&[1.0; 128], 2, &[head], 0.0, Mask { sliding_window: Some(2) });
    assert!((out[64] - 2.5).abs() < 1e-12);
}

#[test]
fn c_checks_need_no_gpu() {
    let cache = ffi::kvw_cache {
        ring: somewhere(),
        lens: somewhere::<i32>(),
        packed: somewhere::<i32>(),
        seqs: 1,
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
        q_heads: 6,
        cache,
        q: somewhere::<u8>().cast(),
        out: somewhere(),
        cu_tokens: somewhere::<i32>(),
        tokens: 100,
        max_tokens: 100,
        dtype: ffi::KVW_F16,
        ..Default::default()
    };
    let op = op!(kvw_prefill_attn);
    op.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 0, ffi::KVW_ERR_STRUCT),
            ("q", |p| p.q = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("cu_tokens", |p| p.cu_tokens = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("packed", |p| p.cache.packed = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("table of a pool", |p| p.cache.pools[0] = 16 as _, ffi::KVW_ERR_NULL),
            ("q unaligned", |p| p.q = 2 as _, ffi::KVW_ERR_ALIGN),
            ("out unaligned", |p| p.out = 2 as _, ffi::KVW_ERR_ALIGN),
            ("cu_tokens unaligned", |p| p.cu_tokens = 4 as _, ffi::KVW_ERR_ALIGN),
            ("group", |p| p.cache.group = 48, ffi::KVW_ERR_FORMAT),
            ("head_dim", |p| p.cache.head_dim = 32, ffi::KVW_ERR_SHAPE),
            ("q_heads", |p| p.q_heads = 5, ffi::KVW_ERR_SHAPE),
            ("17 query heads a kv head", |p| p.q_heads = 34, ffi::KVW_ERR_SHAPE),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("max_tokens", |p| p.max_tokens = 101, ffi::KVW_ERR_SHAPE),
            ("no max_tokens", |p| p.max_tokens = 0, ffi::KVW_ERR_SHAPE),
            ("lse_rows", |p| p.lse_rows = -1, ffi::KVW_ERR_SHAPE),
            ("lse_rows 0 with lse", |p| p.lse = somewhere(), ffi::KVW_ERR_SHAPE),
            ("sliding_window", |p| p.sliding_window = -1, ffi::KVW_ERR_SHAPE),
            ("max_slabs", |p| p.max_slabs = -1, ffi::KVW_ERR_SHAPE),
            ("dtype", |p| p.dtype = ffi::KVW_F32, ffi::KVW_ERR_FORMAT),
            ("scale", |p| p.scale = f32::INFINITY, ffi::KVW_ERR_SHAPE),
            ("reserved", |p| p.reserved = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op.bytes(&valid), 100 * 64 * 2 * (6 + 6 + 2 + 2));
    let long = Params { max_slabs: 12, ..valid };
    assert_eq!(op.bytes(&long), op.bytes(&valid) + 2 * 10 * 64 * 64 * 4);
    assert_eq!(op.workspace(&valid), 0);
}

#[test]
fn executors_match_oracle() {
    for (exec, hopper) in everyone(7).into_iter().flat_map(|e| [(e, false), (e, true)]) {
        let run = exec.start();
        run.hopper(hopper);
        let check = |what: &str, (spec, call): (Spec, Call)| {
            matches(&run, &spec, &call)
                .unwrap_or_else(|e| panic!("{exec:?} {hopper}: {what}: {e}"));
        };
        let (spec, call) = chunk();
        check("a chunk", chunk());
        assert!(run.wgmma().is_none_or(|n| (n > 0) == hopper), "the way of sm_90a is not taken");
        for sliding_window in [1, 70, 250] {
            check("sliding", (spec.clone(), Call { sliding_window, ..call.clone() }));
        }
        check("bf16", (spec.clone(), Call { bf16: true, rows: vec![40], ..call.clone() }));
        let alone = Spec { packed: Some(0), lens: vec![150], heads: 2, ..spec.clone() };
        check("without history", (alone, Call { lse_rows: 200, ..call.clone() }));
        let whole = Spec { lens: vec![64 * 5 + 128], ..spec.clone() };
        check("whole slabs and tiles", (whole, Call { g: 1, rows: vec![128], ..call.clone() }));
        let a_head = Spec { heads: 2, per_head: true, ..spec.clone() };
        check("lengths a head", (a_head, Call { rows: vec![90], ..call.clone() }));
        let holes = Spec { formats: vec![None], ..spec.clone() };
        check("nothing but holes", (holes, Call { rows: vec![40], ..call.clone() }));
        let lens = vec![1, 65, 90, 200, 130];
        let ragged = Spec { lens, packed: Some(1), shared_rows: true, csr: true, ..spec };
        check("ragged", (ragged, Call { g: 2, rows: vec![1, 3, 0, 100, 66], ..call }));
    }
}

#[test]
fn every_shape_matches_oracle() {
    for (exec, hopper) in everyone(0).into_iter().flat_map(|e| [(e, false), (e, true)]) {
        let check = |spec: &Spec, call: &Call| {
            let (d, group, g) = (spec.head_dim, spec.group, call.g);
            let what = format!("{exec:?} {hopper}: D {d} group {group} G {g}");
            let run = exec.start();
            run.hopper(hopper);
            matches(&run, spec, call).unwrap_or_else(|e| panic!("{what}: {e}"));
        };
        let (spec, call) = chunk();
        for head_dim in [64, 96, 128, 256] {
            for group in [32, 64, 128] {
                check(&Spec { head_dim, group, ..spec.clone() }, &call);
            }
        }
        for g in [1, 2, 4, 5, 6, 7, 8, 12, 16] {
            check(&spec, &Call { g, rows: vec![70], ..call.clone() });
        }
    }
}

#[test]
fn faults_are_caught() {
    let plain = |run: &Run| matches(run, &chunk().0, &chunk().1);
    let sliding = |run: &Run| {
        let (spec, call) = chunk();
        matches(run, &spec, &Call { sliding_window: 70, ..call })
    };
    assert_caught(102, "registers 1 and 2 of an A fragment are swapped", plain);
    assert_caught(105, "the ring's slabs are taken one slot late", plain);
    assert_caught(107, "outputs are not rescaled when the maximum grows", plain);
    assert_caught(120, "a row sees the token after it", plain);
    assert_caught(121, "a buffer is filled again while warps still read it", plain);
    assert_caught(122, "a step is read before its copy has landed", plain);
    assert_caught(123, "log-sum-exps are a row late", plain);
    assert_caught(125, "V past the length is used as it lies there", plain);
    assert_caught(126, "columns run over rows first, then heads", plain);
    assert_caught(127, "the sliding window is a token short", sliding);
}

#[test]
fn faults_of_warpgroups_are_caught() {
    let on_hopper = |run: &Run| {
        run.hopper(true);
        matches(run, &chunk().0, &chunk().1)
    };
    let short = |run: &Run| {
        let (spec, call) = chunk();
        run.hopper(true);
        let lens = vec![64 * 5 + 20];
        matches(run, &Spec { lens, head_dim: 96, ..spec }, &Call { rows: vec![20], ..call })
    };
    assert_caught(140, "a stage is read before it is full", short);
    assert_caught(141, "a stage is filled again while warpgroups still read it", on_hopper);
    assert_caught(142, "tensor cores read tiles without a proxy fence", short);
    assert_caught(143, "accumulators go to the tensor cores without a fence", short);
    assert_caught(144, "V past the length is used as it lies there", short);
    assert_caught(145, "rows of K are not swizzled", short);
    assert_caught(146, "outputs are not rescaled when the maximum grows", on_hopper);
    assert_caught(147, "P's rows r and r + 8 are swapped", short);
    assert_caught(148, "a raw slab is overwritten while warps still read it", on_hopper);
    assert_caught(149, "a stage is never handed back", on_hopper);
    assert_caught(123, "log-sum-exps are a row late", on_hopper);
}
