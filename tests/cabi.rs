//! The CPU paths behind the C ABI: as an executor for the tests of the families, refusals, many callers at once.

use crate::cache::{Cache, Device, Spec};
use crate::cases::{Noise, relative_l2};
use crate::exec::Exec;
use half::f16;
use kvwarp::ffi::{self, kvw_paged_attn_params as Params, kvw_status};
use kvwarp::paged_attn::{Mask, Scores, oracle};
use kvwarp::slab::{Format, Meta};
use std::ffi::c_void;

/// The entry of an op of this name.
fn function(op: &str) -> *const c_void {
    match op {
        "kvw_kv_gather" => ffi::kvw_kv_gather_cpu as *const c_void,
        "kvw_kv_pack" => ffi::kvw_kv_pack_cpu as *const c_void,
        "kvw_paged_attn" => ffi::kvw_paged_attn_cpu as *const c_void,
        "kvw_prefill_attn" => ffi::kvw_prefill_attn_cpu as *const c_void,
        "kvw_rms_norm" => ffi::kvw_rms_norm_cpu as *const c_void,
        "kvw_rope_select" => ffi::kvw_rope_select_cpu as *const c_void,
        "kvw_sim_evict" => ffi::kvw_sim_evict_cpu as *const c_void,
        "kvw_token_score" => ffi::kvw_token_score_cpu as *const c_void,
        "kvw_token_select" => ffi::kvw_token_select_cpu as *const c_void,
        _ => panic!("{op} has no CPU entry"),
    }
}

/// Runs the op's CPU entry.
pub fn call<P>(op: &str, params: &P) -> Result<(), String> {
    // SAFETY: the op of this name takes these params; they point into live host memory.
    let status = unsafe {
        let entry: unsafe extern "C" fn(*const P) -> kvw_status = std::mem::transmute(function(op));
        entry(params)
    };
    if status == 0 { Ok(()) } else { Err(text(status)) }
}

fn text(status: kvw_status) -> String {
    // SAFETY: a static, NUL-terminated text.
    let text = unsafe { std::ffi::CStr::from_ptr(ffi::kvw_status_str(status)) };
    text.to_string_lossy().into_owned()
}

/// A decode step by the CPU entry without log-sum-exps, which has a path of its own, against the oracle.
fn decodes(spec: &Spec, sliding_window: usize) -> Result<(), String> {
    let (cache, run) = (Cache::new(spec, 9), Exec::Cpu.start());
    let device = cache.upload(&run);
    let (seqs, q_heads, d) = (spec.lens.len(), spec.heads * 3, spec.head_dim);
    let mut noise = Noise(4);
    let q: Vec<f16> = (0..seqs * q_heads * d).map(|_| f16::from_f32(0.3 * noise.unit())).collect();
    let (q_mem, out) = (run.upload("q", &q), run.alloc::<f16>("out", q.len()));
    let params =
        Params { sliding_window: sliding_window as i32, ..params(&device, q_heads, &cache) };
    let params = Params { q: q_mem.ptr().cast(), out: out.ptr().cast(), ..params };
    call("kvw_paged_attn", &params)?;
    let wide: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
    let mask = Mask { sliding_window: (sliding_window > 0).then_some(sliding_window) };
    let scores = Scores { mask, ..Scores::default() };
    let of = |s: usize| &wide[s * q_heads * d..][..q_heads * d];
    let want: Vec<f64> =
        (0..seqs).flat_map(|s| oracle(of(s), 1, &cache.heads(s), &scores).0).collect();
    let got: Vec<f32> = out.download().iter().map(|x| x.to_f32()).collect();
    let error = relative_l2(&got, &want);
    if error <= 1e-3 { Ok(()) } else { Err(format!("relative L2 {error:.2e}")) }
}

/// Of one row a sequence, without a workspace; `q` and `out` are missing.
fn params(device: &Device, q_heads: usize, cache: &Cache) -> Params {
    Params {
        struct_size: size_of::<Params>() as u32,
        q_heads: q_heads as i32,
        cache: device.params(),
        q_len: 1,
        max_slabs: cache.max_slabs() as i32,
        dtype: ffi::KVW_F16,
        ..Default::default()
    }
}

#[test]
fn one_row_a_sequence_decodes() {
    let spec = Spec {
        lens: vec![0, 1, 64, 65, 500],
        formats: vec![
            Some(Format::Q2),
            None,
            Some(Format::F16),
            Some(Format::Q4),
            Some(Format::Q8),
        ],
        heads: 3,
        ..Spec::default()
    };
    decodes(&spec, 0).unwrap();
    decodes(&spec, 77).unwrap();
    decodes(&Spec { per_head: true, ..spec.clone() }, 0).unwrap();
    decodes(&Spec { shared_rows: true, ..spec.clone() }, 0).unwrap();
    decodes(&Spec { shared_rows: true, csr: true, ..spec.clone() }, 0).unwrap();
    let bytes = vec![Some(Format::Q2), Some(Format::Q4)];
    decodes(&Spec { meta: Meta::U8, formats: bytes, ..spec.clone() }, 0).unwrap();
    decodes(&Spec { head_dim: 128, formats: vec![Some(Format::Fp8)], ..spec }, 0).unwrap();
}

/// A change that makes params unacceptable, and the field that the refusal names.
type Case<'a> = (&'a dyn Fn(&mut Params), &'a str);

