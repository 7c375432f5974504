//! `cpu/prefill_attn/<format>/d64g3/<queries>of<tokens>`: one layer's attention of a chunk, 9 query and 3 kv heads of 64
//! channels, after a history of the format. Elements are multiplications. Threads: `KVW_THREADS`, else the
//! physical cores.

use crate::paged_attn::{noise, team};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::f16;
use kvwarp::pages::{Entry, HeadView, Pools};
use kvwarp::prefill_attn::{Mask, Scratch, cpu};
use kvwarp::slab::{Format, TOKENS, encode};

pub fn run(c: &mut Criterion) {
    prefill(c);
}

const HEADS: usize = 3;
const GROUP: usize = 3;
const D: usize = 64;

fn prefill(c: &mut Criterion) {
    let team = team();
    let halves: Vec<f16> = noise(TOKENS * D).into_iter().map(f16::from_f32).collect();
    for format in Format::ALL {
        let mut group = c.benchmark_group(format!("cpu/prefill_attn/{format:?}/d64g3"));
        for (n, len) in [(512, 512), (512, 2048), (512, 8000)] {
            let mut pools = Pools::new(D, 32).expect("supported");
            let mut slab = |format, fill: &[f16]| {
                let layout = *pools.layout(format);
                let index = pools.pool_mut(format).take().expect("few");
                encode(&layout, fill, fill, pools.pool_mut(format).slab_mut(index as usize));
                Entry::new(format, index)
            };
            let history = (len - n) / TOKENS;
            let table: Vec<Entry> = (0..len / TOKENS)
                .map(|i| slab(if i < history { format } else { Format::F16 }, &halves))
                .collect();
            let view =
                HeadView { pools: &pools, table: &table, ring: &[], len, packed: table.len() };
            let q = noise(n * HEADS * GROUP * D);
            let (mut out, mut scratch) = (vec![0.0; q.len()], Scratch::default());
            let seen = n * (len - n) + n * (n + 1) / 2;
            group.throughput(Throughput::Elements((seen * HEADS * GROUP * D * 2) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{n}of{len}")), |b| {
                b.iter(|| {
                    let (heads, mask) = ([view; HEADS], Mask::default());
                    cpu(&team, &q, n, &heads, 0.0, mask, &mut out, None, &mut scratch)
                        .expect("sizes agree");
                });
            });
        }
        group.finish();
    }
}
