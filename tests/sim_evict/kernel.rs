//! LAG and NORM on the executors.

use super::one_slab;
use crate::cache::Cache;
pub use crate::cache::Spec;
use crate::cases::{Noise, close};
use crate::exec::{Exec, Run, everyone, op};
use kvwarp::ffi::{self, kvw_sim_evict_params as Params};
use kvwarp::pages::{HeadView, Pools};
use kvwarp::sim_evict::{Lag, Reference, oracle};
use kvwarp::slab::{Format, Meta, TOKENS};

pub fn params(op: i32) -> Params {
    Params { struct_size: size_of::<Params>() as u32, op, ..Default::default() }
}

/// Scores of every head from slot `first + 5 h` on, of as many partitions as it has; what is past them stays.
pub fn scores(
    run: &Run,
    spec: &Spec,
    first: usize,
    length: usize,
    reference: Reference,
) -> Result<(), String> {
    let cache = Cache::new(spec, 8);
    let device = cache.upload(run);
    let first_of = |h: usize| first + if spec.per_head { 5 * h } else { 0 };
    let of_rows = |s: usize, h: usize| (cache.heads(s)[h].len - first_of(h)) / length;
    let rows = (0..spec.lens.len()).flat_map(|s| (0..spec.heads).map(move |h| (s, h)));
    let most = rows.clone().map(|(s, h)| of_rows(s, h).saturating_sub(1)).max().unwrap().max(1);
    let firsts: Vec<i32> = (0..spec.lens.len())
        .flat_map(|_| (0..if spec.per_head { spec.heads } else { 1 }).map(|h| first_of(h) as i32))
        .collect();
    let (firsts, size) = (run.upload("first", &firsts), most * length);
    let out = run.upload("scores", &vec![7.0f32; spec.lens.len() * spec.heads * size]);
    let mut p = params(ffi::KVW_EVICT_LAG);
    (p.cache, p.scores, p.first) = (device.params(), out.ptr(), firsts.ptr());
    (p.lag, p.partitions, p.v_weight) = (length as i32, most as i32, 0.75);
    p.reference = i32::from(reference == Reference::Metadata);
    run.call(&op!(kvw_sim_evict), &p)?;
    let got = out.download();
    for (i, (s, h)) in rows.enumerate() {
        let partitions = of_rows(s, h).saturating_sub(1);
        let lag = Lag { first: first_of(h), lag: length, partitions, v_weight: 0.75, reference };
        let mut want = oracle::lag(&cache.heads(s)[h], &lag);
        want.resize(size, 7.0);
        close(&format!("({s}, {h}), {length}"), &got[i * size..][..size], &want, 0.0, 1e-4)?;
    }
    Ok(())
}

/// Three partitions of 16 tokens of one slab.
fn of_one_slab(run: &Run, k: &[f32], v: &[f32]) -> Result<(), String> {
    let pools = Pools::new(64, 32).unwrap();
    let ring = one_slab(&pools, k, v);
    let head = HeadView { pools: &pools, table: &[], ring: &ring, len: TOKENS, packed: 0 };
    let (device, lens) = (run.upload("ring", &ring), run.upload("lens", &[TOKENS as i32]));
    let packed = run.upload("packed", &[0]);
    let out = run.alloc::<f32>("scores", 48);
    let mut p = params(ffi::KVW_EVICT_LAG);
    p.cache = ffi::kvw_cache {
        ring: device.ptr().cast(),
        lens: lens.ptr(),
        packed: packed.ptr(),
        seqs: 1,
        kv_heads: 1,
        head_dim: 64,
        group: 32,
        ring_slabs: 1,
        table_heads: 1,
        lens_heads: 1,
        ..Default::default()
    };
    (p.scores, p.lag, p.partitions, p.v_weight) = (out.ptr(), 16, 3, 0.75);
    run.call(&op!(kvw_sim_evict), &p)?;
    let reference = Reference::Elements;
    let lag = Lag { first: 0, lag: 16, partitions: 3, v_weight: 0.75, reference };
    close("one slab", &out.download(), &oracle::lag(&head, &lag), 0.0, 1e-4)
}

/// Constant channels, NaN, infinities, the ends of f16.
pub fn hard(run: &Run) -> Result<(), String> {
    let (k, v) = super::cpu::hard();
    of_one_slab(run, &k, &v)
}

