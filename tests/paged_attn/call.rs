//! One call of the op on a cache, and what it should give.

use crate::cache::{Cache, Spec};
use crate::cases::{Noise, close, relative_l2};
use crate::exec::{Mem, Run, op};
use half::{bf16, f16};
use kvwarp::ffi::{self, kvw_paged_attn_params as Params};
use kvwarp::paged_attn::{Mask, Scores, oracle};
use kvwarp::slab::Format::{F16, Q2, Q4, Q8};

const TICKETS: usize = ffi::KVW_PAGED_ATTN_TICKETS as usize;

/// How the op is called on a cache.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub g: usize,
    pub q_len: usize,
    pub ctas: i32,
    pub least: i32,
    pub sliding_window: usize,
    pub scale: f32,
    pub softcap: f32,
    pub bf16: bool,
    pub sinks: bool,
    pub k_norm: bool,
    pub rotation: bool,
    /// The way of sm_90, where the executor can choose.
    pub hopper: bool,
}

pub const CALL: Call = Call {
    g: 4,
    q_len: 1,
    ctas: 1,
    least: 1,
    sliding_window: 0,
    scale: 0.0,
    softcap: 0.0,
    bf16: false,
    sinks: false,
    k_norm: false,
    rotation: false,
    hopper: false,
};

pub struct Outcome {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

/// Every format and a hole in turn; each warp wraps its two buffers; the last slab has a tail.
pub fn mixed() -> Spec {
    let formats = vec![Some(Q2), Some(F16), None, Some(Q4), Some(Q2), Some(Q8), Some(Q4)];
    Spec { formats, lens: vec![64 * 13 + 21], ..Spec::default() }
}

/// Sequences of every awkward length, heads of different lengths.
pub fn ragged() -> Spec {
    let lens = vec![0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 400];
    let formats = vec![Some(Q2), Some(Q4), None, Some(F16), Some(Q8)];
    Spec { lens, heads: 3, per_head: true, formats, ..mixed() }
}

/// What the op is given besides the cache, as numbers that f16 or bf16 hold.
struct Inputs {
    q: Vec<f32>,
    sinks: Vec<f32>,
    k_norm: Vec<f32>,
    rotation: Vec<f32>,
}

impl Inputs {
    fn new(cache: &Cache, call: Call) -> Self {
        let Spec { head_dim: d, heads, outlier, .. } = cache.spec;
        let mut noise = Noise(77);
        let round =
            |x: f32| if call.bf16 { bf16::from_f32(x).to_f32() } else { f16::from_f32(x).to_f32() };
        // Half as large as K; less where K has its outliers, so that scores stay of order one.
        let size = |c: usize| if c == 5 || c == d - 3 { 0.5 / outlier } else { 0.5 };
        let n = cache.spec.lens.len() * call.q_len * heads * call.g * d;
        let q = (0..n).map(|i| round(size(i % d) * noise.unit())).collect();
        let sinks = (0..heads * call.g).map(|_| 3.0 * noise.unit()).collect();
        let tokens = cache.spec.lens.len() * heads * cache.spec.lens.iter().max().unwrap().max(&1);
        let k_norm = (0..tokens).map(|_| 1.0 + 0.5 * noise.unit()).collect();
        let unit = (3.0 / d as f32).sqrt() / outlier;
        let entry = |_| f16::from_f32(unit * noise.unit()).to_f32();
        Self { q, sinks, k_norm, rotation: (0..d * d).map(entry).collect() }
    }

    /// Of one sequence.
    fn scores<'a>(&'a self, cache: &Cache, call: Call, s: usize) -> Scores<'a> {
        let norms = self.k_norm.len() / cache.spec.lens.len();
        Scores {
            rotation: call.rotation.then_some(&self.rotation),
            scale: call.scale,
            k_norm: call.k_norm.then(|| &self.k_norm[s * norms..][..norms]),
            softcap: call.softcap,
            mask: Mask { sliding_window: (call.sliding_window > 0).then_some(call.sliding_window) },
            sinks: call.sinks.then_some(&self.sinks),
        }
    }
}

fn bits(x: &[f32], bf: bool) -> Vec<u16> {
    x.iter()
        .map(|&x| if bf { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() })
        .collect()
}

/// A workspace as an engine first hands it over: tickets zero, the rest NaN. 0 bytes: what the call needs.
pub fn workspace(run: &Run, bytes: usize) -> Mem<u8> {
    let mut zeroed = vec![0xFF; bytes];
    zeroed[..TICKETS].fill(0);
    run.upload("workspace", &zeroed)
}

