//! The CUDA kernels' side: one launch, held to the f64 oracle.

use crate::cache::{Cache, Spec};
use crate::cases::{Noise, close};
use crate::exec::{Run, op};
use half::{bf16, f16};
use kvwarp::ffi::{self, kvw_token_score_params as Params};
use kvwarp::pages::HeadView;
use kvwarp::token_score::{Reduce, oracle, oracle_lse};
use std::ops::Range;
use std::ptr::{null, null_mut};
use std::slice::from_ref;

/// How the op is called on a cache; `rows[s]` query rows, of which the last `lse_rows` take part.
#[derive(Clone)]
pub struct Call {
    pub g: usize,
    pub rows: Vec<usize>,
    pub lse_rows: usize,
    pub bf16: bool,
    /// From the end of each head to its first column, and columns; from slot 0 where `None`.
    pub back: Option<usize>,
    pub columns: usize,
    pub accumulate: bool,
    /// Of the log-sum-exps: all slots where there are none.
    pub seen: Vec<Range<usize>>,
    pub scale: f32,
}

impl Call {
    fn narrow(&self, x: f32) -> u16 {
        if self.bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() }
    }

    fn widen(&self, x: &[u16]) -> Vec<f32> {
        let one =
            |&x| if self.bf16 { bf16::from_bits(x).to_f32() } else { f16::from_bits(x).to_f32() };
        x.iter().map(one).collect()
    }

    /// Rows of sequence `s` that take part.
    fn used(&self, s: usize) -> usize {
        self.rows[s].min(self.lse_rows)
    }
}

/// A cache and its queries, on the host and in an executor's memory.
struct Case<'a> {
    call: &'a Call,
    cache: Cache,
    q: Vec<u16>,
    starts: Vec<i32>,
}

impl<'a> Case<'a> {
    fn new(spec: &Spec, call: &'a Call) -> Self {
        let mut noise = Noise(79);
        let row = spec.heads * call.g * spec.head_dim;
        let q = (0..call.rows.iter().sum::<usize>() * row).map(|_| call.narrow(0.5 * noise.unit()));
        let mut starts = vec![0];
        call.rows.iter().for_each(|n| starts.push(starts.last().unwrap() + *n as i32));
        Self { call, cache: Cache::new(spec, 6), q: q.collect(), starts }
    }

    fn q_heads(&self) -> usize {
        self.cache.spec.heads * self.call.g
    }

    /// The queries of sequence `s` that take part.
    fn queries(&self, s: usize) -> Vec<f32> {
        let row = self.q_heads() * self.cache.spec.head_dim;
        let end = self.starts[s + 1] as usize;
        self.call.widen(&self.q[(end - self.call.used(s)) * row..end * row])
    }

    /// Of sequence `s`, `[used, H * G]`, over the slots of `seen`.
    fn lse(&self, s: usize, seen: &[Range<usize>]) -> Vec<f64> {
        match self.call.used(s) {
            0 => vec![],
            n => oracle_lse(&self.queries(s), n, &self.cache.heads(s), self.call.scale, seen),
        }
    }

    /// `[S, lse_rows, H * G]`: what `of(s)` has of the rows that take part, `other` elsewhere.
    fn rows(&self, other: f64, of: impl Fn(usize) -> Vec<f64>) -> Vec<f64> {
        let whole = self.call.lse_rows * self.q_heads();
        let padded = |s: usize| {
            let rows = of(s);
            [vec![other; whole - rows.len()], rows].concat()
        };
        (0..self.call.rows.len()).flat_map(padded).collect()
    }

    /// Launches with what `change` makes of the arguments that the ops share.
    fn run(&self, run: &Run, change: impl FnOnce(Params) -> Params) -> Result<(), String> {
        let (device, call) = (self.cache.upload(run), self.call);
        let (q, cu_tokens) = (run.upload("q", &self.q), run.upload("cu_tokens", &self.starts));
        let params = Params {
            struct_size: size_of::<Params>() as u32,
            cache: device.params(),
            q: q.ptr().cast(),
            lse: null_mut(),
            scores: null_mut(),
            cu_tokens: cu_tokens.ptr(),
            first: null(),
            seen: null(),
            q_heads: self.q_heads() as i32,
            tokens: *self.starts.last().unwrap(),
            max_tokens: *call.rows.iter().max().unwrap() as i32,
            lse_rows: call.lse_rows as i32,
            dtype: if call.bf16 { ffi::KVW_BF16 } else { ffi::KVW_F16 },
            scale: call.scale,
            ..Default::default()
        };
        run.call(&op!(kvw_token_score), &change(params))
    }
}