/// Scaled channels that lie far from 0 and close together.
pub fn far(run: &Run) -> Result<(), String> {
    let mut noise = Noise(63);
    let mut x = || -> Vec<f32> {
        let at = |t: usize| if (t / 16).is_multiple_of(2) { 8.0 } else { 0.0 };
        (0..TOKENS * 64).map(|i| at(i / 64) + noise.below(4) as f32 / 128.0).collect()
    };
    let (k, v) = (x(), x());
    of_one_slab(run, &k, &v)
}

#[test]
fn guards_hold_in_kernels() {
    for exec in everyone(1) {
        hard(&exec.start()).unwrap();
        far(&exec.start()).unwrap();
    }
}

/// Norms of 130 slots of every head from `first` on, or up to its last.
pub fn norms(run: &Run, spec: &Spec, first: i32) -> Result<(), String> {
    let cache = Cache::new(spec, 9);
    let (device, columns) = (cache.upload(run), 130);
    let rows = spec.lens.len() * spec.heads;
    let lens = spec.lens.len() * if spec.per_head { spec.heads } else { 1 };
    let firsts = run.upload("first", &vec![first; lens]);
    let out = run.upload("scores", &vec![7.0f32; rows * columns]);
    let mut p = params(ffi::KVW_EVICT_NORM);
    (p.cache, p.scores, p.columns) = (device.params(), out.ptr(), columns as i32);
    p.first = if first > 0 { firsts.ptr() } else { std::ptr::null() };
    run.call(&op!(kvw_sim_evict), &p)?;
    let got = out.download();
    for row in 0..rows {
        let head = cache.heads(row / spec.heads)[row % spec.heads];
        let end = head.len.min(first as usize + columns);
        let mut want = oracle::key_norms(&head, first as usize..end);
        want.resize(columns, 7.0);
        close(&format!("norms of {row}"), &got[row * columns..][..columns], &want, 0.0, 2e-6)?;
    }
    Ok(())
}

/// Every format and a hole, ragged heads, lengths that end within slabs.
pub fn mixed(head_dim: usize, group: usize) -> Spec {
    let formats = [Format::F16, Format::Q8, Format::Q4, Format::Q2].map(Some);
    let formats = [&formats[..], &[None], &[Some(Format::Q2)]].concat();
    Spec { head_dim, group, formats, per_head: true, lens: vec![500, 330], ..Spec::default() }
}

pub fn two_level(head_dim: usize) -> Spec {
    let formats = vec![Some(Format::Q2), Some(Format::Q4), Some(Format::F16)];
    Spec { head_dim, formats, meta: Meta::U8, ..Spec::default() }
}

#[test]
fn scores_of_each_shape_and_format() {
    let both = [Reference::Elements, Reference::Metadata];
    for exec in everyone(1) {
        let run = exec.start();
        let whole = exec != Exec::SimtChecked(0); // checked, a shape costs seconds
        for (n, head_dim) in [64, 96, 128, 256].into_iter().enumerate() {
            let reference = both[n % 2];
            for (group, length) in [(32, 64), (64, 80), (128, 128)]
                .into_iter()
                .skip(n % 3)
                .take(if whole { 3 } else { 1 })
            {
                scores(&run, &mixed(head_dim, group), 16, length, reference).unwrap();
            }
            norms(&run, &mixed(head_dim, 32), 70 * (n as i32 % 2)).unwrap();
            norms(&run, &two_level(head_dim), 1).unwrap();
            if whole {
                for of in both {
                    scores(&run, &two_level(head_dim), 3, 96, of).unwrap();
                }
                let fp8 = Spec { head_dim, formats: vec![Some(Format::Fp8)], ..Spec::default() };
                scores(&run, &fp8, 0, 112, reference).unwrap();
            }
        }
        let shared = Spec { shared_rows: true, csr: true, ..Spec::default() };
        scores(&run, &shared, 0, 64, Reference::Metadata).unwrap();
    }
}

#[test]
fn the_longest_partitions() {
    for exec in everyone(0) {
        let spec = Spec { lens: vec![2100], heads: 1, ..mixed(64, 32) };
        scores(&exec.start(), &spec, 16, 1024, Reference::Elements).unwrap();
    }
}
