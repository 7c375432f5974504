//! `cpu/token_select/<what>/<scores>`: of one row of scores; elements are scores. `pool` sums 3 query heads over windows of
//! 7, `top_k` keeps a tenth, `kth` finds the threshold of as many.

use crate::paged_attn::noise;
use criterion::{BenchmarkId, Criterion, Throughput};
use kvwarp::token_select::{Pool, kth, pool, top_k};
use std::hint::black_box;

pub fn run(c: &mut Criterion) {
    for n in [2048, 8192, 32768, 1 << 20] {
        let scores: Vec<f32> = noise(3 * n).iter().map(|x| (12.0 * x).exp()).collect();
        let (mut out, row) = (vec![0.0; n], &scores[..n]);
        let mut bench = |what: &str, body: &mut dyn FnMut()| {
            let mut group = c.benchmark_group(format!("cpu/token_select/{what}"));
            group.throughput(Throughput::Elements(n as u64));
            group.bench_function(BenchmarkId::from_parameter(n), |b| b.iter(&mut *body));
            group.finish();
        };
        bench("pool_avg", &mut || pool(&scores, 3, Pool::Avg, 7, black_box(&mut out)));
        bench("pool_max", &mut || pool(&scores, 3, Pool::Max, 7, black_box(&mut out)));
        bench("top_k", &mut || drop(black_box(top_k(black_box(row), n / 10))));
        bench("kth", &mut || _ = black_box(kth(black_box(row), n / 10)));
    }
}