#[test]
fn what_leads_outside_is_refused_by_name() {
    let (spec, run) = (Spec { lens: vec![300], ..Spec::default() }, Exec::Cpu.start());
    let cache = Cache::new(&spec, 9);
    let device = cache.upload(&run);
    let room = run.alloc::<f16>("room", 4 * 64);
    let valid = params(&device, 4, &cache);
    let valid = Params { q: room.ptr().cast(), out: room.ptr().cast(), ..valid };
    let lens = run.upload("lens", &[-1]);
    let (long, none) = (run.upload("lens", &[64 * 400]), run.upload("packed", &[0]));
    let somewhere = std::ptr::without_provenance(16);
    let cases: [Case<'_>; 12] = [
        (&|p| p.struct_size -= 1, "struct_size"),
        (&|p| p.q_heads = 3, "q_heads"),
        (&|p| p.q = std::ptr::null(), "q"),
        (&|p| p.dtype = ffi::KVW_F32, "dtype"),
        (&|p| p.softcap = 2.0, "softcap"),
        (&|p| p.sinks = somewhere, "sinks"),
        (&|p| p.rotation = somewhere.cast(), "rotation"),
        (&|p| (p.k_norm, p.k_norm_stride) = (somewhere, 9), "k_norm"),
        (&|p| p.cache.lens = lens.ptr(), "lens"),
        (&|p| p.cache.lens = long.ptr(), "table_stride"),
        (&|p| (p.cache.packed, p.cache.lens) = (none.ptr(), long.ptr()), "ring_slabs"),
        (&|p| p.cache.table_stride = 1, "table_stride"),
    ];
    for (change, field) in cases {
        let mut params = valid;
        change(&mut params);
        let why = call("kvw_paged_attn", &params).unwrap_err();
        assert_eq!(why.split(':').next(), Some(field), "{why}");
    }
    // SAFETY: null is refused.
    let none = unsafe { ffi::kvw_paged_attn_cpu(std::ptr::null()) };
    assert!(text(none).starts_with("params"), "{}", text(none));
    let evict = ffi::kvw_sim_evict_params { struct_size: 8, ..Default::default() };
    assert!(call("kvw_sim_evict", &evict).unwrap_err().starts_with("struct_size"));
}

#[test]
fn scores_and_selections_name_what_leads_outside() {
    let (spec, run) = (Spec { lens: vec![300], ..Spec::default() }, Exec::Cpu.start());
    let cache = Cache::new(&spec, 9);
    let device = cache.upload(&run);
    let room = run.alloc::<f32>("room", 4 * 64);
    let below = run.upload("below", &[-1]);
    let (rows, many) = (run.upload("rows", &[0, 1]), run.upload("rows", &[0, 2]));
    let twice = run.upload("seen", &[0, 9, 40, 60, 8, 20]);
    let valid = ffi::kvw_token_score_params {
        struct_size: size_of::<ffi::kvw_token_score_params>() as u32,
        op: ffi::KVW_SCORE_LSE,
        cache: device.params(),
        q: room.ptr().cast(),
        lse: room.ptr(),
        cu_tokens: rows.ptr(),
        q_heads: 2,
        tokens: 1,
        max_tokens: 1,
        lse_rows: 1,
        dtype: ffi::KVW_F16,
        ..Default::default()
    };
    type Score<'a> = (&'a dyn Fn(&mut ffi::kvw_token_score_params), &'a str);
    let cases: [Score<'_>; 5] = [
        (&|p| p.dtype = ffi::KVW_F32, "dtype"),
        (&|p| p.first = below.ptr(), "first"),
        (&|p| p.cu_tokens = many.ptr(), "cu_tokens"),
        (&|p| (p.seen, p.ranges) = (twice.ptr(), 3), "seen"),
        (&|p| p.cache.lens = below.ptr(), "lens"),
    ];
    call("kvw_token_score", &valid).unwrap();
    for (change, field) in cases {
        let mut params = valid;
        change(&mut params);
        let why = call("kvw_token_score", &params).unwrap_err();
        assert_eq!(why.split(':').next(), Some(field), "{why}");
    }

    // A segment of more scores than one CTA takes asks the kernel for a workspace, the processor for none.
    let scores = run.upload("scores", &vec![0.5f32; 70_000]);
    let (k, kept, count) =
        (run.upload("k", &[3]), run.upload("kept", &[7; 4]), run.upload("count", &[7]));
    let select = ffi::kvw_token_select_params {
        struct_size: size_of::<ffi::kvw_token_select_params>() as u32,
        op: ffi::KVW_SELECT_TOP_K,
        scores: scores.ptr(),
        k: k.ptr(),
        indices: kept.ptr(),
        counts: count.ptr(),
        rows: 1,
        n: 70_000,
        segment: 1,
        index_stride: 4,
        ..Default::default()
    };
    call("kvw_token_select", &select).unwrap();
    assert_eq!((kept.download(), count.download()), (vec![0, 1, 2, 7], vec![3]));
    let gather = ffi::kvw_token_select_params {
        op: ffi::KVW_SELECT_GATHER,
        positions: k.ptr(),
        out_positions: kept.ptr(),
        first: below.ptr(),
        counts: std::ptr::null_mut(),
        index_stride: 1,
        ..select
    };
    let zero = run.upload("indices", &[0]);
    let why =
        call("kvw_token_select", &ffi::kvw_token_select_params { indices: zero.ptr(), ..gather });
    assert!(why.as_ref().is_err_and(|why| why.starts_with("indices: ")), "{why:?}");
    let one = run.upload("indices", &[1]);
    let gather = ffi::kvw_token_select_params { indices: one.ptr(), ..gather };
    call("kvw_token_select", &gather).unwrap();
    assert_eq!(kept.download(), [3, 1, 2, 7]);
}

#[test]
fn threads_may_call_at_once() {
    let spec = Spec { lens: vec![700], heads: 4, ..Spec::default() };
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..6).map(|_| scope.spawn(|| decodes(&spec, 0))).collect();
        callers.into_iter().for_each(|caller| caller.join().unwrap().unwrap());
    });
}