/// Calls the op; `room` is a workspace to use again.
pub fn run_in(
    run: &Run,
    cache: &Cache,
    call: Call,
    room: Option<&Mem<u8>>,
) -> Result<Outcome, String> {
    let (device, inputs) = (cache.upload(run), Inputs::new(cache, call));
    let (d, n) = (cache.spec.head_dim, inputs.q.len());
    let (q, out) = (run.upload("q", &bits(&inputs.q, call.bf16)), run.alloc::<u16>("out", n));
    let lse = run.alloc::<f32>("lse", n / d);
    let sinks = call.sinks.then(|| run.upload("sinks", &inputs.sinks));
    let k_norm = call.k_norm.then(|| run.upload("k_norm", &inputs.k_norm));
    let rotation = call.rotation.then(|| run.upload("rotation", &bits(&inputs.rotation, false)));
    let mut params = Params {
        struct_size: size_of::<Params>() as u32,
        q_heads: (cache.spec.heads * call.g) as i32,
        cache: device.params(),
        q: q.ptr().cast(),
        out: out.ptr().cast(),
        lse: lse.ptr(),
        workspace: std::ptr::null_mut(),
        workspace_bytes: 0,
        sinks: sinks.as_ref().map_or(std::ptr::null(), |m| m.ptr()),
        k_norm: k_norm.as_ref().map_or(std::ptr::null(), |m| m.ptr()),
        rotation: rotation.as_ref().map_or(std::ptr::null(), |m| m.ptr().cast()),
        k_norm_stride: *cache.spec.lens.iter().max().unwrap().max(&1) as i32,
        q_len: call.q_len as i32,
        max_slabs: cache.max_slabs() as i32,
        ctas: call.ctas,
        least: call.least,
        sliding_window: call.sliding_window as i32,
        dtype: if call.bf16 { ffi::KVW_BF16 } else { ffi::KVW_F16 },
        scale: call.scale,
        softcap: call.softcap,
    };
    params.workspace_bytes = op!(kvw_paged_attn).workspace(&params);
    let own = room.is_none().then(|| workspace(run, params.workspace_bytes));
    let room = room.or(own.as_ref()).expect("one of the two");
    params.workspace = room.ptr().cast();
    run.hopper(call.hopper);
    run.call(&op!(kvw_paged_attn), &params)?;
    if room.download()[..TICKETS].iter().any(|&x| x != 0) {
        return Err("a ticket is not zero".into());
    }
    let wide =
        |&x: &u16| if call.bf16 { bf16::from_bits(x).to_f32() } else { f16::from_bits(x).to_f32() };
    Ok(Outcome { out: out.download().iter().map(wide).collect(), lse: lse.download() })
}

pub fn run_op(run: &Run, cache: &Cache, call: Call) -> Result<Outcome, String> {
    run_in(run, cache, call, None)
}

/// Relative L2 of the whole output at most `most`, rows that see nothing exactly zero, lse within twice that.
pub fn compare(cache: &Cache, call: Call, got: &Outcome, most: f64) -> Result<(), String> {
    let (inputs, seqs) = (Inputs::new(cache, call), cache.spec.lens.len());
    let (mut want, mut want_lse) = (Vec::new(), Vec::new());
    for (s, q) in inputs.q.chunks(inputs.q.len() / seqs).enumerate() {
        let (out, lse) = oracle(q, call.q_len, &cache.heads(s), &inputs.scores(cache, call, s));
        want.extend(out);
        want_lse.extend(lse);
    }
    close("lse", &got.lse, &want_lse, 2.0 * most, 1e-3)?;
    let rows = got.out.chunks(cache.spec.head_dim).zip(want.chunks(cache.spec.head_dim));
    for (row, want) in rows {
        if want.iter().all(|&x| x == 0.0) && row.iter().any(|&x| x != 0.0) {
            return Err("a row that sees no tokens is not zero".into());
        }
    }
    let error = relative_l2(&got.out, &want);
    if error <= most { Ok(()) } else { Err(format!("relative L2 {error:.2e}")) }
}

/// 1e-3 for f16 output, 4e-3 for bf16.
pub fn matches(run: &Run, spec: &Spec, call: Call) -> Result<(), String> {
    let cache = Cache::new(spec, 5);
    compare(&cache, call, &run_op(run, &cache, call)?, if call.bf16 { 4e-3 } else { 1e-3 })
}
