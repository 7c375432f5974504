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

pub const HEADS: usize = 3;
pub const GROUP: usize = 3;
pub const D: usize = 64;

/// `len` tokens of which all but the newest `n` are in `format`: pools, and a head's table.
pub fn tokens(format: Format, n: usize, len: usize) -> (Pools, Vec<Entry>) {
    let halves: Vec<f16> = noise(TOKENS * D).into_iter().map(f16::from_f32).collect();
    let mut pools = Pools::new(D, 32).expect("supported");
    let mut slab = |i| {
        let format = if i < (len - n) / TOKENS { format } else { Format::F16 };
        let layout = *pools.layout(format);
        let index = pools.pool_mut(format).take().expect("few");
        encode(&layout, &halves, &halves, pools.pool_mut(format).slab_mut(index as usize));
        Entry::new(format, index)
    };
    let table = (0..len / TOKENS).map(&mut slab).collect();
    (pools, table)
}

/// A head that holds them.
pub fn view<'a>((pools, table): &'a (Pools, Vec<Entry>)) -> HeadView<'a> {
    HeadView { pools, table, ring: &[], len: table.len() * TOKENS, packed: table.len() }
}

fn prefill(c: &mut Criterion) {
    let team = team();
    for format in Format::ALL {
        let mut group = c.benchmark_group(format!("cpu/prefill_attn/{format:?}/d64g3"));
        for (n, len) in [(512, 512), (512, 2048), (512, 8000)] {
            let held = tokens(format, n, len);
            let q = noise(n * HEADS * GROUP * D);
            let (mut out, mut scratch) = (vec![0.0; q.len()], Scratch::default());
            let seen = n * (len - n) + n * (n + 1) / 2;
            group.throughput(Throughput::Elements((seen * HEADS * GROUP * D * 2) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{n}of{len}")), |b| {
                b.iter(|| {
                    let (heads, mask) = ([view(&held); HEADS], Mask::default());
                    cpu(&team, &q, n, &heads, 0.0, mask, &mut out, None, &mut scratch)
                        .expect("sizes agree");
                });
            });
        }
        group.finish();
    }
}
