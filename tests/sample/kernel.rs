//! The CUDA kernel's side: one launch, held to the CPU path.

use crate::cases::Noise;
use crate::exec::{Run, op};
use kvwarp::ffi::kvw_sample_params as Params;
use kvwarp::sample::{Sampling, cpu, draw};
use std::ptr::null;

/// A history of row `s`: repeats, ids that share a slot of a hash table, ids outside the vocabulary.
fn history(s: usize, vocab: usize) -> Vec<u32> {
    let mut noise = Noise(s as u64);
    let len = [0, 1, 7, 64, 256][s % 5];
    let id = |i: usize| match i % 8 {
        0 => 3,
        1 => 3 + 512 * (i as u32 / 8),
        2 => [u32::MAX, vocab as u32, 1 << 31][i / 8 % 3],
        _ => noise.below(vocab) as u32,
    };
    (0..len).map(id).collect()
}

/// Every sampling on its own copy of `logits`, drawn at `step`: the same tokens as the CPU path.
pub fn same_as_cpu(
    run: &Run,
    logits: &[f32],
    samplings: &[Sampling],
    step: i32,
) -> Result<(), String> {
    let n = samplings.len();
    let recent: Vec<_> = (0..n).map(|s| history(s + step as usize, logits.len())).collect();
    let padded = |r: &Vec<u32>| {
        let mut ids: Vec<i32> = r.iter().map(|&id| id as i32).collect();
        ids.resize(256, 0);
        ids
    };
    let d_history = run.upload("history", &recent.iter().flat_map(padded).collect::<Vec<_>>());
    let lens: Vec<i32> = recent.iter().map(|r| r.len() as i32).collect();
    let d_lens = run.upload("history_lens", &lens);
    let column = |f: fn(&Sampling) -> f32| -> Vec<f32> { samplings.iter().map(f).collect() };
    let seeds: Vec<u64> = (0..n as u64).map(|s| s << 40 | 5).collect();
    let all = run.upload("logits", &logits.repeat(n));
    let out = run.alloc::<i32>("tokens", n);
    let top_k: Vec<i32> = samplings.iter().map(|s| s.top_k as i32).collect();
    let (d_seeds, d_steps) = (run.upload("seeds", &seeds), run.upload("steps", &vec![step; n]));
    let temperature = run.upload("temperature", &column(|s| s.temperature));
    let (top_p, min_p) =
        (run.upload("top_p", &column(|s| s.top_p)), run.upload("min_p", &column(|s| s.min_p)));
    let d_top_k = run.upload("top_k", &top_k);
    let penalty = run.upload("penalty", &column(|s| s.repeat_penalty));
    let penalises = samplings.iter().any(|s| s.repeat_penalty != 1.0);
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        seqs: n as i32,
        logits: all.ptr(),
        tokens: out.ptr(),
        seeds: d_seeds.ptr(),
        steps: d_steps.ptr(),
        temperature: temperature.ptr(),
        top_p: top_p.ptr(),
        min_p: min_p.ptr(),
        top_k: d_top_k.ptr(),
        history: if penalises { d_history.ptr() } else { null() },
        history_lens: d_lens.ptr(),
        penalty: penalty.ptr(),
        vocab: logits.len() as i32,
        history_stride: 256,
    };
    run.call(&op!(kvw_sample), &params)?;
    let rows = samplings.iter().zip(out.download()).zip(&seeds).zip(&recent);
    for (((s, got), &seed), recent) in rows {
        let want = cpu(logits, s, recent, draw(seed, step)).unwrap();
        if got != want as i32 {
            return Err(format!("{} logits, {s:?}, step {step}: {got}, want {want}", logits.len()));
        }
    }
    Ok(())
}
