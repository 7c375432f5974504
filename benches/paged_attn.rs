//! `cpu/paged_attn/<format>/d64g3/<tokens>`: the decode attention of one token of a model with 30 layers, 9 query and
//! 3 kv heads of 64 channels. GB/s over the bytes of its slabs. Threads: `KVW_THREADS`, else the physical cores.

use criterion::{BenchmarkId, Criterion, Throughput};
use half::f16;
use kvwarp::paged_attn::{Mask, Scratch, cpu};
use kvwarp::pages::{Entry, HeadView, Pools};
use kvwarp::slab::{Format, TOKENS, encode};
use kvwarp::threads::{Team, physical_cores};

pub fn run(c: &mut Criterion) {
    decode(c);
}

const LAYERS: usize = 30;
const HEADS: usize = 3;
const GROUP: usize = 3;
const D: usize = 64;

pub fn team() -> Team {
    let threads = std::env::var("KVW_THREADS").ok().and_then(|n| n.parse().ok());
    Team::new(threads.unwrap_or_else(physical_cores))
}

/// Noise in [-1, 1).
pub fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn halves(n: usize) -> Vec<f16> {
    noise(n).into_iter().map(f16::from_f32).collect()
}

fn decode(c: &mut Criterion) {
    let team = team();
    let q = noise(HEADS * GROUP * D);
    for format in Format::ALL {
        let mut group = c.benchmark_group(format!("cpu/paged_attn/{format:?}/d64g3"));
        for len in [128, 1024, 4096, 8000] {
            let mut pools = Pools::new(D, 32).expect("supported");
            let layout = *pools.layout(format);
            let mut slab = vec![0; layout.slab_bytes()];
            encode(&layout, &halves(TOKENS * D), &halves(TOKENS * D), &mut slab);
            let mut entry = || {
                let index = pools.pool_mut(format).take().expect("few");
                pools.pool_mut(format).slab_mut(index as usize).copy_from_slice(&slab);
                Entry::new(format, index)
            };
            let slabs = len / TOKENS;
            let tables: Vec<Entry> = (0..LAYERS * HEADS * slabs).map(|_| entry()).collect();
            let views: Vec<_> = tables
                .chunks_exact(slabs)
                .map(|table| HeadView { pools: &pools, table, ring: &[], len, packed: slabs })
                .collect();
            let (mut out, mut scratch) = (vec![0.0; q.len()], Scratch::default());
            group.throughput(Throughput::BytesDecimal((tables.len() * slab.len()) as u64));
            group.bench_function(BenchmarkId::from_parameter(len), |b| {
                b.iter(|| {
                    for heads in views.chunks_exact(HEADS) {
                        cpu(&team, &q, heads, 0.0, Mask::default(), &mut out, &mut scratch)
                            .expect("sizes agree");
                    }
                });
            });
        }
        group.finish();
    }
}
