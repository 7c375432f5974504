//! `cpu/sim_evict/<what>/<format>/d<D>/<tokens>`: scores of all tokens of one head, on one thread. Elements are tokens.
//! `cpu/sim_evict/crush/<tokens>`: bits of 8 heads, of which each keeps half, and representatives of a quarter.

use crate::paged_attn::noise;
use criterion::{BenchmarkId, Criterion, Throughput};
use half::f16;
use kvwarp::pages::{Entry, HeadView, Pools};
use kvwarp::sim_evict::{Anchor, bits, key_norms, lag, representatives};
use kvwarp::slab::{Format, TOKENS, encode};
use std::hint::black_box;

const TOKENS_HELD: usize = 8192;
const LAG: usize = 128;

pub fn run(c: &mut Criterion) {
    for (d, format) in [(64, Format::F16), (64, Format::Q2), (128, Format::F16), (128, Format::Q2)]
    {
        scoring(c, d, format);
    }
    crushing(c);
}

/// A head of distinct slabs.
fn head(d: usize, format: Format) -> (Pools, Vec<Entry>) {
    let mut pools = Pools::new(d, 32).expect("supported");
    let layout = *pools.layout(format);
    let halves: Vec<f16> = noise(3 * TOKENS * d).into_iter().map(f16::from_f32).collect();
    let mut slab = |i: usize| {
        let index = pools.pool_mut(format).take().expect("few");
        let (k, v) = (&halves[i % 7 * d..], &halves[i % 5 * 3 * d..]);
        let to = pools.pool_mut(format).slab_mut(index as usize);
        encode(&layout, &k[..TOKENS * d], &v[..TOKENS * d], to);
        Entry::new(format, index)
    };
    let table = (0..TOKENS_HELD / TOKENS).map(&mut slab).collect();
    (pools, table)
}

fn scoring(c: &mut Criterion, d: usize, format: Format) {
    let (pools, table) = head(d, format);
    let packed = table.len();
    let head = HeadView { pools: &pools, table: &table, ring: &[], len: TOKENS_HELD, packed };
    let partitions = TOKENS_HELD / LAG - 1;
    let mut out = vec![0.0; TOKENS_HELD];
    let name = BenchmarkId::from_parameter(TOKENS_HELD);
    let mut group = c.benchmark_group(format!("cpu/sim_evict/lag/{format:?}/d{d}"));
    group.throughput(Throughput::Elements(TOKENS_HELD as u64));
    group.bench_function(name.clone(), |b| {
        let out = &mut out[..partitions * LAG];
        b.iter(|| lag(black_box(&head), 0, LAG, partitions, 1.0, out).expect("sizes agree"));
    });
    group.finish();
    let mut group = c.benchmark_group(format!("cpu/sim_evict/norm/{format:?}/d{d}"));
    group.throughput(Throughput::Elements(TOKENS_HELD as u64));
    group.bench_function(name, |b| {
        b.iter(|| key_norms(black_box(&head), 0..TOKENS_HELD, &mut out).expect("sizes agree"));
    });
    group.finish();
}

fn crushing(c: &mut Criterion) {
    const HEADS: usize = 8;
    let (scores, mut words) = (noise(HEADS * TOKENS_HELD), vec![0; TOKENS_HELD]);
    let candidates: Vec<u32> = (0..TOKENS_HELD as u32).filter(|i| i % 3 > 0).collect();
    let mut group = c.benchmark_group("cpu/sim_evict/crush");
    group.throughput(Throughput::Elements(TOKENS_HELD as u64));
    group.bench_function(BenchmarkId::new("bits", TOKENS_HELD), |b| {
        b.iter(|| bits(black_box(&scores), HEADS, TOKENS_HELD / 2, &mut words));
    });
    group.bench_function(BenchmarkId::new("representatives", TOKENS_HELD), |b| {
        let wanted = candidates.len() / 4;
        b.iter(|| representatives(black_box(&words), HEADS, &candidates, Anchor::Mean, wanted));
    });
    group.finish();
}
