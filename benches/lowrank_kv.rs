//! `cpu/lowrank_kv/<q heads>x<kv heads>c<rank>r<pairs>/<tokens>`: the attention of one token in one layer of EliteKV's
//! cache, SmolLM2-135M at 50 % and at 25 %, Llama-2-7B at 25 %; a slab stands for all of a context's. GB/s over rows.
//! `cpu/head_linear`: the absorption of the last. Threads: `KVW_THREADS`, else the physical cores.

use crate::paged_attn::{noise, team};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::f16;
use kvwarp::head_linear::{self, Weights};
use kvwarp::lowrank_kv::{Scratch, Shape, View, cpu};
use kvwarp::pages::{Entry, Pool};
use kvwarp::slab::{Format, TOKENS};

/// Query heads, kv heads, r, c.
const SHAPES: [(usize, usize, usize, usize); 3] =
    [(9, 3, 8, 144), (9, 3, 4, 128), (32, 32, 4, 1792)];

pub fn run(c: &mut Criterion) {
    attend(c);
    absorb(c);
}

fn attend(c: &mut Criterion) {
    let team = team();
    for (q_heads, kv_heads, pairs, rank) in SHAPES {
        let shape = Shape::new(kv_heads, pairs, rank).expect("supported");
        let name = format!("cpu/lowrank_kv/{q_heads}x{kv_heads}c{rank}r{pairs}");
        let mut group = c.benchmark_group(name);
        for len in [1024, 4096] {
            let mut pool = Pool::of(shape.slab_bytes());
            let row = noise(shape.width());
            let slabs = (0..len / TOKENS).map(|_| {
                let index = pool.take().expect("no limit");
                for token in 0..TOKENS {
                    let slab = pool.slab_mut(index as usize);
                    shape.write(slab, token, &row[..rank], &row[rank..]).expect("sizes agree");
                }
                Entry::new(Format::F16, index)
            });
            let table: Vec<_> = slabs.collect();
            let view = View { shape, pool: &pool, packed: None, table: &table, len };
            let (q, q_elite) = (noise(q_heads * rank), noise(q_heads * 2 * pairs));
            let (mut out, mut scratch) = (vec![0.0; q.len()], Scratch::default());
            group.throughput(Throughput::BytesDecimal((2 * len * shape.width()) as u64));
            group.bench_function(BenchmarkId::from_parameter(len), |b| {
                b.iter(|| {
                    cpu(&team, &q, &q_elite, &view, 0.1, &mut out, &mut scratch)
                        .expect("sizes agree");
                });
            });
        }
        group.finish();
    }
}

fn absorb(c: &mut Criterion) {
    let (team, (heads, rows, cols)) = (team(), (32, 1792, 120));
    let data: Vec<f16> = noise(heads * rows * cols).into_iter().map(f16::from_f32).collect();
    let weights = Weights::new(&data, heads, rows, cols).expect("whole matrices");
    let (x, mut y) = (noise(heads * cols), vec![0.0; heads * rows]);
    let mut group = c.benchmark_group("cpu/head_linear");
    group.throughput(Throughput::BytesDecimal(2 * data.len() as u64));
    group.bench_function(format!("{heads}x{rows}x{cols}"), |b| {
        b.iter(|| head_linear::cpu(&team, &weights, &x, &mut y).expect("sizes agree"));
    });
    group.finish();
}