/// The log-sum-exps over `call.seen`; rows that do not take part stay as they are.
pub fn lse_matches(run: &Run, spec: &Spec, call: &Call) -> Result<(), String> {
    let case = Case::new(spec, call);
    let everything = 0..usize::MAX;
    let seen = if call.seen.is_empty() { from_ref(&everything) } else { &call.seen };
    let want = case.rows(7.0, |s| case.lse(s, seen));
    let out = run.upload("lse", &vec![7.0f32; want.len()]);
    let pairs: Vec<i32> = call.seen.iter().flat_map(|r| [r.start as i32, r.end as i32]).collect();
    let ranges = run.upload("seen", &pairs.repeat(call.rows.len()));
    case.run(run, |p| Params {
        op: ffi::KVW_SCORE_LSE,
        lse: out.ptr(),
        seen: if call.seen.is_empty() { null() } else { ranges.ptr() },
        ranges: call.seen.len() as i32,
        ..p
    })?;
    close("lse", &out.download(), &want, 2e-3, 1e-3)
}

/// The scores, from log-sum-exps over everything, of which one in seven is minus infinity.
pub fn matches(run: &Run, spec: &Spec, call: &Call, reduce: Reduce) -> Result<(), String> {
    let (case, heads) = (Case::new(spec, call), spec.heads);
    let given = |s: usize| -> Vec<f64> {
        let rows = case.lse(s, from_ref(&(0..usize::MAX))).into_iter().enumerate();
        rows.map(|(i, x)| if i % 7 == 5 { f64::NEG_INFINITY } else { x }).collect()
    };
    let lse: Vec<f32> = case.rows(f64::NAN, given).iter().map(|&x| x as f32).collect();
    let first = |s: usize| -> Vec<usize> {
        let of = |head: &HeadView<'_>| call.back.map_or(0, |back| head.len.saturating_sub(back));
        case.cache.heads(s).iter().map(of).collect()
    };
    let lines = if reduce == Reduce::Sum { call.g } else { 1 };
    let (mut want, mut noise) = (Vec::new(), Noise(80));
    for s in 0..call.rows.len() {
        let rows: Vec<f32> = given(s).iter().map(|&x| x as f32).collect();
        want.extend(match call.used(s) {
            0 => vec![0.0; heads * lines * call.columns],
            n => {
                let (q, views) = (case.queries(s), case.cache.heads(s));
                oracle(&q, n, &rows, &views, call.scale, &first(s), call.columns, reduce)
            }
        });
    }
    let before: Vec<f32> = want.iter().map(|_| 0.01 + 0.005 * noise.unit()).collect();
    let scores = match call.accumulate {
        true => run.upload("scores", &before),
        false => run.alloc("scores", want.len()),
    };
    if call.accumulate {
        for (x, &before) in want.iter_mut().zip(&before) {
            let before = f64::from(before);
            *x = if reduce == Reduce::Sum { *x + before } else { x.max(before) };
        }
    }
    let apart = if spec.per_head { heads } else { 1 };
    let first: Vec<i32> = (0..call.rows.len())
        .flat_map(|s| first(s).into_iter().step_by(heads / apart).map(|x| x as i32))
        .collect();
    let (lse, first) = (run.upload("lse", &lse), run.upload("first", &first));
    case.run(run, |p| Params {
        op: if reduce == Reduce::Sum { ffi::KVW_SCORE_SUM } else { ffi::KVW_SCORE_MAX },
        lse: lse.ptr(),
        scores: scores.ptr(),
        first: if call.back.is_some() { first.ptr() } else { null() },
        columns: call.columns as i32,
        accumulate: call.accumulate.into(),
        ..p
    })?;
    close(&format!("{reduce:?}"), &scores.download(), &want, 1e-6, 1e-2)
}
